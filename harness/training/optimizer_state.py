"""The state of an optimizer in files: tensors by name, and the rest as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import HarnessError

_HOW = ("foreach", "fused", "capturable", "differentiable")  # how a step is computed here, not what it does


def split(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict()` as tensors by name, and all the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, entries in optimizer["state"].items():
        tensors |= {f"parameter.{index}.{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
        scalars[str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
    for index, group in enumerate(optimizer["param_groups"]):
        tensors |= {f"group.{index}.{k}": v for k, v in group.items() if isinstance(v, Tensor)}
        groups.append({k: v for k, v in group.items() if not isinstance(v, Tensor)})
    return tensors, {"scalars": scalars, "groups": groups}


def load(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], where: Path) -> None:
    """Put a saved state into an optimizer over parameters of the same shapes.

    Args:
        tensors, rest: as `split` gave them.
        where: the checkpoint, for messages.

    Raises:
        HarnessError: it is another optimizer's.
    """
    try:
        state = _join(tensors, rest)
        _keep_how(state["param_groups"], optimizer.param_groups)
        _check_groups(state["param_groups"], optimizer.state_dict()["param_groups"])
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise HarnessError(
            f"the checkpoint's optimizer is another one: {error}",
            where=str(where),
            hint="Resume with the optimizer settings it was trained with.",
        ) from None
    for parameter, entries in optimizer.state.items():  # back to the layout of the weights: sums round by it
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _keep_how(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """A checkpoint of another device, or of an earlier version, says another way of computing the same steps."""
    for group, wanted in zip(saved, own, strict=False):
        group.update({name: wanted[name] for name in _HOW if name in wanted})


def _check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Settings of other kinds than the optimizer's own would fail later, or train another way.

    Raises:
        ValueError: the first of them, in words.
    """
    if len(saved) != len(own):
        raise ValueError(f"it has {len(saved)} parameter groups, not {len(own)}")
    for group, wanted in zip(saved, own, strict=True):
        if group.get("params") != wanted["params"] or not wanted.keys() <= group.keys():
            raise ValueError("its parameter groups hold other parameters or settings")
        for name, value in wanted.items():
            numbers = isinstance(value, int | float) and isinstance(group[name], int | float)
            if not numbers and type(group[name]) is not type(value):
                raise ValueError(f"its {name} is {group[name]!r}")


def _join(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's `state_dict` back from its tensors and JSON part."""
    per_parameter: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in rest["scalars"].items()}
    groups: list[dict[str, Any]] = [dict(group) for group in rest["groups"]]
    for name, tensor in tensors.items():
        kind, index, key = name.split(".", 2)
        owner = groups[int(index)] if kind == "group" else per_parameter.setdefault(int(index), {})
        owner[key] = tensor
    for group in groups:  # JSON knows no tuples; betas and the like are tuples
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"})
    return {"state": per_parameter, "param_groups": groups}
