"""Which interface gloo is told to use. Between hosts with addresses of their own: tests/cluster/test_hosts.py."""

from __future__ import annotations

import pytest

from harness.network import choose_interface, interface_towards

RANKS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "mine", **RANKS},
        {"MASTER_ADDR": "no.such.host.invalid", **RANKS},
    ],
)
def test_nothing_changes_where_there_is_nothing_to_choose(environment: dict[str, str]) -> None:
    before = dict(environment)
    choose_interface(environment)
    assert environment == before


@pytest.mark.parametrize("head", ["127.0.0.1", "localhost", "127.0.1.1"])
def test_ranks_of_one_machine_stay_on_it(head: str) -> None:
    environment = {"MASTER_ADDR": head, **RANKS}
    choose_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_head_on_the_loopback_interface_is_taken_at_its_word() -> None:
    """As in a cluster whose nodes are all on one machine."""
    assert interface_towards("127.0.0.1", several_machines=True) == "lo"
