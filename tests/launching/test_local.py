"""The split of cores into ranks and threads: which are tried, how one is chosen, and that it is remembered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.launching import local
from harness.launching.local import Split, best, candidate_splits, choose_split, main

ROOT = Path(__file__).resolve().parents[2]
TINY = """
data: {source: synthetic, synthetic: {train_images: 256, test_images: 32, num_classes: 4}, loader: torch}
model: {name: dual_branch, args: {widths: [[8, 8], [8, 8]], transition_widths: [8], head_width: 8}}
training: {epochs: 100, global_batch_size: 32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("cores", "splits"),
    [
        (1, [(1, 1)]),
        (2, [(1, 2), (2, 1)]),
        (4, [(1, 4), (2, 2), (4, 1)]),
        (8, [(1, 8), (2, 4), (4, 2), (8, 1)]),
    ],
)
def test_candidates_for_a_power_of_two(cores: int, splits: list[tuple[int, int]]) -> None:
    assert candidate_splits(cores, divisible=128) == [Split(*split) for split in splits]


@given(
    cores=st.integers(1, 256),
    batch=st.integers(1, 1024),
    smallest=st.none() | st.integers(1, 64),
    memory=st.none() | st.floats(0.1, 512),
)
def test_candidates_fit_the_machine_and_the_batch(
    cores: int, batch: int, smallest: int | None, memory: float | None
) -> None:
    splits = candidate_splits(cores, divisible=batch, smallest_batch=smallest, memory_gib=memory)
    assert splits[0] == Split(1, cores)
    assert len(splits) <= local.MAX_CANDIDATES
    assert splits == sorted(set(splits))
    for split in splits:
        assert batch % split.ranks == 0
        assert 0.75 * cores <= split.ranks * split.threads <= cores
        assert smallest is None or split.ranks <= max(1, smallest)
        assert memory is None or split.ranks == 1 or split.ranks * local.RANK_MEMORY_GIB <= memory


def test_more_ranks_must_gain_more_than_noise() -> None:
    one, two, four = Split(1, 4), Split(2, 2), Split(4, 1)
    assert best({one: 100.0, two: 102.0, four: 101.0}) == one
    assert best({one: 100.0, two: 110.0, four: 112.0}) == two
    assert best({four: 130.0, two: 110.0, one: 100.0}) == four


@pytest.mark.slow
def test_a_split_is_measured_once_and_then_remembered(recipe: Path, empty_cache: Path) -> None:
    first = choose_split(recipe, cores=2)
    assert set(first.images_per_second) == {Split(1, 2), Split(2, 1)}
    assert all(speed > 0 for speed in first.images_per_second.values())
    assert first.split == best(first.images_per_second)
    assert not first.remembered

    start = time.perf_counter()
    again = choose_split(recipe, cores=2)
    assert time.perf_counter() - start < 3  # a measurement takes longer
    assert again.remembered
    assert (again.split, dict(again.images_per_second)) == (first.split, dict(first.images_per_second))

    # Another batch, precision or number of cores is another question.
    for overrides, cores in ((["training.global_batch_size=64"], 2), (["training.precision=bf16"], 2), ([], 4)):
        other = choose_split(recipe, overrides, cores=cores, remembered_only=True)
        assert not other.remembered
        assert other.split.ranks == 1

    # A spoilt file is no answer, and no error.
    (stored,) = (empty_cache / "splits").glob("*.json")
    stored.write_text(stored.read_text()[:40])
    assert not choose_split(recipe, cores=2, remembered_only=True).remembered


def test_the_remembered_file_says_what_it_is_about(recipe: Path, empty_cache: Path, monkeypatch) -> None:
    # What is measured is the matter of the test above; here only what becomes of the figures.
    monkeypatch.setattr(local, "measure", lambda path, overrides, splits: {s: 10.0 * s.ranks for s in splits})
    assert choose_split(recipe, cores=4).split == Split(4, 1)
    (stored,) = (empty_cache / "splits").glob("*.json")
    content = json.loads(stored.read_text())
    assert content["key"]["global_batch_size"] == 32
    assert content["measured"][0] == {"ranks": 1, "threads": 4, "images_per_second": 10.0}
    # The same name with another question inside (a hash that collides, a hand that edits) is not believed.
    stored.write_text(json.dumps(content | {"key": {}}))
    assert not choose_split(recipe, cores=4, remembered_only=True).remembered


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (["training.global_batch_size=33"], [1, 3]),
        (["training.global_batch_size=32", "training.gradient_accumulation_steps=32"], [1]),
        (["training.precision=fp16"], [1]),
        # 257 images in batches of 32: the last batch has one, and a second rank would have none.
        (["data.synthetic.train_images=257"], [1]),
        (["data.synthetic.train_images=257", "training.drop_last=true"], [1, 2, 4]),
    ],
)
def test_only_splits_that_training_accepts(
    recipe: Path, empty_cache: Path, monkeypatch, overrides: list[str], ranks: list[int]
) -> None:
    monkeypatch.setattr(local, "measure", lambda path, overrides, splits: dict.fromkeys(splits, 1.0))
    speeds = choose_split(recipe, overrides, cores=4).images_per_second
    assert [split.ranks for split in speeds] == (ranks if len(ranks) > 1 else [])


@pytest.mark.parametrize("override", ["training.epochs=2", "training={epochs: null, steps: 9}"])
def test_a_short_training_is_not_worth_a_measurement(recipe: Path, empty_cache: Path, override: str) -> None:
    choice = choose_split(recipe, [override], cores=4)
    assert choice.split == Split(1, 4)
    assert "too short" in choice.explain()
    assert not empty_cache.exists()


def test_a_wrong_recipe_is_told_before_anything_starts(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "training.epcohs=2"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert 'Did you mean "training.epochs"?' in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_network_that_cannot_be_built_is_told_by_the_processes(recipe: Path, empty_cache: Path) -> None:
    with pytest.raises(HarnessError, match="resnet_of_dreams") as caught:
        choose_split(recipe, ["model={name: resnet_of_dreams, args: {}}"], cores=2)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_processes_that_die_leave_one_rank_and_a_reason(recipe: Path, empty_cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    choice = choose_split(recipe, cores=2)
    assert choice.split == Split(1, 2)
    assert "could not be measured" in choice.explain()
    assert list((empty_cache / "splits").glob("*.json")) == []


def test_what_launch_sh_reads(recipe: Path, empty_cache: Path) -> None:
    command = [sys.executable, "-m", "harness.launching.local", str(recipe), "--ranks", "3", "--cores", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "3 2 torch\n"
    assert done.stderr == ""
    command = [*command[:4], "--remembered", "--cores", "2", "data.loader=device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1 2 device\n"
    assert "not measured yet" in done.stderr
