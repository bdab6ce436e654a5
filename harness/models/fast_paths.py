"""Sends a network's layers down faster paths of the same function on a CPU, where this machine can."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from harness.models.fused_units import adopt_fused_units
from harness.models.kernels import depthwise
from harness.models.kernels.compiled import NoKernels, close_kernels, open_kernels
from harness.models.kernels.self_check import check_fused_pass
from harness.models.safe_conv import SafeConv2d
from harness.models.sync_batch_norm import several_ranks


def adopt_compiled_kernels(model: nn.Module, cache_directory: Path) -> str:
    """Depthwise convolutions and branch units by the compiled kernels, in place; says in a phrase what was done.

    Ranks that train together have them all or none of them. Call it before `check_and_repair`, which checks the
    convolutions at their shapes, and before anything that wraps.
    """
    convolutions = [m for m in model.modules() if type(m) is nn.Conv2d and depthwise.applies(m)]
    missing = _missing(cache_directory)
    if not _on_all_ranks(missing is None):
        close_kernels()
        return f"plain ({missing or 'another rank has no compiled ones'})"
    for conv in convolutions:
        SafeConv2d.adopt(conv, "compiled")
    units = adopt_fused_units(model)
    return f"compiled ({len(convolutions)} depthwise convolutions, {units} units of norm, ReLU and dropout)"


def _missing(cache_directory: Path) -> str | None:
    """Why there are no kernels here; None where there are."""
    try:
        open_kernels(cache_directory)
        check_fused_pass()
    except NoKernels as missing:
        return str(missing)
    return None


def _on_all_ranks(here: bool) -> bool:
    if not several_ranks():
        return here
    least = torch.tensor(int(here))
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least)
