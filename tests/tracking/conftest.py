"""The real W&B client against a real server of its protocol, openwandb: one a session, and a warm process to train."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fault import NotHere
from tests.faults.runs import RECIPE, Server, Stage
from tests.faults.wandb_server import WandbServer


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
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A folder with the recipe, and the process that forks trainings."""
    work = tmp_path_factory.mktemp("tracked")
    (work / "faults.yaml").write_text(RECIPE)
    server = Server(work / "cache")
    yield work, server
    server.close()


@pytest.fixture
def stage(warm: tuple[Path, Server], tmp_path: Path) -> Iterator[Stage]:
    """Trainings of 21 steps in this test's folder."""
    work, server = warm
    made = Stage(work, tmp_path / "stage", server, random.Random(0))
    yield made
    made.close()
