"""`harness scale`: predictions against values worked out by hand, against torch, and what must hold for any numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import scaling
from harness.cli import main
from harness.errors import HarnessError
from harness.recipe import load
from harness.scaling import NETWORKS, Link, Network, Workload, all_reduce_seconds, predict, ring_seconds

LINK = Link(alpha_us=10e6, gbps=8e-9)  # round numbers: 10 s a message, 1 s a byte
# Two ranks that reach each other by a ring: α = 1 s, hardly a cost of bytes, so that an all-reduce takes 2 s.
TWO_SECONDS = Network("two seconds", Link(1e6, 1e12), "", all_reduce=ring_seconds)
LINKS = st.builds(Link, st.floats(0, 1e4), st.floats(1e-3, 1e6))
WORKLOADS = st.builds(
    Workload,
    global_batch_size=st.sampled_from([64, 512, 4096]),
    gradient_accumulation_steps=st.sampled_from([1, 2, 4]),
    fixed_seconds=st.floats(0, 1),
    seconds_per_image=st.floats(1e-7, 1),
    bucket_bytes=st.lists(st.integers(1, 2**28), max_size=8),
    sync_batch_norm_bytes=st.lists(st.integers(8, 2**16), max_size=40),
)


@pytest.mark.parametrize(
    ("ranks", "size", "seconds"),
    [
        (2, 8, 10 + 8),  # doubling; a ring takes 2·(10 + 4)
        (4, 8, 2 * (10 + 8)),  # doubling; ring 72, halving-doubling 52
        (8, 8, 3 * (10 + 8)),  # doubling; halving-doubling 60 + 14
        (5, 8, 2 * (10 + 8) + 2 * (10 + 8)),  # four exchange, the fifth hands in and gets back
        (4, 1_000_000, 4 * 10 + 2 * 3 / 4 * 1_000_000),  # halving-doubling moves the fewest bytes
        (5, 1_000_000, 8 * (10 + 200_000)),  # doubling pays twice for the fifth: a ring
        (1, 8, 0),
    ],
)
def test_costs_worked_out_by_hand(ranks: int, size: float, seconds: float) -> None:
    assert all_reduce_seconds(ranks, size, LINK) == pytest.approx(seconds)


def test_nodes_worked_out_by_hand() -> None:
    """2 nodes of 4: a ring of 4 within, then 2 nodes exchange a fourth of the bytes by doubling."""
    intra = Link(alpha_us=1e6, gbps=16e-9)
    within, nodes = 6 * (1 + 0.5 * 8 / 4), Network("x", LINK, "", intra, 4)
    assert nodes.all_reduce_seconds(8, 8) == pytest.approx(within + 10 + 8 / 4)
    shared = Network("x", LINK, "", intra, 4, adapter_per_gpu=False)  # its bandwidth, not its latency
    assert shared.all_reduce_seconds(8, 8) == pytest.approx(within + 10 + 8)
    assert nodes.all_reduce_seconds(4, 8) == all_reduce_seconds(4, 8, intra)
    # 6 GPUs: two nodes of 3, for 4 does not divide them.
    assert nodes.all_reduce_seconds(6, 9) == pytest.approx(4 * (1 + 0.5 * 3) + 10 + 3)


@settings(deadline=None)  # other programs may keep it waiting
@given(st.integers(1, 5000), st.just(0.0) | st.floats(1, 1e10), LINKS, st.floats(1, 10))
def test_times_are_finite_and_never_below_what_the_bytes_need(
    ranks: int, size: float, link: Link, factor: float
) -> None:
    least = 2 * (ranks - 1) / ranks * size * 8e-9 / link.gbps  # Patarasuk & Yuan 2009
    found = all_reduce_seconds(ranks, size, link)
    assert least * (1 - 1e-9) <= found <= ring_seconds(ranks, size, link) < math.inf
    assert found <= all_reduce_seconds(ranks, size * factor, link) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("buckets", "backward_seconds", "seconds"),
    [
        ([7, 7, 7, 7], 40, 5),  # full after 10, 20, 30 and 40 s, each exchanged within 5 s: only the last is left over
        ([7, 7, 7, 7], 8, 2 + 20 - 8),  # full after 2, 4, 6, 8 s: the exchange ends 2 + 4·5 s after the start
        ([28], 8, 5),  # one bucket hides nothing
        ([9, 1], 40, 41 + 5 - 40),  # a small last one: full at 36 and 40 s, with the first done at 41
        ([], 8, 0),
    ],
)
def test_what_the_backward_pass_hides(buckets: list[int], backward_seconds: float, seconds: float) -> None:
    assert scaling.exposed_seconds(buckets, backward_seconds, lambda size_bytes: 5.0) == pytest.approx(seconds)


def test_a_step_worked_out_by_hand() -> None:
    work = Workload(8, 2, bucket_bytes=(1, 1), sync_batch_norm_bytes=(8, 8, 8), fixed_seconds=1, seconds_per_image=3)
    strong = predict(work, TWO_SECONDS, 2, mode="strong")
    wanted = {
        "gpus": 2,
        "images_per_gpu": 4,
        "step_ms": 28e3,
        "compute_ms": 2 * (1 + 3 * 2) * 1e3,  # two micro-batches of two images
        "sync_batch_norm_ms": 2 * 3 * 2 * 1e3,  # in both
        "exchange_ms": 2e3,  # of the last bucket; the first is exchanged within the last 14/3 s of a backward pass
        "exchange_total_ms": 4e3,
        "images_per_second": 8 / 28,
        "efficiency": (8 / 28) / (2 * 8 / 26),
    }
    assert strong == pytest.approx(wanted)
    weak = predict(work, TWO_SECONDS, 2, mode="weak")
    assert (weak["images_per_gpu"], weak["step_ms"]) == (8, pytest.approx((26 + 12 + 2) * 1e3))
    assert weak["efficiency"] == pytest.approx(26 / 40)


def test_what_cannot_be_is_a_row_with_its_reason() -> None:
    work = Workload(100, 1, (4,), seconds_per_image=1.0)
    rows = [
        predict(work, TWO_SECONDS, gpus, mode=mode) for gpus, mode in ((8, "strong"), (128, "strong"), (128, "weak"))
    ]
    why = "a micro-batch of 100 images does not divide among {} GPUs"
    assert [row.get("impossible") for row in rows] == [why.format(8), why.format(128), None]
    large = predict(work, NETWORKS["nvlink4"], 1024, mode="weak")
    assert large == {"gpus": 1024, "impossible": "nvlink4 joins at most 256 GPUs"}


@settings(deadline=None)
@given(work=WORKLOADS, name=st.sampled_from(sorted(NETWORKS)), mode=st.sampled_from(["strong", "weak"]),
       gpus=st.integers(1, 2048) | st.sampled_from([2, 4, 8, 16]))  # fmt: skip
def test_no_prediction_is_too_good_to_be_true(work: Workload, name: str, mode: str, gpus: int) -> None:
    one, found = (predict(work, NETWORKS[name], n, mode=mode) for n in (1, gpus))
    assert one["exchange_total_ms"] == one["sync_batch_norm_ms"] == 0
    assert one["efficiency"] == pytest.approx(1)
    if "impossible" in found:
        return
    assert min(found["exchange_ms"], found["sync_batch_norm_ms"]) >= 0
    assert found["exchange_ms"] <= found["exchange_total_ms"] * (1 + 1e-9) + 1e-9
    assert found["step_ms"] >= found["compute_ms"] > 0
    assert found["images_per_second"] <= gpus * one["images_per_second"] * (1 + 1e-9)  # before the cut at 1
    assert 0 < found["efficiency"] <= 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_buckets_are_those_of_torch(sizes: list[int]) -> None:
    """By torch's own function, with limits small enough for these tensors."""
    first, cap = 256, 1024
    parameters = [torch.empty(size) for size in reversed(sizes)]
    indices, _ = dist._compute_bucket_assignment_by_size(parameters, [first, cap])
    theirs = [sum(parameters[i].numel() * 4 for i in bucket) for bucket in indices]
    assert sorted(scaling.gradient_buckets([4 * size for size in sizes], first=first, cap=cap)) == sorted(theirs)


def test_the_seeds_network() -> None:
    work = scaling.workload_of(load("seed"))
    assert (sum(work.bucket_bytes), len(work.bucket_bytes)) == (4 * 380_646, 2)
    assert len(work.sync_batch_norm_bytes) == 2 * 18
    assert work.sync_batch_norm_bytes[:2] == [(2 * 32 + 1) * 8, 2 * 32 * 8]
    halves = scaling.workload_of(
        load("seed", ["training.sync_batch_norm=false", "training.gradient_accumulation_steps=2"])
    )
    assert (halves.sync_batch_norm_bytes, halves.micro_batch_size) == ((), 64)


def test_two_times_give_a_fixed_part() -> None:
    assert scaling.affine((16, 0.5), (64, 1.1)) == pytest.approx(0.3)
    assert scaling.affine((16, 0.1), (64, 1.1)) == 0.0  # steeper than through the origin: nothing is fixed
    assert scaling.affine((16, 1.2), (64, 1.1)) == 1.1  # falling, by noise: all is fixed


def test_networks_by_name_and_by_figures() -> None:
    assert (NETWORKS["infiniband-ndr"].inter.gbps, NETWORKS["nvlink4"].inter.gbps) == (400, 450 * 8)
    own = scaling.parse_network("gbps=100,alpha_us=5,intra=nvlink4", gpus_per_node=4)
    assert (own.inter, own.gpus_per_node, own.intra) == (Link(5, 100), 4, NETWORKS["nvlink4"].inter)
    assert scaling.parse_network("infiniband-ndr", gpus_per_node=1).intra is None


@pytest.mark.parametrize(
    ("text", "gpus_per_node", "what", "hint"),
    [
        ("infiniband-nrd", None, "--network: unknown network", 'Did you mean "infiniband-ndr"?'),
        ("alfa_us=1,gbps=3", None, 'unknown key "alfa_us"', 'Did you mean "alpha_us"?'),
        *((text, None, "needs alpha_us, a number from 0 to 1e9, and gbps, one from 1e-6", "alpha_us=5,gbps=100")
          for text in ("alpha_us=1,gbps=3,alpha_us=2", "gbps=3", "alpha_us=-1,gbps=3", "alpha_us=1,gbps=nan",
                       "alpha_us=x,gbps=3")),
        ("alpha_us=1,gbps=3,intra=nvlink", None, 'unknown network "nvlink"', 'Did you mean "nvlink4"?'),
        ("nvlink4", 4, "no link of its own within a node", "intra=nvlink4"),
    ],
)  # fmt: skip
def test_mistakes_in_networks(text: str, gpus_per_node: int | None, what: str, hint: str) -> None:
    with pytest.raises(HarnessError) as caught:
        scaling.parse_network(text, gpus_per_node=gpus_per_node)
    assert what in str(caught.value)
    assert hint in str(caught.value.hint)


def test_scale_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "seed", "--step-ms", "20", "--gpus", "8,1,64,1024", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for rows in (result["strong"], result["weak"]):
        assert [row["gpus"] for row in rows] == [1, 8, 64, 1024]
        assert (rows[0]["step_ms"], rows[0]["images_per_second"]) == pytest.approx((20, 6400))
    efficiencies = [row["efficiency"] for row in result["weak"]]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert (result["network"]["gpus_per_node"], result["recipe"]["gradient_bytes"]) == (8, 4 * 380_646)


def test_the_table_ends_with_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["training.sync_batch_norm=false", "--step-ms", "20", "--network", "alpha_us=5,gbps=9"]
    assert main(["scale", "seed", *options]) == 0
    table, _, assumptions = capsys.readouterr().out.partition("\nAssumptions\n")
    assert "efficiency" in table
    assert "1,024  – a micro-batch of 128 images does not divide among 1024 GPUs" in table
    for word in ("alpha 5 us, 9 Gbit/s", "Overlap", "Thakur", "20.0 ms a step", "as given"):
        assert word in assumptions
    assert "SyncBatchNorm" not in assumptions


def test_a_recipe_is_measured_where_no_time_is_given(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "MEASURE_SECONDS", 0.0)  # no more steps than the least
    assert main(["scale", str(tiny), "--gpus", "1,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    compute = result["compute"]
    assert compute["step_ms"] == pytest.approx(compute["fixed_ms_per_pass"] + 16 * compute["ms_per_image"])
    assert "at 16 images a pass and at 4" in compute["how"]
    assert [row["images_per_gpu"] for row in result["strong"]] == [16, 8]
    assert compute["measured_on"] == ("cuda" if torch.cuda.is_available() else "cpu")
    warned = "measured on a CPU and is no GPU's" in scaling.render(result)
    assert warned is not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--network infiniband-nrd", 'HINT: Did you mean "infiniband-ndr"?'),
        ("--gpus 1,x", '--gpus: must be a whole number from 1 to 1000000, not "x"'),
        ("--step-ms -3", "--step-ms: must be more than 0"),
        ("--step-ms nan", "--step-ms: must be more than 0"),
        pytest.param("training.precision=fp16", "training.precision: fp16 needs a GPU",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")),
    ],
)  # fmt: skip
def test_mistakes_are_explained(options: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "seed", *options.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error
