"""Who is late, who is gone: each rank says now and then how far it is, so that a failure can be given a name.

A collective that fails tells only that some connection broke or that time ran out. A thread of every rank writes its
activity to the store that the ranks met at, twice a second or so; a rank that fails writes its error there first.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from harness.errors import EXIT_FAILED, HarnessError

BEAT_SECONDS = 0.5
LOOK_SECONDS = 2.0  # between two looks at the beats of a rank; one that is alive beats meanwhile
LATE_SHARE = 0.8  # of the collectives' time limit: from here on the late rank is named
STORE_LIMIT_SECONDS = 10.0
MAX_TEXT = 2_000
# In the errors of torch's backends. Gloo names its file, but not where it hands a time-out on to what else is on its
# way over the same connection.
_OF_COLLECTIVES = ("gloo", "NCCL", "Application timeout caused pair closure", "Connection closed by peer")
_ALL_ALIVE = "a collective failed although all ranks are alive"
_STORE_IS_GONE = "rank 0, or the launcher, which keeps the ranks' meeting point, is gone or stopped (see its output)"


class RankLost(HarnessError):
    """Another rank is gone, late or failed; this one could not go on."""

    def __init__(self, blame: str) -> None:
        super().__init__(
            f"this rank cannot go on: {blame}",
            hint="The same command with --resume auto goes on from the last checkpoint.",
            exit_code=EXIT_FAILED,
        )


class Heartbeat:
    """The beats of this rank, and what it knows of the others.

    Args:
        store: a connection of its own, so that a wait of the main thread does not silence it.
        limit_seconds: of collectives.
        warn: takes a sentence when the ranks stand still.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        limit_seconds: float,
        warn: Callable[[str], None],
    ) -> None:
        store.set_timeout(datetime.timedelta(seconds=STORE_LIMIT_SECONDS))
        self._store, self._rank, self._world_size = store, rank, world_size
        self._limit_seconds, self._warn = limit_seconds, warn
        self._activity = 0
        self._beats = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="harness-heartbeat", daemon=True)
        self._thread.start()

    def tick(self) -> None:
        """Something was done: a step, a batch of an evaluation. Costs nothing."""
        self._activity += 1

    def end(self) -> None:
        """No more beats."""
        self._ended.set()
        self._thread.join(STORE_LIMIT_SECONDS)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell the other ranks of an error in the block; turn a broken collective into a `RankLost` with names."""
        try:
            yield
        except RuntimeError as error:
            if not is_broken_collective(error):
                self.tell(f"{type(error).__name__}: {error}")
                raise
            blame = self.blame()
            if blame == _ALL_ALIVE:
                blame += ": " + str(error).partition("\n")[0]
            raise RankLost(blame) from error
        except HarnessError as error:
            self.tell(error.what)
            raise
        except Exception as error:
            self.tell(f"{type(error).__name__}: {error}")
            raise

    def tell(self, text: str) -> None:
        """Leave this rank's error for the others."""
        with suppress(RuntimeError), self._connection():  # the store may be gone; then there is nobody to tell
            self._store.set(f"failed/{self._rank}", " ".join(text.split())[:MAX_TEXT])

    def blame(self) -> str:
        """Which rank failed, is gone or is late, as far as can be told, in words."""
        found: list[str] = []
        # In a thread: a store whose process stands still answers nothing, and torch's client then waits for ever.
        look = threading.Thread(target=lambda: found.append(self._look()), name="harness-blame", daemon=True)
        look.start()
        look.join(LOOK_SECONDS + STORE_LIMIT_SECONDS)
        return found[0] if found else _STORE_IS_GONE

    def _look(self) -> str:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = {rank: self._beat_of(rank) for rank in others}
            self._beat_on(LOOK_SECONDS)  # also the time that a failing rank needs to leave its error
            after = {rank: self._beat_of(rank) for rank in others}
            failed = {rank: text for rank in others if (text := self._read(f"failed/{rank}")) is not None}
        except RuntimeError:
            return _STORE_IS_GONE
        if failed:
            return "; ".join(f"rank {rank} failed: {text}" for rank, text in failed.items())
        gone = [rank for rank in others if before[rank] == after[rank]]
        done = {rank: int(after[rank].split()[1]) for rank in others if rank not in gone}
        done[self._rank] = self._activity
        late = [rank for rank in sorted(done) if done[rank] < max(done.values())]
        found = [f"rank {rank} is gone or stopped (no sign of life for {LOOK_SECONDS:g} s)" for rank in gone]
        found += [f"rank {rank} is late{' (this one)' if rank == self._rank else ''}" for rank in late]
        if found:
            return "; ".join(found)
        return _ALL_ALIVE

    def _beat(self) -> None:
        seen, since, warned = self._activity, time.monotonic(), False
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._write()
            except RuntimeError:
                return  # the store is gone, and rank 0 with it: the next collective tells
            if self._activity != seen:
                seen, since, warned = self._activity, time.monotonic(), False
            elif not warned and seen and time.monotonic() - since > LATE_SHARE * self._limit_seconds:
                warned = True
                stood = time.monotonic() - since
                self._warn(f"WARNING rank {self._rank} has stood still for {stood:.0f} s: {self.blame()}")

    def _write(self) -> None:
        with self._connection():
            self._beats += 1
            self._store.set(f"beat/{self._rank}", f"{self._beats} {self._activity}")

    def _beat_on(self, seconds: float) -> None:
        """Wait, and show the others meanwhile that this rank is alive: several look at one another at the same time."""
        for _ in range(round(seconds / BEAT_SECONDS)):
            time.sleep(BEAT_SECONDS)
            self._write()

    def _read(self, key: str) -> str | None:
        with self._connection():
            return self._store.get(key).decode() if self._store.check([key]) else None

    def _beat_of(self, rank: int) -> str:
        """How often a rank has beaten, and its activity."""
        return self._read(f"beat/{rank}") or "0 0"

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """The connection for one request.

        Raises:
            RuntimeError: another request waits for an answer that does not come; torch's own errors too.
        """
        if not self._lock.acquire(timeout=STORE_LIMIT_SECONDS / 2):
            raise RuntimeError("the ranks' store does not answer")
        try:
            yield
        finally:
            self._lock.release()


def is_broken_collective(error: RuntimeError) -> bool:
    """Whether an error is that of torch's collectives: a rank gone, a time-out, a network that broke."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(phrase in text for phrase in _OF_COLLECTIVES)


def to_stderr(text: str) -> None:
    """Where warnings of the beats go: they come from a thread, so past the console's progress line."""
    print(text, file=sys.stderr, flush=True)


def collective_limit_seconds() -> float:
    """The time limit of collectives: `$HARNESS_COLLECTIVE_TIMEOUT_SECONDS`, else five minutes."""
    return seconds_of_environment("HARNESS_COLLECTIVE_TIMEOUT_SECONDS", 300)


def seconds_of_environment(variable: str, default: float) -> float:
    """A time that a variable may set.

    Raises:
        HarnessError: it is no number above 0.
    """
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise HarnessError(
            f'must be a number of seconds above 0 and up to 86400 (a day), it is "{text}"',
            where=variable,
            hint=f"Leave it out for {default:g}.",
        )
    return seconds
