"""How many ranks a training has on this machine: GPUs, the layout of a CPU, and the command of launch.sh."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.launch import local
from harness.launch.local import CpuLayout, choose_layout, fastest, layouts_for, plan
from harness.recipe import Recipe, load
from harness.recipe.document import RECIPES
from harness.runs import RUN_FILES

SEED = "recipes/seed.yaml"
TINY = """
data: {source: synthetic, synthetic: {train_images: 256, test_images: 32, num_classes: 4}, loader: torch}
model: {name: dual_branch, args: {widths: [[8, 8], [8, 8]], transition_widths: [8], head_width: 8}}
training: {epochs: 100, global_batch_size: 32}
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ranks, no threads and no GPU, as far as the environment says."""
    for name in ("WORLD_SIZE", "NPROC", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(RECIPES.parent)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load(recipe_file)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """GPUs in a machine that has none."""
    monkeypatch.setattr(local, "usable_gpus", lambda: count)


# --- the layout of a CPU


@pytest.mark.parametrize(
    ("overrides", "cores", "ranks"),
    [
        ([], 1, [1]),
        ([], 2, [1, 2]),
        ([], 8, [1, 2, 4, 8]),
        (["training.global_batch_size=33"], 4, [1, 3]),
        (["training.gradient_accumulation_steps=32"], 4, [1]),
        (["training.precision=fp16"], 4, [1]),
        # 257 images in batches of 32: the last batch has one, and a second rank would have none.
        (["data.synthetic.train_images=257"], 4, [1]),
        (["data.synthetic.train_images=257", "training.drop_last=true"], 4, [1, 2, 4]),
    ],
)
def test_only_layouts_that_training_accepts(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], cores: int, ranks: list[int]
) -> None:
    monkeypatch.setattr(local, "available_memory_gib", lambda: None)
    layouts = layouts_for(load(recipe_file, overrides), cores)
    assert layouts == [CpuLayout(n, cores // n) for n in ranks]


@given(cores=st.integers(1, 256), batch=st.integers(1, 1024), memory=st.none() | st.floats(0.1, 512))
def test_layouts_fit_the_machine_and_the_batch(cores: int, batch: int, memory: float | None) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(local, "available_memory_gib", lambda: memory)
        layouts = layouts_for(load("seed", [f"training.global_batch_size={batch}", "training.drop_last=true"]), cores)
    assert layouts[0] == CpuLayout(1, cores)
    assert len(layouts) <= local.MAX_CANDIDATES
    assert layouts == sorted(set(layouts))
    for layout in layouts:
        assert batch % layout.ranks == 0
        assert 0.75 * cores <= layout.ranks * layout.threads <= cores
        assert memory is None or layout.ranks == 1 or layout.ranks * local.RANK_MEMORY_GIB <= memory


def test_more_ranks_must_gain_more_than_noise() -> None:
    one, two, four = CpuLayout(1, 4), CpuLayout(2, 2), CpuLayout(4, 1)
    assert fastest({one: 100.0, two: 102.0, four: 101.0}) == one
    assert fastest({one: 100.0, two: 110.0, four: 112.0}) == two
    assert fastest({four: 130.0, two: 110.0, one: 100.0}) == four


@pytest.mark.slow
def test_a_layout_is_measured_once_and_then_remembered(recipe: Recipe, recipe_file: Path, empty_cache: Path) -> None:
    layout, note = choose_layout(recipe, cores=2)
    assert "(measured: 1 rank × 2 threads: " in note
    (stored,) = (empty_cache / "splits").glob("*.json")
    start = time.perf_counter()
    again, note = choose_layout(recipe, cores=2)
    assert time.perf_counter() - start < 3  # a measurement takes longer
    assert again == layout
    assert "(measured before: 1 rank × 2 threads: " in note
    # Another batch, precision or number of cores is another question.
    for overrides, cores in ((["training.global_batch_size=64"], 2), (["training.precision=bf16"], 2), ([], 4)):
        other, note = choose_layout(load(recipe_file, overrides), cores=cores, measure=False)
        assert other.ranks == 1
        assert "not measured yet" in note
    stored.write_text(stored.read_text()[:20])  # a spoilt file is no answer, and no error
    assert "not measured yet" in choose_layout(recipe, cores=2, measure=False)[1]


@pytest.mark.slow
def test_a_network_that_cannot_be_built_leaves_one_rank(recipe_file: Path, empty_cache: Path) -> None:
    """Its training says what is wrong."""
    broken = load(recipe_file, ["model={name: resnet_of_dreams, args: {}}"])
    layout, note = choose_layout(broken, cores=2)
    assert layout == CpuLayout(1, 2)
    assert "could not be measured" in note
    assert "resnet_of_dreams" in note
    assert list((empty_cache / "splits").glob("*.json")) == []


@pytest.mark.parametrize("override", ["training.epochs=2", "training={epochs: null, steps: 9}"])
def test_a_short_training_is_not_worth_a_measurement(recipe_file: Path, empty_cache: Path, override: str) -> None:
    layout, note = choose_layout(load(recipe_file, [override]), cores=4)
    assert layout == CpuLayout(1, 4)
    assert "too short" in note
    assert not empty_cache.exists()


# --- the command


def words_of(*arguments: str) -> list[str]:
    """The variables and words of the command."""
    command, variables = plan(arguments, measure=False)
    return [*(f"{name}={value}" for name, value in variables.items()), *command]


def test_the_layout_that_was_measured_is_used(
    recipe_file: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 2)
    one = ["ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=2", sys.executable, "-m", "harness", "train", str(recipe_file)]
    assert words_of(str(recipe_file)) == one
    assert "launch: takes 1 rank × 2 threads: not measured yet" in capsys.readouterr().err
    # What is measured is the matter of the test above.
    monkeypatch.setattr(local, "measure_layouts", lambda recipe, layouts: {each: 10.0 * each.ranks for each in layouts})
    plan([str(recipe_file)], measure=True)
    cpu = ["accelerate", "launch", "--config_file", str(RECIPES / "launch/cpu.yaml"), "--num_processes", "2"]
    two = [*one[:1], "OMP_NUM_THREADS=1", sys.executable, "-m", "harness.launch.torchrun", *cpu, *one[3:]]
    assert words_of(str(recipe_file)) == two
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's choice stays
    assert words_of(str(recipe_file), "--ranks", "2") == [two[0], *two[2:]]


@pytest.mark.parametrize(
    ("there", "arguments", "ranks"),
    [(4, [], 4), (4, ["--gpus", "2"], 2), (4, ["--ranks=3"], 3), (4, ["--gpus=1"], 1), (1, [], 1)],
)
def test_gpus_that_are_there_are_used(
    monkeypatch: pytest.MonkeyPatch, there: int, arguments: list[str], ranks: int
) -> None:
    gpus(monkeypatch, there)
    words = words_of(SEED, *arguments)
    assert "ACCELERATE_USE_CPU=true" not in words
    if ranks == 1:
        assert words == [sys.executable, "-m", "harness", "train", SEED]
    else:
        assert str(RECIPES / "launch/multi_gpu.yaml") in words
        assert words[words.index("--num_processes") + 1] == str(ranks)
    assert "ACCELERATE_USE_CPU=true" in words_of(SEED, "--gpus", "0")
    monkeypatch.setenv("NPROC", str(there))
    assert words_of(SEED) == words_of(SEED, "--ranks", str(there))


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "yes")])
def test_gpus_that_are_hidden_are_not_used(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)  # the devices of GPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv(name, value)
    assert local.usable_gpus() == 0


@pytest.mark.parametrize(
    ("there", "arguments", "message"),
    [
        (0, ["training.epochs=2"], "the recipe comes first"),
        (0, ["--resume", "auto"], "the recipe comes first"),
        (0, ["--slurm"], "the recipe comes first"),
        (0, ["recipes/sead.yaml"], 'Did you mean "seed.yaml"?'),
        (0, ["zzz"], "Valid names: debug, fast, quickstart, seed"),
        (0, [SEED, "training.epochs=-1", "--ranks", "2"], "training.epochs"),
        (0, [SEED, "--gpus", "1"], "--gpus 1, but this machine has 0 GPU(s)"),
        (0, ["--slurm", SEED, "--gpus", "1"], "HINT: With --slurm: --nodes N"),
        (4, [SEED, "--gpus", "5"], "--gpus 5, but this machine has 4 GPU(s)"),
        (4, [SEED, "--ranks", "5"], "--ranks 5, but this machine has 4 GPU(s)"),
        (4, [SEED, "--ranks", "2", "--gpus", "4"], "one rank per GPU"),
    ],
)
def test_mistakes_have_a_hint(monkeypatch: pytest.MonkeyPatch, there: int, arguments: list[str], message: str) -> None:
    gpus(monkeypatch, there)
    with pytest.raises(HarnessError) as caught:
        plan(arguments, measure=False)
    assert message in str(caught.value)
    assert "HINT:" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("option", [["--gpus", "two"], ["--ranks"], ["--ranks=0"], ["--max-restarts=-1"]])
def test_numbers_are_numbers(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan([SEED, *option], measure=False)
    assert ended.value.code == 2
    assert option[0].partition("=")[0] in capsys.readouterr().err


def test_several_tasks_of_srun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train by itself, and all end well."""
    step = {"STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # to be removed after the test
        monkeypatch.delenv(name)
    with pytest.raises(HarnessError, match="was started 2 times") as caught:
        plan([SEED], measure=False)
    assert "-m harness train RECIPE" in str(caught.value.hint)


def test_arguments_come_through_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--run-dir", "/a b/x=$HOME", "--resume", "never", "--new-option=*", "seed=1"]
    words = words_of(SEED, *arguments)
    assert words[words.index("train") + 1 :] == [SEED, *arguments]
    monkeypatch.chdir(tmp_path)
    assert words_of(SEED)[-1] == str(RECIPES / "seed.yaml")  # from any folder
    (tmp_path / "recipes").mkdir()
    (tmp_path / SEED).write_text("base: seed\n")
    assert words_of(SEED)[-1] == SEED


def test_a_job_is_submitted_with_the_options_of_submit() -> None:
    words = [SEED, "--nodes", "2", "--gpus-per-node=8", "--qos=q", "training.epochs=2", "--run-dir", "a b"]
    assert words_of("--slurm", *words) == [sys.executable, "-m", "harness", "submit", *words]
    assert words_of(*words, "--max-restarts", "0", "--slurm")[-2:] == ["--max-restarts", "0"]


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        ([], None),
        (["--resume=never"], None),
        (["--run-dir", "here"], "here"),
        (["--resume", "auto"], ""),
        (["--resume", "{run}"], "{run}"),
        (["--resume", "{run}/checkpoints/step_3"], "{run}"),
    ],
)
def test_a_restart_finds_the_run_again(tmp_path: Path, words: list[str], directory: str | None) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step_3").mkdir(parents=True)
    for name in RUN_FILES:
        (run / name).touch()
    planned = words_of(SEED, "--max-restarts", "2", *(word.format(run=run) for word in words))
    assert planned[planned.index("harness.launch.torchrun") + 1 :][:3] == ["--max-restarts", "2", "accelerate"]
    chosen = local.option_value(planned, "--run-dir")
    if directory is None:
        assert str(chosen).startswith("runs/seed/")
    else:
        assert (chosen or "") == directory.format(run=run)


@pytest.mark.parametrize(
    ("recipe", "arguments", "added"),
    [
        ("quickstart", [], True),
        ("quickstart", ["data.loader=torch"], False),
        ("quickstart", ["data.loader=ffcv"], False),  # who asks for it gets it, or an error
        ("debug", [], False),  # it names another loader
    ],
)
def test_without_ffcv_the_device_loader_takes_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    arguments: list[str],
    added: bool,
) -> None:
    (tmp_path / ".harness-setup").write_text("ffcv=no\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert ("data.loader=device" in words_of(recipe, "--ranks", "1", *arguments)) is added
    assert ("FFCV is not installed" in capsys.readouterr().err) is added


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HarnessError, match="a pipe is read once"):
        plan([str(tmp_path / "pipe")], measure=False)


def test_a_dry_run_can_be_pasted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setattr(sys, "argv", ["launch", SEED, "--gpus", "0", "--ranks", "1", "--run-dir", "a b"])
    assert local.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert shlex.split(printed)[0] == "ACCELERATE_USE_CPU=true"
    assert shlex.split(printed)[-1] == "a b"
