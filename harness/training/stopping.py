"""All ranks stop at the same step when any of them was asked to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from harness import signals
from harness.errors import EXIT_REQUEUE, HarnessError
from harness.runtime import Runtime

# The answer to a step's vote is read this many steps later, when it has long arrived: at once would mean to wait for
# the slowest rank, or for the device, at every step. All ranks use the same number, so they still agree.
LAG_STEPS = {"cpu": 1, "cuda": 8}


class Stopped(HarnessError):
    """The training stopped between two steps because a signal asked it to; its checkpoint is written."""

    def __init__(self, step: int) -> None:
        name = signals.received() or "a signal to another rank"
        super().__init__(
            f"stopped by {name} after step {step}; the checkpoint is written",
            hint="The same command with --resume auto goes on from there.",
            exit_code=EXIT_REQUEUE,
        )


class StopVote:
    """Asks at every step whether any rank has received a stop signal; all ranks get the same answer."""

    def __init__(self, runtime: Runtime) -> None:
        self._device, self._world_size = runtime.device, runtime.world_size
        self._on_the_way: deque[Callable[[], bool]] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step. A collective where there are several ranks."""
        mine = signals.received() is not None
        if self._world_size == 1:
            return mine
        vote = torch.full((), int(mine), dtype=torch.int32, device=self._device)
        self._on_the_way.append(_cast_on_gpu(vote) if self._device.type == "cuda" else _cast(vote))
        if len(self._on_the_way) <= LAG_STEPS[self._device.type]:
            return False
        return self._on_the_way.popleft()()


def _cast(vote: Tensor) -> Callable[[], bool]:
    """Send a vote on its way; what comes back waits for the answer."""
    work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(vote.item())

    return answer


def _cast_on_gpu(vote: Tensor) -> Callable[[], bool]:
    """The same, with a copy to the host right behind it: `vote.item()` would wait for all work queued until then."""
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    copy = torch.empty_like(vote, device="cpu", pin_memory=True).copy_(vote, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(vote.device))

    def answer() -> bool:
        arrived.synchronize()
        return bool(copy.item())

    return answer
