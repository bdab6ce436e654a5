"""scripts/gpu_check.py, as far as a CPU can run it: a dry run of all parts, and parts that fail or take too long."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import PARTS, Check, Figures, copy_bandwidth, measured, roofline_images_per_second


def fails(check: Check) -> Iterator[Figures]:
    yield {"first": 1}
    raise ValueError("the reason\nof the failure")


def hangs(check: Check) -> Iterator[Figures]:
    yield {"first": subprocess.Popen(["sleep", "600"]).pid}
    time.sleep(600)


@pytest.mark.long
def test_a_dry_run_runs_every_part(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    assert gpu_check.main(["--output", str(file), "--dry-run", "--epochs", "2"]) == 0
    found = json.loads(file.read_text())
    assert found["dry_run"]
    parts = found["parts"]
    assert list(parts) == list(PARTS)
    assert parts["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert parts["tests"]["exit_code"] == 0
    assert parts["digits"]["result"]["step"] == 2
    for name in ("eager_bf16_4", "harness_bf16_4"):
        case = parts["step"][name]
        rates = case["images_per_second_median"], case["roofline_images_per_second"]
        assert case["share_of_roofline"] == pytest.approx(rates[0] / rates[1])
    assert parts["loader"]["contestants"]["torchvision"]["images_per_second_median"] > 0
    curve = [row["accuracy"] for row in parts["seed"]["curve"] if row["split"] == "test"]
    assert len(curve) == 2


@pytest.mark.slow
def test_what_fails_or_hangs_keeps_its_figures_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "machine", fails)
    monkeypatch.setitem(PARTS, "tests", hangs)
    monkeypatch.setattr(gpu_check, "_measure", measure_here)
    check = Check("cpu", True, 1, time.monotonic() + 40, tmp_path)  # processes start slowly on busy cores
    failed = measured("machine", check)
    assert failed["first"] == 1
    assert failed["error"] == "ValueError: the reason of the failure"
    hung = measured("tests", check)
    assert hung["error"].startswith("stopped after")
    while psutil.pid_exists(hung["first"]):  # what a part has started ends with it, as soon as it is reaped
        assert time.monotonic() < check.deadline + 10
        time.sleep(0.05)


def measure_here(name: str, check: Check, file: Path) -> None:
    """The process of a part, with the parts of this file: a spawned one imports the script as it is."""
    PARTS.update(machine=fails, tests=hangs)
    _measure(name, check, file)


_measure = gpu_check._measure


def test_the_roofline_is_bandwidth_over_bytes() -> None:
    """10.76 million elements of two bytes, and 32 bytes a parameter for each step."""
    found = roofline_images_per_second(3e12, 128, element_bytes=2)
    assert found == pytest.approx(3e12 / (2 * 10_763_860 + 32 * 380_646 / 128))
    assert 1e6 < copy_bandwidth("cpu", 1 << 16) < math.inf


def test_mistakes_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "check.json")
    assert gpu_check.main(["--output", file, "--part", "stpe"]) == 2
    assert 'no part "stpe"\n  HINT: Did you mean "step"?' in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_check.main(["--output", file]) == 2
        assert "torch finds no GPU\n  HINT: --dry-run" in capsys.readouterr().err
