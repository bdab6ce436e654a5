"""Checkpoints: `checkpoints/step_N/` with safetensors and JSON, whole or not there at all.

A save goes to a temporary folder, every file is synced, a manifest with the SHA-256 of each file is written last, and
the folder is renamed. A load believes nothing that the manifest does not confirm. No pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from harness.errors import EXIT_FAILED, HarnessError
from harness.files import fsync_directory, hex_digest
from harness.training import optim
from harness.training.state import STRICT, Progress
from harness.training.step import TrainingStep

FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
_NAME = re.compile(r"step_(0|[1-9][0-9]{0,15})")
MAX_TEXT = 500
_REPLACED = ".replaced"  # a checkpoint while the new one of its step takes its place

Number = bool | int | float | str | None  # of an optimizer's settings


class BrokenCheckpoint(HarnessError):
    """Its files are not what was written: nothing can be done with it."""

    def __init__(self, file: Path, what: str) -> None:
        hint = "Use an earlier checkpoint, or --resume auto, which finds the last good one."
        super().__init__(f"broken checkpoint: {file.name} {what}", where=str(file.parent), hint=hint)


class OptimizerRest(BaseModel):
    """What is no tensor in an optimizer's state and groups."""

    model_config = STRICT
    scalars: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], dict[str, Number]]
    groups: list[dict[str, Number | list[Number]]]


class State(BaseModel):
    """What `state.json` must hold. A manifest that fits says only that nothing changed by accident."""

    model_config = STRICT
    format_version: int
    progress: Progress
    scaler: dict[str, Number] | None
    classes: Annotated[list[str], Field(min_length=1)]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    data_sha256: dict[str, str]
    optimizer: OptimizerRest


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified: tensors by name, on the CPU, and the rest (`state.json`)."""

    path: Path
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    progress: Progress

    def weights(self, which: str) -> dict[str, Tensor]:
        """The "raw" or the averaged ("ema") weights. Raises HarnessError: there are none."""
        tensors = self.ema if which == "ema" else self.model
        if tensors is None:
            raise HarnessError("the run has no averaged weights", where=str(self.path), hint="Use --weights raw.")
        return tensors


@dataclass(eq=False)
class Checkpointer:
    """Saves the state of a training and restores it.

    Files are written by a thread: the training waits for the copy to the host, not for the disk. `check_lock` raises
    where the run directory is another process's by now.
    """

    directory: Path
    step: TrainingStep
    identity: Mapping[str, Any]
    keep_last: int
    keep_best: bool
    check_lock: Callable[[], None] = lambda: None
    _writing: Future[None] | None = None

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harness-checkpoint")

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint of this step (the first rank does); the one before is on the disk by then.

        Raises HarnessError: the one before could not be written, or the directory is another process's.
        """
        if not self.step.runtime.is_main:
            return
        optimizer_tensors, optimizer_rest = optim.split_state(self.step.raw_optimizer.state_dict())
        tensors = {MODEL: _on_host(self.step.unwrapped_model.state_dict()), OPTIMIZER: _on_host(optimizer_tensors)}
        if self.step.ema is not None:
            tensors[EMA] = _on_host(self.step.ema.module.state_dict())
        scaler = self.step.runtime.accelerator.scaler
        state = {
            "format_version": FORMAT_VERSION,
            "progress": dataclasses.asdict(progress),
            "scaler": scaler.state_dict() if scaler is not None else None,
            **self.identity,
            "optimizer": optimizer_rest,
        }
        best = f"step_{progress.best['step']}" if progress.best and self.keep_best else None
        self.wait()
        self.check_lock()
        self._writing = self._thread.submit(self._write, progress.step, tensors, json.dumps(state, indent=1), best)

    def wait(self) -> None:
        """Until everything is on the disk. Raises HarnessError: it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread; a checkpoint under way is finished first."""
        self._thread.shutdown()

    def restore(self, saved: Saved) -> Progress:
        """Put a checkpoint into the training and return where it stood; HarnessError if it is of another."""
        where, ema, scaler = str(saved.path), self.step.ema, self.step.runtime.accelerator.scaler
        if saved.state["data_sha256"] != self.identity["data_sha256"]:
            what = "the checkpoint was trained on other images (the SHA-256 of the converted data differs)"
            hint = "Resume with the data it was trained on, or start a new run."
            raise HarnessError(what, where=where, hint=hint)
        load_weights(self.step.unwrapped_model, saved.model, saved.path)
        if (ema is None) != (saved.ema is None):
            what = f"the checkpoint has {'averaged' if saved.ema else 'no averaged'} weights"
            raise HarnessError(what, where=where, hint="Resume with the ema settings it was trained with.")
        if ema is not None and saved.ema is not None:
            load_weights(ema.module, saved.ema, saved.path)
        optim.load_state(self.step.raw_optimizer, saved.optimizer, saved.state["optimizer"], saved.path)
        if scaler is not None and saved.state["scaler"]:
            scaler.load_state_dict(saved.state["scaler"])
        return saved.progress

    def _write(self, step: int, tensors: Mapping[str, dict[str, Tensor]], state: str, best: str | None) -> None:
        """Write `step_N`, in place of an earlier one, and delete all but the newest ones and the best."""
        directory = self.directory
        final, temporary = directory / f"step_{step}", directory / f".step_{step}.{os.getpid()}.tmp"
        replaced = directory / f".{final.name}{_REPLACED}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            files = {}
            for name in [*sorted(tensors), STATE]:
                # Written by us: safetensors' own `save_file` gives files to their owner alone, whatever the umask.
                content = state.encode() if name == STATE else to_bytes(tensors[name])
                files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                _write_synced(temporary / name, content)
            _write_synced(temporary / MANIFEST, json.dumps({"step": step, "files": files}, indent=1).encode())
            fsync_directory(temporary)
            self.check_lock()
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            fsync_directory(directory)
        except (HarnessError, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, HarnessError):
                raise
            what = f"the checkpoint of step {step} could not be written ({error})"
            hint = "Free some space or give another --run-dir; earlier checkpoints are untouched."
            raise HarnessError(what, where=str(directory), hint=hint, exit_code=EXIT_FAILED) from None
        superseded = [p for p in list_checkpoints(directory)[: -self.keep_last] if p.name != best]
        for path in (*superseded, *directory.glob(".step_*.tmp"), *directory.glob(f".step_*{_REPLACED}")):
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """The `step_N` folders by rising N."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The N of `step_N`."""
    return int(path.name.removeprefix("step_"))


def load(path: Path) -> Saved:
    """Read a checkpoint after checking every byte against its manifest.

    Raises BrokenCheckpoint with the name of a file that is missing, cut short or changed, HarnessError where it is of
    another version, and OSError where the disk fails: then the checkpoint may be whole.
    """
    files = _read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER, STATE} <= files.keys():
        raise BrokenCheckpoint(path / MANIFEST, "not the manifest of a checkpoint")
    for name, entry in files.items():
        file = path / name
        if not isinstance(entry, dict):
            raise BrokenCheckpoint(path / MANIFEST, f"says nothing of {name}")
        if file.parent != path or not file.is_file():
            raise BrokenCheckpoint(file, "is missing")
        if (size := file.stat().st_size) != entry.get("bytes"):
            raise BrokenCheckpoint(file, f"has {size} bytes, not {entry.get('bytes')}")
        if hex_digest(file) != entry.get("sha256"):
            raise BrokenCheckpoint(file, "was changed since it was written (SHA-256 differs)")
    state = _read_json(path / STATE)
    if state.get("format_version") != FORMAT_VERSION:
        what = f"a checkpoint of format version {state.get('format_version')}; this is version {FORMAT_VERSION}"
        raise HarnessError(what, where=str(path), hint="Resume with the version of the harness that wrote it.")
    progress = _progress_of(path / STATE, state)
    ema = _load_tensors(path / EMA) if EMA in files else None
    return Saved(path, _load_tensors(path / MODEL), ema, _load_tensors(path / OPTIMIZER), state, progress)


def last_good(directory: Path) -> tuple[Path | None, list[HarnessError]]:
    """The newest checkpoint that is whole, and why newer ones are not.

    Broken ones are set aside, to be kept for a look but not tried again; where the version or the disk may be to blame,
    nothing is set aside and the error is raised.
    """
    for path in directory.glob(f".step_*{_REPLACED}"):  # the process died between the two renames: put it back
        own = directory / path.name.removeprefix(".").removesuffix(_REPLACED)
        if not own.exists():
            path.rename(own)
    problems: list[HarnessError] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return load(path).path, problems
        except BrokenCheckpoint as error:
            problems.append(error)
            _set_aside(path, "broken")
    return None, problems


def set_aside_later_than(directory: Path, step: int) -> None:
    """Checkpoints after the step a run resumes from belong to a future that will not come: keep them under a name that
    nothing resumes from or prunes."""
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            _set_aside(path, "abandoned")


def _set_aside(path: Path, why: str) -> None:
    number = 0
    while (aside := path.with_name(f"{why}{f'_{number}' if number else ''}_{path.name}")).exists():
        number += 1
    path.rename(aside)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put weights into a network; HarnessError says which names or shapes differ if they are another's."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        differs = " ".join(str(error).partition(":")[2].split())
        what = f"a checkpoint of another network: {differs[:MAX_TEXT]}{' …' if len(differs) > MAX_TEXT else ''}"
        hint = "Give the recipe it was trained with, or start a new run with another --run-dir."
        raise HarnessError(what, where=str(where), hint=hint) from None


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, dense and unshared as safetensors wants them; channels_last weights come back in the network's layout."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BrokenCheckpoint(path, f"cannot be read ({error})") from None


def _progress_of(file: Path, state: dict[str, Any]) -> Progress:
    """The progress in a state, once all of the state is as a training writes it."""
    try:
        progress = State.model_validate_json(json.dumps(state)).progress
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise BrokenCheckpoint(file, f"is not what a training writes: {wrong}") from None
    # Only a new run has the defaults; checkpoints from before it was counted lack the loader's wait.
    needed = {field.name for field in dataclasses.fields(Progress)} - {"epoch_loader_wait_seconds"}
    if absent := needed - state["progress"].keys():
        raise BrokenCheckpoint(file, f"is not what a training writes: progress.{min(absent)}: field required")
    return progress


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise BrokenCheckpoint(path, "is missing") from None
    except (ValueError, RecursionError):
        raise BrokenCheckpoint(path, "is not JSON") from None
    if not isinstance(data, dict):
        raise BrokenCheckpoint(path, "is not a JSON object")
    return data
