"""`harness track sync`: bring a W&B server up to metrics.jsonl, where a run had no network or its server died."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, EXIT_FAILED, HarnessError, from_disk, print_error
from harness.files import directory_lock, write_json
from harness.recipe import load
from harness.runs import Run, open_run
from harness.tracking import wandb_run
from harness.tracking.metrics import Record

_SECTIONS = ("checkpoint", "data", "model", "tracking", "training")  # that say what W&B is given
_NOT_COMPARED = ("_runtime", "_timestamp", "perf/", "system/")  # W&B's own, and times: measured again


def sync_runs(paths: Sequence[Path], *, rebuild: bool) -> int:
    """Send what the server lacks of each run, and print what was done; one run's trouble stops no other.

    `rebuild` gives each run a new id on W&B first; the old one stays on the server as it is. Returns the exit code of
    the first run that could not be uploaded, else 0.
    """
    code = EXIT_DONE
    for path in paths:
        try:
            run = open_run(path)
            with _held(run.path):
                print(_sync(run, rebuild=rebuild), flush=True)
        except (HarnessError, OSError) as error:
            reported = from_disk(error) if isinstance(error, OSError) else error
            if reported is None:
                raise
            print_error(reported)
            code = code or reported.exit_code
    return code


def _held(directory: Path) -> AbstractContextManager[None]:
    """Hold a run against a second upload at once: each record would be sent twice, and a second new id be noted."""
    hint = "Wait for it: two at once would send each record twice."
    taken = HarnessError("another process uploads this run", where=str(directory), hint=hint, exit_code=EXIT_FAILED)
    hint = "What was uploaded is noted there: see that it is a folder and may be written to."
    return directory_lock(directory / "wandb", taken=taken, use="the folder of W&B's files", hint=hint)


def _sync(run: Run, *, rebuild: bool) -> str:
    """Send what the server lacks of a run, whose history equals metrics.jsonl then. Twice is the same as once."""
    records = [record for record in run.records if (record.get("kind"), record.get("split")) in wandb_run.PLACES]
    _check(run, records, rebuild=rebuild)
    if left := len(run.records) - len(records):
        print(f"WARNING {run.path}: {left} records are of another version and are left out", file=sys.stderr)
    world_size = run.starts[-1].get("world_size", 1) if run.starts else 1
    identity = wandb_run.identity_of(run.settings, run_id=run.run_id, world_size=world_size)
    identity["entity"] = entity_for(identity["entity"])
    run_id, missing = _choose_id(run, records, identity, rebuild=rebuild)
    where = f"{identity['entity']}/{identity['project']}/{run_id} on {wandb_run.base_url()}"
    note = wandb_run.delivery(run_id, max(map(wandb_run.row_number, records)), finished=run.result is not None)
    if missing == 0 and _noted(run) == note:
        return f"{where} is complete: {len(records)} records; nothing was sent"
    is_whole = _send(run, records, identity, run_id)
    if still_missing := _missing(run, records, identity, run_id):
        what = f"the W&B server lacks {still_missing} of {len(records)} records after the upload"
        raise HarnessError(what, where=where, hint="Run `harness track sync` again.", exit_code=EXIT_FAILED)
    if is_whole:
        write_json(run.path / wandb_run.UPLOADED, note)
    checked = "its history cannot be read back here" if still_missing is None else "its history equals metrics.jsonl"
    return f"{where}: sent {len(records) if missing is None else missing} of {len(records)} records; {checked}"


def _check(run: Run, records: Sequence[Record], *, rebuild: bool) -> None:
    broken = [name for name in _SECTIONS if not isinstance(run.settings.get(name) or {}, Mapping)]
    run_id = run.provenance.get("wandb_run_id")
    if run.state == "running":
        what = "the run is still going, and uploads for itself"
        hint = "Run `harness track sync` when it has ended; what it could not deliver is sent then."
    elif not records:
        what = "there is nothing to upload: metrics.jsonl has no records that this version knows"
        hint = "Train it first: harness train RECIPE --resume auto."
    elif not run.settings or not run.provenance:
        what = f"the run cannot be uploaded: {'; '.join(run.problems)}"
        hint = "recipe.yaml and provenance.json say what the run is; put them back."
    elif broken:
        what = f"recipe.yaml is broken: {', '.join(broken)} must be a section with keys"
        hint = "Put back the recipe.yaml that the training wrote."
    elif not rebuild and not (run_id and isinstance(run_id, str)):
        what, hint = "provenance.json has no wandb_run_id", "--rebuild gives the run a new one."
    else:
        return
    raise HarnessError(what, where=str(run.path), hint=hint)


def _choose_id(
    run: Run, records: Sequence[Record], identity: Mapping[str, Any], *, rebuild: bool
) -> tuple[str, int | None]:
    """The W&B run to fill, and how many records it lacks: None where that is not known.

    A new id is noted before anything is sent, so that a resumed training and the next `--rebuild` continue with it
    where the upload breaks off.
    """
    provenance = dict(run.provenance)
    run_id, before = provenance.get("wandb_run_id"), provenance.get("wandb_run_ids_before", [])
    broke_off = before and _noted(run).get("run_id") != run_id
    if broke_off or not rebuild:
        try:
            return str(run_id), _missing(run, records, identity, str(run_id))
        except _OtherHistory:
            if not rebuild:
                raise
    new_id = secrets.token_hex(8)
    ids = {"wandb_run_id": new_id, "wandb_run_ids_before": [*before, run_id] if run_id else before}
    write_json(run.path / "provenance.json", provenance | ids)
    return new_id, None


def _noted(run: Run) -> dict[str, Any]:
    try:
        noted = json.loads((run.path / wandb_run.UPLOADED).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _missing(run: Run, records: Sequence[Record], identity: Mapping[str, Any], run_id: str) -> int | None:
    """How many records the server lacks; None where it does not give the history. Raises _OtherHistory."""
    try:
        rows = wandb_run.read_history(identity["entity"], identity["project"], run_id)
    except OSError as error:
        raise _no_answer(f"does not answer ({error})") from None
    if rows is None:
        return None
    if (step := first_difference(records, rows)) is not None:
        what = f"the server's history of this run is another one than metrics.jsonl from step {step} on"
        hint = "W&B's histories are only added to; --rebuild uploads the run whole as a new W&B run."
        raise _OtherHistory(what, where=str(run.path), hint=hint)
    return len(records) - len(rows)


class _OtherHistory(HarnessError):
    """Adding to it cannot make it that of metrics.jsonl."""


def first_difference(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The optimizer step of the first row of a server's history that is not the next of the records'; None for none.

    Times are not compared: a resumed run measures them again.
    """
    wanted = [_comparable({**wandb_run.values_of(record), "_step": wandb_run.row_number(record)}) for record in records]
    for index, row in enumerate(map(_comparable, rows)):
        if row != (wanted[index] if index < len(wanted) else None):
            return int(row["_step"]) // len(wandb_run.PLACES)
    return None


def _comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _number(v) for k, v in row.items() if v is not None and not k.startswith(_NOT_COMPARED)}


def _number(value: Any) -> Any:
    try:
        number = float(value)  # also of "NaN" and "Infinity"
    except (TypeError, ValueError):
        return value
    return "nan" if math.isnan(number) else number  # NaN is not even equal to itself


def _send(run: Run, records: Sequence[Record], identity: Mapping[str, Any], run_id: str) -> bool:
    """Whether all that the recipe asks for besides curves went with them; what did not is a warning."""
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="harness-track-") as folder:  # what is under wandb/ stays as it is
        tracker = wandb_run.WandbTracker(
            mode="online",
            directory=Path(folder),
            run_id=run_id,
            identity=identity,
            config=run.settings,
            warn=said.append,
            before=records,
            at_finish=_artifacts(run),
            ran_here=False,
        )
        tracker.finish(run.result)
    if not tracker.delivered:
        what = f"the upload broke off: {said[0] if said else 'the client gave no reason'}"
        more = f"{wandb_run.LIMIT_VARIABLE}=600 gives it ten minutes."
        hint = f"Run it again; what has arrived is not sent a second time. {more}"
        raise HarnessError(what, where=str(run.path), hint=hint, exit_code=EXIT_FAILED)
    for text in said:
        print(f"WARNING {run.path}: {text}", file=sys.stderr, flush=True)
    return tracker.is_whole


def _artifacts(run: Run) -> wandb_run.Artifacts:
    """Tables and checkpoints where the recipe asks for them; none where this version cannot read it."""
    if run.setting("tracking.artifacts", "none") == "none" and not run.setting("tracking.predictions_table", False):
        return {}
    from harness.tracking.wandb_artifacts import artifacts_at_finish  # torch, which curves do not need

    try:
        return artifacts_at_finish(load(run.path / "recipe.yaml"), run.path)
    except HarnessError as error:
        print(f"WARNING only curves are uploaded: {error.what}", file=sys.stderr)
        return {}


def entity_for(named: str | None) -> str:
    """The user or team that runs go to: the named one, `$WANDB_ENTITY` or that of the key, which is tried in any case.

    Raises:
        HarnessError: no key, a refused key, or no answer.
    """
    if wandb_run.api_key() is None:
        hint = "Set WANDB_API_KEY, or run `wandb login`; nothing was uploaded."
        raise HarnessError("there is no W&B API key", hint=hint)
    try:
        query = json.dumps({"query": "query Viewer { viewer { entity } }"}).encode()
        viewer = json.loads(wandb_run.ask("/graphql", query))["data"]["viewer"]
        if viewer is not None:
            return str(named or os.environ.get("WANDB_ENTITY") or viewer["entity"])
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise _no_answer(f"answers {error.code} {error.reason}") from None
    except OSError as error:
        raise _no_answer(f"does not answer ({getattr(error, 'reason', error)})") from None
    except (ValueError, KeyError, TypeError):
        raise _no_answer("is no W&B server") from None
    hint = "Set WANDB_API_KEY to a key of this server (WANDB_BASE_URL says which), or run `wandb login --relogin`."
    raise HarnessError("the W&B server refuses the API key", where=wandb_run.base_url(), hint=hint)


def _no_answer(what: str) -> HarnessError:
    hint = "Run it again where the server can be reached; metrics.jsonl keeps everything until then."
    return HarnessError(f"the W&B server {what}", where=wandb_run.base_url(), hint=hint, exit_code=EXIT_FAILED)
