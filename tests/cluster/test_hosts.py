"""Nodes with addresses of their own: ranks that must reach one another over a network, not the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cli import main
from tests.cluster import hosts as namespaces
from tests.cluster.conftest import ROOT, in_cluster, tasks_in
from tests.cluster.hosts import Hosts, several_hosts
from tests.cluster.sandbox import Sandbox

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TELL = """
import json, sys
from harness.distributed.heartbeat import interface_towards
print(json.dumps([interface_towards(head, several_machines=True) for head in sys.argv[1:]]))
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, several_hosts(Path(folder), 2) as found:
        yield found


def test_the_interface_that_others_are_reached_by(hosts: Hosts) -> None:
    def tell(number: int, *heads: str) -> list[str | None]:
        command = [*hosts.inside(number), sys.executable, "-c", TELL, *heads]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    assert tell(1, hosts.address(1), hosts.address(2), "node2", "localhost", "nowhere") == ["eth0"] * 3 + ["lo", None]
    assert tell(2, hosts.address(1), "node1") == ["eth0", "eth0"]
    # The head by its name, which is 127.0.1.1 to itself: the interface of the default route, where there is one.
    assert tell(1, "node1") == ["lo"]
    subprocess.run(
        ["ip", "-n", f"{hosts.prefix}n1", "route", "add", "default", "via", hosts.address(0)], check=True, timeout=30
    )
    assert tell(1, "node1") == ["eth0"]


def test_a_job_trains_over_the_network(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = [hosts.address(number) for number in range(3)]
    with Sandbox(hosts.folder, addresses=addresses, inside=hosts.inside) as cluster:
        in_cluster(cluster, tmp_path, monkeypatch)
        assert main(["submit", "digits.yaml", "training.steps=2", "--nodes", "2"]) == 0
        (task,) = tasks_in(capsys.readouterr().out, cluster)
        task.finish()
        assert task.result()["world_size"] == 2
