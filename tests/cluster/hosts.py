"""Several hosts on one machine: network namespaces with addresses, names and `/etc/hosts` of their own. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NETWORK = f"198.18.{os.getpid() % 254 + 1}"  # of the range for tests of networks (RFC 2544)
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    tools = [tool for tool in ("ip", "nsenter", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}"
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Hosts:
    """Host 0 is this machine under the name of `controller`; hosts 1, 2, … have a network of their own."""

    folder: Path
    count: int
    prefix: str

    def address(self, number: int) -> str:
        return f"{NETWORK}.{number + 1}"

    def inside(self, number: int) -> list[str]:
        """The words before a command that run it on a host (`ip netns exec` would hide the cgroups)."""
        name = f"node{number}" if number else "controller"
        enter = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", name, str(self.folder / f"hosts{number}")]
        return [*(["nsenter", f"--net=/run/netns/{self.prefix}n{number}"] if number else []), *enter]

    def write_hosts(self) -> None:
        """As Debian does it: a host's own name is 127.0.1.1 to itself, where no other host can reach it."""
        for number in range(self.count + 1):
            names = [f"{self.address(n)} node{n}" for n in range(1, self.count + 1) if n != number]
            own = f"127.0.1.1 node{number}" if number else f"{self.address(0)} controller"
            text = "\n".join(["127.0.0.1 localhost", own, *names])
            (self.folder / f"hosts{number}").write_text(text + "\n")


@contextmanager
def several_hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """Hosts that reach one another over a bridge; they are gone behind the block."""
    hosts = Hosts(folder, count, f"h{os.getpid() % 100_000}")
    bridge = f"{hosts.prefix}b"
    hosts.write_hosts()

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)

    with ExitStack() as undo:
        ip("link", "add", bridge, "type", "bridge")
        undo.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{hosts.address(0)}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            space, cable = f"{hosts.prefix}n{number}", f"{hosts.prefix}v{number}"
            ip("netns", "add", space)
            undo.callback(ip, "netns", "del", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{hosts.address(number)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
        yield hosts
