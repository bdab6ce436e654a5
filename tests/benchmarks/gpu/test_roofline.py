"""The roofline's counting rule, against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness.benchmarks.gpu.roofline import (
    PARAMETER_BYTES_A_STEP,
    copy_bandwidth,
    fused_elements,
    images_per_second_limit,
    layerwise_elements,
    timed,
    trace,
)
from harness.errors import HarnessError
from harness.models.build import build_model
from harness.models.inspect import summarise

CPU = torch.device("cpu")
X, Y, P, LOGITS = 3 * 64, 5 * 64, 5, 7  # images 3×8×8; 5 channels at 8×8; pooled; classes


def plain(*, batch_norm: bool) -> nn.Sequential:
    middle = [nn.BatchNorm2d(5)] if batch_norm else []
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), *middle, nn.ReLU(), nn.Dropout(0.5), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(P, LOGITS)
    )


CONV = (X + Y) + (Y + X)  # forward; gradient of the output and the input for that of the weights, none for images
POOL = (Y + P) + (P + Y)
LINEAR = (P + LOGITS) + (LOGITS + P + P)


def count(model: nn.Module) -> tuple[int, int]:
    traced = trace(model, (3, 8, 8))
    return fused_elements(traced), layerwise_elements(traced)


def test_a_chain_of_layers() -> None:
    relu = dropout = (Y + Y) + (Y + Y + Y)
    rest = CONV + POOL + LINEAR
    fused, layerwise = count(plain(batch_norm=False))
    assert layerwise == rest + relu + dropout
    assert fused == rest + relu


def test_batch_norm_goes_twice_over_its_input() -> None:
    fused, layerwise = count(plain(batch_norm=True))
    fused_without, layerwise_without = count(plain(batch_norm=False))
    assert layerwise - layerwise_without == (Y + Y + Y) + (2 * (Y + Y) + Y)
    assert fused - fused_without == Y + (Y + Y)


class Branches(nn.Module):
    """A stem, two branches of a convolution and ReLU that are added, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = (nn.Conv2d(c, 5, 1) for c in (3, 5, 5))
        self.act_one, self.act_other = nn.ReLU(), nn.ReLU()
        self.head = nn.Conv2d(5, LOGITS, 8)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.stem(x_BCHW)
        return self.head(self.act_one(self.one(x)) + self.act_other(self.other(x)))


def test_branches_that_part_and_meet() -> None:
    fused, layerwise = count(Branches())
    inner = (Y + Y) + (Y + Y + Y)
    head = (Y + LOGITS) + (LOGITS + Y + Y)
    merge, split = 3 * Y, 3 * Y  # two read and one written: the sum, and the sum of the gradients
    assert layerwise == CONV + 2 * inner + 2 * inner + merge + head + split
    # Both ReLUs and the sum are one pass: two read, one written; then gradient and both inputs read, two written.
    together = (Y + Y + Y) + (Y + Y + Y + Y + Y)
    assert fused == CONV + 2 * inner + together + head + Y


def test_the_seeds_network() -> None:
    model = build_model("dual_branch_seed", num_classes=10, image_size_px=32, args={})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traced = trace(model, (3, 32, 32))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # The seed's 115 rows without those of its 18 DepthwiseConv2d, which only hold other layers.
    rows = [row for row in summarise(model).rows if row.type != "DepthwiseConv2d"]
    assert len(traced.passes) == len(rows) == 97
    outputs = [abs(torch.Size(row.output_shape).numel()) for row in rows]
    assert [each.elements_out for each in traced.passes] == outputs
    assert traced.parameters == 380_646
    assert traced.merged_elements == (128 * 32 * 32, 256 * 16 * 16, 256 * 8 * 8)
    assert traced.split_elements == (32 * 16 * 16, 64 * 8 * 8)
    assert sum(each.first for each in traced.passes) == 2
    assert fused_elements(traced) < 0.6 * layerwise_elements(traced)


def test_dropout_of_nothing_and_views_are_no_passes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.0), nn.Identity(), nn.ReLU(), nn.Flatten())
    assert [each.kind for each in trace(model, (3, 8, 8)).passes] == ["conv", "elementwise"]


def test_the_limit_is_bandwidth_over_bytes() -> None:
    limit = images_per_second_limit(
        1_000_000, parameters=4_000, batch_size=8, element_bytes=2, bytes_per_second=4.032e9
    )
    assert limit == pytest.approx(4.032e9 / (2_000_000 + 4_000 * PARAMETER_BYTES_A_STEP / 8))


def test_images_that_do_not_fit() -> None:
    with pytest.raises(HarnessError, match=r"cannot take an image of \(3, 4, 4\)"):
        trace(plain(batch_norm=True), (3, 4, 4))


def test_bandwidth_and_clock() -> None:
    assert copy_bandwidth(CPU, copied_bytes=1 << 20, repeats=3) > 1e8
    calls: list[int] = []
    seconds = timed(lambda: calls.append(1), CPU, repeats=4, warmup=2)
    assert (len(seconds), len(calls)) == (4, 6)
    assert all(each >= 0 for each in seconds)


@pytest.mark.gpu
def test_the_bandwidth_of_a_gpu_is_more_than_a_cpus() -> None:
    assert copy_bandwidth(torch.device("cuda"), copied_bytes=1 << 28) > 1e11
