"""Networks by name and by figures, and mistakes in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.scaling.collectives import all_reduce_seconds, hierarchical_seconds
from harness.scaling.networks import NETWORKS, parse_network


def test_named_networks_say_where_their_figures_are_from() -> None:
    assert {"nvlink4", "infiniband-ndr", "infiniband-hdr", "ethernet-100g", "ethernet-25g"} <= set(NETWORKS)
    for name, network in NETWORKS.items():
        assert network.name == name
        assert network.source
        assert name in network.describe()
    assert NETWORKS["infiniband-ndr"].inter.gbps == pytest.approx(400)
    assert NETWORKS["nvlink4"].inter.gbps == pytest.approx(450 * 8)


def test_a_network_of_ones_own() -> None:
    network = parse_network("alpha_us=5,gbps=100")
    assert (network.inter.alpha_us, network.inter.gbps) == (pytest.approx(5), pytest.approx(100))
    assert network.intra is None
    assert network.all_reduce_seconds(16, 1000) == all_reduce_seconds(16, 1000, network.inter)
    nodes = parse_network("gbps=100,alpha_us=5,intra=nvlink4", gpus_per_node=4)
    assert (nodes.ranks_per_node, nodes.intra) == (4, NETWORKS["nvlink4"].inter)


def test_nodes_are_filled() -> None:
    ndr = parse_network("infiniband-ndr")
    assert ndr.intra is not None
    inside = all_reduce_seconds(8, 1e6, ndr.intra)
    assert ndr.all_reduce_seconds(8, 1e6) == inside
    assert ndr.all_reduce_seconds(4, 1e6) == all_reduce_seconds(4, 1e6, ndr.intra)
    across = hierarchical_seconds(2, 8, 1e6, intra=ndr.intra, inter=ndr.inter)
    assert ndr.all_reduce_seconds(16, 1e6) == across
    # 12 GPUs: two nodes of 6, for 8 does not divide them.
    assert ndr.all_reduce_seconds(12, 1e6) == hierarchical_seconds(2, 6, 1e6, intra=ndr.intra, inter=ndr.inter)
    alone = parse_network("infiniband-ndr", gpus_per_node=1)
    assert alone.all_reduce_seconds(8, 1e6) == all_reduce_seconds(8, 1e6, ndr.inter)


@given(name=st.sampled_from(sorted(NETWORKS)), ranks=st.integers(1, 4096), size=st.integers(0, 2**32))
def test_any_network_gives_times_that_make_sense(name: str, ranks: int, size: int) -> None:
    seconds = NETWORKS[name].all_reduce_seconds(ranks, size)
    assert seconds == 0 if ranks == 1 else seconds > 0


@pytest.mark.parametrize(
    ("text", "gpus_per_node", "what", "hint"),
    [
        ("infiniband-nrd", None, "--network: unknown network", 'Did you mean "infiniband-ndr"?'),
        ("alfa_us=1,gbps=3", None, 'unknown key "alfa_us"', 'Did you mean "alpha_us"?'),
        ("alpha_us=1,gbps=3,alpha_us=2", None, "alpha_us is given twice", "Leave one of them out"),
        ("gbps=3", None, "alpha_us is missing", "alpha_us=5,gbps=100"),
        ("alpha_us=1", None, "gbps is missing", "alpha_us=5,gbps=100"),
        ("alpha_us=-1,gbps=3", None, "alpha_us must be a number from 0", "latency"),
        ("alpha_us=1,gbps=0", None, "gbps must be a number from 1e-06", "bandwidth"),
        ("alpha_us=1,gbps=nan", None, "gbps must be a number", "bandwidth"),
        ("alpha_us=1,gbps=1e-320", None, "gbps must be a number", "bandwidth"),
        ("alpha_us=1,gbps=3,intra=nvlink", None, 'unknown network "nvlink"', 'Did you mean "nvlink4"?'),
        ("nvlink4", 4, "no link of its own within a node", "intra=nvlink4"),
    ],
)
def test_mistakes_are_explained(text: str, gpus_per_node: int | None, what: str, hint: str) -> None:
    with pytest.raises(HarnessError) as caught:
        parse_network(text, gpus_per_node=gpus_per_node)
    assert what in str(caught.value)
    assert hint in str(caught.value.hint)
    assert caught.value.exit_code == 2
