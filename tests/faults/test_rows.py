"""The table of faults, a trial of each and a dozen of them ordinary, and bad inputs.

scripts/faults.sh has all trials instead and thousands of inputs: `$FAULTS_LOG` gets a line of JSON for each, and what
it has already is left out.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault import NoMoreCases, run_trial
from tests.faults.inputs import KINDS, run_kind
from tests.faults.rows import REGISTRY
from tests.faults.runs import NotHere
from tests.fork_server import ForkServer

LOG = os.environ.get("FAULTS_LOG")
INPUTS = int(os.environ.get("FAULTS_INPUTS", "320"))  # of all kinds together


def cases(log: Path | None) -> list[tuple[str, int, bool]]:
    """Each trial as (row, index, whether it is an ordinary test), all rows advancing together."""
    lines = log.read_text().splitlines() if log is not None and log.exists() else []
    done = {(record.get("row"), record.get("index")) for record in map(json.loads, lines)}
    counts = {name: row.short if log is None else row.trials for name, row in REGISTRY.items()}
    every = [(name, index) for name, count in counts.items() for index in range(count) if (name, index) not in done]
    every.sort(key=lambda case: (case[1] + 0.5) / counts[case[0]])
    return [(name, index, REGISTRY[name].ordinary and index == 0) for name, index in every]


def note(**record: Any) -> None:
    if LOG:
        with open(LOG, "a") as file:
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        pytest.param(name, index, marks=[] if ordinary else pytest.mark.long, id=f"{name}-{index}")
        for name, index, ordinary in cases(Path(LOG) if LOG else None)
    ],
)
def test_survived(name: str, index: int, work: Path, fork_server: ForkServer) -> None:
    try:
        outcome = run_trial(REGISTRY[name], index, work, fork_server)
    except NoMoreCases:
        pytest.skip("no more places to try")
    except NotHere as reason:
        note(row=name, index=index, survived=False, skipped=str(reason))
        pytest.skip(str(reason))
    note(row=name, index=index, **outcome.to_json())
    assert outcome.survived, outcome.note


@pytest.mark.parametrize("name", KINDS)
def test_bad_inputs_are_answered(name: str, tmp_path: Path) -> None:
    count = math.ceil(INPUTS * KINDS[name].share)
    tried, problem = run_kind(KINDS[name], count, tmp_path / "inputs")
    note(kind=name, tried=tried, problem=problem)
    assert problem is None
    assert tried >= count / 2  # hypothesis may try fewer where it has seen them all


def test_the_table_is_whole(tmp_path: Path) -> None:
    """Rows that an oversight could lose, and enough trials for what the table promises."""
    assert len(REGISTRY) >= 30
    assert len(cases(tmp_path / "new")) == sum(row.trials for row in REGISTRY.values()) >= 300
    assert REGISTRY["kill"].trials >= 100
    assert sum(ordinary for _, _, ordinary in cases(None)) >= 12
    assert {name for name, _, _ in cases(None)} == set(REGISTRY)
    assert all(row.most_steps_lost == 0 for name, row in REGISTRY.items() if name.endswith("signal"))
    (tmp_path / "log").write_text('{"row": "kill", "index": 0}\n{"kind": "overrides"}\n')
    assert len(cases(tmp_path / "log")) == len(cases(tmp_path / "new")) - 1
