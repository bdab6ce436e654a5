"""Any network by its name, the dual-branch family or a model of timm, and how to run one without disturbing it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

from harness.errors import HarnessError, nearest
from harness.models import dual_branch  # registers the family with timm
from harness.recipe.schema import DualBranchArgs

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FROM_SCRATCH = "recipes train from scratch"
# Set by the data or by the harness; given twice they could only disagree.
RESERVED = {
    "num_classes": "the data's classes decide it, and data.num_classes checks them",
    "img_size": "data.image_size_px decides it",
    "in_chans": "images have three channels",
    **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), FROM_SCRATCH),
    "features_only": "training needs a classifier",
    "cache_dir": "nothing is downloaded",
    "device": "the launcher decides it",
    "dtype": "training.precision decides it",
}


def build_model(name: str, *, num_classes: int, image_size_px: int, args: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network on the CPU: float32 images (B, 3, size, size) -> logits (B, num_classes).

    The initial weights come from torch's global generator. One image of zeros is sent through, which draws nothing.

    Raises:
        HarnessError: an unknown name or argument, with the nearest valid one, or a network that cannot be
            built or cannot take such images.
    """
    if ":" in name or not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise HarnessError(f'there is no model "{name}"', where="model.name", hint=hint)
    for key in args:
        if key in RESERVED:
            what = f"{key} must not be set in model.args: {RESERVED[key]}"
            raise HarnessError(what, where=f"model.args.{key}", hint="Remove it.")
    size: dict[str, Any] = {"img_size": image_size_px} if "img_size" in _arguments(name) else {}
    model = _create(name, {**args, **size, "num_classes": num_classes, "in_chans": 3})
    _check_forward(model, name, num_classes=num_classes, image_size_px=image_size_px)
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations: next to other work on the cores, more threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except HarnessError as error:
        raise HarnessError(error.what, where=error.where or "model.args", hint=error.hint) from None
    except Exception as error:  # whatever a model's constructor thinks of its arguments
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            what = f'timm cannot build "{name}" with these arguments: {_one_line(error)}'
            hint = "See the model's constructor in timm's documentation."
            raise HarnessError(what, where="model.args", hint=hint) from error
        key = unknown.group(1)
        hint = nearest(key, _arguments(name) - set(RESERVED))
        raise HarnessError(f'"{name}" has no argument "{key}"', where=f"model.args.{key}", hint=hint) from None


def _arguments(name: str) -> set[str]:
    """Names of the constructor's arguments, as far as timm's annotations tell; empty where they do not."""
    try:
        built = typing.get_type_hints(model_entrypoint(name)).get("return")
    except (NameError, TypeError, RuntimeError):
        return set()
    constructors = [vars(owner)["__init__"] for owner in getattr(built, "__mro__", ()) if "__init__" in vars(owner)]
    parameters = [p for constructor in constructors for p in inspect.signature(constructor).parameters.values()]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
    return names | set(DualBranchArgs.model_fields) if built is dual_branch.DualBranchNet else names


@torch.no_grad()
def _check_forward(model: nn.Module, name: str, *, num_classes: int, image_size_px: int) -> None:
    try:
        with eval_mode(model), torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(1, 3, image_size_px, image_size_px))
    except Exception as error:  # whatever a layer thinks of the size of its input
        what = f'"{name}" cannot take images of {image_size_px}×{image_size_px} px: {_one_line(error)}'
        hint = "Set a larger data.image_size_px or choose another model."
        raise HarnessError(what, where="model.name", hint=hint) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        what = f'"{name}" gives {shape} for one image, not logits of {num_classes} classes'
        raise HarnessError(what, where="model.name", hint="Choose a model that classifies.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
