"""Golden losses: a short run on real digits, compared exactly.

Bits of floating point belong to a version of torch and the vector instructions of a processor, so the losses are kept
for each pair that was tried. There the comparison is exact; elsewhere it allows for rounding.
`GOLDEN_UPDATE=1 pytest tests/training/test_golden.py` records this machine's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from harness.cli import main
from tests.training.conftest import metrics

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "digits_losses.json"
ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    "data.loader=device",
    "training.kernels=plain",  # compiled ones have bits of their compiler
    "training.epochs=null",
    "training.steps=8",
    "model.args.widths=[[8, 16], [16]]",
    "model.args.transition_widths=[8]",
    "model.args.dropout=0.1",
    "ema.decay=0.9",
    "data.cutout_size_px=8",
    "data.flip=alternating",
    "mix.mixup_alpha=0.2",
    "schedule.warmup_epochs=0.1",
    "tracking.wandb=disabled",
    "tracking.log_every_steps=1",
)


def machine() -> str:
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by threads
    try:
        assert main(["train", str(ROOT / "recipes/quickstart.yaml"), *OVERRIDES, "--run-dir", str(tmp_path / "r")]) == 0
    finally:
        torch.set_num_threads(threads)
    found = {
        "train": [r["loss"] for r in metrics(tmp_path / "r")],
        "test": metrics(tmp_path / "r", "epoch", "test")[0]["loss"],
        "test_ema": metrics(tmp_path / "r", "epoch", "test_ema")[0]["loss"],
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN_UPDATE"):
        GOLDEN.write_text(json.dumps({**golden, machine(): found}, indent=1) + "\n")
        pytest.skip(f"recorded the golden losses of {machine()}")
    if machine() in golden:
        assert found == golden[machine()]
    else:
        nearby = next(iter(golden.values()))
        assert found["train"] == pytest.approx(nearby["train"], rel=1e-3)
        assert found["test"] == pytest.approx(nearby["test"], rel=1e-2)
        assert found["test_ema"] == pytest.approx(nearby["test_ema"], rel=1e-2)
