"""Bring a W&B server up to metrics.jsonl: for nodes without a network, and servers that died in the middle."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError
from harness.files import directory_lock, write_json
from harness.tracking import wandb_server
from harness.tracking.base import Record
from harness.tracking.extras import Extras
from harness.tracking.identity import Identity
from harness.tracking.rows import row_number
from harness.tracking.wandb_server import Difference, compare
from harness.tracking.wandb_tracker import UPLOADED, WandbTracker, delivery


@dataclass(frozen=True)
class Upload:
    """A run to be uploaded.

    Attributes:
        directory: of the run.
        run_id: W&B's.
        settings: the resolved recipe.
        records: of metrics.jsonl.
        result: of result.json; None for a run that has not ended.
        extras: makes what the recipe asks for beside curves.
    """

    directory: Path
    run_id: str
    identity: Identity
    settings: Mapping[str, Any]
    records: Sequence[Record]
    result: Mapping[str, Any] | None
    extras: Callable[[], Extras]


def sync(upload: Upload) -> str:
    """Send what the server lacks of a run; afterwards its history equals metrics.jsonl. Twice is the same as once.

    Returns:
        What was done, in a sentence.

    Raises:
        HarnessError: no key or a refused one, no answer, or a history that cannot be mended by adding to it.
    """
    identity = upload.identity
    entity = wandb_server.entity_for(identity.entity)
    where = f"{entity}/{identity.project}/{upload.run_id} on {wandb_server.base_url()}"
    before = _difference(upload, entity)
    if before is not None and not before.missing and _is_noted(upload):
        return f"{where} is complete: {len(upload.records)} records; nothing was sent"
    is_whole = _send(replace(upload, identity=replace(identity, entity=entity)))
    after = _difference(upload, entity)
    if after is not None and after.missing:
        raise HarnessError(
            f"the W&B server lacks {len(after.missing)} of {len(upload.records)} records after the upload",
            where=where,
            hint="Run `harness track sync` again.",
            exit_code=EXIT_FAILED,
        )
    if is_whole:
        _note(upload)
    sent = len(upload.records) if before is None else len(before.missing)
    checked = "its history cannot be read back here" if after is None else "its history equals metrics.jsonl"
    return f"{where}: sent {sent} of {len(upload.records)} records; {checked}"


def held(directory: Path) -> AbstractContextManager[None]:
    """Hold a run against a second upload at once: each record would be sent twice, and a second new id be noted.

    Raises:
        HarnessError: another process uploads it, or nothing can be written there.
    """
    taken = HarnessError(
        "another process uploads this run",
        where=str(directory),
        hint="Wait for it: two at once would send each record twice.",
        exit_code=EXIT_FAILED,
    )
    hint = "What was uploaded is noted there: see that it is a folder and may be written to."
    return directory_lock(directory / "wandb", taken=taken, use="the folder of W&B's files", hint=hint)


def _difference(upload: Upload, entity: str) -> Difference | None:
    """What the server lacks; None where it cannot be asked.

    Raises:
        HarnessError: it does not answer, or it has what only a new W&B run can mend.
    """
    try:
        rows = wandb_server.read_history(entity, upload.identity.project, upload.run_id)
    except OSError as error:
        raise HarnessError(
            f"the W&B server does not answer ({error})",
            where=wandb_server.base_url(),
            hint="Run it again where the server can be reached.",
            exit_code=EXIT_FAILED,
        ) from None
    if rows is None:
        return None
    found = compare(upload.records, rows)
    if found.wrong:
        raise HarnessError(
            f"the server's history of this run is another one than metrics.jsonl: {'; '.join(found.wrong)}",
            where=str(upload.directory),
            hint="W&B's histories are only added to; --rebuild uploads the run whole as a new W&B run.",
        )
    return found


def _send(upload: Upload) -> bool:
    """Whether all that the recipe asks for beside curves went with them; what did not is told as a warning."""
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="harness-track-") as folder:  # what is under wandb/ stays as it is
        tracker = WandbTracker(
            mode="online",
            directory=Path(folder),
            run_id=upload.run_id,
            identity=upload.identity,
            config=upload.settings,
            warn=said.append,
            before=upload.records,
            extras=upload.extras(),
            of_another_machine=True,
        )
        tracker.finish(upload.result)
    if not tracker.delivered:
        raise HarnessError(
            f"the upload broke off: {said[0] if said else 'the client gave no reason'}",
            where=str(upload.directory),
            hint="Run it again; what has arrived is not sent a second time. HARNESS_WANDB_TIMEOUT_SECONDS=600 gives it "
            "ten minutes.",
            exit_code=EXIT_FAILED,
        )
    for text in said:
        print(f"WARNING {upload.directory}: {text}", file=sys.stderr, flush=True)
    return tracker.is_whole


def _is_noted(upload: Upload) -> bool:
    try:
        return bool(json.loads(_note_file(upload).read_text()) == _wanted_note(upload))
    except (OSError, ValueError):
        return False


def _note(upload: Upload) -> None:
    write_json(_note_file(upload), _wanted_note(upload))


def _wanted_note(upload: Upload) -> dict[str, Any]:
    last = max(map(row_number, upload.records), default=-1)
    return delivery(upload.run_id, last, finished=upload.result is not None)


def _note_file(upload: Upload) -> Path:
    return upload.directory / "wandb" / UPLOADED
