"""A whole run: its directory, resuming, the training, the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness import runtime as runtime_module
from harness.errors import HarnessError, nearest
from harness.recipe import Recipe, load_resolved
from harness.recipe.loading import differences, fingerprint, resolved_yaml
from harness.runtime import Runtime, broadcast_text, new_run_id, provenance, write_json
from harness.tracking import NullTracker, Tracker, Trackers
from harness.tracking.console import ConsoleTracker
from harness.tracking.jsonl import JsonlTracker
from harness.tracking.wandb_tracker import WandbTracker, resolve_mode
from harness.training import checkpoint
from harness.training.loop import Cadence, fit
from harness.training.parts import Parts, assemble, total_steps
from harness.training.state import Progress

RUNS = Path("runs")
# Settings that may differ between a run and its resumption: they decide how long, how and where to, not what.
_MAY_CHANGE = (
    "name",
    "tracking.",
    "checkpoint.",
    "training.epochs",
    "training.steps",
    "data.workers",
    "data.path",
)


def train(recipe: Recipe, *, run_directory: Path | None, resume: str) -> dict[str, Any]:
    """Train a recipe and return its result (also written as `result.json`).

    Args:
        run_directory: where to write; None makes `runs/<recipe>/<run-id>`.
        resume: "auto", "never" or the path of a checkpoint or run.

    Raises:
        HarnessError: see its text; with exit code 2 nothing was started and nothing was overwritten.
    """
    runtime = runtime_module.start(precision=recipe.training.precision, seed=recipe.seed)
    path = Path(broadcast_text(str(_choose_directory(recipe, run_directory, resume)), runtime))
    with ExitStack() as stack:
        stack.callback(runtime_module.finish, runtime)
        saved = _checkpoint_to_resume(path, resume)
        if saved is not None:
            _check_same_training(recipe, saved)
        parts = assemble(recipe, runtime, path / "checkpoints")
        stack.callback(parts.close)
        progress = parts.restore(saved) if saved is not None else Progress()
        if runtime.is_main:
            stack.enter_context(_only_writer(path))
            _describe_run(path, recipe, runtime)
        return _train(recipe, parts, path, progress)


def _train(recipe: Recipe, parts: Parts, path: Path, progress: Progress) -> dict[str, Any]:
    steps = total_steps(recipe, parts.plan)
    parts.tracker = _trackers(path, recipe, parts, progress, steps)
    _announce(parts, recipe, path, progress, steps)
    result = None
    try:
        fit(parts, _cadence(recipe, parts, steps), progress)
        result = _result(recipe, parts, progress)
        if parts.runtime.is_main:
            write_json(path / "result.json", result)
    finally:
        parts.tracker.finish(result)
    return {**result, "run_directory": str(path)}


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Make the run directory and hold it against any other process."""
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise HarnessError(
            "another process is training in this run directory", where=str(path), hint="Give another --run-dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _choose_directory(recipe: Recipe, given: Path | None, resume: str) -> Path:
    if resume not in ("auto", "never"):
        source = Path(resume)
        if given is None and source.is_dir():
            # A checkpoint's run goes on in its own directory.
            return source.parent.parent if source.parent.name == "checkpoints" else source
    if given is not None:
        return given
    if resume == "auto":
        unfinished = _newest_unfinished(recipe)
        if unfinished is not None:
            return unfinished
    return RUNS / recipe.name / new_run_id()


def _newest_unfinished(recipe: Recipe) -> Path | None:
    """The latest run of this very recipe that has checkpoints and no result."""
    for path in sorted((RUNS / recipe.name).glob("*/recipe.yaml"), reverse=True):
        run = path.parent
        if (run / "result.json").exists() or not checkpoint.list_checkpoints(run / "checkpoints"):
            continue
        try:
            same = fingerprint(load_resolved(path)) == fingerprint(recipe)
        except HarnessError:
            continue
        if same:
            return run
    return None


def _checkpoint_to_resume(path: Path, resume: str) -> checkpoint.Saved | None:
    if resume == "never":
        if path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise HarnessError(
                "the run directory is not empty",
                where=str(path),
                hint="Go on with it by --resume auto, or give another --run-dir; nothing was overwritten.",
            )
        return None
    if resume == "auto":
        saved, problems = checkpoint.load_last_good(path / "checkpoints")
        for problem in problems:
            print(f"WARNING {problem}", file=sys.stderr)
        return saved
    return find_checkpoint(Path(resume), "last")


def find_checkpoint(path: Path, which: str) -> checkpoint.Saved:
    """A checkpoint by its folder, or that of a run: "last", "best" or "step_N".

    Raises:
        HarnessError: there is none, or it is broken.
    """
    if (path / checkpoint.MANIFEST).exists():
        return checkpoint.load(path)
    found = checkpoint.list_checkpoints(path / "checkpoints")
    if not found:
        raise HarnessError(
            "no run with checkpoints here", where=str(path), hint="Give a folder like runs/<recipe>/<run-id>."
        )
    if which == "last":
        return checkpoint.load(found[-1])
    if which == "best":
        best = checkpoint.load(found[-1]).state["progress"]["best"]
        which = f"step_{best['step']}" if best else "best"
    names = [p.name for p in found]
    if which not in names:
        raise HarnessError(f'no checkpoint "{which}" in this run', where=str(path), hint=nearest(which, names))
    return checkpoint.load(path / "checkpoints" / which)


def _check_same_training(recipe: Recipe, saved: checkpoint.Saved) -> None:
    """Refuse to go on with settings that would make it another training."""
    before_path = saved.path.parent.parent / "recipe.yaml"
    if not before_path.exists():
        return
    changed = differences(load_resolved(before_path), recipe)
    wrong = {k: v for k, v in changed.items() if not k.startswith(_MAY_CHANGE)}
    if wrong:
        listed = "; ".join(f"{k}: {old!r} → {new!r}" for k, (old, new) in wrong.items())
        raise HarnessError(
            f"the run was trained with other settings: {listed}",
            where=str(before_path),
            hint="Resume with the same recipe, or start a new run with another --run-dir.",
        )


def _describe_run(path: Path, recipe: Recipe, runtime: Runtime) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(resolved_yaml(recipe))
    write_json(path / "provenance.json", {**provenance(runtime.world_size), "recipe_sha256": fingerprint(recipe)})


def _trackers(path: Path, recipe: Recipe, parts: Parts, progress: Progress, steps: int) -> Tracker:
    if not parts.runtime.is_main:
        return NullTracker()
    per_epoch = parts.plan.steps_per_epoch
    console = ConsoleTracker(
        epochs=round(steps / per_epoch, 2),
        steps_per_epoch=per_epoch,
        total_steps=steps,
        from_step=progress.step,
    )
    trackers: list[Tracker] = [JsonlTracker(path / "metrics.jsonl", from_step=progress.step), console]
    mode = resolve_mode(recipe.tracking.wandb)
    if mode != "disabled":
        tracking = recipe.tracking
        trackers.append(
            WandbTracker(
                mode=mode,
                directory=path,
                run_id=path.name,
                name=f"{recipe.name}-{path.name}",
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group,
                tags=tracking.tags,
                config=recipe.model_dump(mode="json"),
                warn=console.note,
            )
        )
    return Trackers(trackers)


def _announce(parts: Parts, recipe: Recipe, path: Path, progress: Progress, steps: int) -> None:
    manifest, runtime = parts.store.manifest, parts.runtime
    count = sum(p.numel() for p in parts.bare_model.parameters())
    note = parts.tracker.note
    note(
        f"{recipe.name}: {recipe.model.name}, {count:,} parameters, on {manifest.source} "
        f"({parts.plan.count:,} train, {parts.test_count:,} test images, {len(manifest.classes)} classes)"
    )
    note(
        f"  {runtime.world_size} × {runtime.device.type}, precision {recipe.training.precision}, "
        f"{parts.memory_format}, loader {recipe.data.loader}, global batch {parts.plan.global_batch_size}, "
        f"{steps} steps of {parts.plan.steps_per_epoch} an epoch"
    )
    for line in parts.numerics.render().splitlines():
        note(f"  {line}")
    if progress.step:
        note(f"  resumed at step {progress.step} of {steps}")
    note(f"  run directory {path}")


def _cadence(recipe: Recipe, parts: Parts, steps: int) -> Cadence:
    per_epoch, saving = parts.plan.steps_per_epoch, recipe.checkpoint
    every = [saving.every_steps] if saving.every_steps else []
    every += [saving.every_epochs * per_epoch] if saving.every_epochs else []
    return Cadence(
        total_steps=steps,
        log_steps=recipe.tracking.log_every_steps,
        evaluate_steps=recipe.evaluation.every_epochs * per_epoch,
        checkpoint_steps=tuple(every),
    )


def _result(recipe: Recipe, parts: Parts, progress: Progress) -> dict[str, Any]:
    """What `result.json` holds; accuracies are shares from 0 to 1."""
    assert progress.last is not None
    assert progress.best is not None
    last, best = progress.last, progress.best
    return {
        "recipe": recipe.name,
        **last["test"],
        "step": last["step"],
        "epoch": last["epoch"],
        "ema": last.get("test_ema"),
        "best": {
            **best[parts.best_by],
            "step": best["step"],
            "epoch": best["epoch"],
            "by": recipe.checkpoint.best_by,
        },
        "seconds": progress.train_seconds,
        "images_per_second": progress.images_seen / max(progress.train_seconds, 1e-9),
        "parameters": sum(p.numel() for p in parts.bare_model.parameters()),
        "data_source": parts.store.manifest.source,
        "world_size": parts.runtime.world_size,
        "precision": recipe.training.precision,
        "seed": recipe.seed,
    }
