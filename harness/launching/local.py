"""How to spread training over the cores of this machine: R processes (ranks) of T threads, measured.

Two ranks of one thread can train twice as fast as one rank of two threads, or slower: it depends on the network,
the batch, the precision and the processor. So the splits are tried for real, once, and the answer is remembered.

`python -m harness.launching.local RECIPE [key=value …]` prints "RANKS THREADS LOADER" for launch.sh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.environment import calm_openmp
from harness.errors import HarnessError
from harness.files import writable_cache_directory, write_json
from harness.launching.trial import run_trial
from harness.machine import available_memory_gib, cpu_name, usable_cores
from harness.recipe import Recipe, load

MAX_CANDIDATES = 6
RANK_MEMORY_GIB = 1.5  # a process with torch, a small network and its activations
MORE_RANKS_MUST_GAIN = 1.03  # below this, noise: fewer processes are simpler
PROBE_LIMIT_SECONDS = 240
WORTH_MEASURING_IMAGES = 4_000  # a training of fewer images ends before the measurement would
# Images in the training split of sources whose size is known without opening them.
KNOWN_IMAGES = {"cifar10": 50_000, "digits": 1_438}
CACHE_FORMAT = 1


@dataclass(frozen=True, order=True)
class Split:
    """R processes of T threads each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        return f"{_count(self.ranks, 'rank')} × {_count(self.threads, 'thread')}"


@dataclass(frozen=True)
class Choice:
    """A split and how it was come by.

    Attributes:
        images_per_second: training speed of each split that was tried, over all its ranks.
        remembered: the figures are from an earlier start.
        note: what went wrong with the measurement, if anything.
    """

    split: Split
    images_per_second: Mapping[Split, float]
    remembered: bool = False
    note: str = ""

    def explain(self) -> str:
        """One line for people."""
        if self.note:
            return f"takes {self.split}: {self.note}"
        if not self.images_per_second:
            return f"takes {self.split}: no other split fits this machine and batch"
        figures = ", ".join(f"{split}: {speed:.0f} images/s" for split, speed in self.images_per_second.items())
        return f"takes {self.split} ({'measured before' if self.remembered else 'measured'}: {figures})"


def candidate_splits(
    cores: int, *, divisible: int = 0, smallest_batch: int | None = None, memory_gib: float | None = None
) -> list[Split]:
    """The splits worth trying on this many cores, fewest ranks first; one rank is always among them.

    Args:
        cores: physical cores.
        divisible: the ranks must divide this number of images (0: any number of ranks).
        smallest_batch: images in the smallest batch of an epoch; every rank needs one.
        memory_gib: the ranks must fit in it.
    """
    most = cores
    if smallest_batch is not None:
        most = min(most, smallest_batch)
    if memory_gib is not None:
        most = min(most, int(memory_gib / RANK_MEMORY_GIB))
    splits = {Split(1, cores)}
    for ranks in range(2, most + 1):
        threads = cores // ranks
        # Splits that leave more than a quarter of the cores idle cannot win.
        if divisible % ranks == 0 and ranks * threads >= 0.75 * cores:
            splits.add(Split(ranks, threads))
    ordered = sorted(splits)
    if len(ordered) <= MAX_CANDIDATES:
        return ordered
    step = (len(ordered) - 1) / (MAX_CANDIDATES - 1)
    return [ordered[round(i * step)] for i in range(MAX_CANDIDATES)]


def best(images_per_second: Mapping[Split, float]) -> Split:
    """The fastest split; more ranks must be faster by more than noise."""
    chosen, *others = sorted(images_per_second)
    for split in others:
        if images_per_second[split] > MORE_RANKS_MUST_GAIN * images_per_second[chosen]:
            chosen = split
    return chosen


def choose_split(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    cores: int | None = None,
    remembered_only: bool = False,
) -> Choice:
    """The fastest split of this machine's cores for a recipe; measured the first time, then remembered.

    Args:
        recipe_path, overrides: as `harness.recipe.load` takes them.
        cores: physical cores to use; None takes all that this process may use.
        remembered_only: do not measure; one rank where nothing is remembered.

    Raises:
        HarnessError: the recipe or its network has a mistake.
    """
    recipe = load(recipe_path, overrides)
    cores = usable_cores() if cores is None else cores
    splits = _splits(recipe, cores)
    if len(splits) == 1:
        return Choice(splits[0], {})
    if _is_short(recipe):
        return Choice(splits[0], {}, note="the training is too short to try others")
    key = _key(recipe, splits)
    remembered = _cache_file(key)
    speeds = _recall(remembered, key)
    if speeds:
        return Choice(best(speeds), speeds, remembered=True)
    if remembered_only:
        return Choice(splits[0], {}, note=f"not measured yet among {', '.join(map(str, splits))}")
    with FileLock(f"{remembered}.lock"):  # two starts at once would disturb each other's figures
        speeds = _recall(remembered, key)
        if speeds:
            return Choice(best(speeds), speeds, remembered=True)
        try:
            speeds = measure(recipe_path, overrides, splits)
        except (subprocess.SubprocessError, OSError) as error:
            return Choice(splits[0], {}, note=f"the others could not be measured ({error})")
        _remember(remembered, key, speeds)
    return Choice(best(speeds), speeds)


def measure(recipe_path: str | Path, overrides: Sequence[str], splits: Sequence[Split]) -> dict[Split, float]:
    """Training speed of each split, images/s over all its ranks, from real steps in real processes.

    As many processes as the largest split has ranks are started once; they go through the splits together, the
    first `ranks` of them exchanging gradients as in training while the others wait.

    Raises:
        HarnessError: the recipe or its network has a mistake.
        subprocess.SubprocessError: a process died or took too long.
    """
    world = max(split.ranks for split in splits)
    plan = ",".join(f"{split.ranks}x{split.threads}" for split in splits)
    arguments = [plan, str(recipe_path), *overrides]
    speeds = run_trial("harness.launching.probe", arguments, ranks=world, limit_seconds=PROBE_LIMIT_SECONDS)
    return dict(zip(splits, speeds, strict=True))


def _splits(recipe: Recipe, cores: int) -> list[Split]:
    """The splits that training would accept; one where it would refuse the recipe anyway and say why."""
    training = recipe.training
    micro_batches, rest = divmod(training.global_batch_size, training.gradient_accumulation_steps)
    if rest or training.precision == "fp16":  # fp16 needs a GPU
        return [Split(1, cores)]
    return candidate_splits(
        cores,
        divisible=micro_batches,
        smallest_batch=_smallest_batch(recipe),
        memory_gib=available_memory_gib(),
    )


def _known_images(recipe: Recipe) -> int | None:
    """Images in the training split where they are known without opening the data, else None."""
    data = recipe.data
    return data.synthetic.train_images if data.source == "synthetic" else KNOWN_IMAGES.get(data.source)


def _smallest_batch(recipe: Recipe) -> int | None:
    """Images in the last batch of an epoch where that is known to be a smaller one, else None."""
    count = _known_images(recipe)
    if recipe.training.drop_last or count is None:
        return None
    return count % recipe.training.global_batch_size or None


def _is_short(recipe: Recipe) -> bool:
    training, count = recipe.training, _known_images(recipe)
    if training.steps is not None:
        return training.steps * training.global_batch_size < WORTH_MEASURING_IMAGES
    return count is not None and (training.epochs or 0) * count < WORTH_MEASURING_IMAGES


def _key(recipe: Recipe, splits: Sequence[Split]) -> dict[str, Any]:
    """All that the figures depend on, as plain JSON."""
    training = recipe.training
    return {
        "format": CACHE_FORMAT,
        "cpu": cpu_name(),
        "splits": [[split.ranks, split.threads] for split in splits],
        "torch": version("torch"),
        "timm": version("timm"),
        "model": recipe.model.name,
        "model_args": recipe.model.model_dump(mode="json")["args"],
        "image_size_px": recipe.data.image_size_px,
        "global_batch_size": training.global_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "precision": training.precision,
        "memory_format": training.memory_format,
        "sync_batch_norm": training.sync_batch_norm,
    }


def _cache_file(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return writable_cache_directory("splits") / f"{name}.json"


def _recall(path: Path, key: Mapping[str, Any]) -> dict[Split, float]:
    """The remembered figures; none where the file is absent, broken or of something else."""
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != key:
            return {}
        return {Split(r["ranks"], r["threads"]): float(r["images_per_second"]) for r in stored["measured"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(path: Path, key: Mapping[str, Any], speeds: Mapping[Split, float]) -> None:
    rows = [{"ranks": s.ranks, "threads": s.threads, "images_per_second": v} for s, v in speeds.items()]
    write_json(path, {"key": dict(key), "measured": rows})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print "RANKS THREADS LOADER" on stdout and one line of explanation on stderr; 2 for a bad recipe."""
    parser = argparse.ArgumentParser(prog="python -m harness.launching.local", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--cores", type=int, help="physical cores to use; default: all this process may use")
    parser.add_argument("--ranks", type=int, help="do not choose: this many processes")
    parser.add_argument("--remembered", action="store_true", help="do not measure; use what is remembered")
    options = parser.parse_intermixed_args(arguments)
    if arguments is None:
        calm_openmp()  # for the processes that measure
    try:
        recipe = load(options.recipe, options.overrides)
        if options.ranks is not None:
            cores = usable_cores() if options.cores is None else options.cores
            split = Split(options.ranks, max(1, cores // options.ranks))
        else:
            choice = choose_split(
                options.recipe, options.overrides, cores=options.cores, remembered_only=options.remembered
            )
            split = choice.split
            if split.ranks > 1 or choice.images_per_second or choice.note:
                print(f"launch: {choice.explain()}", file=sys.stderr)
    except HarnessError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(split.ranks, split.threads, recipe.data.loader)
    return 0


if __name__ == "__main__":
    sys.exit(main())
