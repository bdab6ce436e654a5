"""launch.sh: what it would run on which machine, what it says to mistakes, and real launches."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_limited

ROOT = Path(__file__).resolve().parents[1]
SEED = "recipes/seed.yaml"
LIMIT_SECONDS = 180


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """No set-up, no GPU list but the test's own, and an environment folder that is not there."""
    variables = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "NPROC")}
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    write_script(stand_ins / "nvidia-smi", "exit 9")
    return variables | {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "HARNESS_VENV": str(tmp_path / "absent"),
        "HARNESS_SKIP_SETUP": "1",
        "OMP_NUM_THREADS": "",
    }


@pytest.fixture
def ready(env: dict[str, str]) -> dict[str, str]:
    """The same with the environment these tests run in."""
    return env | {"HARNESS_VENV": sys.prefix}


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def list_gpus(env: dict[str, str], count: int) -> None:
    """An nvidia-smi that lists GPUs: there is none on most machines that run this test, and never four."""
    lines = [f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n  MIG 1g.18gb Device 0: (UUID: MIG-{i})" for i in range(count)]
    write_script(Path(env["PATH"].split(":")[0]) / "nvidia-smi", f"cat <<'END'\n{chr(10).join(lines)}\nEND")


def launch(env: dict[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_limited([str(ROOT / "launch.sh"), *arguments], LIMIT_SECONDS, env, cwd)


def dry_run(env: dict[str, str], *arguments: str, cwd: Path = ROOT) -> list[str]:
    """The words of the command that would run."""
    done = launch(env | {"DRY_RUN": "1"}, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def accelerate_options(words: list[str]) -> list[str]:
    """What stands between `accelerate launch` and `-m harness train`, the folder of the configuration left out."""
    inner = words[words.index("launch") + 1 : words.index("train") - 2]
    return [word.removeprefix(f"{ROOT}/recipes/launch/") for word in inner]


def test_help_and_usage(env: dict[str, str]) -> None:
    asked = launch(env, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "./launch.sh recipes/quickstart.yaml" in asked.stdout
    bare = launch(env)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr == asked.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes/sead.yaml"], ["recipes/sead.yaml: no such recipe", 'HINT: Did you mean "recipes/seed.yaml"?']),
        (["zzz"], ["zzz: no such recipe", "recipes/quickstart.yaml"]),
        (["training.epochs=2"], ["the recipe comes first", "HINT: ./launch.sh"]),
        (["--resume", "auto"], ["the recipe comes first", "HINT: ./launch.sh"]),
        ([SEED, "--gpus", "two"], ['--gpus needs a number, got "two"']),
        ([SEED, "--ranks"], ['--ranks needs a number, got ""']),
        ([SEED, "--ranks=0"], ["--ranks must be at least 1"]),
        ([SEED, "--gpus", "1"], ["this machine has 0"]),
        (["--slurm"], ["./launch.sh --slurm recipes/seed.yaml"]),
        (
            ["--slurm", SEED, "--gpus", "1"],
            ["--gpus and --ranks are for this machine", "HINT: With --slurm: --nodes N"],
        ),
    ],
)
def test_mistakes_are_told_and_nothing_starts(env: dict[str, str], arguments: list[str], words: list[str]) -> None:
    done = launch(env, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr


def test_several_tasks_of_srun_are_refused(env: dict[str, str]) -> None:
    """Each would train by itself, and all end well."""
    step = env | {"DRY_RUN": "1", "SLURM_STEP_NUM_TASKS": "2"}
    done = launch(step, SEED)
    assert done.returncode == 2
    assert "srun started this 2 times" in done.stderr
    assert f"-m harness train {SEED}" in done.stderr
    in_a_shell = step | {"SLURM_PTY_PORT": "4000"}
    assert launch(in_a_shell, SEED).returncode == 2  # a step started there inherits the variable, not the terminal
    master, terminal = pty.openpty()
    command = [str(ROOT / "launch.sh"), SEED]
    done = subprocess.run(command, stdin=terminal, env=in_a_shell, cwd=ROOT, capture_output=True, timeout=LIMIT_SECONDS)
    os.close(master)
    os.close(terminal)
    assert done.returncode == 0


def test_a_dry_run_needs_no_environment_and_makes_none(env: dict[str, str]) -> None:
    del env["HARNESS_SKIP_SETUP"]
    python = f"{env['HARNESS_VENV']}/bin/python"
    assert dry_run(env, SEED) == [
        "ACCELERATE_USE_CPU=true",
        python,
        "-m",
        "harness",
        "train",
        SEED,
    ]
    assert dry_run(env, "seed", cwd=Path("/"))[-1] == str(ROOT / SEED)  # by its name, from anywhere
    assert not Path(env["HARNESS_VENV"]).exists()
    assert "no such recipe" in launch(env | {"DRY_RUN": "0"}, "absent.yaml").stderr


def test_arguments_come_through_whole(env: dict[str, str]) -> None:
    arguments = ["--run-dir", "a b/$HOME", "model.args={a: 'x y'}", "--resume", "never", "--new-option=*", "seed=1"]
    words = dry_run(env, SEED, *arguments)
    assert words[words.index("train") + 1 :] == [SEED, *arguments]


def test_a_recipe_is_found_from_any_folder(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: x.yaml\n")
    assert dry_run(env, "mine.yaml", cwd=tmp_path)[-1] == "mine.yaml"
    assert dry_run(env, SEED, cwd=tmp_path)[-1] == str(ROOT / SEED)


@pytest.mark.parametrize(
    ("gpus", "arguments", "extra", "ranks"),
    [
        (4, [], {}, 4),
        (4, ["--gpus", "2"], {}, 2),
        (4, ["--ranks", "3"], {}, 3),
        (4, [], {"NPROC": "2"}, 2),
        (4, [], {"CUDA_VISIBLE_DEVICES": "0,2,3"}, 3),
        (4, ["--gpus", "1"], {}, 1),
        (4, [], {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        (1, [], {}, 1),
    ],
)
def test_gpus_that_are_there_are_used(
    env: dict[str, str], gpus: int, arguments: list[str], extra: dict[str, str], ranks: int
) -> None:
    list_gpus(env, gpus)
    words = dry_run(env | extra, SEED, *arguments)
    assert "ACCELERATE_USE_CPU=true" not in words
    if ranks == 1:
        assert words[1:] == ["-m", "harness", "train", SEED]
    else:
        expected = ["--config_file", "multi_gpu.yaml", "--num_processes", str(ranks)]
        assert accelerate_options(words) == expected


def test_a_job_is_submitted_with_the_options_of_submit(ready: dict[str, str], tmp_path: Path) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "8", "training.epochs=2", "--run-dir", "a b"]
    expected = [f"{sys.prefix}/bin/python", "-m", "harness", "submit", SEED, *words]
    assert dry_run(ready, "--slurm", SEED, *words) == expected
    assert dry_run(ready, SEED, *words, "--slurm") == expected
    text = launch(ready, "--slurm", str(ROOT / SEED), *words, "--dry-run", cwd=tmp_path).stdout
    assert "#SBATCH --nodes=2\n" in text
    assert f"python={sys.prefix}/bin/python\n" in text
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("extra", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}])
def test_gpus_that_are_hidden_are_not_used(env: dict[str, str], extra: dict[str, str]) -> None:
    list_gpus(env, 4)
    assert "ACCELERATE_USE_CPU=true" in dry_run(env | extra, SEED)
    assert "ACCELERATE_USE_CPU=true" in dry_run(env, SEED, "--gpus", "0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "5"], "--gpus 5, but this machine has 4"),
        (["--ranks", "5"], "5 ranks asked for, but this machine has 4 GPU(s)"),
        (["--ranks", "2", "--gpus", "4"], "one rank a GPU"),
    ],
)
def test_more_than_there_is_is_refused(env: dict[str, str], arguments: list[str], words: str) -> None:
    list_gpus(env, 4)
    done = launch(env | {"DRY_RUN": "1"}, SEED, *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_gpus_that_torch_cannot_use_are_not_used(ready: dict[str, str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use this machine's GPU")
    list_gpus(ready, 4)
    assert "ACCELERATE_USE_CPU=true" in dry_run(ready, SEED)


def test_ranks_on_the_cpu_share_the_cores(ready: dict[str, str]) -> None:
    from harness.machine import usable_cores

    words = dry_run(ready, SEED, "--gpus", "0", "--ranks", "2")
    assert words[:2] == [f"OMP_NUM_THREADS={max(1, usable_cores() // 2)}", "ACCELERATE_USE_CPU=true"]
    assert accelerate_options(words) == ["--config_file", "cpu.yaml", "--num_processes", "2"]
    assert words[-2:] == ["train", SEED]
    # Threads that the user chose stay.
    assert dry_run(ready | {"OMP_NUM_THREADS": "7"}, SEED, "--gpus", "0")[0] == "ACCELERATE_USE_CPU=true"


def test_the_split_that_was_measured_is_taken(ready: dict[str, str], tmp_path: Path) -> None:
    from harness.launching import local
    from harness.machine import usable_cores
    from harness.recipe import load

    recipe = load(ROOT / SEED)
    splits = local._splits(recipe, usable_cores())
    if len(splits) == 1:
        pytest.skip("one core: nothing to split")
    # Figures of a made-up measurement: the largest number of ranks is the fastest.
    env = ready | {"HARNESS_CACHE": str(tmp_path / "cache")}
    assert "--num_processes" not in dry_run(env, SEED)
    key = local._key(recipe, splits)
    path = tmp_path / "cache" / "splits" / local._cache_file(key).name
    local._remember(path, key, {split: 100.0 * split.ranks for split in splits})
    assert accelerate_options(dry_run(env, SEED))[-1] == str(splits[-1].ranks)


def test_a_wrong_recipe_ends_with_2_and_no_traceback(ready: dict[str, str]) -> None:
    done = launch(ready, SEED, "training.epochs=-1", "--gpus", "0", "--ranks", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "training.epochs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("recipe", "arguments", "added"),
    [
        ("recipes/quickstart.yaml", [], True),
        ("recipes/quickstart.yaml", ["data.loader=torch"], False),
        ("recipes/quickstart.yaml", ["data.loader=ffcv"], False),  # who asks for it gets it, or an error
        ("recipes/debug.yaml", [], False),  # it names another loader
    ],
)
def test_without_ffcv_the_device_loader_takes_its_place(
    ready: dict[str, str], tmp_path: Path, recipe: str, arguments: list[str], added: bool
) -> None:
    venv = tmp_path / "without-ffcv"
    (venv / "bin").mkdir(parents=True)
    write_script(venv / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    (venv / ".harness-setup").write_text("ffcv=no\n")
    env = ready | {"HARNESS_VENV": str(venv), "DRY_RUN": "1"}
    done = launch(env, recipe, "--ranks", "1", *arguments)
    assert done.returncode == 0
    assert ("data.loader=device" in shlex.split(done.stdout)) == added
    assert ("FFCV is not installed" in done.stderr) == added


@pytest.mark.slow
def test_two_ranks_train_and_leave_a_run(ready: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(ready, "recipes/debug.yaml", "--gpus", "0", "--ranks", "2", "--run-dir", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_bad_data_on_two_ranks_ends_with_2_and_no_traceback(ready: dict[str, str], tmp_path: Path) -> None:
    arguments = ["data.source=imagefolder", f"data.path={tmp_path / 'absent'}", "--ranks", "2", "--gpus", "0"]
    done = launch(ready, "recipes/debug.yaml", *arguments, "--run-dir", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
