"""`harness report`: what a finished run shows, and what is said where a run is not whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.files import LOCK
from harness.report import reporter as reporter_module
from harness.report.explain import EXPLAINED, grad_cam_body
from harness.report.lazy_checkpoint import LazyCheckpoint
from harness.report.reporter import _CHECKPOINT_SECTIONS, Reporter, Server
from harness.report.sections import duration
from harness.runs import Run, open_run
from harness.training.inference import predict_test_split
from tests.handmade import write_run

SECTIONS = ["summary", "curves", "rates", *(id for id, *_ in _CHECKPOINT_SECTIONS), "origin"]
OF_PREDICTIONS = {"confusion", "classes", "calibration", "mistakes", "grad-cam"}


def report(run: Path, *options: str) -> str:
    assert main(["report", str(run), *options]) == 0
    return (run / "report.html").read_text()


def sections(html: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([\w-]+)".*?</h2>(.*?)</section>', html, re.DOTALL))


def missing_in(html: str) -> set[str]:
    """The sections in which a sentence stands in place of something."""
    return {id for id, text in sections(html).items() if 'class="missing"' in text}


def change_recipe(run: Path, old: str, new: str) -> None:
    text = (run / "recipe.yaml").read_text()
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new, 1))


def checkpoints_of(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))


def sign(checkpoint: Path, name: str) -> None:
    """Make a changed file of a checkpoint one that its manifest knows."""
    data, manifest = (checkpoint / name).read_bytes(), checkpoint / "manifest.json"
    files = json.loads(manifest.read_text())
    files["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps(files))


def grow(run: Path, **record: Any) -> None:
    whole = {"kind": "epoch", "split": "test", "step": 999, "epoch": 3, "loss": 0.1, "accuracy": 0.9876, **record}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(whole) + "\n")


def test_a_finished_run_has_all_sections(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = report(run)
    out = capsys.readouterr()
    assert str(run / "report.html") in out.out
    assert "WARNING" not in out.err
    found = sections(html)
    assert list(found) == SECTIONS
    assert missing_in(html) == set()
    result = json.loads((run / "result.json").read_text())
    assert f"{result['accuracy']:.2%}" in found["summary"]
    assert f"{result['correct']:,} of {result['total']:,}" in found["summary"]
    predictions = predict_test_split(run, which="last")
    pairs = Counter(zip(predictions.labels_N.tolist(), predictions.predicted_N.tolist(), strict=True))
    drawn = re.findall(r"<title>(\d) → (\d): (\d+)</title>", found["confusion"])
    assert {(int(true), int(predicted)): int(count) for true, predicted, count in drawn} == pairs
    images = sum(count for (true, _), count in pairs.items() if true == 0)
    assert f'>0</th><td class="number">{images}</td>' in found["classes"]
    assert f"<title>0: {100 * pairs[0, 0] / images:.3g}%</title>" in found["classes"]
    wrong = int((~predictions.correct_N).sum())
    assert found["mistakes"].count("<img") == min(24, wrong)
    assert re.search(r"taken for <strong>\d \([\d.<>]+%\)</strong>", found["mistakes"])  # not "8 26.7%"
    assert found["grad-cam"].count("<img") == 3 * min(8, wrong)
    assert "block 2: " in found["fields"]
    assert found["architecture"].count("dilation 2") == 3
    assert f"{result['parameters']:,}" in found["layers"]
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}  # a name, no address


def test_the_checkpoint_and_weights_that_are_asked_for(run: Path) -> None:
    raw, averaged = report(run), report(run, "--weights", "ema", "--checkpoint", "best")
    assert "raw weights" in raw
    assert "averaged weights" in averaged
    assert sections(raw)["confusion"] != sections(averaged)["confusion"]
    first = checkpoints_of(run)[0].name
    assert f"{first}, raw" in report(run, "--checkpoint", first)
    assert main(["report", str(run / "checkpoints" / first), "--output", str(run.parent / "other.html")]) == 0
    assert f"{first}, raw" in (run.parent / "other.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "step_9999"], 'no checkpoint "step_9999"'),
        (["--checkpoint", "bset"], 'no checkpoint "bset"'),
        (["--port", "8000"], "--port is for --serve"),
        (["--serve", "--port", "70000"], "must be a whole number from 1 to 65535"),
        (["--weights", "both"], "invalid choice"),
        (["--output", "nowhere/report.html"], "is no folder that can be written to"),
        (["--output", "."], "is there already"),
        (["--output", str(Path(__file__))], "no page of ours"),
    ],
)
def test_mistakes(trained: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(__file__).read_bytes()
    assert main(["report", str(trained), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "HINT" in err
    assert Path(__file__).read_bytes() == before


def test_averaged_weights_of_a_run_without_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in checkpoints_of(run):  # as a run without ema has them
        (checkpoint / "ema.safetensors").unlink()
        data = json.loads((checkpoint / "manifest.json").read_text())
        del data["files"]["ema.safetensors"]
        (checkpoint / "manifest.json").write_text(json.dumps(data))
    assert main(["report", str(run), "--weights", "ema"]) == 2
    assert "no averaged weights" in capsys.readouterr().err


def test_grad_cam_without_a_mistake(run: Path) -> None:
    checkpoint = LazyCheckpoint(open_run(run), which="last", weights="raw", keep=False)
    words = grad_cam_body(checkpoint)
    assert "taken for" in words
    assert "rightly" not in words
    found = checkpoint.predictions
    vars(checkpoint)["predictions"] = replace(found, labels_N=found.predicted_N)
    words = grad_cam_body(checkpoint)
    assert "Of the first test images, since none is misclassified" in words
    assert words.count("rightly taken for") == EXPLAINED


def test_before_the_first_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    html = report(run)
    others = [id for id in SECTIONS[3:] if id not in OF_PREDICTIONS]
    assert list(sections(html)) == ["summary", "curves", "rates", "checkpoint", *others]
    assert missing_in(html) == {"checkpoint"}
    assert html.count("There is no checkpoint yet.") == 1
    assert "Confusion matrix, Accuracy by class, Calibration" in sections(html)["checkpoint"]
    assert "stopped before its end" in html


def test_a_running_training_tells_how_far_it_is_and_when_it_was_looked_at(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small" / "run", (0.5, 0.6), settings={"training": {"epochs": 6}}, finished=False)
    (run / "provenance.json").write_text(json.dumps({"starts": [{"from_step": 0}, {"from_step": 10}]}))
    assert "<strong>step 20 of 60</strong> <span>epoch 2 of 6</span>" in report(run)
    with FileLock(run / LOCK):
        html = report(run)
    # Records since the latest start: step 15 to 20 in 30 seconds, so 40 steps in 240.
    assert "<strong>step 20 of 60</strong> <span>epoch 2 of 6, about 4 min 00 s left</span>" in html
    assert re.search(r"as it was at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\.", html)
    by_steps = {"training": {"epochs": None, "steps": 45}}
    other = write_run(tmp_path / "small" / "other", (0.5, 0.6), settings=by_steps, finished=False)
    assert "step 20 of 45</strong> <span>epoch 2 of 4.5<" in report(other)
    assert "step 0</strong> <span>epoch 0 of 2<" in report(write_run(tmp_path / "small" / "empty", (), finished=False))
    assert "Progress" not in report(write_run(tmp_path / "small" / "whole", (0.5,)))
    assert [duration(s) for s in (0.5, 12, 200, 7500)] == ["0.5 s", "12 s", "3 min 20 s", "2 h 05 min"]


def test_without_the_images_and_with_other_ones(run: Path) -> None:
    change_recipe(run, "source: digits", "source: synthetic")
    assert "test images other than those of the training" in report(run)
    assert not (run / "predictions").exists()
    change_recipe(run, "source: synthetic", "source: digits")
    predict_test_split(run, which="last")  # what was kept of the predictions is shown; pictures are not
    change_recipe(run, "source: digits\n  path: null", f"source: imagefolder\n  path: {run / 'gone'}")
    html = report(run)
    assert missing_in(html) == {"mistakes", "grad-cam"}
    assert "This cannot be shown" in sections(html)["mistakes"]
    assert "gone" in sections(html)["mistakes"]


@pytest.mark.parametrize("recipe", ["name: [", "name: digits\nfuture: {key: 1}\n", "", None], ids=str)
def test_a_recipe_that_is_broken_or_of_another_version(run: Path, recipe: str | None) -> None:
    (run / "recipe.yaml").unlink()
    if recipe is not None:
        (run / "recipe.yaml").write_text(recipe)
    html = report(run)
    assert list(sections(html)) == SECTIONS
    assert {"mistakes", "grad-cam", "architecture", "layers"} <= missing_in(html)
    assert 'class="missing"' not in sections(html)["curves"]
    if recipe and "future" in recipe:
        assert "future" in sections(html)["layers"]


def test_whatever_the_files_hold(run: Path) -> None:
    """Records, results and provenance of no form that we know are no reason to fail."""
    grow(run, epoch=None, accuracy=[1])
    grow(run, epoch="x", loss="nan")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "kind": "step", "split": "train", "lr": "0.1", "loss": 1e308}\n[]\n{"st')
    (run / "result.json").write_text('{"accuracy": "high", "total": null, "correct": {}, "seconds": [1]}')
    (run / "provenance.json").write_text('{"starts": [7, {"git": null, "gpus": [], "libraries": null}]}')
    html = report(run)
    assert list(sections(html)) == SECTIONS
    assert missing_in(html) == set()
    grow(run, step=10**400)
    (run / "result.json").write_text(f'{{"seconds": Infinity, "images_per_second": NaN, "parameters": {10**400}}}')
    assert missing_in(report(run)) == set()
    for name in ("metrics.jsonl", "result.json", "provenance.json"):
        (run / name).write_text("\x00 no JSON")
    html = report(run)
    assert "provenance.json is broken" in html
    assert missing_in(html) == {"curves", "rates", "origin"}


def test_a_broken_checkpoint_and_one_whose_outputs_are_no_numbers(run: Path) -> None:
    weights = checkpoints_of(run)[-1] / "model.safetensors"
    tensors = load_file(weights)  # mapped from the file
    not_numbers = {k: v * math.nan if v.is_floating_point() else v.clone() for k, v in tensors.items()}
    weights.write_bytes(b"broken")
    html = report(run)
    assert missing_in(html) >= OF_PREDICTIONS
    assert "model.safetensors" in sections(html)["confusion"]
    save_file(not_numbers, weights)
    sign(weights.parent, weights.name)
    html = report(run)
    assert missing_in(html) == OF_PREDICTIONS
    assert "outputs are not finite for 359 of 359 test images" in sections(html)["calibration"]


def test_the_headline_is_of_the_raw_weights_and_times_read_well(run: Path) -> None:
    change_recipe(run, "best_by: raw", "best_by: ema")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {r["split"]: f"{r['accuracy']:.2%}" for r in records if r["kind"] == "epoch"}
    assert last["test"] != last["test_ema"]
    started = '{"starts": [{"started": "2026-11-25T10:03:46+01:00"}]}'
    (run / "provenance.json").write_text(started)
    summary = sections(report(run))["summary"]
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd><strong>(.*?)</strong>", summary))
    assert (figures["Test accuracy"], figures["Averaged weights"]) == (last["test"], last["test_ema"])
    assert "<dd>2026-11-25 09:03 UTC</dd>" in summary


def test_text_from_files_stays_text(run: Path) -> None:
    bad = "<script>alert(1)</script>"
    for checkpoint in checkpoints_of(run):
        data = json.loads((checkpoint / "state.json").read_text())
        data["classes"] = [bad, *data["classes"][1:]]
        (checkpoint / "state.json").write_text(json.dumps(data))
        sign(checkpoint, "state.json")
    change_recipe(run, "name: digits", 'name: "<b>bold<"')
    (run / "provenance.json").write_text(json.dumps({"starts": [{"command": [bad], "cpu": bad}]}))
    html = report(run)
    assert html.count("<script>") == 1  # ours
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in sections(html)["classes"]
    assert "&lt;script&gt;" in sections(html)["origin"]
    assert "<b>bold" not in html
    assert missing_in(html) == set()
    assert "/caf?" in report(Path(shutil.copytree(run, run.parent / os.fsdecode(b"caf\xe9"))))  # no UTF-8


def test_into_a_run_that_trains_nothing_but_the_report_is_written(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with FileLock(run / LOCK):
        html = report(run)
    assert '<span class="badge">running</span>' in html
    assert {p for p in run.rglob("*") if p not in before} - {run / LOCK} == {run / "report.html"}
    changed = {p for p, time_ns in before.items() if p.exists() and p.stat().st_mtime_ns != time_ns}
    assert changed <= {run, run / LOCK}


def test_only_what_has_changed_is_made_again(run: Path) -> None:
    reporter = Reporter(run)
    assert (reporter.update_run(), reporter.update_checkpoint()) == (True, True)
    assert (reporter.update_run(), reporter.update_checkpoint()) == (False, False)
    grow(run)
    assert (reporter.update_run(), reporter.update_checkpoint()) == (True, False)
    assert "98.76%" in reporter.html()
    last = checkpoints_of(run)[-1]
    assert last.name in reporter.html()
    shutil.rmtree(last)
    assert reporter.update_checkpoint()
    assert last.name not in reporter.html()


def test_what_is_written_while_a_run_is_read_is_not_missed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9123, 0.9876])

    def read_and_grow(path: Path) -> Run:
        found = open_run(path)
        grow(run, accuracy=next(accuracies))
        return found

    monkeypatch.setattr(reporter_module, "open_run", read_and_grow)
    reporter = Reporter(run)
    reporter.update_run()
    assert "91.23%" in reporter.html()
    monkeypatch.undo()
    assert reporter.update_run()
    assert "98.76%" in reporter.html()


def test_a_server_does_not_take_the_pages_of_the_one_before_for_its_own(run: Path) -> None:
    """A page in a browser asks for the version at the port it came from, whoever listens there now."""
    reporter, versions = Reporter(run), set()
    reporter.update_run()
    for _ in range(2):
        with Server(0) as server:
            for _ in range(2):
                server.show(reporter)
                versions.add(server.version)
                assert f'let version = "{server.version}"' in server.page.decode()
    assert len(versions) == 4


def test_another_network(tmp_path: Path) -> None:
    recipe = tmp_path / "resnet.yaml"
    recipe.write_text(
        "data: {source: synthetic, loader: device, synthetic: {train_images: 40, test_images: 20, num_classes: 3}}\n"
        "model: {name: resnet10t}\ntraining: {epochs: 1, global_batch_size: 20}\ntracking: {wandb: disabled}\n"
    )
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    html = report(tmp_path / "run")
    assert missing_in(html) <= {"confusion", "fields", "architecture", "mistakes"}  # it may make no mistake
    assert "last feature map" in sections(html)["grad-cam"]
    assert "resnet10t" in sections(html)["architecture"]


def test_a_long_run_is_quick_and_small(tmp_path: Path) -> None:
    """100,000 records, beside which nothing else is there."""
    run = tmp_path / "long" / "run"
    run.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step, value in enumerate(torch.rand(100_000, generator=torch.Generator().manual_seed(0)).tolist(), start=1):
            record = {"kind": "step", "split": "train", "step": step, "epoch": step / 391, "loss": value, "lr": 0.1,
                      "accuracy": value, "images_per_second": 900 + value, "grad_norm": 1 + value}  # fmt: skip
            file.write(json.dumps(record) + "\n")
    started = time.process_time()
    html = report(run)
    assert time.process_time() - started < 20
    assert len(html) < 500_000
    assert {"checkpoint", "origin"} <= missing_in(html)
