"""docs/architecture.md says what happens: which functions a setting and a batch pass."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn

from harness.cli import main
from harness.recipe import Recipe
from harness.training import optim
from harness.training.step import TrainingStep

ROOT = Path(__file__).resolve().parents[1]
MOST_FOR_A_SETTING, MOST_FOR_A_BATCH = 10, 8


def listed(title: str) -> list[str]:
    section = (ROOT / "docs/architecture.md").read_text().split(f"### {title}\n")[1].split("\n##")[0]
    return re.findall(r"^\d+\. `(.*)`$", section, re.MULTILINE)


def name_of(frame: FrameType) -> str | None:
    """The function of a frame where it is one of ours."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT / "harness"):
        return None
    return ".".join(path.relative_to(ROOT).with_suffix("").parts) + f".{frame.f_code.co_name}"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(ROOT / "recipes/debug.yaml"), "training.epochs=null", "training.steps=2"]
    return lambda: main([*words, "data.loader=device", "tracking.wandb=disabled", "optimizer.lr=0.1"])  # type: ignore[return-value]


def test_a_setting_passes_few_functions(trained: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, None] = {}

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **settings: Any) -> Any:
            stack = [name for each in reversed(inspect.stack()) if (name := name_of(each.frame))]
            passed.update(dict.fromkeys(stack))
            return function(*args, **settings)

        return noted

    monkeypatch.setattr(optim, "create_optimizer_v2", noting(optim.create_optimizer_v2))
    monkeypatch.setattr(Recipe, "model_validate", noting(Recipe.model_validate))
    trained()
    assert list(passed) == listed("A setting on its way to timm")
    assert len(passed) <= MOST_FOR_A_SETTING


def test_a_batch_passes_few_functions(trained: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    perform, forward = TrainingStep.__call__, nn.Module.__call__

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (name := name_of(frame)) and "profiler" not in name:
            passed.append(name)

    def noted(self: TrainingStep, *args: Any, step: int, **how: Any) -> None:
        if step == 1:  # step 0 begins the epoch, whose ids and augmentation go to the device at once
            sys.setprofile(note)
        perform(self, *args, step=step, **how)

    def stop(self: nn.Module, *args: Any, **how: Any) -> Any:
        sys.setprofile(None)
        return forward(self, *args, **how)

    monkeypatch.setattr(TrainingStep, "__call__", noted)
    monkeypatch.setattr(nn.Module, "__call__", stop)
    trained()
    ours = ("harness.data.loaders", "harness.training.step.__call__")
    of_a_batch = [name for name in dict.fromkeys(passed) if name.startswith(ours)]
    assert of_a_batch == listed("A batch on its way to the device")
    assert len(of_a_batch) <= MOST_FOR_A_BATCH
