"""Evidence from a GPU machine: one JSON file that several calls add to, each of which ends in time.

A part is `complete` when all of it was measured, on one machine with one set of versions; what another machine or
commit has begun is begun anew. The file says of each part when, with what command and on what it was measured.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, HarnessError, nearest
from harness.files import write_json
from harness.machine import cpu_name, usable_cores
from harness.preflight import installed_versions
from harness.runtime import git_state

ROOT = Path(__file__).resolve().parents[3]
FORMAT = 1
DRY_NOTE = "A dry run with tiny sizes, to see that everything runs: these figures are no evidence."


@dataclass(frozen=True)
class Call:
    """One call of the evidence script, as its parts see it.

    Attributes:
        device: what is measured.
        dry_run: tiny sizes, no evidence.
        work: a folder that outlives the call: run directories and logs.
        deadline: of `time.monotonic()`.
        recipes: recipes to train.
        command: what was typed, without the names of files and folders, which mean nothing elsewhere.
    """

    device: torch.device
    dry_run: bool
    work: Path
    deadline: float
    recipes: tuple[Path, ...]
    command: str

    def left_seconds(self) -> float:
        """Time to the end of the call; negative when it is over."""
        return self.deadline - time.monotonic()


Figures = dict[str, Any]
Save = Callable[[Figures], None]
# Takes the figures of earlier calls, adds to them and saves as it goes; returns whether all is there.
Part = Callable[[Call, Figures, Save], bool]


def find_device(*, dry_run: bool) -> torch.device:
    """The GPU; the CPU only for a dry run.

    Raises:
        HarnessError: there is no GPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if dry_run:
        return torch.device("cpu")
    raise HarnessError(
        "torch finds no GPU, and figures of a CPU are no evidence", hint="--dry-run tries everything with tiny sizes."
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What figures belong to: hardware, driver, versions and commit."""
    facts: dict[str, Any] = {
        "gpu": None,
        "cpu": cpu_name(),
        "cpu_cores": usable_cores(),
        "python": platform.python_version(),
        "libraries": installed_versions(),
        "git": git_state(ROOT),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def read(path: Path) -> dict[str, Any] | None:
    """A file of evidence; None where there is none.

    Raises:
        HarnessError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HarnessError(f"cannot be read: {error}", where=str(path), hint="Give --out another name.") from error
    whole = isinstance(content, dict) and {"dry_run", "parts"} <= content.keys()
    if not whole or content.get("format") != FORMAT:
        raise HarnessError("is no evidence of this version", where=str(path), hint="Give --out another name.")
    return content


def gather(call: Call, parts: dict[str, Part], names: Iterable[str], out: Path) -> int:
    """Run parts one after the other until all are complete or the time is over; returns the exit code.

    Args:
        parts: all there are, in order.
        names: those asked for, which are then run even if they are complete; none runs all that are not.
        out: the file of evidence, written after every figure.

    Raises:
        HarnessError: an unknown part, a recipe that is not there, a work folder that cannot be made, or a file that is
            a dry run's and evidence at once; before anything is measured.
    """
    names = list(names)
    for recipe in call.recipes:
        if not recipe.is_file():
            raise HarnessError("there is no such recipe", where=str(recipe), hint="ls recipes/*.yaml")
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise HarnessError(f'there is no part "{unknown[0]}"', hint=nearest(unknown[0], parts))
    content = read(out) or {"format": FORMAT, "dry_run": call.dry_run, "parts": {}}
    if content["dry_run"] != call.dry_run:
        raise HarnessError(
            "dry runs and evidence are not kept in one file", where=str(out), hint="Give --out another name."
        )
    if call.dry_run:
        content["note"] = DRY_NOTE
    try:
        call.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(
            f"cannot be made: {error.strerror}", where=str(call.work), hint="Name another folder with --work."
        ) from error
    for name in names or parts:
        known = content["parts"].get(name, {})
        if known.get("complete") and name not in names:
            print(f"{name}: complete already", flush=True)
            continue
        _run(call, name, parts[name], content, out)
    states = [content["parts"].get(name, {}) for name in names or parts]
    if any(state.get("figures", {}).get("failed") for state in states):
        return EXIT_FAILED
    return EXIT_DONE if all(state.get("complete") for state in states) else EXIT_REQUEUE


def _run(call: Call, name: str, part: Part, content: dict[str, Any], out: Path) -> None:
    known, here = content["parts"].get(name, {}), machine(call.device)
    if known.get("complete") or known.get("machine") != here:
        known = {}
    begun, before = time.monotonic(), known.get("seconds", 0.0)
    entry: dict[str, Any] = {
        "complete": False,
        "machine": here,
        "commands": [*known.get("commands", []), call.command],
        "started": known.get("started") or _now(),
        "figures": dict(known.get("figures", {})),
    }

    def save(figures: Figures) -> None:
        entry.update(figures=figures, ended=_now(), seconds=before + time.monotonic() - begun)
        content["parts"][name] = entry
        write_json(out, content)

    print(f"{name}: {call.left_seconds():.0f} s are left", flush=True)
    entry["complete"] = part(call, entry["figures"], save)
    save(entry["figures"])
    print(f"{name}: {'complete' if entry['complete'] else 'not complete'}", flush=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
