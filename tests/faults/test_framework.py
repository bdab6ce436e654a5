"""The fault tests see what they claim to see: a survival that is none, a touch, a pickle that runs; and the table."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from tests.faults import report, run_all
from tests.faults.check import contents, differences, records, said_well
from tests.faults.fault import Outcome
from tests.faults.fault import fault as register
from tests.faults.rows import REGISTRY
from tests.faults.rows_kill import saves
from tests.faults.rows_malice import Bad
from tests.faults.runs import Hang, Server, Stage


@pytest.fixture
def stage(work: Path, server: Server, tmp_path: Path) -> Stage:
    import random

    return Stage(work, tmp_path / "stage", server, random.Random(0))


def test_a_run_equals_itself_and_nothing_that_was_changed(stage: Stage) -> None:
    reference = stage.reference()
    run = stage.folder / "copy"
    shutil.copytree(reference, run)
    assert differences(run, reference) == []
    last = run / "checkpoints" / "step_21"
    for file, old, new, words in (
        (last / "ema.safetensors", None, None, "ema.safetensors is not equal"),
        (last / "state.json", '"step": 21', '"step": 20', "state.json is not equal"),
        (run / "result.json", '"correct"', '"corect"', "result.json: correct"),
        (run / "metrics.jsonl", '"step": 9,', '"step": 8,', "metrics.jsonl: missing"),
        (run / "metrics.jsonl", '"total": 16', '"total": 17', "metrics.jsonl: other values"),
    ):
        whole = file.read_bytes()
        text = whole[:-1] + b"\x01" if old is None else whole.replace(old.encode(), str(new).encode(), 1)
        file.write_bytes(text)
        assert any(words in found for found in differences(run, reference)), words
        file.write_bytes(whole)
    (run / "checkpoints" / ".step_3.1.tmp").mkdir()
    assert differences(run, reference) == ["left behind: .step_3.1.tmp"]
    assert [r["step"] for r in records(run) if r["kind"] == "step"] == list(range(1, 22))


def test_a_touch_is_counted_and_the_process_dies_at_it(stage: Stage) -> None:
    log = stage.folder / "touches"
    place = {"kind": "files", "under": "/checkpoints", "log": str(log), "do": [[4, "kill"]]}
    assert stage.train(faults=[place]).wait() == -9
    assert log.read_text().splitlines()[-1].startswith("write")
    assert not list((stage.run / "checkpoints").glob("step_*"))


def test_a_process_that_does_not_end_is_ended(stage: Stage) -> None:
    process = stage.train("training.epochs=100000")
    with pytest.raises(Hang):
        process.wait(1)
    assert process.wait(30) == -9


def test_saves_are_cut_at_their_renames() -> None:
    lines = ["mkdir a", "write b", "rename step_3", "fsync c", "write b", "rename step_6", "fsync c", "remove b"]
    assert saves(lines, (1,)) == [1, 2, 3, 4, 5]
    assert saves(lines, (2,)) == [4, 5, 6, 7, 8]


def test_the_pickle_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bad(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_message_needs_a_hint_and_no_traceback() -> None:
    assert said_well("ERROR x\n  HINT: y") == []
    assert len(said_well("Traceback (most recent call last)\nValueError: x")) == 2


def test_contents_leave_locks_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / "a").write_text("a")
    assert list(contents(tmp_path)) == ["a"]


TRIALS = [
    {"row": "kill", "index": 0, **Outcome(True, 2, 0.011, 1.25).to_json()},
    {"row": "kill", "index": 1, **Outcome(False, 9, 0.5, None, "other | weights").to_json()},
    {"row": "signal", "index": 0, **Outcome(True).to_json()},
    {"row": "rank-stalls", "index": -1, "survived": False, "skipped": "no time-out", "note": "no time-out"},
]
ABOUT = {
    "command": "scripts/faults.sh",
    "date": "2026-11-24",
    "note": "Quiet.",
    "machine": "a CPU, 2 cores, Linux 6",
    "python": "3.11.2",
    "versions": {"torch": "2.14.1"},
}


def test_the_page_says_what_the_trials_say() -> None:
    results = report.summarise(TRIALS, {"overrides": {"tried": 1600, "problem": None}}, ABOUT)
    assert json.loads(json.dumps(results)) == results
    page = report.render(results)
    kill, signal, stalls = (REGISTRY[name] for name in ("kill", "signal", "rank-stalls"))
    assert f"| {kill.title} | 2 | **1** | 9 | 0.5 | 1.2 | {kill.how} |" in page
    assert f"| {signal.title} | 1 | 1 | 0 | – | – | {signal.how} |" in page
    assert f"| {stalls.title} | 0 | skipped | – | – | – | no time-out |" in page
    assert "**2 of 3 faults survived; 1,600 bad inputs, 0 of 8 kinds with a finding.**" in page
    assert "- SIGKILL at a random moment: other \\| weights" in page
    assert (
        "Made by `scripts/faults.sh` on 2026-11-24: a CPU, 2 cores, Linux 6; Python 3.11.2, torch 2.14.1. Quiet."
        in page
    )
    assert page.count("\n| SIGKILL") == sum("SIGKILL" in row.title[:7] for row in REGISTRY.values())


def test_the_long_form_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run_all.main(["--work", str(tmp_path), "--jobs", "1", "--only", "malice", "--trials", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 trials to do, 0 done before" in out
    assert "0 trials to do, 1 done before" in out
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 1
    assert os.listdir(tmp_path / "trials") == []


def test_a_name_stands_for_one_row() -> None:
    with pytest.raises(AssertionError, match="kill"):
        register("kill", "", "", trials=1)(lambda stage, index: Outcome(True))
