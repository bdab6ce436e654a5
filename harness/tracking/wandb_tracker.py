"""Weights & Biases: one run a training, offline where there is no key, and never a reason to fail."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import write_json
from harness.tracking import wandb_server
from harness.tracking.base import NullTracker, Record
from harness.tracking.extras import Extras
from harness.tracking.identity import Identity
from harness.tracking.rows import (
    STEP_METRIC,
    SUMMARIES,
    Best,
    Summaries,
    judged_split,
    result_summary,
    row_number,
    values_of,
)
from harness.tracking.wandb_extras import log_answers, log_checkpoints, save_model_summary

LIMIT_VARIABLE = "HARNESS_WANDB_TIMEOUT_SECONDS"
_LIMIT_SECONDS = 60.0
_ANSWER_SECONDS = 10.0  # for a first sign of life: a server that is not there must not hold up a short training
_ARTIFACTS_LIMIT_SECONDS = 150.0  # with what else the first rank ends with, below the time limit of collectives
_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "dryrun": "offline", "run": "online"}
UPLOADED = "uploaded.json"  # under wandb/: what was delivered whole


def resolve_mode(setting: str) -> str:
    """`auto` is online with an API key and offline without; `$WANDB_MODE` wins over `auto` alone.

    `$WANDB_MODE` may be `dryrun` or `run` too, W&B's older words. One that is no mode sends nothing.

    Returns:
        "online", "offline" or "disabled".
    """
    if setting != "auto":
        return setting
    asked = os.environ.get("WANDB_MODE", "")
    if asked in _MODES:
        return _MODES[asked]
    if asked:
        print(f'WARNING WANDB_MODE="{asked}" is not one of {", ".join(_MODES)}: W&B stays offline', file=sys.stderr)
        return "offline"
    return "online" if wandb_server.api_key() else "offline"


def new_run_id() -> str:
    """The id of a new W&B run: that which a sweep's agent has given this training, else a random one."""
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return given or random_run_id()


def random_run_id() -> str:
    """64 random bits: with 32, two of the 10,000 runs that a sweep may have would be one in every 86th sweep."""
    return secrets.token_hex(8)


def limit_seconds() -> float:
    """How long W&B may hold up the beginning and the end of a run: `$HARNESS_WANDB_TIMEOUT_SECONDS`, else a minute."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        seconds = float(text) if text else _LIMIT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:  # more are milliseconds
        raise HarnessError(
            f'must be a number of seconds above 0 and up to 3600, not "{text}"',
            where=LIMIT_VARIABLE,
            hint="Unset it for a minute, or give a number such as 20.",
        )
    return seconds


def _answer_seconds() -> float:
    try:
        return limit_seconds() if LIMIT_VARIABLE in os.environ else _ANSWER_SECONDS
    except HarnessError:
        return _ANSWER_SECONDS  # the start of the run will tell of it


class WandbTracker(NullTracker):
    """A W&B run. Any trouble with the service becomes one warning, and the training goes on without it.

    W&B's own step (`_step`) never goes back, but a resumed training does: each record has a number of its own
    (`row_number`), and those that the server has are not sent again. What an earlier start could not deliver is sent.

    Args:
        mode: "online" or "offline".
        directory: the run directory; W&B's files go to `wandb/` in it.
        run_id: W&B's id of the run, the same for every start.
        config: the resolved recipe.
        before: the records of earlier starts.
        warn: takes a sentence.
        of_another_machine: do not describe this machine, since the training ran elsewhere.
    """

    def __init__(
        self,
        *,
        mode: str,
        directory: Path,
        run_id: str,
        identity: Identity,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        before: Sequence[Record] = (),
        extras: Extras | None = None,
        of_another_machine: bool = False,
    ) -> None:
        self._warn, self._directory, self._identity = warn, directory, identity
        self._config, self._before, self._extras = dict(config), before, extras or Extras()
        self._run_id, self._of_another_machine = run_id, of_another_machine
        self._run: Any = None
        self._active = True
        self._best, self._summaries = Best(judged_split(config)), Summaries()
        self._last_row = -1
        self.delivered = False
        self.is_whole = True  # no extra failed
        if mode == "online" and not wandb_server.answers(within_seconds=_answer_seconds()):
            self._warn(f"W&B: {wandb_server.base_url()} does not answer ({LIMIT_VARIABLE}=SECONDS waits longer)")
            self._active = False
        self._guard(lambda: self._start(mode))
        if mode == "online" and not self._active:  # no network, as on many compute nodes
            self._stop_service()  # it still holds the run's id
            self._active = True
            self._warn("W&B stays offline; `harness track sync` uploads the run later")
            self._guard(lambda: self._start("offline"))

    def _start(self, mode: Any) -> None:
        with warnings.catch_warnings(), _without_mode():
            warnings.simplefilter("ignore")  # the client's own deprecations are not the user's concern
            import wandb

            identity = self._identity
            self._run = wandb.init(
                mode=mode,
                dir=str(self._directory),
                id=self._run_id,
                name=identity.name,
                project=identity.project,
                entity=identity.entity,
                group=identity.group,
                job_type=identity.job_type,
                tags=list(identity.tags),
                config=self._config,
                allow_val_change=True,
                resume="allow",
                settings=wandb.Settings(
                    init_timeout=limit_seconds(),
                    finish_timeout=self._finish_limit_seconds(),  # without one it waits for a dead server for ever
                    finish_timeout_raises=True,
                    silent=True,
                    console="off",
                    x_disable_stats=self._of_another_machine,
                    x_disable_meta=self._of_another_machine,
                    x_save_requirements=not self._of_another_machine,
                ),
            )
        for handler in logging.getLogger("wandb").handlers:  # on a full disk its debug.log would print tracebacks
            handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        for name, summary in SUMMARIES.items():
            self._run.define_metric(name, summary=summary, step_metric=STEP_METRIC)
        self._mode = mode
        self._last_row = self._last_row_held()
        for record in self._before:
            self._take(record)
        self._tell_summary()
        if (summary_text := self._extras.model_summary) is not None:
            self._attempt("the network's summary", lambda: save_model_summary(self._run, summary_text()))

    def _last_row_held(self) -> int:
        """The number of the last row that need not be sent; -1 where there is none."""
        if not self._before:
            return -1
        if self._mode == "offline":  # earlier starts have files of their own
            return max(map(row_number, self._before))
        if self._run.starting_step > 0:  # the server told the client
            return int(self._run.starting_step) - 1
        rows = wandb_server.read_history(self._run.entity, self._run.project, self._run_id)
        return max((int(row["_step"]) for row in rows or ()), default=-1)

    def _finish_limit_seconds(self) -> float:
        more = LIMIT_VARIABLE not in os.environ and self._extras.checkpoints is not None
        return _ARTIFACTS_LIMIT_SECONDS if more else limit_seconds()

    def log(self, record: Record) -> None:
        self._guard(lambda: self._take(record))
        if record["kind"] == "epoch":
            self._guard(self._tell_summary)

    def _take(self, record: Record) -> None:
        number = row_number(record)
        if number > self._last_row:
            self._run.log(values_of(record), step=number, commit=True)  # else the client keeps it until the next
            self._last_row = number
        self._best.take(record)
        self._summaries.take(record)

    def _tell_summary(self) -> None:
        self._run.summary.update({**self._best.summary(), **self._summaries.summary()})

    def finish(self, result: Record | None) -> None:
        if result is not None:
            self._guard(lambda: self._run.summary.update(result_summary(result)))
        self._guard(self._tell_summary)
        if result is not None:
            self._add_extras()
        self._guard(lambda: self._run.finish(exit_code=0 if result is not None else 1))
        if self._active and self._run is not None and self._mode == "online":
            self.delivered = True
            self._attempt("a note of what was uploaded", lambda: self._note_delivery(result))
        self._stop_service()

    def _add_extras(self) -> None:
        answers, checkpoints = self._extras.answers, self._extras.checkpoints
        if answers is not None:
            self.is_whole &= self._attempt("the predictions table", lambda: log_answers(self._run, answers()))
        if checkpoints is not None:
            name = self._identity.name
            self.is_whole &= self._attempt("the checkpoints", lambda: log_checkpoints(self._run, name, checkpoints()))

    def _note_delivery(self, result: Record | None) -> None:
        """What of the extras did not arrive is left to `harness track sync`."""
        finished = result is not None and self.is_whole
        write_json(self._directory / "wandb" / UPLOADED, delivery(self._run_id, self._last_row, finished=finished))

    def _stop_service(self) -> None:
        """Whatever happened before: the client's service process must not outlive the run."""
        client = sys.modules.get("wandb")
        self._active = client is not None
        self._guard(lambda: client.teardown())  # type: ignore[union-attr]
        self._active = False

    def _attempt(self, what: str, action: Callable[[], Any]) -> bool:
        """Something that the run can do without. Whether it was done."""
        if not self._active:
            return False
        try:
            action()
            return True
        except Exception as error:  # whatever it is, the training is done or goes on
            self._warn(f"W&B goes without {what}: {type(error).__name__}: {error}")
            return False

    def _guard(self, action: Callable[[], Any]) -> None:
        if not self._active:
            return
        try:
            action()
        except Exception as error:  # whatever the service or its client does, the training must go on
            self._active = False
            more = f" ({LIMIT_VARIABLE}=SECONDS waits longer)" if isinstance(error, TimeoutError) else ""
            self._warn(f"W&B fails and is left out: {type(error).__name__}: {error}{more}")


@contextmanager
def _without_mode() -> Iterator[None]:
    """The mode is given; one in the environment that the client does not know would make it refuse all settings."""
    before = os.environ.pop("WANDB_MODE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WANDB_MODE"] = before


def delivery(run_id: str, last_row: int, *, finished: bool) -> dict[str, Any]:
    """What `wandb/uploaded.json` says: which server has the run up to which row, and whether it has its end
    too, with all that was wanted beside curves."""
    return {"server": wandb_server.base_url(), "run_id": run_id, "last_row": last_row, "finished": finished}
