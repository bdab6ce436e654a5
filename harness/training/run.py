"""A whole run: where it starts, the training, the result."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import write_json, write_text
from harness.recipe import Recipe
from harness.recipe.loading import fingerprint, resolved_yaml
from harness.runs import is_unused
from harness.runtime import joined, provenance
from harness.tracking.console import ConsoleTracker
from harness.tracking.metrics import JsonlTracker, Tracker, Trackers, read
from harness.tracking.wandb_artifacts import artifacts_at_finish, artifacts_at_start
from harness.tracking.wandb_run import WandbTracker, identity_of, new_run_id, resolve_mode
from harness.training import checkpoint
from harness.training.claiming import claim
from harness.training.loop import Cadence, fit
from harness.training.parts import Parts, assemble, total_steps
from harness.training.profiler import Profiler, StepProfiler, TooFewSteps, plan_steps
from harness.training.resuming import agree_on_start
from harness.training.startup import Startup
from harness.training.state import Progress
from harness.training.stopping import Stopped


def train(
    recipe: Recipe,
    *,
    run_directory: Path | None,
    resume: str,
    profile: bool = False,
    began_at: float | None = None,
) -> dict[str, Any]:
    """Train a recipe and return its result (also written as `result.json`).

    Args:
        run_directory: where to write; None makes `runs/<recipe>/<run-id>`.
        resume: "auto", "never" or the path of a checkpoint or run.
        profile: tell where the time of some steps goes, in the run directory's `profile/`.
        began_at: when the command began, by `time.perf_counter()`, for what is told of the start; None is now. The
            command line gives it without what Python waited for (a slow disk) before our first line.

    Raises:
        HarnessError: see its text; with exit code 2 nothing was started and nothing was overwritten.
    """
    startup = Startup(began_at)
    startup.lap("imports")
    with ExitStack() as stack:
        runtime = stack.enter_context(
            joined(precision=recipe.training.precision, seed=recipe.seed, recipe_sha256=fingerprint(recipe))
        )
        start = agree_on_start(recipe, runtime, stack, run_directory=run_directory, resume=resume)
        path = start.run_directory
        startup.lap("ranks")
        saved = checkpoint.load(start.checkpoint) if start.checkpoint is not None else None
        parts = assemble(recipe, runtime, path / "checkpoints", startup)
        stack.callback(parts.close)
        progress = parts.restore(saved) if saved is not None else Progress()
        steps = total_steps(recipe, parts.plan)
        if progress.step > steps:
            raise HarnessError(
                f"the checkpoint is of step {progress.step}, the training has {steps}",
                where=str(path),
                hint="Train longer (training.epochs), or resume from an earlier checkpoint by its path.",
            )
        if runtime.is_main:
            hold = start.hold or claim(path, stack)
            if start.hold is None and not is_unused(path):
                raise HarnessError(
                    "another process has begun a training in this run directory meanwhile",
                    where=str(path),
                    hint="Give another --run-dir, or resume that one with --resume auto.",
                )
            hold.sign()
            parts.writer.check_hold = hold.check
            stack.callback(parts.writer.close)  # before the directory is given free
            _describe_run(path, recipe, parts, progress, steps)
            if profile:
                parts.profiler = _profiler(path, parts, progress, steps)
        return _train(recipe, parts, path, progress, steps)


def _train(recipe: Recipe, parts: Parts, path: Path, progress: Progress, steps: int) -> dict[str, Any]:
    parts.tracker = _trackers(path, recipe, parts, progress, steps)
    parts.startup.lap("trackers")
    _announce(parts, recipe, path, progress, steps)
    result = None
    together = False
    try:
        fit(parts, _cadence(recipe, parts, steps), progress)
        result = _result(recipe, parts, progress)
        if parts.runtime.is_main:
            parts.writer.check_hold()
            write_json(path / "result.json", result)
        together = True
    except Stopped:
        together = True
        raise
    finally:
        for line in parts.profiler.close():
            parts.tracker.note(line)
        parts.tracker.finish(result)
        if together:  # launchers end the other ranks soon after the first has ended, and this one has most to finish
            parts.runtime.accelerator.wait_for_everyone()
    return {**result, "run_directory": str(path)}


def _profiler(path: Path, parts: Parts, progress: Progress, steps: int) -> Profiler:
    plan = plan_steps(progress.step, steps, parts.plan.steps_per_epoch)
    if plan is None:
        return TooFewSteps()
    facts = {
        "rank": parts.runtime.rank,
        "world_size": parts.runtime.world_size,
        "global_batch_size": parts.plan.global_batch_size,
    }
    return StepProfiler(plan, path / "profile", device=parts.runtime.device, facts=facts)


def _describe_run(path: Path, recipe: Recipe, parts: Parts, progress: Progress, steps: int) -> None:
    """Write what is known at the start, and move aside what going on from an earlier step makes untrue."""
    file, result = path / "provenance.json", path / "result.json"
    before = {"wandb_run_id": new_run_id(), "starts": []} | _read_json(file)
    finished_step = _read_json(result).get("step", 0)
    manifest = parts.store.manifest
    now = {
        **provenance(parts.runtime.world_size, parts.runtime.ignored),
        "recipe_sha256": fingerprint(recipe),
        "data": {"source": manifest.source, "origin": manifest.origin, "sha256": dict(manifest.sha256)},
        "from_step": progress.step,
        "kernels": parts.network.kernels,
    }
    _warn_of_other_kernels(before["starts"], now)
    write_text(path / "recipe.yaml", resolved_yaml(recipe))
    write_json(file, {**before, "starts": [*before["starts"], now]})
    checkpoint.set_aside_later_than(path / "checkpoints", progress.step)
    if result.exists() and progress.step < steps:  # of a shorter training that goes on now
        result.rename(path / f"result_step_{finished_step}.json")


def _warn_of_other_kernels(starts: list[dict[str, Any]], now: dict[str, Any]) -> None:
    """Dropout draws from another source with other kernels, so that no bits can be promised from here on."""
    earlier = starts[-1].get("kernels") if starts else None
    if earlier is not None and now["from_step"] and earlier.split()[0] != now["kernels"].split()[0]:
        print(
            f"WARNING the run had other kernels before ({earlier}), now {now['kernels']}: dropout draws anew, so it "
            "will not end bit-equal to a run that was left alone",
            file=sys.stderr,
        )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run; empty where there is no file.

    Raises:
        HarnessError: it is broken.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise HarnessError(
            "is not a JSON object", where=str(path), hint="Move it aside; checkpoints do not depend on it."
        )
    return data


def _trackers(path: Path, recipe: Recipe, parts: Parts, progress: Progress, steps: int) -> Tracker:
    if not parts.runtime.is_main:
        return Tracker()
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
        settings = recipe.model_dump(mode="json")
        trackers.append(
            WandbTracker(
                mode=mode,
                directory=path,
                run_id=json.loads((path / "provenance.json").read_text())["wandb_run_id"],
                identity=identity_of(settings, run_id=path.name, world_size=parts.runtime.world_size),
                config=settings,
                before=read(path / "metrics.jsonl"),
                at_start=artifacts_at_start(recipe, num_classes=len(parts.store.manifest.classes)),
                at_finish=artifacts_at_finish(recipe, path),
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
    for line in parts.network.numerics.render().splitlines():
        note(f"  {line}")
    note(f"  kernels: {parts.network.kernels}")
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
        "startup_seconds": parts.startup.seconds,
        "precision": recipe.training.precision,
        "kernels": parts.network.kernels,
        "seed": recipe.seed,
    }
