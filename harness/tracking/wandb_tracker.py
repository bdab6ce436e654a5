"""Weights & Biases: one run a training, offline where there is no key, and never a reason to fail."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from harness.tracking.base import NullTracker, Record

_INIT_TIMEOUT_SECONDS = 60
_FINISH_TIMEOUT_SECONDS = 60


def resolve_mode(setting: str) -> str:
    """`auto` is online with an API key and offline without; `$WANDB_MODE` wins over `auto` alone.

    Returns:
        "online", "offline" or "disabled".
    """
    if setting != "auto":
        return setting
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if _has_key() else "offline"


def new_run_id() -> str:
    """The id of a new W&B run: that which a sweep's agent has given this training, else a random one."""
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return given or secrets.token_hex(4)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker(NullTracker):
    """A W&B run. Any trouble with the service becomes one warning, and the training goes on without it."""

    def __init__(
        self,
        *,
        mode: str,
        directory: Path,
        run_id: str,
        name: str,
        project: str,
        entity: str | None,
        group: str | None,
        tags: tuple[str, ...],
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        self._active = True
        arguments = {
            "dir": str(directory),
            "id": run_id,
            "name": name,
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
            "config": dict(config),
        }
        self._guard(lambda: self._start(mode=mode, **arguments))
        if mode == "online" and not self._active:  # no network, as on many compute nodes: `wandb sync` later
            self._stop_service()  # it still holds the run's id
            self._active = True
            self._warn("W&B goes on offline; `wandb sync` uploads the run later")
            self._guard(lambda: self._start(mode="offline", **arguments))

    def _start(self, **arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own deprecations are not the user's concern
            import wandb

            settings = wandb.Settings(
                init_timeout=_INIT_TIMEOUT_SECONDS,
                finish_timeout=_FINISH_TIMEOUT_SECONDS,  # without one it waits for a dead server for ever
                finish_timeout_raises=True,
                silent=True,
                console="off",
            )
            self._run = wandb.init(resume="allow", settings=settings, **arguments)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("test/accuracy", summary="max", step_metric="step")
        self._run.define_metric("test_ema/accuracy", summary="max", step_metric="step")

    def log(self, record: Record) -> None:
        scope = record["split"] if record["kind"] == "epoch" else f"{record['split']}_step"
        values = {
            f"{scope}/{key}": value
            for key, value in record.items()
            if key not in ("kind", "split", "step", "epoch") and isinstance(value, int | float)
        }
        self._guard(lambda: self._run.log({"step": record["step"], "epoch": record["epoch"], **values}))

    def finish(self, result: Record | None) -> None:
        def end() -> None:
            if result is not None:
                self._run.summary["result"] = {k: v for k, v in result.items() if v is not None}
            self._run.finish(exit_code=0 if result is not None else 1)

        self._guard(end)
        self._stop_service()

    def _stop_service(self) -> None:
        """Whatever happened before: the client's service process must not outlive the run."""
        client = sys.modules.get("wandb")
        self._active = client is not None
        self._guard(lambda: client.teardown())  # type: ignore[union-attr]
        self._active = False

    def _guard(self, action: Callable[[], Any]) -> None:
        if not self._active:
            return
        try:
            action()
        except Exception as error:  # whatever the service or its client does, the training must go on
            self._active = False
            self._warn(f"W&B fails and is left out: {type(error).__name__}: {error}")
