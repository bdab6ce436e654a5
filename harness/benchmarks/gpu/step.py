"""Training steps of a network on one device, in several precisions, batch sizes and ways to launch them.

A case is one of each. The ways, from what users have to what is possible:

    harness         the training step of `harness train` with its device loader, meter and schedule
    eager           forward, loss, backward and SGD with momentum on one batch in memory, a kernel at a time
    graphs          the same step recorded once as a CUDA graph and replayed
    compile         the same step with torch.compile
    compile_graphs  the compiled step recorded as a CUDA graph

All but the first train on the same random batch; weights, activations and images are channels_last.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from harness.benchmarks.gpu import roofline
from harness.data.batches import Batch
from harness.models.build import build_model
from harness.recipe import load
from harness.runtime import joined
from harness.training.parts import assemble
from harness.training.startup import Startup
from harness.training.state import Meter

WAYS = ("eager", "harness", "graphs", "compile", "compile_graphs")
PRECISIONS = ("fp32", "tf32", "bf16")
LR, MOMENTUM, CLASSES = 0.008, 0.95, 10  # the seed's
LOG_EVERY_STEPS = 50  # as recipes have it: the only steps that wait for the device

Step = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        network: timm's name of the network.
        args: arguments of its constructor.
        image_size_px: height and width of the images.
        batch_sizes: images a step.
        precisions: some of `PRECISIONS`.
        steps: steps of a round; a figure is the median over the rounds.
        rounds: rounds of each case.
        warmup_steps: steps before the first round.
        synthetic_images: that the harness's epochs go over.
    """

    network: str = "dual_branch_seed"
    args: Mapping[str, Any] | None = None
    image_size_px: int = 32
    batch_sizes: tuple[int, ...] = (128, 512, 2048)
    precisions: tuple[str, ...] = PRECISIONS
    steps: int = 20
    rounds: int = 5
    warmup_steps: int = 10
    synthetic_images: int = 16_384


# A network of the same kind, small enough that a CPU takes it through all ways in a minute.
DRY_SIZE = Size(
    network="dual_branch",
    args={"widths": [[4, 8], [8]], "transition_widths": [8], "head_width": 8, "dropout": 0.2},
    image_size_px=8,
    batch_sizes=(8,),
    precisions=("tf32", "bf16"),
    steps=2,
    rounds=2,
    warmup_steps=1,
    synthetic_images=64,
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    way: str
    precision: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.way}/{self.precision}/{self.batch_size}"


def cases(size: Size) -> Iterator[Case]:
    """All cases: what needs no compiler first, so that a short time shows something of everything."""
    for way in WAYS:
        for batch_size in reversed(size.batch_sizes):
            for precision in reversed(size.precisions):
                yield Case(way, precision, batch_size)


def measure(case: Case, size: Size, device: torch.device) -> dict[str, Any]:
    """Images a second of a case: median, lowest and highest round.

    A case that this device or its memory cannot do gives {"left_out": why} instead; so does one that fails, with
    "error": True, since the other cases are worth having.
    """
    if case.way in ("graphs", "compile_graphs") and device.type != "cuda":
        return {"left_out": "CUDA graphs need a GPU"}
    try:
        with _arithmetic(case.precision), _step(case, size, device) as step:
            seconds = _rounds(step, size, device)
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    except Exception as error:  # whatever a compiler or a driver thinks of a case
        return {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "error": True}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    speeds = [size.steps * case.batch_size / each for each in seconds]
    return {
        "images_per_second_median": statistics.median(speeds),
        "images_per_second_min": min(speeds),
        "images_per_second_max": max(speeds),
        "milliseconds_per_step_median": 1000 * statistics.median(seconds) / size.steps,
    }


def _rounds(step: Step, size: Size, device: torch.device) -> Sequence[float]:
    for _ in range(size.warmup_steps):
        step()

    def one_round() -> None:
        for _ in range(size.steps):
            step()

    return roofline.timed(one_round, device, repeats=size.rounds, warmup=1)


@contextmanager
def _arithmetic(precision: str) -> Iterator[None]:
    """TF32 on for "tf32" alone. torch left to itself, as in a training, has it on for convolutions alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    on = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = on, on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _step(case: Case, size: Size, device: torch.device) -> Iterator[Step]:
    if case.way == "harness":
        with _harness_step(case, size) as step:
            yield step
        return
    torch._dynamo.reset()  # a case must not find the shapes of the one before
    plain = _plain_step(case, size, device)
    yield _recorded(plain, device) if case.way.endswith("graphs") else plain


def _plain_step(case: Case, size: Size, device: torch.device) -> Step:
    torch.manual_seed(0)
    model = build_model(size.network, num_classes=CLASSES, image_size_px=size.image_size_px, args=dict(size.args or {}))
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    shape = (case.batch_size, 3, size.image_size_px, size.image_size_px)
    images_BCHW = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels_B = torch.randint(0, CLASSES, (case.batch_size,), device=device)
    forward: nn.Module | Callable[..., Any] = torch.compile(model) if case.way.startswith("compile") else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
            loss = F.cross_entropy(forward(images_BCHW), labels_B)
        loss.backward()
        optimizer.step()

    return step


def _recorded(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph. Warmed up on a stream of its own first, as recording wants it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def _harness_step(case: Case, size: Size) -> Iterator[Step]:
    """The real training step, epoch after epoch over synthetic images; log steps wait for the device as in training."""
    precision = "bf16" if case.precision == "bf16" else "no"
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        recipe_file = Path(folder) / "step.yaml"
        recipe_file.write_text(_RECIPE)
        overrides = [
            f"model.name={size.network}",
            f"data.image_size_px={size.image_size_px}",
            f"data.synthetic.train_images={max(size.synthetic_images, 2 * case.batch_size)}",
            f"training.global_batch_size={case.batch_size}",
            f"training.precision={precision}",
            *(f"model.args.{name}={value}" for name, value in (size.args or {}).items()),
        ]
        recipe = load(recipe_file, overrides)
        with joined(precision=precision, seed=recipe.seed) as runtime:
            parts = assemble(recipe, runtime, Path(folder) / "checkpoints", Startup())
            parts.model.train()
            try:
                yield _one_by_one(parts, case.batch_size)
            finally:
                parts.close()


_RECIPE = f"""
data: {{source: synthetic, loader: device, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], synthetic: {{num_classes: 10}}}}
training: {{epochs: 1, drop_last: true}}
optimizer: {{lr: {LR}, momentum: {MOMENTUM}}}
tracking: {{wandb: disabled, log_every_steps: {LOG_EVERY_STEPS}}}
"""


def _one_by_one(parts: Any, batch_size: int) -> Step:
    """Each call is the next optimizer step of an endless training."""
    meter = Meter(parts.runtime.device)

    def batches() -> Iterator[Batch]:
        for epoch in count():
            ids_per_batch = list(chain.from_iterable(parts.plan.micro_batches(epoch)))
            yield from parts.train_loader.batches(ids_per_batch, epoch=epoch)

    stream, number = batches(), count()

    def step() -> None:
        index = next(number)
        check = (index + 1) % LOG_EVERY_STEPS == 0
        parts.step(
            stream,
            refetch=lambda: iter(()),
            micro_batches=1,
            step=index,
            global_count=batch_size,
            meter=meter,
            check=check,
        )
        if check:
            meter.read()
            meter.reset()

    return step


def limits(size: Size, bytes_per_second: float) -> dict[str, Any]:
    """What is counted, and the roofline of each precision and batch size, images a second.

    Args:
        bytes_per_second: measured by `roofline.copy_bandwidth`.
    """
    px = size.image_size_px
    model = build_model(size.network, num_classes=CLASSES, image_size_px=px, args=dict(size.args or {}))
    traced = roofline.trace(model, (3, px, px))
    counted = {"fused": roofline.fused_elements(traced), "layerwise": roofline.layerwise_elements(traced)}
    limit: dict[str, dict[str, float]] = {rule: {} for rule in counted}
    for rule, elements in counted.items():
        for precision in size.precisions:
            for batch_size in size.batch_sizes:
                limit[rule][f"{precision}/{batch_size}"] = roofline.images_per_second_limit(
                    elements,
                    parameters=traced.parameters,
                    batch_size=batch_size,
                    element_bytes=roofline.ELEMENT_BYTES[precision],
                    bytes_per_second=bytes_per_second,
                )
    return {
        "copy_bytes_per_second": bytes_per_second,
        "elements_per_image": counted,
        "parameters": traced.parameters,
        "images_per_second": limit,
    }
