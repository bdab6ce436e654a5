"""The real W&B client against a real server of its protocol, openwandb: one a session."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import NotHere, Stage
from tests.faults.wandb_server import WandbServer
from tests.fork_server import ForkServer


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


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture
def stage(work: Path, fork_server: ForkServer, tmp_path: Path) -> Iterator[Stage]:
    """Trainings of 21 steps in this test's folder."""
    made = Stage(work, tmp_path / "stage", fork_server, random.Random(0))
    yield made
    made.close()
