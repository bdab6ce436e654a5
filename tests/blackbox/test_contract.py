"""What the outside relies on, through the command line alone: this file survives any change inside the house.

Nothing here imports more of the package than the entry point of the `harness` command and the processor's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from harness.cli import main
from harness.machine import cpu_name
from tests.conftest import RunRanks

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "recipes" / "debug.yaml")
SEED = str(ROOT / "recipes" / "seed.yaml")
GOLDEN = ROOT / "tests" / "golden" / "weights.json"
# Compiled kernels have bits of their compiler.
SHORT = (
    "training.kernels=plain",
    "ema.decay=0.9",
    "data.crop_padding_px=4",
    "data.flip=alternating",
    "mix.mixup_alpha=0.2",
)
COMMANDS = (
    *(
        "train",
        "eval",
        "predict",
        "lr-find",
        "sweep",
        "submit",
        "summary",
        "recipe",
        "data",
        "report",
        "runs",
        "curves",
    ),
    *("compare", "track", "dashboard", "bench", "scale", "doctor"),
)
Out = pytest.CaptureFixture[str]


def digest(run: Path, name: str = "model") -> str:
    """SHA-256 over the names and bytes of the newest checkpoint's tensors, the same whatever the file's layout."""
    newest = max((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))
    found = hashlib.sha256()
    with safe_open(newest / f"{name}.safetensors", "pt") as file:
        for key in sorted(file.keys()):
            found.update(key.encode() + file.get_tensor(key).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def train(run: Path, *words: str, recipe: str = DEBUG, expect: int = 0) -> Path:
    assert main(["train", recipe, *words, "--run-dir", str(run)]) == expect
    return run


def output_of(capsys: Out, *words: str | Path, expect: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == expect
    printed = capsys.readouterr()
    return printed.out if expect == 0 else printed.err


def json_of(capsys: Out, *words: str | Path) -> Any:
    return json.loads(output_of(capsys, *words, "--json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("contract") / "runs" / "debug" / "run", *SHORT)


# --- what a training leaves


def test_a_run_directory_holds_what_it_always_held(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {"recipe.yaml", "provenance.json", "metrics.jsonl", "result.json", "checkpoints"}
    for checkpoint in (run / "checkpoints").glob("step_*"):
        files = {path.name for path in checkpoint.iterdir()}
        assert files == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_result_json(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    wanted = {"accuracy", "correct", "total", "loss", "epoch", "step", "seconds", "images_per_second", "parameters"}
    assert wanted | {"best", "ema", "data_source", "world_size", "seed"} <= result.keys()
    assert {"accuracy", "epoch", "step"} <= result["best"].keys()
    assert (result["total"], result["step"], result["epoch"]) == (128, 8, 2)


def test_metrics_are_a_json_object_a_line(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"kind", "split", "step", "epoch", "loss", "accuracy"} <= line.keys() for line in lines)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all({"lr", "images_per_second", "loader_wait_seconds"} <= line.keys() for line in steps)
    assert {line["split"] for line in lines if line["kind"] == "epoch"} == {"train", "test", "test_ema"}


def test_provenance_names_code_libraries_and_machine(run: Path) -> None:
    (provenance,) = json.loads((run / "provenance.json").read_text())["starts"]
    assert {
        "harness",
        "git",
        "python",
        "libraries",
        "cpu",
        "gpus",
        "world_size",
        "command",
        "started",
    } <= provenance.keys()


def test_a_run_directory_in_use_by_another_run_is_left_alone(run: Path, capsys: Out) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "HINT:" in output_of(capsys, "train", DEBUG, "--run-dir", run, expect=2)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


# --- bits


def _machine() -> str:
    """What bits belong to: torch, the processor and its vector instructions."""
    amx = " with AMX" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else ""
    version, vectors = torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability()
    return f"torch {version}, {cpu_name()}, {vectors}{amx}"


def _is_golden(name: str, found: Sequence[str]) -> None:
    """Equal to what this kind of machine had before; `GOLDEN_UPDATE=1` records it."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN_UPDATE"):
        golden.setdefault(_machine(), {})[name] = list(found)
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    elif _machine() not in golden:
        pytest.skip(f"the bits of {_machine()} are not recorded (GOLDEN_UPDATE=1 records them)")
    assert golden[_machine()][name] == list(found)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_rank_ends_at_the_golden_weights(tmp_path: Path, precision: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split by threads
    try:
        trained = train(tmp_path / "run", *SHORT, f"training.precision={precision}")
    finally:
        torch.set_num_threads(threads)
    _is_golden(f"one rank, {precision}", [digest(trained), digest(trained, "ema"), digest(trained, "optimizer")])


def test_two_ranks_end_at_the_golden_weights(tmp_path: Path, run_ranks: RunRanks) -> None:
    done = run_ranks(2, "-m", "harness", "train", DEBUG, *SHORT, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    _is_golden("two ranks", [digest(tmp_path / "run"), digest(tmp_path / "run", "ema")])


def test_a_stopped_training_resumes_to_the_same_bits(tmp_path: Path, run: Path) -> None:
    half = train(tmp_path / "run", *SHORT, "training.epochs=1")
    assert main(["train", DEBUG, *SHORT, "--run-dir", str(half), "--resume", "auto"]) == 0
    assert [digest(half, name) for name in ("model", "ema", "optimizer")] == [
        digest(run, name) for name in ("model", "ema", "optimizer")
    ]


@pytest.mark.ffcv
def test_all_loaders_give_the_same_pixels(tmp_path: Path) -> None:
    words = (*SHORT, "data.source=digits", "model.args.widths=[[8],[8]]", "training.epochs=null", "training.steps=4")
    words += ("data.cutout_size_px=6",)
    trained = [
        train(tmp_path / f"{loader}-{workers}", *words, f"data.loader={loader}", f"data.workers={workers}")
        for loader, workers in (("torch", 0), ("device", 1), ("ffcv", 1), ("ffcv", 2))
    ]
    assert len({digest(path) for path in trained}) == 1


# --- exit codes


def test_sigterm_leaves_a_checkpoint_and_75(tmp_path: Path) -> None:
    words = ["train", DEBUG, "training.epochs=100000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_diverged_training_ends_with_3(tmp_path: Path, capsys: Out) -> None:
    train(tmp_path / "run", "optimizer.lr=1e30", "model.args.norm=none", expect=3)
    assert "diverged at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "nowhere.yaml"],
        ["tarin", DEBUG],
        ["train", DEBUG, "--reusme", "auto"],
        ["train", DEBUG, "data.num_classes=7"],
        ["eval", "nowhere"],
        ["predict", "nowhere", "image.png"],
        ["report", "nowhere"],
        ["compare", "nowhere", "nowhere_else"],
    ],
)
def test_mistakes_end_with_2_a_hint_and_nothing_on_disk(
    words: list[str], capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = output_of(capsys, *words, expect=2)
    assert "HINT:" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_all_errors_of_a_recipe_come_at_once_with_their_lines(tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("training: {epocs: 3}\noptimizer:\n  lr: -1\nseed: zero\n")
    error = output_of(capsys, "train", path, "data.flipp=none", expect=2)
    for text in (
        f"{path}:1",
        f"{path}:3",
        f"{path}:4",
        'Did you mean "training.epochs"?',
        'override "data.flipp=none"',
    ):
        assert text in error


# --- every command


def test_help_lists_every_command(capsys: Out) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


def test_eval_gives_the_accuracy_of_the_result(run: Path, capsys: Out) -> None:
    result = json.loads((run / "result.json").read_text())
    found = json_of(capsys, "eval", run)
    assert {key: found["test"][key] for key in ("correct", "total")} == {
        key: result[key] for key in ("correct", "total")
    }
    assert "test: accuracy" in output_of(capsys, "eval", run, "--checkpoint", "best", "--recalibrate", "2")


def test_predict_names_classes(run: Path, tmp_path: Path, capsys: Out) -> None:
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "image.png")
    (found,) = json_of(capsys, "predict", run, tmp_path / "image.png", "--top", "4", "--weights", "ema")
    assert sum(found["classes"].values()) == pytest.approx(1, abs=1e-5)


def test_summary_has_the_rows_of_the_seed(capsys: Out) -> None:
    found = json_of(capsys, "summary", SEED)
    assert len(found["summary"]["rows"]) == 115
    assert [c["passed"] for c in found["constraints"]] == [True] * 3
    assert "Total params: 380,646" in output_of(capsys, "summary", SEED)


def test_recipe_show_is_a_recipe(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "debug.yaml").write_text(output_of(capsys, "recipe", "show", DEBUG, "seed=3"))
    assert output_of(capsys, "recipe", "show", tmp_path / "debug.yaml") == (tmp_path / "debug.yaml").read_text()
    assert "valid" in output_of(capsys, "recipe", "validate", DEBUG, SEED)
    assert json.loads(output_of(capsys, "recipe", "schema"))["properties"].keys() >= {"base", "data", "training"}


def test_data_is_prepared_and_verified(capsys: Out) -> None:
    assert "sha256" in output_of(capsys, "data", "prepare", DEBUG)
    assert ": whole" in output_of(capsys, "data", "verify")


def test_doctor(capsys: Out) -> None:
    assert json_of(capsys, "doctor")
    assert "right" in output_of(capsys, "doctor", "--numerics", DEBUG)


def test_lr_find_draws_and_suggests(capsys: Out, tmp_path: Path) -> None:
    assert "learning rate" in output_of(capsys, "lr-find", DEBUG, "--html", tmp_path / "lr.html")
    assert "<svg" in (tmp_path / "lr.html").read_text()


def test_runs_and_curves_show_a_run(run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[2])
    assert "debug" in output_of(capsys, "runs")
    assert "loss" in output_of(capsys, "curves", run)


def test_a_report_is_one_page_that_needs_no_network(run: Path, tmp_path: Path, capsys: Out) -> None:
    page = tmp_path / "report.html"
    output_of(capsys, "report", run, "--output", page)
    text = page.read_text()
    assert "<svg" in text
    assert 'src="http' not in text


def test_compare_two_runs(run: Path, tmp_path: Path, capsys: Out) -> None:
    other = train(tmp_path / "other", *SHORT, "optimizer.lr=0.01")
    assert "optimizer.lr" in output_of(capsys, "compare", run, other)
    assert json_of(capsys, "compare", run, other)


def test_a_sweep_trains_its_points_once(tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"recipe: {DEBUG}\nmethod: grid\nseeds: [0]\noverrides: {{training.epochs: 1}}\n"
    Path("rates.yaml").write_text(f"{text}parameters: {{optimizer.lr: {{values: [0.1]}}}}\n")
    assert "optimizer.lr" in output_of(capsys, "sweep", "rates.yaml", "--dry-run")
    output_of(capsys, "sweep", "rates.yaml", "--ranks", "1")
    assert len(list(Path("runs", "rates").glob("*/result.json"))) == 1
    assert "±" in output_of(capsys, "sweep", "rates.yaml", "--table")


def test_submit_prints_the_batch_script(capsys: Out) -> None:
    script = output_of(capsys, "submit", DEBUG, "--nodes", "2", "--time", "10", "--dry-run")
    assert script.startswith("#!")
    assert "#SBATCH --nodes=2" in script
    assert "srun" in script


def test_scale_predicts(capsys: Out) -> None:
    strong = json_of(capsys, "scale", DEBUG, "--gpus", "1,8", "--step-ms", "20")["strong"]
    assert [row["gpus"] for row in strong] == [1, 8]
    assert strong[0]["step_ms"] == 20 > strong[1]["step_ms"] > 20 / 8


def test_dashboard_is_printed(capsys: Out) -> None:
    assert json.loads(output_of(capsys, "dashboard", DEBUG, "--print"))


def test_launch_sh_prints_the_command() -> None:
    environment = os.environ | {"DRY_RUN": "1", "HARNESS_VENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "launch.sh", DEBUG, "seed=3"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"-m harness train {DEBUG} seed=3")
