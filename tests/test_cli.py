"""The command line: quick, helpful, and never a traceback for a user's mistake."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import COMMANDS, main
from harness.errors import from_disk

ROOT = Path(__file__).resolve().parents[1]
SEED = str(ROOT / "recipes" / "seed.yaml")
DEBUG = str(ROOT / "recipes" / "debug.yaml")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom harness.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'timm', 'yaml', 'wandb'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, "recipe show", "data prepare", "data verify", "bench loader", "bench step", "bench scaling"],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: harness {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("harness 0.")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("tarin x.yaml", 'unknown command "tarin"\n  HINT: Did you mean "train"?'),
        ("train", "the following arguments are required: RECIPE"),
        (f"train {SEED} --reusme auto", 'unknown argument "--reusme"'),
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
        ("eval nowhere --recalibrate -4", 'argument --recalibrate: must be a whole number of at least 0, not "-4"'),
        ("predict nowhere https://a.org/b.png", "downloads nothing; fetch it first: curl -LO https://a.org/b.png"),
        ("predict nowhere image.png", "no run with checkpoints here"),
        ("predict nowhere image.png --top 0", 'argument --top: must be a whole number of at least 1, not "0"'),
        ("predict nowhere image.png --top x", 'argument --top: must be a whole number of at least 1, not "x"'),
        ("summary nowhere.yaml", "cannot be read"),
        ("doctor --numerics", "--numerics needs a recipe"),
        ("recipe", "the following arguments are required: ACTION"),
    ],
)
def test_mistakes_are_explained(
    arguments: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_no_data_and_no_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert main(["train", SEED]) == 2
    error = capsys.readouterr().err
    assert "HARNESS_DATA" in error
    assert not (tmp_path / "runs").exists()


def test_exit_code_is_told_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = tmp_path / "codes"
    monkeypatch.setenv("HARNESS_EXIT_CODE_FILE", str(codes))
    assert main(["train", "nowhere.yaml"]) == 2
    assert codes.read_text() == "2\n"


def test_recipe_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipe", "show", SEED, "training.epochs=2"]) == 0
    assert "epochs: 2" in capsys.readouterr().out
    (tmp_path / "bad.yaml").write_text("a: 1\n")
    assert main(["recipe", "validate", SEED, str(tmp_path / "bad.yaml")]) == 2
    assert f"{SEED}: valid" in capsys.readouterr().out
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["base"]


def test_validate_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", DEBUG, SEED, "training.epochs=3"]) == 0
    assert main(["recipe", "validate", DEBUG, "training.epochs=two"]) == 2
    assert "training.epochs: input should be a valid integer" in capsys.readouterr().err


def test_summary_prints_the_seeds_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", SEED]) == 0
    out = capsys.readouterr().out
    assert (ROOT / "tests" / "golden" / "seed_summary.txt").read_text().strip() in out
    assert out.count("PASS") == 3
    assert main(["summary", DEBUG, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_data_prepare_and_verify(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
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


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "cache_folder" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["libraries"]["torch"]
    assert main(["doctor", "--numerics", DEBUG]) == 0
    assert "float64" in capsys.readouterr().out
    assert main(["doctor", "--numerics", DEBUG, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_python_m_harness_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "harness", "train"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR harness train")


def test_a_full_disk_anywhere_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    told = from_disk(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert told is not None
    assert (told.where, told.exit_code) == ("/x", 1)


@pytest.mark.parametrize("words", [["train", DEBUG], ["runs"]], ids=" ".join)
def test_a_python_without_the_packages_is_no_traceback(words: list[str], tmp_path: Path) -> None:
    """And not tried again by launchers, which start ranks anew after a 1."""
    code = tmp_path / "code"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "harness", *words],  # without site-packages
        env={"PYTHONPATH": str(ROOT), "HARNESS_EXIT_CODE_FILE": str(code)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert code.read_text() == "2\n"
    assert done.stderr.startswith(f"ERROR {sys.executable}: No module named ")
    assert "HINT: ./scripts/setup.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exit_code_that_nobody_waits_for_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer start of the job has cleared the folder away."""
    monkeypatch.setenv("HARNESS_EXIT_CODE_FILE", str(tmp_path / "gone" / "0"))
    assert main(["recipe", "validate", DEBUG]) == 0
