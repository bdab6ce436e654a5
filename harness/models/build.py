"""Any network by its name: the dual-branch family or a model of timm."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

from harness.errors import HarnessError, nearest
from harness.models import dual_branch  # registers the family with timm

FAMILY = (dual_branch.dual_branch.__name__, dual_branch.dual_branch_seed.__name__)

# Set by the data or by the harness; given twice they could only disagree.
RESERVED = {
    "num_classes": "the data's classes decide it, and data.num_classes checks them",
    "img_size": "data.image_size_px decides it",
    "in_chans": "images have three channels",
    "pretrained": "recipes train from scratch",
    "pretrained_cfg": "recipes train from scratch",
    "pretrained_cfg_overlay": "recipes train from scratch",
    "checkpoint_path": "recipes train from scratch",
    "features_only": "training needs a classifier",
    "cache_dir": "nothing is downloaded",
    "device": "the launcher decides it",
    "dtype": "training.precision decides it",
}


def build_model(name: str, *, num_classes: int, image_size_px: int, args: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network on the CPU, in training mode, float32.

    It maps images (B, 3, image_size_px, image_size_px) to logits (B, num_classes); one image of zeros is sent
    through it to make sure. The initial weights come from torch's global generator.

    Args:
        name: `dual_branch`, `dual_branch_seed` or any name of `timm.list_models()`.
        num_classes: classes, ≥ 1.
        image_size_px: height and width of the images, pixels.
        args: keyword arguments of the model's constructor, as in a recipe's `model.args`.

    Raises:
        HarnessError: an unknown name or argument, with the nearest valid one, or a network that cannot be
            built or cannot take such images.
    """
    if num_classes < 1:
        raise HarnessError(
            f"a classifier needs at least one class, got {num_classes}", hint="Set data.num_classes to 1 or more."
        )
    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        hint = nearest(str(name), [*timm.list_models(), *FAMILY])
        raise HarnessError(f'there is no model "{name}"', where="model.name", hint=hint)
    for key in args:
        if key in RESERVED:
            what = f"{key} must not be set in model.args: {RESERVED[key]}"
            raise HarnessError(what, where=f"model.args.{key}", hint="Remove it.")
    size: dict[str, Any] = {"img_size": image_size_px} if "img_size" in _arguments(name) else {}
    model = _create(name, {**args, **size, "num_classes": num_classes, "in_chans": 3})
    _check_forward(model, name, num_classes=num_classes, image_size_px=image_size_px)
    return model


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except HarnessError as error:
        raise HarnessError(error.what, where=error.where or "model.args", hint=error.hint) from None
    except Exception as error:  # whatever a model's constructor thinks of its arguments
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise HarnessError(
                f'timm cannot build "{name}" with these arguments: {_one_line(error)}',
                where="model.args",
                hint="See the model's constructor in timm's documentation.",
            ) from error
        key = unknown.group(1)
        raise HarnessError(
            f'"{name}" has no argument "{key}"',
            where=f"model.args.{key}",
            hint=nearest(key, _arguments(name) - set(RESERVED)),
        ) from None


def _arguments(name: str) -> set[str]:
    """Names of the constructor's arguments, as far as timm's annotations tell; empty where they do not."""
    try:
        built = typing.get_type_hints(model_entrypoint(name)).get("return")
    except (NameError, TypeError, RuntimeError):
        return set()
    if built is dual_branch.DualBranchNet:
        own = set(inspect.signature(built).parameters) - {"settings"}
        return own | set(dual_branch.DualBranchArgs.model_fields)
    names: set[str] = set()
    for owner in inspect.getmro(built) if inspect.isclass(built) else ():
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # no further argument reaches the classes above
    return names - {"self"}


@torch.no_grad()
def _check_forward(model: nn.Module, name: str, *, num_classes: int, image_size_px: int) -> None:
    """One forward pass in evaluation mode, which leaves weights, modes and generators as they are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(1, 3, image_size_px, image_size_px))
    except Exception as error:  # whatever a layer thinks of the size of its input
        raise HarnessError(
            f'"{name}" cannot take images of {image_size_px}×{image_size_px} px: {_one_line(error)}',
            where="model.name",
            hint="Set a larger data.image_size_px or choose another model.",
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, num_classes):
        raise HarnessError(
            f'"{name}" gives {shape} for one image, not logits of {num_classes} classes',
            where="model.name",
            hint="Choose a model that classifies.",
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
