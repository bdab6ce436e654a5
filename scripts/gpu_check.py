#!/usr/bin/env python3
"""Check a GPU machine in minutes, offline or not, and write what was found as one JSON file.

    python scripts/gpu_check.py --output FILE [--minutes 9] [--epochs 50] [--part NAME]... [--dry-run]

Parts, in the order of their value, each in a process of its own and written as soon as it has figures: machine (device
and versions), tests (those marked gpu), digits (a training of seconds), step (training steps beside eager PyTorch,
torch.compile and the memory roofline), loader (`harness bench loader`), seed (the seed's training in bf16, with its
curve). Exit codes: 0 all is there, 1 a part failed or the time was over first (the file says which), 2 wrong use.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from harness.bench import Contestant, describe_machine, run_contest
from harness.bench.loader import bench_loader
from harness.bench.step import GPU_STEPS, HARNESS, PYTORCH, SEED
from harness.distributed.runtime import git_state
from harness.errors import EXIT_DONE, EXIT_FAILED, HarnessError, nearest, print_error
from harness.files import write_json
from harness.machine import seconds_of, usable_cores

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = {"machine": 60, "tests": 120, "digits": 90, "step": 240, "loader": 120, "seed": 3600}
STOP_SECONDS = 30.0  # from the signal to the end of a training: the step under way, an evaluation, the checkpoint
WORTH_STARTING_SECONDS = 45.0
COPIED_BYTES = 1 << 30  # many times the cache of any GPU
# What a step of the seed's network must move for an image, in elements of activations: convolutions and pools read
# their input and write their output, backward they read the gradient and the input and write the gradient; a run of
# normalisation, activation, dropout and merge of branches is one pass of the same kind, which reads twice where it
# normalises. With each layer a pass of its own, as eager execution has it, it is 19,766,868.
ELEMENTS_PER_IMAGE = 10_763_860
PARAMETER_BYTES = 380_646 * 8 * 4  # a step: float32 read twice, gradient and momentum read and written, weight written
TINY_NETWORK = "{widths: [[4, 8], [8]], transition_widths: [8], head_width: 8}"
TINY = ("data.source=synthetic", "data.synthetic={train_images: 64, test_images: 32, num_classes: 4}",
        "model.name=dual_branch", f"model.args={TINY_NETWORK}", "training.global_batch_size=16")  # fmt: skip

Figures = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What all parts are told: `deadline` is of `time.monotonic()`, `work` a folder for runs and logs."""

    device: str
    dry_run: bool
    epochs: int
    deadline: float
    work: Path


def machine(check: Check) -> Iterator[Figures]:
    """What figures belong to: hardware, driver, versions and commit."""
    yield describe_machine() | {"python": sys.version.split()[0], "git": git_state(ROOT)}
    if check.device == "cuda":
        yield {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.sm,power.limit", "--format=csv"]
        yield {"nvidia_smi": subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()}


def tests(check: Check) -> Iterator[Figures]:
    """The tests marked `gpu`, in the files that have any: other tests may want packages that are not there."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in (marked[:1] if check.dry_run else marked)]
    log = check.work / "tests.log"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *names]
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").splitlines()
    yield {"files": names, "exit_code": code, "log": lines[-1:] if code == 0 else lines[-60:]}
    if code:
        raise HarnessError(f"pytest ended with code {code}", where=str(log))


def digits(check: Check) -> Iterator[Figures]:
    """A training of seconds, whole."""
    few = ["training.epochs=null", "training.steps=2", "schedule.warmup_epochs=0"]
    yield from _train("quickstart", few if check.dry_run else [], check, name="digits")


def seed(check: Check) -> Iterator[Figures]:
    """The seed's training in bf16; the device loader gives the same pixels and is the quickest on a GPU."""
    epochs = [f"training.epochs={check.epochs}", "training.precision=bf16", "data.loader=device"]
    yield from _train("seed", [*epochs, *(TINY if check.dry_run else ())], check, name="seed")


def _train(recipe: str, overrides: Sequence[str], check: Check, *, name: str) -> Iterator[Figures]:
    """`harness train` until its end or that of the time: its curve, its result, and its time from command to end."""
    run, log = check.work / name, check.work / f"{name}.log"
    words = ["harness", "train", recipe, *overrides, "tracking.wandb=disabled"]
    began = time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, "-m", *words, "--run-dir", str(run)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=max(1.0, check.deadline - time.monotonic() - STOP_SECONDS))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint and ends with code 75
            process.wait()
    seconds = time.monotonic() - began
    metrics, result = run / "metrics.jsonl", run / "result.json"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    keys = ("epoch", "split", "loss", "accuracy", "images_per_second")
    yield {
        "command": " ".join(words),
        "exit_code": process.returncode,
        "command_seconds": seconds,
        "curve": [{key: row[key] for key in keys if key in row} for row in rows if row["kind"] == "epoch"],
        "result": json.loads(result.read_text()) if result.exists() else None,
    }
    if process.returncode != EXIT_DONE:
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise HarnessError(f"the training ended with code {process.returncode}: " + " ".join(last), where=str(log))


def step(check: Check) -> Iterator[Figures]:
    """Images a second of training steps, and their share of what the memory's bandwidth allows."""
    bandwidth = copy_bandwidth(check.device, COPIED_BYTES if check.device == "cuda" else 1 << 24)
    yield {
        "copy_gb_per_second": bandwidth / 1e9,
        "note": "fp32 is torch's own: TF32 in convolutions; harness is `harness train`, eager and compiled are PyTorch",
    }
    failed = []
    for batch_size in (4,) if check.dry_run else (512, 128, 2048):
        for precision, ways in (
            ("bf16", ("eager", "harness")),
            ("fp32", ("eager", "harness")),
            ("bf16", ("compiled",)),
        ):
            if check.dry_run and (precision == "fp32" or "compiled" in ways):
                continue
            names = [f"{way}_{precision}_{batch_size}" for way in ways]
            contest = {
                f"{way}_{precision}_{batch_size}": _contestant(way, precision, batch_size, check) for way in ways
            }
            try:
                times = run_contest(contest, rounds=1 if check.dry_run else 5, threads=usable_cores())
            except HarnessError as error:  # out of memory, a compiler's opinion: the others are worth having
                failed += names
                yield {name: {"error": error.what} for name in names}
                continue
            limit = roofline_images_per_second(bandwidth, batch_size, element_bytes=2 if precision == "bf16" else 4)
            for name, each in times.items():
                assert each is not None
                rates = each.per_second("images")
                share = {"share_of_roofline": rates["images_per_second_median"] / limit}
                yield {name: rates | {"roofline_images_per_second": limit} | share}
    if failed:
        raise HarnessError(f"not measured: {', '.join(failed)}")


def _contestant(way: str, precision: str, batch_size: int, check: Check) -> Contestant:
    steps = 1 if check.dry_run else GPU_STEPS
    task = {**SEED, "batch_size": batch_size, "steps": steps, "device": check.device, "channels_last": True}
    if way == "harness":
        overrides = ["training.precision=bf16"] if precision == "bf16" else []
        return Contestant(HARNESS, {**task, "recipe": "seed", "overrides": overrides})
    how = {"bf16": precision == "bf16", "compiled": way == "compiled"}
    return Contestant(PYTORCH, {**task, **how})


def roofline_images_per_second(bytes_per_second: float, batch_size: int, *, element_bytes: int) -> float:
    """What the seed's network could reach at most (Williams et al. 2009, "Roofline", doi:10.1145/1498765.1498785)."""
    return bytes_per_second / (ELEMENTS_PER_IMAGE * element_bytes + PARAMETER_BYTES / batch_size)


def copy_bandwidth(device: str, size_bytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted; median of 20."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), device=device) for _ in range(23)]
    return 2 * size_bytes / statistics.median(seconds[3:])


def loader(check: Check) -> Iterator[Figures]:
    """`harness bench loader`, on CIFAR-10 where it is at hand."""
    tiny = {"rounds": 1, "workers": 1, "synthetic_images": 256}
    yield bench_loader(**(tiny if check.dry_run else {"rounds": 3}))


PARTS = {each.__name__: each for each in (machine, tests, digits, step, loader, seed)}


def measured(name: str, check: Check) -> Figures:
    """A part's figures, those of a part that failed or took too long with its "error"."""
    file, began = check.work / f"{name}.json", time.monotonic()
    own = replace(check, deadline=min(check.deadline, began + LIMIT_SECONDS[name]))
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(name, own, file))
    process.start()
    assert process.pid is not None
    wrong = {}
    try:
        process.join(own.deadline - began)
        if process.exitcode is None:
            wrong = {"error": f"stopped after {time.monotonic() - began:.0f} s"}
        elif process.exitcode:
            wrong = {"error": f"its process ended with code {process.exitcode}"}
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all that it started
        process.join()
    figures: Figures = json.loads(file.read_text()) if file.exists() else {}
    return wrong | figures | {"part_seconds": round(time.monotonic() - began, 1)}


def _measure(name: str, check: Check, file: Path) -> None:
    """The process of a part."""
    os.setsid()
    figures: Figures = {}
    try:
        for more in PARTS[name](check):
            figures |= more
            write_json(file, figures)
    except Exception as error:  # whatever happens, the other parts are worth having
        write_json(file, figures | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="the call ends before (default 9)")
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="of the seed's training (default 50)")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too: no evidence")
    options = parser.parse_args(words)
    deadline = time.monotonic() + 60 * options.minutes
    try:
        names = options.part or list(PARTS)
        for name in names:
            if name not in PARTS:
                raise HarnessError(f'there is no part "{name}"', where="--part", hint=nearest(name, PARTS))
        if not torch.cuda.is_available() and not options.dry_run:
            raise HarnessError("torch finds no GPU", hint="--dry-run tries everything with tiny sizes on a CPU.")
        found: Figures = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["scripts/gpu_check.py", *(words if words is not None else sys.argv[1:])]),
            "dry_run": options.dry_run,
            "parts": {},
        }
        write_json(options.output, found)  # a place that cannot be written to shows now
        with tempfile.TemporaryDirectory(prefix="harness-gpu-check-") as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            check = Check(device, options.dry_run, options.epochs, deadline, Path(folder))
            for name in names:
                left = deadline - time.monotonic()
                late = {"error": "the time was over first"}
                found["parts"][name] = late if left < WORTH_STARTING_SECONDS else measured(name, check)
                write_json(options.output, found)
                print(f"{name}: {found['parts'][name].get('error', 'done')}, {left:.0f} s were left", flush=True)
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return EXIT_FAILED if any("error" in part for part in found["parts"].values()) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
