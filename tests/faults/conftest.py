"""One warm process and one folder of undisturbed runs for all fault tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import RECIPE, Server


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all trials share: recipe, cache, undisturbed runs."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def server(work: Path) -> Iterator[Server]:
    """The warm process that forks the trainings."""
    started = Server(work / "cache")
    yield started
    started.close()
