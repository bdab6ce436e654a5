"""A training as one Weights & Biases run: offline where there is no key, and never a reason to fail.

A record of metrics.jsonl is one row of W&B's history. Its number there (`_step`) follows from the record alone: the
training and `harness track sync` make the same rows, and however often they upload, each record has one place.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import hashlib
import http.client
import json
import logging
import math
import netrc
import os
import secrets
import ssl
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal
from urllib.parse import quote, urlparse

from harness.errors import EXIT_FAILED, HarnessError
from harness.files import write_json
from harness.tracking.metrics import Record, Tracker

Mode = Literal["online", "offline", "disabled"]
DEFAULT_PROJECT = "dual-branch-harness"
STEP_METRIC = "step"  # the optimizer step, which all charts are drawn over
WORST_TABLE, CONFUSION_TABLE = "predictions/worst", "predictions/confusion"
UPLOADED = "wandb/uploaded.json"  # in the run directory: what was delivered whole
LIMIT_VARIABLE = "HARNESS_WANDB_TIMEOUT_SECONDS"
_WAITS_LONGER = f"({LIMIT_VARIABLE}=SECONDS waits longer)"
_ANSWER_SECONDS = 10.0  # for a first sign of life: a server that is not there must not hold up a short training
_LIMIT_SECONDS = 60.0
_ARTIFACTS_SECONDS = 150.0  # with what else the first rank ends with, below the time limit of collectives
_MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled"}
_MODES |= {"dryrun": "offline", "run": "online"}  # W&B's older words

# Of an optimizer step, in the order in which they are written.
PLACES = {("step", "train"): 0, ("epoch", "train"): 1, ("epoch", "test"): 2, ("epoch", "test_ema"): 3}
_NAMES = {"step": STEP_METRIC, "epoch": "epoch", "lr": "lr/learning_rate", "time_unix_seconds": "_timestamp"}
_SPEED = ("images_per_second", "milliseconds_per_step", "loader_wait_seconds", "seconds", "steps")
# Metrics whose summary is not the last value.
_SUMMARIES = {"test/accuracy": "max", "test_ema/accuracy": "max", "test/loss": "min", "test_ema/loss": "min"}
_SUMMARIES["perf/images_per_second"] = "mean"
_SUMMARISE: dict[str, Callable[..., float]] = {"max": max, "min": min, "mean": fmean}
# Runs that differ in these settings alone are one group.
_OF_THE_RUN = ("name", "seed", "tracking", "checkpoint")
_OF_THE_MACHINE = ("path", "loader", "workers")  # of data

Artifacts = Mapping[str, Callable[[Any], None]]  # what it is, in words: sends it with the W&B run that it is given


def row_number(record: Record) -> int:
    """The record's `_step`: 4 × optimizer step + its place among the records of that step."""
    return len(PLACES) * int(record["step"]) + PLACES[record["kind"], record["split"]]


def values_of(record: Record) -> dict[str, float]:
    """A record's row: `step`, `epoch` and numbers under train/, test/, test_ema/, perf/ and lr/.

    Of the training, values of a log step have plain names (`train/loss`) and those of an epoch the prefix `epoch_`
    (`train/epoch_loss`). The record's time is W&B's own `_timestamp`, seconds since 1970. Takes records as they are
    made and as they are read from the file, where NaN and infinity are texts.
    """
    row: dict[str, float] = {}
    for key, value in record.items():
        number = float(value) if value in ("nan", "inf", "-inf") else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            row[_metric_name(key, record)] = number
    return row


def _metric_name(key: str, record: Record) -> str:
    split, whole_epoch = record["split"], record["kind"] == "epoch"
    if key in _NAMES:
        return _NAMES[key]
    if key in _SPEED:
        of_what = "" if not whole_epoch else "epoch_" if split == "train" else f"{split}_"
        return f"perf/{of_what}{key}"
    return f"{split}/epoch_{key}" if whole_epoch and split == "train" else f"{split}/{key}"


class Summary:
    """The summary of a run over the records of all its starts; W&B's client knows those alone that this one has sent.

    `judged_split` is test or test_ema: whose accuracy decides what is best.
    """

    def __init__(self, judged_split: str) -> None:
        self._judged_by = f"{judged_split}/accuracy"
        self._values: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}

    def take(self, record: Record) -> None:
        row = values_of(record)
        for name in _SUMMARIES.keys() & row.keys():
            if math.isfinite(row[name]):
                self._values.setdefault(name, []).append(row[name])
        if row.get(self._judged_by, math.nan) > self._best.get("best/accuracy", -1):
            self._best = {"best/accuracy": row[self._judged_by], "best/epoch": row["epoch"], "best/step": row["step"]}

    def values(self) -> dict[str, Any]:
        """`best/accuracy`, the first of equals, with its epoch and step; and as the client has them, `{"max": …}`."""
        kinds = {name: _SUMMARIES[name] for name in self._values}
        return self._best | {name: {kind: _SUMMARISE[kind](self._values[name])} for name, kind in kinds.items()}


def result_summary(result: Mapping[str, Any], prefix: str = "result") -> dict[str, float | str]:
    """result.json as summary values: `result/accuracy`, `result/best/accuracy`, …"""
    flat: dict[str, float | str] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            flat |= result_summary(value, f"{prefix}/{key}")
        elif value is not None:
            flat[f"{prefix}/{key}"] = value
    return flat


def identity_of(settings: Mapping[str, Any], *, run_id: str, world_size: int) -> dict[str, Any]:
    """Where a run directory's run belongs, as `wandb.init` takes it; the recipe's `tracking` section wins."""
    model, data, training, tracking = (settings.get(name) or {} for name in ("model", "data", "training", "tracking"))
    recipe = settings.get("name") or "run"
    experiment = {key: value for key, value in settings.items() if key not in _OF_THE_RUN}
    experiment["data"] = {key: value for key, value in data.items() if key not in _OF_THE_MACHINE}
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True, default=str).encode()).hexdigest()[:8]
    tags = [f"model:{model.get('name')}", f"data:{data.get('source')}", f"precision:{training.get('precision')}"]
    tags = tracking.get("tags") or [tag[:64] for tag in (*tags, f"ranks:{world_size}")]  # W&B's limit
    return {
        "entity": tracking.get("entity"),
        "project": tracking.get("project") or DEFAULT_PROJECT,
        "name": tracking.get("run_name") or f"{recipe}-{run_id}",
        "group": tracking.get("group") or f"{recipe}-{digest}",
        "job_type": tracking.get("job_type") or "train",
        "tags": list(tags),
    }


def base_url() -> str:
    """`$WANDB_BASE_URL`, else the server that `wandb login --host` noted, else W&B's own service."""
    noted = configparser.ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    with contextlib.suppress(OSError, ValueError, configparser.Error):
        noted.read(folder / "settings")
    of_login = noted.get("default", "base_url", fallback=None)
    return (os.environ.get("WANDB_BASE_URL") or of_login or "https://api.wandb.ai").rstrip("/")


def api_key() -> str | None:
    """The key for that server: of `$WANDB_API_KEY`, else of netrc, where `wandb login` writes it."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        keys, address = netrc.netrc(), urlparse(base_url())
    except (OSError, ValueError, netrc.NetrcParseError):
        return None
    found = keys.authenticators(address.netloc) or keys.authenticators(address.hostname or "")
    return found[2] if found else None


def ask(path: str, data: bytes | None = None, *, within_seconds: float = 20) -> bytes:
    """Send a GET, or with data a POST, to the server. Raises OSError (of it HTTPError)."""
    token = base64.b64encode(f"api:{api_key() or ''}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json", "User-Agent": "harness"}
    request = urllib.request.Request(base_url() + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=within_seconds) as answer:
            return bytes(answer.read())
    except http.client.HTTPException as error:  # no address, or something there that does not speak HTTP
        raise urllib.error.URLError(f"{type(error).__name__}: {error}") from None


def answers(*, within_seconds: float) -> bool:
    """Whether the server says anything at all, whatever it says."""
    try:
        ask("", within_seconds=within_seconds)
    except urllib.error.URLError as error:  # of HTTP, or of certificates that the client may know and Python does not
        return isinstance(error, urllib.error.HTTPError) or isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True


def read_history(entity: str, project: str, run_id: str) -> list[dict[str, Any]] | None:
    """The rows that the server has of a run, in its order; None where it does not let them be read.

    W&B's own servers give them by the public interface. Others that speak the protocol (openwandb) do not know that
    query, but serve the history as the file they were sent. Raises OSError where the server does not answer.
    """
    path = "/files/" + "/".join(quote(part, safe="") for part in (entity, project, run_id, "wandb-history.jsonl"))
    try:
        return [json.loads(line) for line in ask(path).decode().splitlines() if line.strip()]
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # any other says no more than that there is no such file: the key was asked for before
            raise
    except ValueError:
        pass
    import wandb

    try:
        return list(wandb.Api(timeout=20).run(f"{entity}/{project}/{run_id}").scan_history())
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError):  # no such run, or no such query
        return None


def resolve_mode(setting: Mode | Literal["auto"]) -> Mode:
    """`auto` is online with an API key and offline without.

    `$WANDB_MODE` wins over `auto` alone; one that is no mode sends nothing.
    """
    if setting != "auto":
        return setting
    asked = os.environ.get("WANDB_MODE", "")
    if asked and asked not in _MODES:
        print(f'WARNING WANDB_MODE="{asked}" is not one of {", ".join(_MODES)}: W&B stays offline', file=sys.stderr)
    return _MODES.get(asked, "offline" if asked or not api_key() else "online")


def new_run_id() -> str:
    """The id of a new W&B run: that which a sweep's agent has given this training, else a random one."""
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return given or secrets.token_hex(8)  # with half the bits, one sweep in 86 of 10,000 runs would have an id twice


def delivery(run_id: str, last_row: int, *, finished: bool) -> dict[str, Any]:
    """What `uploaded.json` says: which server has the run up to which row, and whether it has its end and artifacts."""
    return {"server": base_url(), "run_id": run_id, "last_row": last_row, "finished": finished}


@dataclass(kw_only=True)
class WandbTracker(Tracker):
    """A W&B run. Any trouble with the service becomes one warning, and the training continues without it.

    W&B's own step (`_step`) never goes back, but a resumed training does: each record has a number of its own
    (`row_number`), and those that the server has are not sent again. What an earlier start could not deliver is sent.

    `at_start` and `at_finish` are sent besides curves, and may fail.
    """

    mode: Mode
    directory: Path  # of the run; W&B's files go to `wandb/` in it
    run_id: str  # W&B's, the same for every start
    identity: Mapping[str, Any]  # as `identity_of` gives it
    config: Mapping[str, Any]  # the resolved recipe
    warn: Callable[[str], None]
    before: Sequence[Record] = ()  # of earlier starts
    at_start: Artifacts = field(default_factory=dict)
    at_finish: Artifacts = field(default_factory=dict)
    ran_here: bool = True  # else this machine is not described
    delivered: bool = field(default=False, init=False)  # at the end, whether the server has the run
    is_whole: bool = field(default=True, init=False)  # and all of `at_finish`

    def __post_init__(self) -> None:
        self._run: Any = None
        self._active = True
        if not self._attempt(self._read_limit):
            return
        if self.mode == "online" and not answers(within_seconds=self._limit or _ANSWER_SECONDS):
            self.warn(f"W&B: {base_url()} does not answer {_WAITS_LONGER}")
        elif self._attempt(self._start) or self.mode == "offline":
            return
        self._stop_service()  # it still holds the run's id
        self.warn("W&B stays offline; `harness track sync` uploads the run later")
        self.mode, self._active = "offline", True  # no network, as on many compute nodes
        self._attempt(self._start)

    def _read_limit(self) -> None:
        """How long W&B may hold up the beginning and the end of a run, where the user says so."""
        text = os.environ.get(LIMIT_VARIABLE, "")
        try:
            self._limit = float(text) if text else None
        except ValueError:
            self._limit = 0.0
        if self._limit is not None and not 0 < self._limit <= 3600:  # more are milliseconds
            what = f'must be a number of seconds above 0 and up to 3600, not "{text}"'
            hint = "Unset it for a minute, or give a number such as 20."
            raise HarnessError(what, where=LIMIT_VARIABLE, hint=hint)

    def _start(self) -> None:
        with warnings.catch_warnings(), _without_mode():
            warnings.simplefilter("ignore")  # the client's own deprecations are not the user's concern
            import wandb

            self._run = wandb.init(
                **self.identity,
                mode=self.mode,
                dir=str(self.directory),
                id=self.run_id,
                config=dict(self.config),
                allow_val_change=True,
                resume="allow",
                settings=wandb.Settings(
                    init_timeout=self._limit or _LIMIT_SECONDS,
                    # Without one it waits for a dead server for ever.
                    finish_timeout=self._limit or (_ARTIFACTS_SECONDS if self.at_finish else _LIMIT_SECONDS),
                    finish_timeout_raises=True,
                    silent=True,
                    console="off",
                    x_disable_stats=not self.ran_here,
                    x_disable_meta=not self.ran_here,
                    x_save_requirements=self.ran_here,
                ),
            )
        for handler in logging.getLogger("wandb").handlers:  # on a full disk its debug.log would print tracebacks
            handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._run.define_metric(STEP_METRIC)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        for name, summary in _SUMMARIES.items():
            self._run.define_metric(name, summary=summary, step_metric=STEP_METRIC)
        by_ema = (self.config.get("checkpoint") or {}).get("best_by") == "ema"
        self._summary = Summary("test_ema" if by_ema else "test")
        self._last_row = self._last_row_held()
        for record in self.before:
            self._take(record)
        self._run.summary.update(self._summary.values())
        for what, send in self.at_start.items():
            self._attempt(partial(send, self._run), without=what)

    def _last_row_held(self) -> int:
        """The number of the last row that need not be sent; -1 where there is none."""
        if not self.before or self.mode == "offline":  # earlier starts have files of their own
            return max(map(row_number, self.before), default=-1)
        if self._run.starting_step > 0:  # the server told the client
            return int(self._run.starting_step) - 1
        rows = read_history(self._run.entity, self._run.project, self.run_id)
        return max((int(row["_step"]) for row in rows or ()), default=-1)

    def log(self, record: Record) -> None:
        self._attempt(lambda: self._take(record))
        if record["kind"] == "epoch":
            self._attempt(lambda: self._run.summary.update(self._summary.values()))

    def _take(self, record: Record) -> None:
        number = row_number(record)
        if number > self._last_row:
            self._run.log(values_of(record), step=number, commit=True)  # else the client keeps it until the next
            self._last_row = number
        self._summary.take(record)

    def finish(self, result: Record | None) -> None:
        self._attempt(lambda: self._run.summary.update(result_summary(result or {}) | self._summary.values()))
        for what, send in self.at_finish.items() if result is not None else ():
            self.is_whole &= self._attempt(partial(send, self._run), without=what)
        ended = self._attempt(lambda: self._run.finish(exit_code=0 if result is not None else 1))
        self.delivered = ended and self.mode == "online"
        if self.delivered:  # artifacts that did not arrive are left to `harness track sync`
            note = delivery(self.run_id, self._last_row, finished=result is not None and self.is_whole)
            self._attempt(lambda: write_json(self.directory / UPLOADED, note), without="a note of what was uploaded")
        self._stop_service()

    def _stop_service(self) -> None:
        """The client's service process must not outlive the run, whatever happened before."""
        if (client := sys.modules.get("wandb")) is not None:
            self._active = True
            self._attempt(client.teardown)
        self._active = False

    def _attempt(self, action: Callable[[], Any], *, without: str | None = None) -> bool:
        """Whether it was done. What fails and has no name in `without` is the end of W&B for this run."""
        if not self._active:
            return False
        try:
            action()
        except Exception as error:  # whatever the service or its client does, the training must continue
            self._active = without is not None
            what = f"goes without {without}" if without else "fails and is left out"
            more = f" {_WAITS_LONGER}" if isinstance(error, TimeoutError) else ""
            self.warn(f"W&B {what}: {type(error).__name__}: {error}{more}")
            return False
        return True


@contextlib.contextmanager
def _without_mode() -> Iterator[None]:
    """The mode is given; one in the environment that the client does not know would make it refuse all settings."""
    before = os.environ.pop("WANDB_MODE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["WANDB_MODE"] = before


def create_sweep(configuration: Mapping[str, Any], *, project: str, entity: str | None) -> str:
    """Create a sweep, as W&B documents it, on the server; its id.

    Raises:
        HarnessError: no key, no server, or the server does not take the sweep.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wandb

        try:
            with contextlib.redirect_stdout(sys.stderr):  # which it prints on, next to the id
                return str(wandb.sweep(dict(configuration), project=project, entity=entity))
        except Exception as error:  # whatever the client or the server has against it
            what = f"W&B does not take the sweep ({type(error).__name__}: {error})"
            hint = "See WANDB_API_KEY and WANDB_BASE_URL, and that the server has sweeps; "
            hint += "--wandb --dry-run shows the configuration, --local and --slurm need no server."
            raise HarnessError(what, hint=hint, exit_code=EXIT_FAILED) from None
        finally:
            wandb.teardown()
