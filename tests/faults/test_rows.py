"""The short form of the table: a trial of each fault, a dozen of them ordinary. scripts/faults.sh runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fault import run_trial
from tests.faults.rows import REGISTRY
from tests.faults.runs import NotHere
from tests.fork_server import ForkServer

CASES = [
    pytest.param(name, index, marks=[] if row.ordinary and index == 0 else pytest.mark.long, id=f"{name}-{index}")
    for name, row in REGISTRY.items()
    for index in range(row.short)
]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_survived(name: str, index: int, work: Path, fork_server: ForkServer) -> None:
    try:
        outcome = run_trial(REGISTRY[name], index, work, fork_server)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert outcome.survived, outcome.note


def test_the_table_is_whole() -> None:
    """Rows that an oversight could lose, and enough trials for what the table promises."""
    assert len(REGISTRY) >= 30
    assert sum(row.trials for row in REGISTRY.values()) >= 300
    assert REGISTRY["kill"].trials >= 100
    assert sum(row.ordinary for row in REGISTRY.values()) >= 12
    assert all(row.most_steps_lost == 0 for name, row in REGISTRY.items() if name.endswith("signal"))
