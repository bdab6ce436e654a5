"""Which sample when: orders, batches and shards as pure functions of (seed, epoch).

Nothing here holds a random generator. A number is a hash of what it is for, so it is the same whatever the number of
workers or ranks, and a run that is resumed at any step gets the batches it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from harness.errors import HarnessError

_MASK_64 = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """What a hash is for. A number once given stays for ever: another one would change every run."""

    ORDER = 1
    CROP_Y = 2
    CROP_X = 3
    FLIP = 4
    ALTERNATING_FLIP = 5
    CUTOUT_Y = 6
    CUTOUT_X = 7


def _mix(state: np.ndarray) -> np.ndarray:
    """One step of splitmix64: add the golden gamma, then the finaliser.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), with the
    constants of Stafford's variant 13 as in Vigna's public domain splitmix64.c (2015).
    """
    state = state + _GAMMA
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


def _as_uint64(value: int | np.ndarray) -> np.ndarray:
    """Whole numbers modulo 2**64, so that negative ones have a hash too."""
    return np.asarray(value & _MASK_64, dtype=np.uint64) if isinstance(value, int) else value.astype(np.uint64)


def hash64(seed: int, *streams: int | np.ndarray) -> np.ndarray:
    """A stateless hash of whole numbers, uint64 of their broadcast shape; their order counts.

    All 64 bits are unbiased and differ for any change of any argument. The values never change between versions,
    machines or numpy releases.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        state = _mix(_as_uint64(seed))
        for stream in streams:
            state = _mix(state ^ _as_uint64(stream))
    return np.asarray(state, dtype=np.uint64)


def uniform_below(bound: int, hashes: np.ndarray) -> np.ndarray:
    """int64 in [0, bound) from uint64 hashes, by multiply-shift on their upper 32 bits; bound is at most 2**31.

    No value is likelier than another by more than bound / 2**32 of its share.
    Source: Lemire, "Fast random integer generation in an interval" (ACM TOMACS 2019), without the rejection.
    """
    return (((hashes >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """All sample ids in the order of one epoch, int64 (count,): the stable argsort of one hash a sample."""
    ids = np.arange(count, dtype=np.int64)
    if not shuffle:
        return ids
    return np.argsort(hash64(seed, Stream.ORDER, epoch, ids), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """The training batches of one rank. All ranks together see each epoch's order, cut into global batches.

    Raises:
        HarnessError: the numbers do not go together; the hint names sizes that do.
    """

    count: int  # training samples
    global_batch_size: int  # images in one optimizer step, over all ranks and accumulation steps
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False  # leave out the last, smaller batch of an epoch

    def __post_init__(self) -> None:
        size, unit = self.global_batch_size, self._unit
        given = f"global_batch_size {size}"
        if size % unit:
            product = f"{self.world_size} ranks × {self.accumulation_steps} accumulation steps"
            raise HarnessError(f"{given} is not divisible by {unit} ({product})", hint=self._hint())
        if size > self.count:
            raise HarnessError(f"{given} is larger than the {self.count} training images", hint=self._hint())
        if not self._fits(size):
            what = f"the last batch of an epoch would hold {self.count % size} images for {self.world_size} ranks"
            hint = f"Set drop_last, or: {self._hint()}"
            raise HarnessError(f"{what} ({self.count} training images, {given})", hint=hint)

    @property
    def _unit(self) -> int:
        """Every global batch size is a multiple of this."""
        return self.world_size * self.accumulation_steps

    def _fits(self, size: int) -> bool:
        """Whether each rank has at least one image in the last batch."""
        rest = self.count % size
        return self.drop_last or rest == 0 or rest >= self.world_size

    def _hint(self) -> str:
        """Names the valid sizes next below and above the one asked for."""
        unit, wanted = self._unit, self.global_batch_size
        largest = self.count // unit * unit
        at_most = min(wanted // unit * unit, largest)
        below = next((s for s in range(at_most, 0, -unit) if self._fits(s)), None)
        above = next((s for s in range(at_most + unit, largest + 1, unit) if self._fits(s)), None)
        sizes = [str(size) for size in (below, above) if size is not None]
        if not sizes:
            return "no size fits: use fewer ranks or accumulation steps, or more images"
        return f"the nearest valid global_batch_size is {' or '.join(sizes)}"

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, the same on every rank."""
        whole, rest = divmod(self.count, self.global_batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def global_count(self, step: int) -> int:
        """Images in the global batch of this step of an epoch, over all ranks; the last may be smaller."""
        return min(self.global_batch_size, self.count - step * self.global_batch_size)

    def micro_batches(self, epoch: int, start_step: int = 0) -> list[list[np.ndarray]]:
        """The int64 sample ids of this rank in one epoch, [step][micro-batch], from `start_step` on.

        A step's global ids are cut into micro-batches, and each of these into one block a rank, as evenly as can be.
        So the micro-batches of all ranks together hold the same images whatever the number of ranks, and with them
        the statistics of synchronised BatchNorm. No block is empty.
        """
        order = epoch_order(self.count, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        steps = []
        for step in range(start_step, self.steps_per_epoch):
            first, global_count = step * self.global_batch_size, self.global_count(step)
            micro_count = min(self.accumulation_steps, global_count // self.world_size)
            micros = np.array_split(order[first : first + global_count], micro_count)
            steps.append([np.array_split(micro, self.world_size)[self.rank] for micro in micros])
        return steps


def evaluation_batches(count: int, *, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The batches of int64 ids one rank evaluates: over all ranks each sample exactly once, without padding.

    None is empty. Ranks may differ in their number of batches; one may have none.
    """
    shard = np.array_split(np.arange(count, dtype=np.int64), world_size)[rank]
    return [shard[first : first + batch_size] for first in range(0, len(shard), batch_size)]
