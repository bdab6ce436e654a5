"""The parts of the evidence: GPU-marked tests, loaders and training steps beside the memory roofline, trainings."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from harness.benchmarks.gpu import roofline
from harness.benchmarks.gpu import step as gpu_step
from harness.benchmarks.gpu.evidence import ROOT, Call, Figures, Part, Save
from harness.benchmarks.gpu.evidence_train import train_part
from harness.benchmarks.loader import bench_loader, synthetic_split
from harness.benchmarks.report import bench_loader_here

COPIED_BYTES = 1 << 30  # many times the cache of any GPU
PIXEL_CHANNELS, UINT8_BYTES, FLOAT32_BYTES = 3, 1, 4
LOADER_SECONDS = 100.0  # five rounds of four contestants, FFCV's compilation included
CASE_SECONDS, COMPILED_CASE_SECONDS = 25.0, 100.0
FAREWELL_SECONDS = 15.0  # for writing down what was measured


def tests_part(call: Call, figures: Figures, save: Save) -> bool:
    """The tests marked `gpu`, in the files that have any: other tests may want packages that are not there."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    report = call.work / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    figures["command"] = " ".join(["python", *command[1:6], *names])
    limit_seconds = max(1.0, call.left_seconds() - FAREWELL_SECONDS)
    with (call.work / "tests.log").open("w") as log:
        try:
            done = subprocess.run(
                [*command, *names], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"  stopped after {limit_seconds:.0f} s; call it alone, or give more --minutes", flush=True)
            return False
    figures.update(counts_of(report), exit_code=done.returncode, failed=done.returncode != 0)
    save(figures)
    return True


def counts_of(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit file, and the names of those that failed; empty without a file."""
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": len(skipped),
        "not_passed": [f"{case.get('classname')}.{case.get('name')}" for case in bad],
    }


def loader_part(call: Call, figures: Figures, save: Save) -> bool:
    """`harness bench loader`, and what memory and the way to the device would allow."""
    if call.left_seconds() < LOADER_SECONDS:
        return False
    if call.dry_run:
        with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
            split = synthetic_split(Path(folder), count=256)
            how: dict[str, Any] = {"rounds": 1, "workers": 1, "batch_size": 64, "torchvision_images": 64}
            figures.update(bench_loader(split, device=call.device, **how))
    else:
        figures.update(bench_loader_here(rounds=5, workers=None))
    height_px, width_px = figures["settings"]["image_size_px"]
    numbers = height_px * width_px * PIXEL_CHANNELS
    copied = COPIED_BYTES if not call.dry_run else 1 << 20
    bandwidth = roofline.copy_bandwidth(call.device, copied_bytes=copied)
    upload = upload_bandwidth(call.device, copied_bytes=copied // 4)
    figures["roofline"] = {
        "rule": "device: uint8 pixels read, float32 written; ffcv: float32 sent to the device from pinned memory",
        "copy_bytes_per_second": bandwidth,
        "upload_bytes_per_second": upload,
        "harness_device_images_per_second": bandwidth / (numbers * (UINT8_BYTES + FLOAT32_BYTES)),
        "harness_ffcv_images_per_second": None if upload is None else upload / (numbers * FLOAT32_BYTES),
    }
    save(figures)
    return True


def upload_bandwidth(device: torch.device, *, copied_bytes: int) -> float | None:
    """Bytes a second from pinned memory of the host to the device, the median of ten; None for a CPU."""
    if device.type != "cuda":
        return None
    source = torch.zeros(copied_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    copy = roofline.timed(lambda: target.copy_(source, non_blocking=True), device, repeats=10, warmup=2)
    return copied_bytes / statistics.median(copy)


def step_part(call: Call, figures: Figures, save: Save) -> bool:
    """Every case of `gpu_step` that earlier calls have not measured, as far as the time goes."""
    size = gpu_step.DRY_SIZE if call.dry_run else gpu_step.Size()
    if "roofline" not in figures:
        copied = COPIED_BYTES if not call.dry_run else 1 << 20
        bandwidth = roofline.copy_bandwidth(call.device, copied_bytes=copied)
        figures.update(network=size.network, roofline=gpu_step.limits(size, bandwidth), cases={}, failed=False)
        save(figures)
    fused = figures["roofline"]["images_per_second"]["fused"]
    for case in gpu_step.cases(size):
        if case.name in figures["cases"]:
            continue
        needed = COMPILED_CASE_SECONDS if case.way.startswith("compile") else CASE_SECONDS
        if call.left_seconds() < needed:
            return False
        measured = gpu_step.measure(case, size, call.device)
        if "images_per_second_median" in measured:
            limit = fused[f"{case.precision}/{case.batch_size}"]
            measured["share_of_roofline"] = measured["images_per_second_median"] / limit
        figures["failed"] |= measured.get("error", False)
        figures["cases"][case.name] = measured
        print(f"  {case.name}: {_in_words(measured)}", flush=True)
        save(figures)
    return True


def _in_words(measured: dict[str, Any]) -> str:
    if "left_out" in measured:
        return str(measured["left_out"])
    return f"{measured['images_per_second_median']:,.0f} images/s, {measured['share_of_roofline']:.1%} of the roofline"


PARTS: dict[str, Part] = {"tests": tests_part, "loader": loader_part, "step": step_part, "train": train_part}


def limit_threads(*, dry_run: bool) -> None:
    """A dry run shares its machine, and tiny tensors gain nothing from threads that wait for one another."""
    if dry_run:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
