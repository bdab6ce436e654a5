"""The real W&B client against a real server of its protocol, openwandb: one a session."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.wandb_run import row_number, values_of
from tests.faults.check import records
from tests.faults.runs import NotHere, Stage
from tests.faults.wandb_server import WandbServer, environment
from tests.fork_server import ForkServer
from tests.tracking.door import Door


def record(kind: str, split: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "split": split, "step": step, "epoch": step / 4, **values}


def wandb_id(run: Path) -> str:
    return str(json.loads((run / "provenance.json").read_text())["wandb_run_id"])


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The history that the run's metrics.jsonl stands for, row by row."""
    return [{"_step": row_number(record), **values_of(record)} for record in records(run)]


@pytest.fixture(scope="session")
def wandb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    """`openwandb serve` on a free port, for all tests of the session."""
    yield from _served(tmp_path_factory.mktemp("wandb-server"))


@pytest.fixture
def mortal_server(tmp_path: Path) -> Iterator[WandbServer]:
    """One of the test's own, to be killed."""
    yield from _served(tmp_path)


def _served(folder: Path) -> Iterator[WandbServer]:
    try:
        started = WandbServer(folder / "data", folder / "log")
    except NotHere as reason:
        pytest.skip(str(reason))
    yield started
    started.kill()


@pytest.fixture
def door(wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """A door before the server, which this process's client goes through."""
    made = Door(wandb_server.port)
    for name, value in environment(made.port).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key, no server and no mode; the home folder, which is empty."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture
def stage(work: Path, fork_server: ForkServer, tmp_path: Path) -> Iterator[Stage]:
    """Trainings of 21 steps in this test's folder."""
    made = Stage(work, tmp_path / "stage", fork_server, random.Random(0))
    yield made
    made.close()
