"""A small recipe that trains in about a second, a way to run it in this process, and what to look at afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.cli import main
from harness.data.loaders import Batch, Loader, build_loader
from harness.tracking.metrics import read
from harness.training import build

Train = Callable[..., Path]
Capsys = pytest.CaptureFixture[str]

EVERYTHING = (
    "training.gradient_accumulation_steps=2",
    "mix.mixup_alpha=0.2",
    "mix.cutmix_alpha=1.0",
    "ema.decay=0.9",
    "optimizer.weight_decay=0.001",
    "schedule.name=multistep",
    "schedule.milestones_epochs=[1]",
    "schedule.warmup_steps=2",
    "data.cutout_size_px=6",
    "data.flip=alternating",
    "training.clip_grad_norm=1.0",
    "checkpoint.every_steps=3",
)
DELAY_SECONDS = 0.04


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    """`train("run", "training.epochs=1", resume=…)` trains the small recipe and returns the run directory."""

    def run(name: str, *words: str, resume: str = "never", expect: int = 0) -> Path:
        directory = tmp_path / name
        code = main(["train", str(tiny), *words, "--run-dir", str(directory), "--resume", resume])
        assert code == expect
        return directory

    return run


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def starts(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "provenance.json").read_text())["starts"]


def metrics(run: Path, kind: str = "step", split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind and r["split"] == split]


def everything(run: Path) -> dict[str, bytes]:
    """All files of a run by name."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / f"{name}.safetensors")


def assert_same_state(one: Path, other: Path, step: int, names: Sequence[str] = ("model", "ema", "optimizer")) -> None:
    """Their checkpoints hold the same bits."""
    for name in names:
        left, right = weights(one, step, name), weights(other, step, name)
        assert left.keys() == right.keys()
        assert [k for k in left if not torch.equal(left[k], right[k])] == []


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in read(run / "metrics.jsonl")):
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} in {run} within two minutes")


class SlowLoader:
    """A real loader whose batches come late, as over a slow network."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.close = loader.close

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        for batch in self._loader.batches(ids_per_batch, epoch=epoch):
            time.sleep(DELAY_SECONDS)
            yield batch


@pytest.fixture
def slow_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_loader", lambda *a, **k: SlowLoader(build_loader(*a, **k)))
