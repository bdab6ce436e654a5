"""Checkpoints: `checkpoints/step_N/` with safetensors and JSON, whole or not there at all.

A save goes to a temporary folder, every file is synced, a manifest with the SHA-256 of each file is written
last, and the folder is renamed. A load believes nothing that the manifest does not confirm. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from harness.errors import HarnessError, nearest
from harness.training import optimizer_state
from harness.training.saved_state import wrong_in

FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
_PREFIX = "step_"
_NAME = re.compile(rf"{_PREFIX}(0|[1-9][0-9]{{0,15}})")
_REPLACED = ".replaced"  # a checkpoint while the new one of its step takes its place


class BrokenCheckpoint(HarnessError):
    """Its files are not what was written: nothing can be done with it."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified.

    Attributes:
        model, ema, optimizer: tensors by name, on the CPU; `ema` is None where the run has none.
        state: everything else (`state.json`).
    """

    path: Path
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of one step holds, copied to the host: training may go on while it is written.

    Attributes:
        tensors: by file name and tensor name.
        state: JSON-able.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def snapshot(
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    optimizer: dict[str, Any],
    state: Mapping[str, Any],
) -> Snapshot:
    """Copy everything to the host.

    Args:
        optimizer: the optimizer's `state_dict()`.
        state: JSON-able.
    """
    optimizer_tensors, optimizer_rest = optimizer_state.split(optimizer)
    tensors = {MODEL: _on_host(model), OPTIMIZER: _on_host(optimizer_tensors)}
    if ema is not None:
        tensors[EMA] = _on_host(ema)
    whole = {"format_version": FORMAT_VERSION, **state, "optimizer": optimizer_rest}
    return Snapshot(step, tensors, json.loads(json.dumps(whole)))


def write(directory: Path, saved: Snapshot, *, before_rename: Callable[[], None] = lambda: None) -> Path:
    """Write `directory/step_N` and return it; an existing one of that step is replaced.

    Args:
        before_rename: called when all is on the disk but not in place; what it raises is raised, and nothing is left.

    Raises:
        HarnessError: the disk is full or not writable; what was there before is untouched.
    """
    final = directory / f"{_PREFIX}{saved.step}"
    temporary = directory / f".{_PREFIX}{saved.step}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in saved.tensors.items():
            # Written by us: safetensors' own `save_file` gives files to their owner alone, whatever the umask.
            (temporary / name).write_bytes(to_bytes(tensors))
        (temporary / STATE).write_text(json.dumps(saved.state, indent=1))
        files = sorted(p.name for p in temporary.iterdir())
        manifest = {name: {"sha256": _sha256(temporary / name), "bytes": _bytes(temporary / name)} for name in files}
        (temporary / MANIFEST).write_text(json.dumps({"step": saved.step, "files": manifest}, indent=1))
        for name in [*files, MANIFEST]:
            _sync(temporary / name)
        _sync(temporary)
        before_rename()
        replaced = directory / f".{final.name}{_REPLACED}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _sync(directory)
    except HarnessError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise HarnessError(
            f"the checkpoint of step {saved.step} could not be written ({error})",
            where=str(directory),
            hint="Free some space or give another --run-dir; earlier checkpoints are untouched.",
            exit_code=1,
        ) from None
    return final


def prune(directory: Path, *, keep_last: int, keep: Path | None) -> None:
    """Delete all but the newest `keep_last` checkpoints, and never `keep` (the best one)."""
    for path in list_checkpoints(directory)[:-keep_last]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*directory.glob(f".{_PREFIX}*.tmp"), *directory.glob(f".{_PREFIX}*{_REPLACED}")):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """The `step_N` folders by rising N."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The N of `step_N`."""
    return int(path.name[len(_PREFIX) :])


def load(path: Path) -> Saved:
    """Read a checkpoint after checking every byte against its manifest.

    Raises:
        BrokenCheckpoint: a file is missing, cut short or changed, named; or the folder is no checkpoint.
        HarnessError: it is of another version.
        OSError: the disk fails; the checkpoint may be whole.
    """
    manifest = _read_json(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER, STATE} <= files.keys():
        raise _broken(path / MANIFEST, "not the manifest of a checkpoint")
    for name, entry in files.items():
        file = path / name
        if not isinstance(entry, dict):
            raise _broken(path / MANIFEST, f"says nothing of {name}")
        if file.parent != path or not file.is_file():
            raise _broken(file, "is missing")
        if _bytes(file) != entry.get("bytes"):
            raise _broken(file, f"has {_bytes(file)} bytes, not {entry.get('bytes')}")
        if _sha256(file) != entry.get("sha256"):
            raise _broken(file, "was changed since it was written (SHA-256 differs)")
    state = _read_json(path / STATE)
    if state.get("format_version") != FORMAT_VERSION:
        raise HarnessError(
            f"a checkpoint of format version {state.get('format_version')}; this is version {FORMAT_VERSION}",
            where=str(path),
            hint="Go on with it by the version of the harness that wrote it.",
        )
    if wrong := wrong_in(state):
        raise _broken(path / STATE, f"is not what a training writes: {wrong}")
    ema = _load_tensors(path / EMA) if EMA in files else None
    return Saved(
        path,
        _load_tensors(path / MODEL),
        ema,
        _load_tensors(path / OPTIMIZER),
        state,
    )


def last_good(directory: Path) -> tuple[Path | None, list[HarnessError]]:
    """The newest checkpoint that is whole, and why newer ones are not.

    Broken ones are set aside, so that they are kept for a look but not tried again; of another version, or where the
    disk fails, nothing is set aside and the error goes on.
    """
    _put_back_replaced(directory)
    problems: list[HarnessError] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return load(path).path, problems
        except BrokenCheckpoint as error:
            problems.append(error)
            _set_aside(path, "broken")
    return None, problems


def _put_back_replaced(directory: Path) -> None:
    """Checkpoints whose successor did not take their place, since the process died between the two renames."""
    for path in directory.glob(f".{_PREFIX}*{_REPLACED}"):
        own = directory / path.name.removeprefix(".").removesuffix(_REPLACED)
        if not own.exists():
            path.rename(own)


def set_aside_later_than(directory: Path, step: int) -> None:
    """Checkpoints behind the step a run goes on from belong to a future that will not come: keep them under a name
    that nothing resumes from or prunes."""
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            _set_aside(path, "abandoned")


def _set_aside(path: Path, why: str) -> None:
    number = 0
    while (aside := path.with_name(f"{why}{f'_{number}' if number else ''}_{path.name}")).exists():
        number += 1
    path.rename(aside)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put weights into a network of the same shape.

    Raises:
        HarnessError: they belong to another network; says which names or shapes differ.
    """
    own = model.state_dict()
    problems = [f'"{name}" is missing' for name in own.keys() - tensors.keys()]
    problems += [f'"{name}" is not in the network' for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            problems.append(f'"{name}" has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}')
    if problems:
        listed = "; ".join(sorted(problems)[:4]) + ("; …" if len(problems) > 4 else "")
        raise HarnessError(
            f"a checkpoint of another network ({len(problems)} differences): {listed}",
            where=str(where),
            hint="Give the recipe it was trained with, or start a new run with another --run-dir.",
        )
    model.load_state_dict(dict(tensors))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, dense and unshared as safetensors wants them; channels_last weights come back in the network's layout."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _broken(path, f"cannot be read ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        around = [p.name for p in list_checkpoints(path.parent.parent)]
        raise BrokenCheckpoint(
            "no checkpoint here", where=str(path.parent), hint=nearest(path.parent.name, around)
        ) from None
    except ValueError:
        raise _broken(path, "is not JSON") from None
    if not isinstance(data, dict):
        raise _broken(path, "is not a JSON object")
    return data


def _broken(file: Path, what: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"broken checkpoint: {file.name} {what}",
        where=str(file.parent),
        hint="Use an earlier checkpoint, or --resume auto, which finds the last good one.",
    )


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
