"""`harness track sync`: runs from their directories to W&B."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, HarnessError, from_disk, print_error
from harness.files import write_json
from harness.recipe import load
from harness.runs import Run, open_run
from harness.tracking.extras import Extras
from harness.tracking.identity import identity_of
from harness.tracking.rows import has_place
from harness.tracking.sync import Upload, held, sync
from harness.tracking.wandb_server import entity_for
from harness.tracking.wandb_tracker import random_run_id

_SECTIONS = ("checkpoint", "data", "model", "tracking", "training")  # that say what W&B is told


def sync_runs(paths: Sequence[Path], *, rebuild: bool) -> int:
    """Bring the server up to each run's metrics.jsonl, and say what was done; one run's trouble stops no other.

    Args:
        rebuild: give each run a new id on W&B first; the old one stays on the server as it is.

    Returns:
        The exit code: that of the first run that could not be uploaded, else 0.
    """
    code = EXIT_DONE
    for path in paths:
        try:
            run = open_run(path)
            with held(run.path):
                print(sync(_upload(run, rebuild=rebuild)), flush=True)
        except HarnessError as error:
            print_error(error)
            code = code or error.exit_code
        except OSError as error:
            told = from_disk(error)
            if told is None:
                raise
            print_error(told)
            code = code or told.exit_code
    return code


def _upload(run: Run, *, rebuild: bool) -> Upload:
    if run.state == "running":
        raise HarnessError(
            "the run is still going, and uploads for itself",
            where=str(run.path),
            hint="Run `harness track sync` when it has ended; what it could not deliver is sent then.",
        )
    records = [record for record in run.records if has_place(record)]
    if not records:
        raise HarnessError(
            "there is nothing to upload: metrics.jsonl has no records that this version knows",
            where=str(run.path),
            hint="Train it first: harness train RECIPE --resume auto.",
        )
    if not run.settings or not run.provenance:
        raise HarnessError(
            f"the run cannot be uploaded: {'; '.join(run.problems)}",
            where=str(run.path),
            hint="recipe.yaml and provenance.json say what the run is; put them back.",
        )
    if broken := [name for name in _SECTIONS if not isinstance(run.settings.get(name) or {}, Mapping)]:
        raise HarnessError(
            f"recipe.yaml is broken: {', '.join(broken)} must be a section with keys",
            where=str(run.path),
            hint="Put back the recipe.yaml that the training wrote.",
        )
    if len(records) < len(run.records):
        left = len(run.records) - len(records)
        print(f"WARNING {run.path}: {left} records are of another version and are left out", file=sys.stderr)
    run_id = _new_id(run) if rebuild else run.provenance.get("wandb_run_id")
    if not isinstance(run_id, str) or not run_id:
        raise HarnessError(
            "provenance.json has no wandb_run_id", where=str(run.path), hint="--rebuild gives the run a new one."
        )
    identity = identity_of(run.settings, run_id=run.run_id, world_size=_world_size(run))
    return Upload(run.path, run_id, identity, run.settings, records, run.result, partial(_extras, run))


def _world_size(run: Run) -> int:
    """Of the latest start, as provenance.json has it; 1 where it does not say."""
    starts = run.provenance.get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else None
    size = last.get("world_size") if isinstance(last, Mapping) else None
    return size if isinstance(size, int) else 1


def _new_id(run: Run) -> str:
    """A new id, noted in provenance.json with the one before, so that a resumed training goes on with it.

    Raises:
        HarnessError: no key or no server, where a new id would be of no use.
    """
    entity_for()
    provenance: dict[str, Any] = dict(run.provenance)
    before = [*provenance.get("wandb_run_ids_before", []), provenance.get("wandb_run_id")]
    new = {**provenance, "wandb_run_id": random_run_id(), "wandb_run_ids_before": [i for i in before if i]}
    write_json(run.path / "provenance.json", new)
    return str(new["wandb_run_id"])


def _extras(run: Run) -> Extras:
    """Tables and checkpoints where the recipe asks for them; curves alone where this version cannot read it."""
    if run.setting("tracking.artifacts", "none") == "none" and not run.setting("tracking.predictions_table", False):
        return Extras()
    from harness.training.showing import extras_of  # torch, which curves do not need

    try:
        return extras_of(load(run.path / "recipe.yaml"), run.path)
    except HarnessError as error:
        print(f"WARNING only curves are uploaded: {error.what}", file=sys.stderr)
        return Extras()
