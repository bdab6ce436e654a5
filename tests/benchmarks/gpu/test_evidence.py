"""The evidence of a GPU machine, as far as a CPU can run it: calls that add up, trainings that stop, a dry run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.benchmarks.gpu import evidence, evidence_page, evidence_parts, evidence_train
from harness.benchmarks.gpu.evidence import Call, Figures, Save
from harness.errors import HarnessError
from tests.conftest import ROOT
from tests.training.conftest import metrics, result

CPU = torch.device("cpu")


@pytest.fixture
def call(tmp_path: Path) -> Call:
    deadline = time.monotonic() + 100
    return Call(CPU, dry_run=True, work=tmp_path / "work", deadline=deadline, recipes=(), command="scripts/x.py")


def counting(call: Call, figures: Figures, save: Save) -> bool:
    """A part that takes three calls."""
    figures["calls"] = figures.get("calls", 0) + 1
    save(figures)
    return figures["calls"] >= 3


def failing(call: Call, figures: Figures, save: Save) -> bool:
    figures["failed"] = True
    return True


def at_once(call: Call, figures: Figures, save: Save) -> bool:
    return True


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_calls_add_up_to_complete_parts(call: Call, tmp_path: Path) -> None:
    out, parts = tmp_path / "evidence.json", {"slow": counting, "quick": at_once}
    assert [evidence.gather(call, parts, [], out) for _ in range(3)] == [75, 75, 0]
    content = read(out)
    assert content["note"] == evidence.DRY_NOTE
    assert {name: len(part["commands"]) for name, part in content["parts"].items()} == {"slow": 3, "quick": 1}
    slow = content["parts"]["slow"]
    assert slow["complete"]
    assert slow["figures"] == {"calls": 3}
    assert slow["machine"]["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert slow["started"] <= slow["ended"]
    assert evidence.gather(call, parts, [], out) == 0
    assert read(out) == content  # nothing was left to do
    assert evidence.gather(call, parts, ["slow"], out) == 75  # asked for by name it begins anew
    assert read(out)["parts"]["slow"]["figures"] == {"calls": 1}


def test_what_another_machine_began_is_begun_anew(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "evidence.json"
    evidence.gather(call, {"slow": counting}, [], out)
    monkeypatch.setattr(evidence, "cpu_name", lambda: "another processor")  # there is only one here
    evidence.gather(call, {"slow": counting}, [], out)
    part = read(out)["parts"]["slow"]
    assert part["figures"] == {"calls": 1}
    assert part["machine"]["cpu"] == "another processor"


def test_a_failure_is_code_1_and_later_parts_still_run(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "evidence.json"
    assert evidence.gather(call, {"bad": failing, "quick": at_once}, [], out) == 1
    assert read(out)["parts"]["quick"]["complete"]


def test_wrong_use(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "evidence.json"
    with pytest.raises(HarnessError, match='there is no part "slwo"\n  HINT: Did you mean "slow"'):
        evidence.gather(call, {"slow": counting}, ["slwo"], out)
    evidence.gather(call, {"slow": counting}, [], out)
    with pytest.raises(HarnessError, match="dry runs and evidence are not kept in one file"):
        evidence.gather(dataclasses.replace(call, dry_run=False), {"slow": counting}, [], out)
    out.write_text("[]")
    with pytest.raises(HarnessError, match="is no evidence of this version"):
        evidence.gather(call, {"slow": counting}, [], out)
    if not torch.cuda.is_available():
        with pytest.raises(HarnessError, match="torch finds no GPU"):
            evidence.find_device(dry_run=False)
    for broken in ({"format": 1}, {"format": 1, "parts": {}}):
        out.write_text(json.dumps(broken))
        for use in (lambda: evidence.gather(call, {"slow": counting}, [], out), lambda: evidence_page.write(out, out)):
            with pytest.raises(HarnessError, match="is no evidence of this version"):
                use()


def test_what_no_part_can_use_is_told_before_any_is_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    for wrong, what in (
        ({"recipes": (tmp_path / "absent.yaml",)}, r"absent\.yaml: there is no such recipe"),
        ({"work": tmp_path / "a file"}, "a file: cannot be made: File exists"),
    ):
        with pytest.raises(HarnessError, match=what):
            evidence.gather(dataclasses.replace(call, **wrong), {"slow": counting}, [], tmp_path / "evidence.json")
    assert not (tmp_path / "evidence.json").exists()


@pytest.mark.parametrize("minutes", ["-1", "nan", "nine"])
def test_minutes_are_a_number_above_0(minutes: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_evidence.py"), "--dry-run", "--part", "step"]
    command += ["--out", str(tmp_path / "evidence.json"), "--minutes", minutes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f'must be a number above 0, not "{minutes}"' in done.stderr


@pytest.mark.long
def test_a_training_is_stopped_in_time_and_ends_as_if_it_never_was(tiny: Path, tmp_path: Path) -> None:
    how = ("training.epochs=400", "checkpoint.keep_last=1", "tracking.log_every_steps=7")
    run, log = tmp_path / "run", tmp_path / "train.log"
    command = [sys.executable, "-m", "harness", "train", str(tiny), *how, "--run-dir", str(run), "--resume", "auto"]
    metrics_file = run / "metrics.jsonl"
    begun = time.monotonic()
    assert evidence_train.run_until(command, seconds=15, log=log) == 75
    assert time.monotonic() - begun < 15 + evidence_train.STOP_SECONDS
    assert metrics_file.exists()
    steps = [record["step"] for record in metrics(run)]
    assert 0 < steps[-1] < 400 * 7
    assert evidence_train.outcome(run)["result"] is None
    # Shorter from here on: the end is what is compared.
    epochs = steps[-1] // 7 + 2
    command[command.index(how[0])] = f"training.epochs={epochs}"
    assert evidence_train.run_until(command, seconds=150, log=log) == 0
    outcome = evidence_train.outcome(run)
    assert outcome["epochs_done"] == epochs
    assert [each["epoch"] for each in outcome["epochs"]] == list(range(1, epochs + 1))
    assert all({"test_accuracy", "images_per_second", "loss"} <= set(each) for each in outcome["epochs"])
    whole = tmp_path / "whole"
    command[command.index(str(run))] = str(whole)
    assert evidence_train.run_until(command, seconds=150, log=log) == 0
    assert outcome["result"]["loss"] == result(whole)["loss"]
    assert "stopping after this step, with a checkpoint" in log.read_text()


def test_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    assert evidence_parts.counts_of(report) == {}
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n@pytest.fixture\ndef broken(): 1 / 0\ndef test_d(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    counts = evidence_parts.counts_of(report)
    assert (counts["passed"], counts["skipped"]) == (1, 1)
    assert [name.rpartition(".")[2] for name in counts["not_passed"]] == ["test_b", "test_d"]


@pytest.mark.long
def test_a_dry_run_goes_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real script and all its parts, and the page that is made of what it wrote."""
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    out = tmp_path / "evidence.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_evidence.py"), "--out", str(out), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = read(out)["parts"]
    assert {name: part["complete"] for name, part in parts.items()} == dict.fromkeys(evidence_parts.PARTS, True)
    assert parts["tests"]["figures"]["exit_code"] == 0
    assert parts["loader"]["figures"]["roofline"]["harness_device_images_per_second"] > 0
    cases = parts["step"]["figures"]["cases"]
    assert cases["harness/bf16/8"]["images_per_second_median"] > 0
    assert cases["eager/tf32/8"]["share_of_roofline"] > 0
    assert "images_per_second_median" in cases["compile/bf16/8"]
    if not torch.cuda.is_available():
        assert cases["compile_graphs/bf16/8"] == {"left_out": "CUDA graphs need a GPU"}
    assert parts["train"]["figures"]["seed"]["result"]["epoch"] == 2
    assert str(tmp_path) not in json.dumps(parts)  # names of folders mean nothing elsewhere
    with pytest.raises(HarnessError, match="is of a dry run, whose figures are no evidence"):
        evidence_page.write(out, tmp_path / "page.md")
    check_page(read(out), tmp_path)


def check_page(content: dict[str, Any], folder: Path) -> None:
    """The figures of a dry run do for the form of the page."""
    file, page = folder / "as_if.json", folder / "page.md"
    file.write_text(json.dumps({**content, "dry_run": False}))
    page.write_text("# Benchmarks\n\nBefore.\n")
    evidence_page.write(file, page)
    page.write_text(page.read_text() + "\nAfter.\n")
    evidence_page.write(file, page)
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nBefore.\n\n<!--")
    assert text.endswith("-->\n\nAfter.\n")
    assert text.count("\n## GPU\n") == 1
    for heading in ("Tests marked `gpu`", "Loaders", "Training step of dual_branch", "Trainings"):
        assert text.count(f"### {heading}") == 1
    assert "| compile_graphs |" in text
    assert "`scripts/gpu_evidence.py`: " in text


def test_a_page_of_a_call_that_had_no_time_for_the_loaders(call: Call, tmp_path: Path) -> None:
    late = dataclasses.replace(call, dry_run=False, deadline=time.monotonic())
    parts = {name: part for name, part in evidence_parts.PARTS.items() if name in ("loader", "train")}
    assert evidence.gather(late, parts, [], tmp_path / "evidence.json") == 75
    evidence_page.write(tmp_path / "evidence.json", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not measured: the time was over first." in text
    assert "Not complete." in text


def test_a_page_needs_evidence(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="holds no evidence"):
        evidence_page.write(tmp_path / "absent.json", tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
