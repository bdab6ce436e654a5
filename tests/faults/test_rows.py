"""The short form of the table: a trial or two of each fault. scripts/faults.sh runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import rows
from tests.faults.fault import NotHere, run_trial
from tests.faults.runs import Server

CASES = [(name, index) for name, row in rows.REGISTRY.items() for index in range(row.short_trials)]


@pytest.mark.parametrize(("name", "index"), CASES, ids=lambda value: str(value))
def test_survived(name: str, index: int, work: Path, server: Server) -> None:
    try:
        outcome = run_trial(rows.REGISTRY[name], index, work, server)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert outcome.survived, outcome.note


def test_the_table_is_whole() -> None:
    """Rows that an oversight could lose, and enough trials for what the table promises."""
    assert len(rows.REGISTRY) >= 30
    assert sum(row.trials for row in rows.REGISTRY.values()) >= 300
    assert rows.REGISTRY["kill"].trials >= 100
    assert all(row.most_steps_lost == 0 for name, row in rows.REGISTRY.items() if name.endswith("signal"))
