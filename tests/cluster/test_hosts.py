"""Nodes with addresses of their own: ranks that must reach one another over a network, not the loopback interface.

The hosts are network namespaces with addresses, names and `/etc/hosts` of their own; they need root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.conftest import submitting
from tests.cluster.sandbox import Sandbox
from tests.conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.long]
NETWORK = f"198.18.{os.getpid() % 254 + 1}"  # of the range for tests of networks (RFC 2544)
ADDRESSES = [f"{NETWORK}.{number + 1}" for number in range(3)]  # of this machine, named controller, and of two nodes
PREFIX = f"h{os.getpid() % 100_000}"
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
INTERFACES = """
import json, sys
from harness.distributed.heartbeat import interface_towards
print(json.dumps([interface_towards(head, several_machines=True) for head in sys.argv[1:]]))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[Path]:
    """The folder of hosts 1 and 2, which reach one another over a bridge."""
    missing = [tool for tool in ("ip", "nsenter", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root for network namespaces, and {', '.join(missing) or 'no more tools'}")
    if subprocess.run(["ip", "netns", "add", f"{PREFIX}try"], capture_output=True).returncode != 0:
        pytest.skip("network namespaces are not allowed here")
    ip("netns", "del", f"{PREFIX}try")
    bridge = f"{PREFIX}b"
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, ExitStack() as undo:
        ip("link", "add", bridge, "type", "bridge")
        undo.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{ADDRESSES[0]}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number in (1, 2):
            space, cable = f"{PREFIX}n{number}", f"{PREFIX}v{number}"
            ip("netns", "add", space)
            undo.callback(ip, "netns", "del", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{ADDRESSES[number]}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
        for number in (0, 1, 2):
            # As Debian does it: a host's own name is 127.0.1.1 to itself, where no other host can reach it.
            own = f"127.0.1.1 node{number}" if number else f"{ADDRESSES[0]} controller"
            others = [f"{ADDRESSES[n]} node{n}" for n in (1, 2) if n != number]
            Path(folder, f"hosts{number}").write_text("\n".join(["127.0.0.1 localhost", own, *others, ""]))
        yield Path(folder)


def inside(folder: Path, number: int) -> list[str]:
    """The words before a command that run it on a host (`ip netns exec` would hide the cgroups)."""
    name = f"node{number}" if number else "controller"
    enter = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", name, str(folder / f"hosts{number}")]
    return [*(["nsenter", f"--net=/run/netns/{PREFIX}n{number}"] if number else []), *enter]


def test_the_interface_that_others_are_reached_by(hosts: Path) -> None:
    def towards(number: int, *heads: str) -> list[str | None]:
        command = [*inside(hosts, number), sys.executable, "-c", INTERFACES, *heads]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    assert towards(1, *ADDRESSES[1:], "node2", "localhost", "nowhere") == ["eth0"] * 3 + ["lo", None]
    assert towards(2, ADDRESSES[1], "node1") == ["eth0", "eth0"]
    # The head by its name, which is 127.0.1.1 to itself: the interface of the default route, where there is one.
    assert towards(1, "node1") == ["lo"]
    ip("-n", f"{PREFIX}n1", "route", "add", "default", "via", ADDRESSES[0])
    assert towards(1, "node1") == ["eth0"]


def test_a_job_trains_over_the_network(hosts: Path, tmp_path: Path) -> None:
    with (
        Sandbox(hosts, addresses=ADDRESSES, inside=lambda number: inside(hosts, number)) as cluster,
        submitting(cluster, tmp_path) as submit,
    ):
        (task,) = submit("submit", "digits.yaml", "training.steps=2", "--nodes", "2")
        task.finish()
        assert task.result()["world_size"] == 2
