"""All ranks stop at the same step when any of them was asked to."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from harness import signals
from harness.errors import EXIT_REQUEUE, HarnessError
from harness.runtime import Runtime

# On a GPU the answer is read this many steps later, when it has long arrived: reading it at once would be a wait for
# the device at every step. All ranks use the same number, so they still agree.
GPU_LAG_STEPS = 8


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
        self._on_the_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step. A collective where there are several ranks."""
        mine = signals.received() is not None
        if self._world_size == 1:
            return mine
        vote = torch.full((), int(mine), dtype=torch.int32, device=self._device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return bool(vote.item())
        self._on_the_way.append(_copy_to_host(vote))
        if len(self._on_the_way) <= GPU_LAG_STEPS:
            return False
        answer, arrived = self._on_the_way.popleft()
        arrived.synchronize()
        return bool(answer.item())


def _copy_to_host(vote: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy that waits for nothing, and the event of its arrival; `vote.item()` would wait for all queued work."""
    answer = torch.empty_like(vote, device="cpu", pin_memory=True).copy_(vote, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(vote.device))
    return answer, arrived
