"""The short form of the bad inputs; `FAULTS_INPUTS=10000` makes it the long one."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from tests.faults.examples import changed, paths_of
from tests.faults.inputs import KINDS, limited, run_kind

COUNT = int(os.environ.get("FAULTS_INPUTS", "320"))
# Not mended yet; a finding of these is told, and not held against the suite.


@pytest.mark.parametrize("name", KINDS)
def test_answered(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    count = math.ceil(COUNT * kind.share)
    tried, problem = run_kind(kind, count, tmp_path / "inputs")
    assert problem is None
    assert tried >= count / 2  # hypothesis may try fewer where it has seen them all


def test_the_shares_are_a_whole() -> None:
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1)


def test_a_hang_is_seen() -> None:
    with pytest.raises(TimeoutError), limited(0.05):
        time.sleep(5)


def test_changes_reach_every_value_and_bear_one_another() -> None:
    data = {"a": [1, {"b": 2}], "c": 3}
    assert paths_of(data) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert changed(data, [(("a", 1, "b"), 9), (("c",), None)]) == {"a": [1, {"b": 9}], "c": None}
    assert changed(data, [(("a",), {}), (("a", 1, "b"), 9), (("a", 0), 7)]) == {"a": {}, "c": 3}
