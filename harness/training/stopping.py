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
# the device at every step.
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
        self._pending: deque[Tensor] = deque()
        self._lag = GPU_LAG_STEPS if runtime.device.type != "cpu" else 0

    def agreed(self) -> bool:
        """Whether to stop before the next step. A collective where there are several ranks."""
        mine = signals.received() is not None
        if self._world_size == 1:
            return mine
        vote = torch.full((), int(mine), dtype=torch.int32, device=self._device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        self._pending.append(vote)
        return len(self._pending) > self._lag and bool(self._pending.popleft().item())
