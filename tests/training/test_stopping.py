"""The vote on stopping: at once on a CPU, a few steps later and without waiting on a GPU."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from harness import signals
from harness.training.stopping import GPU_LAG_STEPS, StopVote


@dataclass
class OneOfTwo:
    """A rank's place; the other rank is left out, so the group below has one member and no answer but its own."""

    device: torch.device
    world_size: int = 2


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    dist.init_process_group(request.param, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def vote(device: str) -> StopVote:
    return StopVote(OneOfTwo(torch.device(device)))  # type: ignore[arg-type]


def test_a_single_rank_asks_nobody() -> None:
    alone = StopVote(OneOfTwo(torch.device("cpu"), world_size=1))  # type: ignore[arg-type]
    with signals.noticed():
        assert not alone.agreed()
        signal.raise_signal(signal.SIGUSR1)
        assert alone.agreed()


@pytest.mark.parametrize("group", ["gloo"], indirect=True)
@pytest.mark.usefixtures("group")
def test_on_a_cpu_the_answer_comes_at_once() -> None:
    ranks = vote("cpu")
    with signals.noticed():
        assert not any(ranks.agreed() for _ in range(20))
        signal.raise_signal(signal.SIGTERM)
        assert ranks.agreed()


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["nccl"], indirect=True)
@pytest.mark.usefixtures("group")
def test_on_a_gpu_the_answer_comes_later_and_nothing_waits_for_queued_work() -> None:
    ranks = vote("cuda")
    with signals.noticed():
        assert not any(ranks.agreed() for _ in range(20))
        torch.cuda.synchronize()
        signal.raise_signal(signal.SIGTERM)
        torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds of queued work
        begin = time.perf_counter()
        answers = [ranks.agreed() for _ in range(GPU_LAG_STEPS)]
        seconds = time.perf_counter() - begin
        assert answers == [False] * GPU_LAG_STEPS
        assert seconds < 0.5
        assert ranks.agreed()
