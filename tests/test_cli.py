"""The command line: quick, helpful, and never a traceback for a user's mistake."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.cli import COMMANDS, main
from harness.errors import from_disk
from harness.files import hex_digest
from tests.conftest import run_limited

ROOT = Path(__file__).resolve().parents[1]
SEED = str(ROOT / "recipes" / "seed.yaml")
DEBUG = str(ROOT / "recipes" / "debug.yaml")
HARNESS = [sys.executable, "-m", "harness"]
Out = pytest.CaptureFixture[str]


ACTIONS = ("recipe show", "data prepare", "data verify", "track sync", "bench loader", "bench scaling")


def test_no_help_imports_anything_heavy() -> None:
    code = (
        "import sys\nfrom harness.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    try:\n        main(words.split())\n    except SystemExit as end:\n        assert not end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'timm', 'yaml', 'wandb'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    commands = [f"{name} --help" for name in (*COMMANDS, *ACTIONS)]
    done = run_limited([sys.executable, "-c", code, "--help", "--version", *commands], 60, dict(os.environ), ROOT)
    assert done.returncode == 0, done.stderr
    assert "\nharness 0." in done.stdout
    assert all(f"usage: harness {name}" in done.stdout for name in (*COMMANDS, *ACTIONS))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "the first word must be a command"),
        ("--jsn", "the first word must be a command"),
        ("tarin x.yaml", 'unknown command "tarin"\n  HINT: Did you mean "train"?'),
        ("train", "the following arguments are required: RECIPE"),
        (f"train {SEED} --reusme auto", 'unknown argument "--reusme"'),
        ("runs here there", 'unknown argument "there"'),
        ("train nowhere.yaml", "cannot be read"),
        (f"train {SEED} optimizer.lr=0", "optimizer.lr: must be > 0"),
        (f"train {SEED} training.epochs=-1", "training.epochs: must be ≥ 0"),
        (f"train {DEBUG} model.name=resnet81", 'HINT: Did you mean "resnet'),
        (f"train {DEBUG} model.args.dropout=2", "model.args.dropout: must be < 1"),
        (f"train {DEBUG} training.global_batch_size=1000", "larger than the 256 training images"),
        (f"train {DEBUG} data.num_classes=7", "the data has 4 classes, not 7"),
        (f"train {DEBUG} optimizer.name=adamx", "unknown optimizer"),
        (f"train {DEBUG} training.precision=fp16", "fp16 needs a GPU"),
        (f"train {DEBUG} --resume nowhere", "no run with checkpoints here"),
        (f"train {DEBUG} data.source=parquet data.path=/nowhere", "/nowhere"),
        (f"train {DEBUG} data.source=imagefolder data.path=/nowhere", "/nowhere"),
        (f"train {DEBUG} data.synthetic.train_images=1000000000000", "not enough memory"),
        ("eval nowhere", "no run with checkpoints here"),
        ("eval nowhere --recalibrate -4", 'argument --recalibrate: must be a whole number from 0 to 1000000, not "-4"'),
        ("predict nowhere https://a.org/b.png", "downloads nothing; fetch it first: curl -LO https://a.org/b.png"),
        ("predict nowhere image.png", "no run with checkpoints here"),
        ("predict nowhere image.png --top x", 'argument --top: must be a whole number from 1 to 1000000, not "x"'),
        ("summary nowhere.yaml", "cannot be read"),
        ("doctor --numerics", "--numerics needs a recipe"),
        ("recipe", "the following arguments are required: ACTION"),
    ],
)
def test_mistakes_are_explained(
    arguments: str, text: str, capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_no_data_and_no_network(
    capsys: Out, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert main(["train", SEED]) == 2
    assert "HARNESS_DATA" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_exit_code_is_told_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = tmp_path / "codes"
    monkeypatch.setenv("HARNESS_EXIT_CODE_FILE", str(codes))
    assert main(["train", "nowhere.yaml"]) == 2
    assert codes.read_text() == "2\n"
    monkeypatch.setenv("HARNESS_EXIT_CODE_FILE", str(tmp_path / "gone" / "0"))  # a newer start has cleared it away
    assert main(["recipe", "validate", DEBUG]) == 0


def test_recipe_commands(capsys: Out, tmp_path: Path) -> None:
    assert main(["recipe", "show", SEED, "training.epochs=2"]) == 0
    assert "epochs: 2" in capsys.readouterr().out
    (tmp_path / "bad.yaml").write_text("a: 1\n")
    assert main(["recipe", "validate", SEED, str(tmp_path / "bad.yaml")]) == 2
    assert f"{SEED}: valid" in capsys.readouterr().out
    assert main(["recipe", "validate", DEBUG, SEED, "training.epochs=3"]) == 0
    assert main(["recipe", "validate", DEBUG, "training.epochs=two"]) == 2
    assert "training.epochs: input should be a valid integer" in capsys.readouterr().err
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["base"]


def test_summary_prints_the_seeds_table(capsys: Out) -> None:
    assert main(["summary", SEED]) == 0
    out = capsys.readouterr().out
    assert (ROOT / "tests" / "golden" / "seed_summary.txt").read_text().strip() in out
    assert out.count("PASS") == 3


def test_data_prepare_and_verify(capsys: Out, empty_cache: Path, tmp_path: Path) -> None:
    assert main(["data", "prepare", DEBUG]) == 0
    store = Path(capsys.readouterr().out.splitlines()[0])
    assert main(["data", "verify"]) == 0
    beton = store / "train.beton"
    beton.write_bytes(beton.read_bytes()[:-1])
    assert main(["data", "verify"]) == 2
    assert "train.beton" in capsys.readouterr().out
    assert main(["train", DEBUG, "--run-dir", str(tmp_path / "run")]) == 2
    assert "train.beton" in capsys.readouterr().err
    assert main(["data", "prepare", DEBUG, "--force"]) == 0
    assert main(["data", "verify"]) == 0


def test_doctor(capsys: Out) -> None:
    assert main(["doctor"]) == 0
    assert "cache_folder" in capsys.readouterr().out
    assert main(["doctor", "--numerics", DEBUG, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]


def test_weights_that_are_not_there_and_a_loss_that_json_has_no_word_for(
    tiny: Path, tmp_path: Path, capsys: Out
) -> None:
    assert main(["train", str(tiny), "training.epochs=1", "--run-dir", str(tmp_path / "run")]) == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "image.png"), "--json"]
    assert main([*words, "--weights", "ema"]) == 2
    assert "the run has no averaged weights" in capsys.readouterr().err
    assert main([*words, "--top", "2"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["image"], len(found["classes"])) == (str(tmp_path / "image.png"), 2)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    file, manifest_file = checkpoint / "model.safetensors", checkpoint / "manifest.json"
    tensors = load_file(file)
    save_file({name: tensor * math.inf for name, tensor in tensors.items()}, file)
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][file.name] = {"sha256": hex_digest(file), "bytes": file.stat().st_size}
    manifest_file.write_text(json.dumps(manifest))
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail)["test"]["loss"] is None


def test_python_m_harness_is_the_same_program() -> None:
    done = run_limited([*HARNESS, "train"], 60, dict(os.environ), ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR harness train")


@pytest.mark.parametrize("words", ["--help", "recipe list", f"data prepare {DEBUG}"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">/dev/full 2>&1"])
def test_an_output_that_is_full_is_one_error(words: str, redirection: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"{shlex.join(HARNESS)} {words} {redirection}"
    done = run_limited(["bash", "-c", command], 60, variables, ROOT)
    assert done.returncode == 1  # where Python's own end would answer 120
    if redirection == ">/dev/full":
        assert done.stderr.startswith("ERROR standard output: cannot be written or read (No space left on device)\n")
        assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "words", ["recipe schema | true", "data verify | true", "recipe list >&-", "data verify >&- 2>&-"]
)
def test_a_reader_that_leaves_at_once_or_never_came_is_no_error(words: str) -> None:
    command = f"{shlex.join(HARNESS)} {words}; exit ${{PIPESTATUS[0]}}"
    done = run_limited(["bash", "-c", command], 60, dict(os.environ), ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_anywhere_is_reported_without_a_traceback(tmp_path: Path, capsys: Out) -> None:
    """The run's own files, which are written before the first checkpoint: larger ones fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    overrides = ["data.loader=device", "tracking.wandb=disabled"]
    assert main(["data", "prepare", DEBUG]) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert main(["train", DEBUG, *overrides, "--run-dir", str(tmp_path / "run")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "File too large" in error
    assert "HINT: See that the disk has space" in error


def test_an_error_of_ours_is_not_put_down_to_the_disk() -> None:
    assert from_disk(FileNotFoundError(errno.ENOENT, "no such file")) is None
    found = from_disk(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert found is not None
    assert (found.where, found.exit_code) == ("/x", 1)


@pytest.mark.parametrize("words", [["train", DEBUG], ["runs"]], ids=" ".join)
def test_a_python_without_the_packages_is_no_traceback(words: list[str], tmp_path: Path) -> None:
    """And not tried again by launchers, which start ranks again after a 1."""
    code = tmp_path / "code"
    variables = {"PYTHONPATH": str(ROOT), "HARNESS_EXIT_CODE_FILE": str(code)}
    command = [sys.executable, "-S", "-m", "harness", *words]  # without site-packages
    done = run_limited(command, 60, variables, tmp_path)
    assert done.returncode == 2
    assert code.read_text() == "2\n"
    assert done.stderr.startswith(f"ERROR {sys.executable}: No module named ")
    assert "HINT: ./scripts/setup.sh" in done.stderr
