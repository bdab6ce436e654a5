"""A whole run: where it starts, the training, the result."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.distributed.runtime import distributed_context, provenance
from harness.errors import HarnessError
from harness.files import write_json, write_text
from harness.recipe import Recipe
from harness.recipe.loading import fingerprint, resolved_yaml
from harness.runs import is_unused
from harness.tracking.console import ConsoleTracker
from harness.tracking.metrics import JsonlTracker, Tracker, Trackers, read
from harness.tracking.wandb_artifacts import artifacts_at_finish, artifacts_at_start
from harness.tracking.wandb_run import WandbTracker, identity_of, new_run_id, resolve_mode
from harness.training import checkpoint
from harness.training.build import TrainingComponents, total_steps
from harness.training.loop import Cadence, fit
from harness.training.profiler import MIN_STEPS, NullProfiler, StepProfiler, plan_steps
from harness.training.resume import agree_on_start, take_directory
from harness.training.state import Progress, Startup
from harness.training.step import Stopped


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
        profile: measure where the time of some steps goes, in the run directory's `profile/`.
        began_at: when the command began, by `time.perf_counter()`, without what Python waited for (a slow disk).

    Raises:
        HarnessError: see its text; with exit code 2 nothing was started and nothing was overwritten.
    """
    startup = Startup(began_at)
    startup.lap("imports")
    precision, sha256 = recipe.training.precision, fingerprint(recipe)
    with ExitStack() as stack:
        runtime = stack.enter_context(distributed_context(precision=precision, seed=recipe.seed, recipe_sha256=sha256))
        start = agree_on_start(recipe, runtime, stack, run_directory=run_directory, resume=resume)
        path = start.run_directory
        startup.lap("ranks")
        saved = checkpoint.load(start.checkpoint) if start.checkpoint is not None else None
        components = TrainingComponents(recipe, runtime, path / "checkpoints", startup)
        stack.callback(components.close)
        progress = components.checkpointer.restore(saved) if saved is not None else Progress()
        cadence = _cadence(recipe, components)
        if progress.step > cadence.total_steps:
            what = f"the checkpoint is of step {progress.step}, the training has {cadence.total_steps}"
            hint = "Train longer (training.epochs), or resume from an earlier checkpoint by its path."
            raise HarnessError(what, where=str(path), hint=hint)
        if runtime.is_main:
            lock = start.lock or take_directory(path, stack)
            if start.lock is None and not is_unused(path):
                what = "another process has begun a training in this run directory meanwhile"
                hint = "Give another --run-dir, or resume that one with --resume auto."
                raise HarnessError(what, where=str(path), hint=hint)
            lock.sign()
            components.checkpointer.check_lock = lock.check
            stack.callback(components.checkpointer.close)  # before the directory is given free
            run_id = _describe_run(path, recipe, components, progress, is_longer=progress.step < cadence.total_steps)
            components.tracker = _trackers(path, recipe, components, progress, cadence.total_steps, run_id)
            if profile:
                components.step.profiler = _profiler(path, components, progress, cadence.total_steps)
        startup.lap("trackers")
        _announce(components, recipe, path, progress, cadence.total_steps)
        return {**_train(recipe, components, path, progress, cadence), "run_directory": str(path)}


def _cadence(recipe: Recipe, components: TrainingComponents) -> Cadence:
    per_epoch, saving = components.plan.steps_per_epoch, recipe.checkpoint
    every = (saving.every_steps, saving.every_epochs and saving.every_epochs * per_epoch)
    return Cadence(
        total_steps=total_steps(recipe, components.plan),
        log_steps=recipe.tracking.log_every_steps,
        evaluate_steps=recipe.evaluation.every_epochs * per_epoch,
        checkpoint_steps=tuple(filter(None, every)),
    )


def _train(
    recipe: Recipe, components: TrainingComponents, path: Path, progress: Progress, cadence: Cadence
) -> dict[str, Any]:
    result = None
    together = False
    try:
        fit(components, cadence, progress)
        result = _result(recipe, components, progress)
        if components.runtime.is_main:
            components.checkpointer.check_lock()
            write_json(path / "result.json", result)
        together = True
    except Stopped:
        together = True
        raise
    finally:
        for line in components.step.profiler.close():
            components.tracker.note(line)
        components.tracker.finish(result)
        if together:  # launchers end the other ranks soon after the first has ended, and this one has most to finish
            components.runtime.accelerator.wait_for_everyone()
    return result


def _profiler(path: Path, components: TrainingComponents, progress: Progress, steps: int) -> NullProfiler:
    runtime, plan = components.runtime, components.plan
    stretches = plan_steps(progress.step, steps, plan.steps_per_epoch)
    if stretches is None:
        return NullProfiler(f"profile: none, it takes at least {MIN_STEPS} steps")
    facts = {"rank": runtime.rank, "world_size": runtime.world_size, "global_batch_size": plan.global_batch_size}
    return StepProfiler(stretches, path / "profile", device=runtime.device, facts=facts)


def _describe_run(
    path: Path, recipe: Recipe, components: TrainingComponents, progress: Progress, *, is_longer: bool
) -> str:
    """Write what is known at the start, move aside what resuming from an earlier step makes untrue; W&B's run id."""
    file, result = path / "provenance.json", path / "result.json"
    before = {"wandb_run_id": new_run_id(), "starts": []} | _read_json(file)
    finished_step = _read_json(result).get("step", 0)
    manifest, kernels = components.store.manifest, components.network.kernels
    now = {
        **provenance(components.runtime.world_size, components.runtime.ignored),
        "recipe_sha256": fingerprint(recipe),
        "data": {"source": manifest.source, "origin": manifest.origin, "sha256": dict(manifest.sha256)},
        "from_step": progress.step,
        "kernels": kernels,
    }
    earlier = before["starts"][-1].get("kernels") if before["starts"] else None
    if earlier is not None and progress.step and earlier.split()[0] != kernels.split()[0]:
        print(
            f"WARNING the run had other kernels before ({earlier}), now {kernels}: dropout draws anew, so it "
            "will not end bit-equal to a run that was left alone",
            file=sys.stderr,
        )
    write_text(path / "recipe.yaml", resolved_yaml(recipe))
    write_json(file, {**before, "starts": [*before["starts"], now]})
    checkpoint.set_aside_later_than(path / "checkpoints", progress.step)
    if result.exists() and is_longer:
        result.rename(path / f"result_step_{finished_step}.json")
    return str(before["wandb_run_id"])


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run, empty where there is no file. Raises HarnessError: it is broken."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError:
        data = None
    if not isinstance(data, dict):
        hint = "Move it aside; checkpoints do not depend on it."
        raise HarnessError("is not a JSON object", where=str(path), hint=hint)
    return data


def _trackers(
    path: Path, recipe: Recipe, components: TrainingComponents, progress: Progress, steps: int, wandb_run_id: str
) -> Tracker:
    per_epoch, step = components.plan.steps_per_epoch, progress.step
    epochs = round(steps / per_epoch, 2)
    console = ConsoleTracker(epochs=epochs, steps_per_epoch=per_epoch, total_steps=steps, from_step=step)
    trackers: list[Tracker] = [JsonlTracker(path / "metrics.jsonl", from_step=step), console]
    mode = resolve_mode(recipe.tracking.wandb)
    if mode != "disabled":
        settings = recipe.model_dump(mode="json")
        trackers.append(
            WandbTracker(
                mode=mode,
                directory=path,
                run_id=wandb_run_id,
                identity=identity_of(settings, run_id=path.name, world_size=components.runtime.world_size),
                config=settings,
                before=read(path / "metrics.jsonl"),
                at_start=artifacts_at_start(recipe, num_classes=len(components.store.manifest.classes)),
                at_finish=artifacts_at_finish(recipe, path),
                warn=console.note,
            )
        )
    return Trackers(trackers)


def _announce(components: TrainingComponents, recipe: Recipe, path: Path, progress: Progress, steps: int) -> None:
    manifest, runtime, plan = components.store.manifest, components.runtime, components.plan
    lines = [
        f"{recipe.name}: {recipe.model.name}, {components.network.parameter_count:,} parameters, on {manifest.source} "
        f"({plan.count:,} train, {components.evaluator.total:,} test images, {len(manifest.classes)} classes)",
        f"  {runtime.world_size} × {runtime.device.type}, precision {recipe.training.precision}, "
        f"{recipe.training.memory_format}, loader {recipe.data.loader}, global batch {plan.global_batch_size}, "
        f"{steps} steps of {plan.steps_per_epoch} an epoch",
        *(f"  {line}" for line in components.network.numerics.render().splitlines()),
        f"  kernels: {components.network.kernels}",
        *([f"  resumed at step {progress.step} of {steps}"] if progress.step else []),
        f"  run directory {path}",
    ]
    for line in lines:
        components.tracker.note(line)


def _result(recipe: Recipe, components: TrainingComponents, progress: Progress) -> dict[str, Any]:
    """What `result.json` holds; accuracies are shares from 0 to 1."""
    last, best = dict[str, Any](progress.last or {}), dict[str, Any](progress.best or {})
    place = {"step": best["step"], "epoch": best["epoch"], "by": recipe.checkpoint.best_by}
    return {
        "recipe": recipe.name,
        **last["test"],
        "step": last["step"],
        "epoch": last["epoch"],
        "ema": last.get("test_ema"),
        "best": {**best[components.best_by], **place},
        "seconds": progress.train_seconds,
        "images_per_second": progress.images_seen / max(progress.train_seconds, 1e-9),
        "parameters": components.network.parameter_count,
        "data_source": components.store.manifest.source,
        "world_size": components.runtime.world_size,
        "startup_seconds": components.startup.seconds,
        "precision": recipe.training.precision,
        "kernels": components.network.kernels,
        "seed": recipe.seed,
    }
