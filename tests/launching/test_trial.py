"""Trials: a rank that fails is told at once. Results that come back are the matter of their users' tests."""

from __future__ import annotations

import json
import subprocess

import pytest

from harness.errors import HarnessError
from harness.launching.trial import answer, run_trial

RANK_MODULE = "harness.launching.probe"


def test_a_rank_that_dies_is_told_by_its_last_words() -> None:
    with pytest.raises(subprocess.SubprocessError, match="ValueError"):
        run_trial(RANK_MODULE, ["{"], ranks=2, limit_seconds=60)


def test_a_trial_has_a_limit() -> None:
    with pytest.raises(subprocess.SubprocessError, match=r"longer than 0\.1 s"):
        run_trial(RANK_MODULE, ["1x1", "debug"], ranks=1, limit_seconds=0.1)


def test_an_error_of_the_users_is_left_as_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise HarnessError("too few", where="here", hint="More.")

    monkeypatch.setenv("RANK", "1")
    assert answer(str(tmp_path), wrong) == 0
    assert list(tmp_path.iterdir()) == []  # rank 0 speaks for all
    monkeypatch.setenv("RANK", "0")
    assert answer(str(tmp_path), wrong) == 0
    told = json.loads((tmp_path / "result.json").read_text())
    assert told == {"error": {"what": "too few", "where": "here", "hint": "More.", "exit_code": 2}}
