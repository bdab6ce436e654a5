"""Training on this machine: one rank per GPU, or the fastest layout of ranks and threads on the CPU.

`launch.sh` calls `python -m harness.launch.local RECIPE …`, which becomes the training.

On a CPU, two ranks of one thread can train twice as fast as one rank of two threads, or slower: it depends on network,
batch, precision and processor. So the layouts are measured once, in real steps, and the answer is remembered.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.bench import Contestant, run_contest
from harness.environment import calm_openmp, flag
from harness.errors import HarnessError, print_error
from harness.files import writable_cache_directory, write_json
from harness.launch.rank_env import set_from_srun
from harness.launch.torchrun import option_value
from harness.machine import available_memory_gib, cpu_name, usable_cores
from harness.recipe import Recipe, load
from harness.recipe.document import RECIPES
from harness.runs import new_run_directory, run_of

MAX_CANDIDATES = 6
RANK_MEMORY_GIB = 1.5  # a process with torch, a small network and its activations
MORE_RANKS_MUST_GAIN = 1.03  # below this, noise: fewer processes are simpler
ROUNDS = 3
WORTH_MEASURING_IMAGES = 4_000  # a training of fewer images ends before the measurement would
# Images in the training split of sources whose size is known without opening them.
KNOWN_IMAGES = {"cifar10": 50_000, "digits": 1_438}
CACHE_FORMAT = 2


# --- how many ranks


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, each with a GPU of its own, or all on the CPU."""

    count: int
    threads: int | None  # of arithmetic in each; None leaves it to torch
    gpu: bool
    note: str = ""  # how the numbers were chosen, for people

    def command(self, words: Sequence[str], *, max_restarts: int = 0) -> list[str]:
        """The command that runs `harness WORDS` on all ranks; every rank has these very words."""
        if self.count == 1 and not max_restarts:
            return [sys.executable, "-m", "harness", *words]
        restarts = ["--max-restarts", str(max_restarts)] if max_restarts else []
        configuration = RECIPES / "launch" / ("multi_gpu.yaml" if self.gpu else "cpu.yaml")
        launcher = ["accelerate", "launch", "--config_file", str(configuration), "--num_processes", str(self.count)]
        return [sys.executable, "-m", "harness.launch.torchrun", *restarts, *launcher, "-m", "harness", *words]

    def variables(self) -> dict[str, str]:
        """What its environment needs in addition to ours."""
        variables = {} if self.gpu else {"ACCELERATE_USE_CPU": "true"}
        if self.threads is not None and not os.environ.get("OMP_NUM_THREADS"):
            variables["OMP_NUM_THREADS"] = str(self.threads)
        return variables


def choose_ranks(recipe: Recipe, ranks: int | None, *, gpus: int | None = None, measure: bool = True) -> Ranks:
    """One rank per GPU; on the CPU (0 GPUs) as many as asked for, or as measured fastest for the recipe.

    Raises:
        HarnessError: more than there is was asked for, or this process is itself one of several ranks.
    """
    if (started := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise HarnessError(
            f"was started {started} times, as several ranks, and starts ranks itself",
            hint="Start it once, without srun, torchrun or accelerate launch; "
            "`srun … .venv/bin/python -m harness train RECIPE` trains with one rank per task.",
        )
    if gpus and ranks not in (None, gpus):
        raise HarnessError(f"--ranks {ranks} and --gpus {gpus}: one rank per GPU", hint="Give one of them.")
    usable = 0 if gpus == 0 else usable_gpus()
    wanted, option = (gpus, "--gpus") if gpus else (ranks, "--ranks")
    if wanted and wanted > usable and (usable or gpus):
        raise HarnessError(
            f"{option} {wanted}, but this machine has {usable} GPU(s)",
            hint=f"Give {option} {usable}, or ACCELERATE_USE_CPU=true for the CPU.",
        )
    if usable or wanted:
        count = wanted or usable
        threads = None if usable and count == 1 else max(1, usable_cores() // count)
        return Ranks(count, threads, gpu=usable > 0)
    layout, note = choose_layout(recipe, measure=measure)
    return Ranks(layout.ranks, layout.threads, gpu=False, note=note)


def usable_gpus() -> int:
    """The GPUs that torch can use; torch is imported only where there may be any."""
    if flag("ACCELERATE_USE_CPU") or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return 0
    if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def loader_override(recipe: Recipe) -> list[str]:
    """The override that replaces FFCV's loader where it is missing, or was found broken by scripts/setup.sh."""
    setup = Path(sys.prefix, ".harness-setup")
    broken = setup.exists() and "ffcv=no" in setup.read_text().split()
    if recipe.data.loader == "ffcv" and (broken or importlib.util.find_spec("ffcv") is None):
        return ["data.loader=device"]
    return []


# --- the layout on a CPU


@dataclass(frozen=True, order=True)
class CpuLayout:
    """R processes of T threads each."""

    ranks: int
    threads: int

    def __str__(self) -> str:
        counts = {"rank": self.ranks, "thread": self.threads}
        return " × ".join(f"{n} {noun}" + ("s" if n > 1 else "") for noun, n in counts.items())


def layouts_for(recipe: Recipe, cores: int) -> list[CpuLayout]:
    """The layouts worth trying on this many physical cores, fewest ranks first; one rank is always among them."""
    training, images = recipe.training, _known_images(recipe)
    batch = training.global_batch_size // training.gradient_accumulation_steps
    last_batch = images % training.global_batch_size if images and not training.drop_last else 0
    most = min(cores, last_batch or cores)  # every rank needs an image of it
    memory_gib = available_memory_gib()
    if memory_gib is not None:
        most = min(most, int(memory_gib / RANK_MEMORY_GIB))
    if training.precision == "fp16":  # refused on a CPU, whatever the layout
        most = 1
    # Layouts that leave more than a quarter of the cores idle cannot win.
    counts = [n for n in range(2, most + 1) if batch % n == 0 and cores // n * n >= 0.75 * cores]
    layouts = [CpuLayout(n, cores // n) for n in (1, *counts)]
    if len(layouts) <= MAX_CANDIDATES:
        return layouts
    step = (len(layouts) - 1) / (MAX_CANDIDATES - 1)
    return [layouts[round(i * step)] for i in range(MAX_CANDIDATES)]


def fastest(images_per_second: Mapping[CpuLayout, float]) -> CpuLayout:
    """The fastest layout; more ranks must be faster by more than noise."""
    chosen, *others = sorted(images_per_second)
    for layout in others:
        if images_per_second[layout] > MORE_RANKS_MUST_GAIN * images_per_second[chosen]:
            chosen = layout
    return chosen


def choose_layout(recipe: Recipe, *, cores: int | None = None, measure: bool = True) -> tuple[CpuLayout, str]:
    """The fastest layout for a recipe, and how it was found; without `measure` one rank where that is not known yet."""
    layouts = layouts_for(recipe, cores or usable_cores())
    one = layouts[0]
    if len(layouts) == 1:
        return one, f"takes {one}: no other layout fits this machine and batch"
    if _is_short(recipe):
        return one, f"takes {one}: the training is too short to try others"
    file = _cache_file(recipe, layouts)
    speeds, how = _recall(file), "measured before"
    if not speeds and not measure:
        return one, f"takes {one}: not measured yet among {', '.join(map(str, layouts))}"
    with FileLock(f"{file}.lock"):  # two starts at once would disturb each other's figures
        speeds = _recall(file)
        if not speeds:
            try:
                speeds, how = measure_layouts(recipe, layouts), "measured"
            except HarnessError as error:  # the training will say what is wrong with its network
                return one, f"takes {one}: the others could not be measured ({error.what.splitlines()[0]})"
            write_json(file, {f"{layout.ranks}x{layout.threads}": speed for layout, speed in speeds.items()})
    figures = ", ".join(f"{layout}: {speed:.0f} images/s" for layout, speed in speeds.items())
    return fastest(speeds), f"takes {fastest(speeds)} ({how}: {figures})"


def measure_layouts(recipe: Recipe, layouts: Sequence[CpuLayout]) -> dict[CpuLayout, float]:
    """Training speed of each layout (one rank comes first), images/s over all its ranks.

    Raises:
        HarnessError: a process died.
    """
    arguments: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    speeds = {}
    for layout in layouts:
        contestant = Contestant("harness.launch.probe:training_steps", arguments, ranks=layout.ranks)
        times = run_contest({str(layout): contestant}, rounds=ROUNDS, threads=layout.threads)[str(layout)]
        assert times is not None
        speeds[layout] = times.per_second("images")["images_per_second_median"]
        arguments |= times.payloads[0]
    return speeds


def _known_images(recipe: Recipe) -> int | None:
    """Images in the training split where they are known without opening the data, else None."""
    data = recipe.data
    return data.synthetic.train_images if data.source == "synthetic" else KNOWN_IMAGES.get(data.source)


def _is_short(recipe: Recipe) -> bool:
    training, images = recipe.training, _known_images(recipe)
    if training.steps is not None:
        images = training.steps * training.global_batch_size
    elif images is not None and training.epochs is not None:
        images *= training.epochs
    return images is not None and images < WORTH_MEASURING_IMAGES


def _cache_file(recipe: Recipe, layouts: Sequence[CpuLayout]) -> Path:
    """Named by all that the figures depend on."""
    settings = ("global_batch_size", "gradient_accumulation_steps", "precision", "memory_format", "sync_batch_norm")
    question = {
        "format": CACHE_FORMAT,
        "cpu": cpu_name(),
        "layouts": [str(layout) for layout in layouts],
        "versions": [version("torch"), version("timm")],
        "model": recipe.model.model_dump(mode="json"),
        "image_size_px": recipe.data.image_size_px,
        "training": recipe.training.model_dump(mode="json", include=set(settings)),
    }
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    return writable_cache_directory("splits") / f"{digest[:16]}.json"


def _recall(file: Path) -> dict[CpuLayout, float]:
    """The remembered figures; none where the file is absent or broken."""
    try:
        return {CpuLayout(*map(int, key.split("x"))): speed for key, speed in json.loads(file.read_text()).items()}
    except (OSError, ValueError):
        return {}


# --- what launch.sh calls


def main() -> int:
    """Become the training that the options ask for; with DRY_RUN=1 print its command."""
    calm_openmp()  # for the processes that measure
    is_dry_run = os.environ.get("DRY_RUN", "0") not in ("", "0")
    try:
        command, variables = plan(sys.argv[1:], measure=not is_dry_run)
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not is_dry_run:
        os.execve(command[0], command, os.environ | variables)
    print(*(f"{name}={value}" for name, value in variables.items()), shlex.join(command))
    return 0


def plan(arguments: Sequence[str], *, measure: bool) -> tuple[list[str], dict[str, str]]:
    """The command of the training, or of its submission, and the variables that it needs.

    Raises:
        HarnessError: options that do not go together, or a wrong recipe.
    """
    options, words = _parse(arguments)
    first = words[0] if words else ""
    if not first or first.startswith("-") or "=" in first:
        example = f"./launch.sh recipes/quickstart.yaml {first}"
        raise HarnessError(f'the recipe comes first, got "{first}"', hint=example)
    in_checkout = RECIPES.parent / first
    if not Path(first).exists() and in_checkout.is_file():
        words[0] = str(in_checkout)
    restarts = options.max_restarts
    if options.slurm:
        if (options.gpus, options.ranks) != (None, None):
            hint = "With --slurm: --nodes N --gpus-per-node G."
            raise HarnessError("--gpus and --ranks are for this machine alone", hint=hint)
        more = [] if restarts is None else ["--max-restarts", str(restarts)]
        return [sys.executable, "-m", "harness", "submit", *words, *more], {}
    if Path(words[0]).is_fifo():
        what = "a pipe is read once, and launch.sh reads the recipe several times"
        raise HarnessError(what, where=words[0], hint="Write it to a file first, or use harness train.")
    recipe = load(words[0], [word for word in words[1:] if re.match(r"[A-Za-z_][\w.]*=", word)])
    set_from_srun()
    ranks = choose_ranks(recipe, options.ranks, gpus=options.gpus, measure=measure)
    if ranks.note:
        print(f"launch: {ranks.note}", file=sys.stderr)
    loader = [] if any(word.startswith("data.loader=") for word in words) else loader_override(recipe)
    if loader:
        print(f"launch: FFCV is not installed: {loader[0]} takes its place", file=sys.stderr)
    words = ["train", *words, *loader]
    resume = option_value(words, "--resume")
    if restarts and resume != "auto" and option_value(words, "--run-dir") is None:  # a restart must find the run again
        run = run_of(Path(resume)) if resume not in (None, "never") else None
        words += ["--run-dir", str(run or new_run_directory(recipe.name))]
    return ranks.command(words, max_restarts=restarts or 0), ranks.variables()


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of launch.sh itself, and all other words in their order."""
    usage = "./launch.sh RECIPE [key=value …] [options]; see ./launch.sh --help"
    parser = argparse.ArgumentParser(prog="launch", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--ranks", type=int, default=os.environ.get("NPROC") or None)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--max-restarts", type=int)
    options, words = parser.parse_known_args(arguments)
    for name, smallest in (("ranks", 1), ("gpus", 0), ("max_restarts", 0)):
        number = getattr(options, name)
        if number is not None and number < smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {number}")
    return options, words


if __name__ == "__main__":
    sys.exit(main())
