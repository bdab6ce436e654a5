"""The fault tests see what they claim to see: a survival that is none, a touch, a pickle that runs, a bad answer."""

from __future__ import annotations

import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import page
from tests.faults.check import contents, differences, records, says_why
from tests.faults.fault import Outcome, fault, run_trial
from tests.faults.inputs import KINDS, Kind, changed, limited, paths_of, run_kind
from tests.faults.rows import REGISTRY
from tests.faults.rows_files import Bad
from tests.faults.rows_kill import saves
from tests.faults.runs import Stage
from tests.fork_server import ForkServer, Hang, Process


def test_what_an_input_does_is_seen(tmp_path: Path) -> None:
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1)

    def finding(attempt: object) -> str | None:
        return run_kind(Kind("", KINDS["overrides"].examples, lambda folder: attempt, 1), 5, tmp_path / "inputs")[1]

    assert finding(lambda example: None) is None
    assert "ZeroDivisionError" in str(finding(lambda example: 1 / 0))
    assert finding(lambda example: (tmp_path / "inputs" / "canary").touch()) == "an input ran code"
    assert finding(lambda example: (tmp_path / "inputs" / "other").touch()) == "an input changed files"
    with pytest.raises(TimeoutError), limited(0.05):
        time.sleep(5)


def test_changes_reach_every_value_and_bear_one_another() -> None:
    data = {"a": [1, {"b": 2}], "c": 3}
    assert paths_of(data) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert changed(data, [(("a", 1, "b"), 9), (("c",), None)]) == {"a": [1, {"b": 9}], "c": None}
    assert changed(data, [(("a",), {}), (("a", 1, "b"), 9), (("a", 0), 7)]) == {"a": {}, "c": 3}


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


def test_a_message_needs_a_hint_and_no_traceback(tmp_path: Path) -> None:
    process = Process(0, tmp_path / "err", lambda: 2)
    for text, wrong in (
        ("ERROR x\n  HINT: y", None),
        ("Traceback (most recent call last)\nx", "traceback"),
        ("", "no"),
    ):
        (tmp_path / "err").write_text(text)
        if wrong is None:
            says_why(process)
        else:
            with pytest.raises(AssertionError, match=wrong):
                says_why(process)


def test_contents_leave_locks_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / "a").write_text("a")
    assert list(contents(tmp_path)) == ["a"]


def test_what_was_not_survived_is_seen(work: Path, fork_server: ForkServer) -> None:
    def loses(stage: Stage, index: int) -> None:
        stage.lost = 7
        stage.notes.append("a note")
        assert index == 0, "other weights"

    row = replace(REGISTRY["kill"], name="one", run=loses)
    outcome = run_trial(row, 0, work, fork_server)
    assert (outcome.survived, outcome.note) == (False, "a note; AssertionError: 7 steps lost, more than 6")
    assert "other weights" in run_trial(row, 1, work, fork_server).note
    with pytest.raises(AssertionError, match="kill"):  # a name stands for one row
        fault("kill", trials=1)(loses)


LOG = [
    {"row": "kill", "index": 0, **Outcome(True, 2, 0.011, 1.25).to_json()},
    {"row": "kill", "index": 1, **Outcome(False, 9, 0.5, None, "other | weights").to_json()},
    {"row": "signal", "index": 0, **Outcome(True).to_json()},
    {"row": "rank-stalls", "index": 0, "survived": False, "skipped": "no time-out"},
    {"kind": "overrides", "tried": 1600, "problem": None},
]
ABOUT = {
    "date": "2026-11-24",
    "note": "Quiet.",
    "machine": "a CPU",
    "python": "3.11.2",
    "versions": {"torch": "2"},
}


def test_the_page_says_what_the_log_says() -> None:
    shown = page.render(LOG, ABOUT)
    kill, signal, stalls = (REGISTRY[name] for name in ("kill", "signal", "rank-stalls"))
    assert f"| {kill.title} | 2 | **1** | 9 | 0.5 | 1.2 | {kill.how} |" in shown
    assert f"| {signal.title} | 1 | 1 | 0 | – | – | {signal.how} |" in shown
    assert f"| {stalls.title} | 0 | skipped | – | – | – | no time-out |" in shown
    assert "**2 of 3 faults survived; 1,600 bad inputs, 0 of 8 kinds with a finding.**" in shown
    assert "- SIGKILL at a random moment: other \\| weights" in shown
    assert "Made by `scripts/faults.sh` on 2026-11-24: a CPU; Python 3.11.2, torch 2. Quiet." in shown
    assert shown.count("\n| SIGKILL") == sum("SIGKILL" in row.title[:7] for row in REGISTRY.values())
