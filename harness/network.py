"""Which network interface ranks on CPUs reach one another by.

gloo takes the interface that the machine's own name resolves to. On many machines that is the loopback interface (in
Debian 127.0.1.1), by which other machines cannot be reached.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping

import psutil

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
# Of the range for documentation (RFC 5737): no machine has it, so the way there is the way out of this machine.
ELSEWHERE = "192.0.2.1"


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `$GLOO_SOCKET_IFNAME` to the interface on the way to `$MASTER_ADDR`, before the ranks join.

    Nothing is changed where it is set already, where there are no ranks to reach, or where the way is not known.
    """
    head = environment.get("MASTER_ADDR")
    ranks = int(environment.get("WORLD_SIZE") or 1)
    if not head or ranks == 1 or environment.get(GLOO_VARIABLE):
        return
    here = int(environment.get("LOCAL_WORLD_SIZE") or ranks)
    name = interface_towards(head, several_machines=ranks > here)
    if name is not None:
        environment[GLOO_VARIABLE] = name


def interface_towards(head: str, *, several_machines: bool) -> str | None:
    """The name of the interface that packets to `head`, a name or an address, leave by; None where it is not known.

    A head that is known by name and resolves to loopback is this very machine under its own name; where there are
    several machines, the others reach it by the interface of the default route.
    """
    address = _own_address_towards(head)
    if several_machines and _is_loopback(address) and not is_loopback_host(head):
        address = _own_address_towards(ELSEWHERE) or address
    if address is None:
        return None
    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(entry.address.partition("%")[0] == address for entry in addresses)
        ),
        "lo" if _is_loopback(address) else None,  # such as 127.0.1.1, which no interface lists
    )


def _own_address_towards(head: str) -> str | None:
    """The address that this machine would send from; connecting a UDP socket sends nothing."""
    try:
        found = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def is_loopback_host(host: str) -> bool:
    """Whether a name or address means this machine's loopback by itself, without asking anyone."""
    return host == "localhost" or _is_loopback(host)


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
