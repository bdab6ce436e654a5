"""Free ports that stay free until they are used."""

from __future__ import annotations

import random
import socket
from pathlib import Path

DEFAULT_EPHEMERAL_START = 32768


def free_port(seed: str | None = None) -> int:
    """A free TCP port below the range that outgoing connections take theirs from.

    A port of that range can be lost to something else before rank 0 listens, and the ranks would wait in vain.

    Args:
        seed: where the search begins; jobs with seeds of their own begin apart, and so do not race for one port. None
            begins anywhere and asks for a port of the loopback interface alone.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = DEFAULT_EPHEMERAL_START
    ports = list(range(max(1024, end // 2), end)) or [0]
    for port in random.Random(seed).sample(ports, min(len(ports), 200)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1" if seed is None else "", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return 0
