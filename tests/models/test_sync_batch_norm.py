"""Batch normalisation over 2 and 3 real ranks equals one process with all the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from harness.errors import HarnessError
from harness.models.safe_conv import adopt_path
from harness.models.sync_batch_norm import CpuSyncBatchNorm2d, CpuSyncBatchNormAct2d, convert_sync_batch_norm
from tests.conftest import ROOT, RunRanks
from tests.models.sync_bn_worker import CASES, IMAGES, network, network_gradients, train

Results = list[dict[str, np.ndarray]]
_RESULTS: dict[int, Results] = {}


@pytest.fixture(params=[2, 3])
def results(request: pytest.FixtureRequest, run_ranks: RunRanks, tmp_path: Path) -> Results:
    """What each rank found; the ranks run once for each number of them."""
    ranks = request.param
    if ranks not in _RESULTS:
        worker = Path(__file__).with_name("sync_bn_worker.py")
        process = run_ranks(ranks, worker, tmp_path, env={"PYTHONPATH": str(ROOT)})
        assert process.returncode == 0, process.stdout + process.stderr
        _RESULTS[ranks] = [dict(np.load(tmp_path / f"rank_{rank}.npz")) for rank in range(ranks)]
    return _RESULTS[ranks]


def joined(results: Results, name: str, what: str) -> np.ndarray:
    """What one process would have: images one after another, the ranks' shares of parameter gradients added."""
    values = [result[f"{name}/{what}"] for result in results]
    if what.endswith(("output", "input gradient", "evaluation")):
        return np.concatenate(values)
    if what.endswith("gradient"):
        return np.sum(values, axis=0)
    for value in values[1:]:
        np.testing.assert_array_equal(value, values[0], err_msg=f"{what} differs between ranks")
    return values[0]


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(results: Results, name: str) -> None:
    case = CASES[name]
    expected = train(case.layer(), case, slice(0, IMAGES))
    tolerance = {torch.float64: 1e-11}.get(case.dtype, 1e-5)
    assert len([what for what in results[0] if what.startswith(f"{name}/")]) == len(expected) + 1  # and the messages
    for what, value in expected.items():
        found = joined(results, name, what)
        assert found.shape == value.shape
        if case.autocast and found.ndim == 4:  # bfloat16 outputs: one rounding may go the other way
            np.testing.assert_allclose(found, value, rtol=2**-7, atol=2**-9, err_msg=what)
        else:
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance * scale, err_msg=what)
    # One message forward and one backward.
    assert [float(result[f"{name}/messages a step"]) for result in results] == [2.0] * len(results)


def test_one_value_on_each_rank_is_enough(results: Results) -> None:
    for result in results:
        np.testing.assert_array_equal(result["one value a rank"], np.zeros((1, 2, 1, 1)))


def test_data_parallel_gradients_equal_one_process(results: Results) -> None:
    expected = network_gradients(network(), slice(0, IMAGES // len(results) * len(results)))
    assert len(expected) == 9
    for name, value in expected.items():
        for result in results:
            np.testing.assert_allclose(result[f"network/{name}"], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["plain", "average momentum", "not affine", "with activation"])
def test_one_process_is_exactly_batch_norm(name: str) -> None:
    case = CASES[name]
    expected = train(case.layer(), case, slice(0, IMAGES))
    found = train(convert_sync_batch_norm(case.layer(), "cpu"), case, slice(0, IMAGES))
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        np.testing.assert_array_equal(found[what], value, err_msg=what)


def test_conversion_keeps_names_parameters_and_hooks() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    seen: list[Any] = []
    model.bn1.register_forward_hook(lambda module, *_: seen.append(module))
    converted = convert_sync_batch_norm(model, "cpu")
    assert {name: value.data_ptr() for name, value in converted.state_dict().items()} == before
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert sum(type(module) is CpuSyncBatchNorm2d for module in converted.modules()) == 20
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    converted(torch.zeros(2, 3, 32, 32))
    assert seen == [model.bn1]
    assert convert_sync_batch_norm(converted, "cpu") is converted


def test_fused_and_repaired_layers_are_converted() -> None:
    model = nn.Sequential(BatchNormAct2d(4), adopt_path(nn.BatchNorm2d(4), "float32"))
    convert_sync_batch_norm(model, "cpu")
    assert [type(layer) for layer in model] == [CpuSyncBatchNormAct2d, CpuSyncBatchNorm2d]
    assert model(torch.randn(3, 4, 2, 2)).shape == (3, 4, 2, 2)


class OwnBatchNorm(nn.BatchNorm2d):
    """A class whose forward pass we know nothing of."""


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm3d(3), OwnBatchNorm(3)])
def test_what_cannot_be_synchronised_on_the_cpu_is_named(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(HarnessError, match=rf"0\.1: {type(layer).__name__} cannot be synchronised"):
        convert_sync_batch_norm(model, "cpu")


def test_other_devices_get_torchs_own_with_the_activation_kept() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
    keys = list(model.state_dict())
    converted = convert_sync_batch_norm(model, "cuda")
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in converted)
    assert isinstance(converted[1].act, nn.ReLU)
    assert list(converted.state_dict()) == keys
