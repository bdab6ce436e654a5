"""Time to accuracy on the real CIFAR-10: airbench94 and trainings of ours take turns, an epoch each.

A round is an epoch of training, in a process of its own (`harness.bench`). Its seconds are of training alone, with
loading and augmentation; evaluation comes after it and is timed apart.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from harness.bench import Contestant, Round, Times, describe_machine, run_contest
from harness.bench.step import built, epochs_alone
from harness.data.prepare import prepare
from harness.errors import HarnessError
from harness.machine import keep_freed_memory, seconds_of, usable_cores
from harness.recipe import load
from harness.training.loop import evaluate_all, run_epoch
from harness.training.state import Progress
from scripts.benchmarks import airbench

HERE = "scripts.benchmarks.accuracy"
TARGETS_PERCENT = (80, 85, 90, 92, 93, 94)
SEED_EPOCHS = 8  # of its 50, which take hours; its learning rate is constant, so that any number is a beginning of it
WHITENED_IMAGES = 5000


def bench_accuracy(*, epochs: int | None = None) -> dict[str, Any]:
    """Train airbench94, the seed's recipe in bf16 and the fast recipe by turns, and report how soon each was how good.

    `epochs` is the most of each contestant, with schedules shortened to them; None is each one's own number. Returns a
    dict for JSON: "contestants" (see `figures`), "settings" and "machine".

    Raises:
        HarnessError: no CIFAR-10, or a contestant that failed.
    """
    try:
        prepare("cifar10", download=False)
    except HarnessError as error:
        what = f"needs the real CIFAR-10, since accuracies on other images would mean nothing: {error.what}"
        raise HarnessError(what, where=error.where or "harness bench accuracy", hint=error.hint) from error
    contestants, threads = entries(epochs), usable_cores()
    times = run_contest(contestants, rounds=1, threads=threads, after_round=print_epoch)
    return {
        "contestants": {name: figures(times[name], each.arguments) for name, each in contestants.items()},
        "settings": {"epochs_at_most": epochs, "threads": threads, "data": "cifar10"},
        "machine": describe_machine(),
    }


def entries(epochs: int | None) -> dict[str, Contestant]:
    """Who takes part, in the order of turns; `epochs` as `bench_accuracy` has it."""
    settings = airbench.Settings()
    settings = replace(settings, epochs=min(settings.epochs, float(epochs or settings.epochs)))
    peer = Contestant(f"{HERE}:airbench94", {"settings": asdict(settings)}, rounds=math.ceil(settings.epochs))
    return {
        "airbench94": peer,
        "harness_seed_bf16": of_recipe("seed", min(SEED_EPOCHS, epochs or SEED_EPOCHS), "training.precision=bf16"),
        "harness_fast": of_recipe("fast", epochs),
    }


def of_recipe(name: str, epochs: int | None, *overrides: str) -> Contestant:
    """A training of ours, of `epochs` epochs where the recipe has more, its warm-up shortened in proportion."""
    recipe = load(name, overrides)
    whole, warmup = recipe.training.epochs, recipe.schedule.warmup_epochs
    assert whole is not None  # in the recipes that take part
    chosen = min(whole, epochs or whole)
    if chosen < whole:
        overrides = (*overrides, f"training.epochs={chosen}")
        overrides += () if warmup is None else (f"schedule.warmup_epochs={warmup * chosen / whole:.4g}",)
    return Contestant(f"{HERE}:harness", {"recipe": name, "overrides": list(overrides)}, rounds=chosen)


def harness(*, recipe: str, overrides: list[str]) -> Round:
    """The training of a recipe, as `harness train` does it, without its files."""
    loaded = load(recipe, overrides)
    components, cadence, progress = built(loaded), epochs_alone(loaded), Progress()
    first = components.plan.micro_batches(0)[0][:1]
    list(components.train_loader.batches(first, epoch=0))  # compiled where it must be; none depends on earlier ones

    def one_round() -> tuple[float, int, dict[str, Any]]:
        before = progress.images_seen
        seconds = seconds_of(lambda: run_epoch(components, cadence, progress))
        evaluation_seconds = seconds_of(lambda: evaluate_all(components, progress))
        assert progress.last is not None
        kinds = {"raw": progress.last["test"], "ema": progress.last.get("test_ema")}
        correct = {kind: score["correct"] for kind, score in kinds.items() if score is not None}
        payload = _payload(components.step.unwrapped_model, correct, components.evaluator.total, evaluation_seconds)
        return seconds, progress.images_seen - before, payload

    return one_round


def airbench94(*, settings: dict[str, Any], source: str = "cifar10") -> Round:
    """The peer, on the same images. Taking the whitening from them belongs to its first epoch."""
    keep_freed_memory()  # as in trainings of ours
    chosen = airbench.Settings(**settings)
    store = prepare(source, image_size_px=32, download=False)
    manifest, train, test = store.manifest, store.split("train"), store.split("test")
    scale = {"mean": manifest.mean, "std": manifest.std}
    images = airbench.TrainingImages(train.images_BHWC, train.labels_B, settings=chosen, **scale)
    few_BCHW = airbench.normalised(torch.from_numpy(train.images_BHWC[:WHITENED_IMAGES].copy()), **scale)
    test_NCHW = airbench.normalised(torch.from_numpy(test.images_BHWC.copy()), **scale)
    labels_N = torch.from_numpy(test.labels_B.copy())
    training: list[airbench.Training] = []
    counts: list[int] = []

    def train_epoch() -> None:
        if not training:
            training.append(airbench.Training(images, few_BCHW, num_classes=len(manifest.classes), settings=chosen))
        counts.append(training[0].epoch())

    def one_round() -> tuple[float, int, dict[str, Any]]:
        seconds, correct = seconds_of(train_epoch), dict[str, int]()
        net = training[0].net
        evaluation_seconds = seconds_of(lambda: correct.update(airbench.evaluate(net, test_NCHW, labels_N)))
        return seconds, counts[-1], _payload(net, correct, len(labels_N), evaluation_seconds)

    return one_round


def _payload(net: torch.nn.Module, correct: dict[str, int], total: int, seconds: float) -> dict[str, Any]:
    parameters = sum(p.numel() for p in net.parameters())
    return {"parameters": parameters, "correct": correct, "total": total, "evaluation_seconds": seconds}


def figures(times: Times | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the result says of a contestant.

    `seconds` of training up to the end of each epoch, `correct` answers after each by kind (raw: the weights as they
    are; ema: averaged ones; tta: raw ones with test-time augmentation), and for each kind the seconds up to the end of
    the first epoch that reached so many percent, or None.
    """
    assert times is not None  # none of them needs a package that may be missing
    seconds = [round(sum(times.seconds[: n + 1]), 3) for n in range(len(times.seconds))]
    total = times.payloads[0]["total"]
    correct = {kind: [each["correct"][kind] for each in times.payloads] for kind in times.payloads[0]["correct"]}
    return {
        "parameters": times.payloads[0]["parameters"],
        "epochs": len(seconds),
        "seconds": seconds,
        "evaluation_seconds": [round(each["evaluation_seconds"], 3) for each in times.payloads],
        **times.per_second("images"),
        "test_images": total,
        "correct": correct,
        "seconds_to_accuracy": {kind: _seconds_to_accuracy(seconds, each, total) for kind, each in correct.items()},
        "settings": dict(settings),
    }


def _seconds_to_accuracy(seconds: list[float], correct: list[int], total: int) -> dict[str, float | None]:
    return {
        str(percent): next((s for s, c in zip(seconds, correct, strict=True) if 100 * c >= percent * total), None)
        for percent in TARGETS_PERCENT
    }


def render_accuracy(result: Mapping[str, Any]) -> str:
    """The result as a table: a line for each contestant and kind of accuracy."""
    width = max(len(name) for name in result["contestants"]) + 6
    columns = "".join(f"{f'{percent} %':>8}" for percent in TARGETS_PERCENT)
    heads = f"{'epochs':>8}{'images/s':>10}{'seconds':>9}{'accuracy':>10}"
    lines = [f"{'':<{width}}{heads}   seconds of training to{columns}"]
    for name, each in result["contestants"].items():
        for kind, correct in each["correct"].items():
            reached = each["seconds_to_accuracy"][kind].values()
            times = "".join(f"{'-' if s is None else format(s, ',.0f'):>8}" for s in reached)
            percent = f"{100 * correct[-1] / each['test_images']:.2f} %"
            speed = f"{each['epochs']:>8}{each['images_per_second_median']:>10,.0f}{each['seconds'][-1]:>9,.0f}"
            lines.append(f"{f'{name}, {kind}':<{width}}{speed}{percent:>10}{'':<25}{times}")
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in {**result["settings"], **result["machine"]}.items())])


def print_epoch(name: str, times: Times) -> None:
    """A line on stderr after each epoch: the whole takes about an hour."""
    last = times.payloads[-1]
    shares = ", ".join(f"{kind} {100 * correct / last['total']:.2f} %" for kind, correct in last["correct"].items())
    line = f"{name}: epoch {len(times.seconds)}, {sum(times.seconds):,.0f} s of training, {shares}"
    print(line, file=sys.stderr, flush=True)
