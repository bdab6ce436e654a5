"""One rank of test_sync_batch_norm.py, run by torchrun: sync_bn_worker.py DIRECTORY writes DIRECTORY/rank_<rank>.npz.

The cases and their data are made here, by `CASES`, for the ranks and for the test's one process alike.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.files import writable_cache_directory
from harness.models import fused_units
from harness.models.fused_units import adopt_compiled_kernels
from harness.models.sync_batch_norm import convert_sync_batch_norm

IMAGES = 14
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A layer and its data."""

    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    channels_last: bool = False
    mean: float = 0.5
    activation: bool = False
    fused: bool = False

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        norm = (BatchNormAct2d if self.activation else nn.BatchNorm2d)(5, **self.settings).to(self.dtype)
        for parameter in norm.parameters():
            nn.init.normal_(parameter, mean=1.0)
        return _fused(norm) if self.fused else norm

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and output gradients of a step, (IMAGES, 5, 6, 7)."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(IMAGES, 5, 6, 7, generator=generator) * 2 + self.mean
        gradient = torch.randn(IMAGES, 5, 6, 7, generator=generator)
        dtype = torch.bfloat16 if self.autocast else self.dtype
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(dtype).contiguous(memory_format=layout), gradient.to(dtype)


CASES = {
    "plain": Case({}),
    "channels_last": Case({}, channels_last=True),
    "float64": Case({}, dtype=torch.float64),
    "average momentum": Case({"momentum": None}),
    "not affine": Case({"affine": False}),
    "no running statistics": Case({"track_running_stats": False}),
    "mean far from zero": Case({}, mean=300.0),
    "bf16 autocast": Case({}, autocast=True),
    "with activation": Case({}, activation=True),
    "fused": Case({}, channels_last=True, fused=True),
    "fused, bf16 autocast": Case({}, autocast=True, channels_last=True, fused=True),
}


def images_of_each(ranks: int) -> list[slice]:
    """Which images each rank has; unequal."""
    bounds = {2: (0, 4, IMAGES), 3: (0, 2, 9, IMAGES)}[ranks]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _fused(norm: nn.Module) -> nn.Module:
    """The layer and a ReLU by the compiled pass."""
    unit = nn.Sequential(OrderedDict(norm=norm, act=nn.ReLU()))
    verdict = adopt_compiled_kernels(unit, writable_cache_directory())
    assert "1 units" in verdict, verdict
    fused_units.FEW_VALUES = 0
    return unit


def train(layer: nn.Module, case: Case, images: slice) -> dict[str, np.ndarray]:
    """Results of STEPS training steps on some of the images, and of an evaluation."""
    results: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, gradient = (t[images] for t in case.data(step))
        x.requires_grad_()
        layer.train().zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
            y = layer(x)
        assert y.dtype == x.dtype
        y.backward(gradient)
        assert x.grad is not None
        results |= {f"{step} output": y.detach(), f"{step} input gradient": x.grad}
        results |= {f"{step} {name} gradient": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results |= {f"{step} {name}": buffer.clone() for name, buffer in layer.named_buffers()}
    if case.settings.get("track_running_stats", True):  # else evaluation goes by each batch, as torch's own does
        with torch.no_grad():
            results["evaluation"] = layer.eval()(case.data(0)[0][images])
    return {name: value.double().numpy() for name, value in results.items()}


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 3))


def network_gradients(model: nn.Module, images: slice) -> dict[str, np.ndarray]:
    """Gradients of the mean loss over some of the images."""
    x = CASES["plain"].data(0)[0][images]
    nn.functional.cross_entropy(model(x), torch.arange(IMAGES)[images] % 3).backward()
    parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: p.grad.double().numpy() for name, p in parameters.items() if p.grad is not None}


def main(directory: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    messages = 0
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal messages
        messages += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted  # the number of messages is part of what is promised
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        layer = convert_sync_batch_norm(case.layer(), "cpu")
        messages = 0  # the layer's making may ask the ranks for kernels; a step may not
        found = train(layer, case, images_of_each(ranks)[rank])
        results |= {f"{name}/{what}": value for what, value in found.items()}
        results[f"{name}/messages a step"] = messages / STEPS
    dist.all_reduce = all_reduce
    # Each rank has one image of one pixel: too few for one process, enough for all ranks together.
    results["one value a rank"] = convert_sync_batch_norm(nn.BatchNorm2d(2), "cpu")(torch.ones(1, 2, 1, 1)).detach()
    model = DistributedDataParallel(convert_sync_batch_norm(network(), "cpu"))
    part = IMAGES // ranks  # equal shares: DistributedDataParallel averages over ranks, not over images
    gradients = network_gradients(model, slice(rank * part, (rank + 1) * part))
    results |= {f"network/{name}": value for name, value in gradients.items()}
    np.savez(directory / f"rank_{rank}.npz", **results)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]))
