"""One folder of undisturbed runs for all fault tests of a session."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.runs import Stage
from tests.fork_server import ForkServer


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all trials share: recipe, cache, undisturbed runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def stage(work: Path, fork_server: ForkServer, tmp_path: Path) -> Stage:
    return Stage(work, tmp_path / "stage", fork_server, random.Random(0))
