"""Who is late and who is gone, and by which network interface ranks reach one another.

A collective that fails says only that some connection broke or that time ran out. So a thread of every rank writes its
activity to the store that the ranks met at, twice a second; a rank that fails writes its error there first.

Torch is imported where it is needed: launchers do without it, and choose interfaces too.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from harness.errors import EXIT_FAILED, HarnessError

if TYPE_CHECKING:
    import torch.distributed as dist

BEAT_SECONDS = 0.5
LOOK_SECONDS = 2.0  # between two looks at the beats of a rank; one that is alive beats meanwhile
LATE_SHARE = 0.8  # of the collectives' time limit: from here on the late rank is named
STORE_LIMIT_SECONDS = 10.0
MAX_TEXT = 2_000
GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
# In the errors of torch's backends. Gloo names its file, except where it hands a time-out on to what else is under way
# on the same connection.
_OF_COLLECTIVES = ("gloo", "NCCL", "Application timeout caused pair closure", "Connection closed by peer")
_ALL_ALIVE = "a collective failed although all ranks are alive"
_STORE_IS_GONE = "rank 0, or the launcher, which keeps the ranks' meeting point, is gone or stopped (see its output)"
# Of the range for documentation (RFC 5737): no machine has it, so the way there is the way out of this machine.
_ELSEWHERE = "192.0.2.1"


class RankLost(HarnessError):
    """Another rank is gone, late or failed; this one could not continue."""

    def __init__(self, diagnosis: str) -> None:
        super().__init__(
            f"this rank cannot continue: {diagnosis}",
            hint="The same command with --resume auto resumes from the last checkpoint.",
            exit_code=EXIT_FAILED,
        )


class Heartbeat:
    """The beats of this rank, and what it knows of the others.

    The store is a connection of its own, so that a wait of the main thread does not silence it.
    """

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, limit_seconds: float) -> None:
        store.set_timeout(datetime.timedelta(seconds=STORE_LIMIT_SECONDS))
        self._store, self._rank, self._limit_seconds = store, rank, limit_seconds
        self._others = [other for other in range(world_size) if other != rank]
        self._activity = self._beats = 0
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
    def diagnosing(self) -> Iterator[None]:
        """Report an error in the block to the other ranks; turn a broken collective into a `RankLost` with names."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, RuntimeError) or not is_broken_collective(error):
                self.report(error.what if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}")
                raise
            diagnosis = self.diagnose()
            if diagnosis == _ALL_ALIVE:
                diagnosis += ": " + str(error).partition("\n")[0]
            raise RankLost(diagnosis) from error

    def report(self, text: str) -> None:
        """Leave this rank's error for the others."""
        with suppress(RuntimeError), self._connection():  # the store may be gone; then there is nobody to read it
            self._store.set(f"failed/{self._rank}", " ".join(text.split())[:MAX_TEXT])

    def diagnose(self) -> str:
        """Which rank failed, is gone or is late, as far as can be known, in words."""
        found: list[str] = []
        # In a thread: a store whose process stands still answers nothing, and torch's client then waits for ever.
        look = threading.Thread(target=lambda: found.append(self._look()), name="harness-diagnosis", daemon=True)
        look.start()
        look.join(LOOK_SECONDS + STORE_LIMIT_SECONDS)
        return found[0] if found else _STORE_IS_GONE

    def _look(self) -> str:
        try:
            before = {rank: self._read(f"beat/{rank}") for rank in self._others}
            for _ in range(round(LOOK_SECONDS / BEAT_SECONDS)):  # also the time that a failing rank needs to report
                time.sleep(BEAT_SECONDS)
                self._write_beat()  # several ranks look at one another at the same time
            after = {rank: self._read(f"beat/{rank}") for rank in self._others}
            failed = {rank: text for rank in self._others if (text := self._read(f"failed/{rank}"))}
        except RuntimeError:
            return _STORE_IS_GONE
        if failed:
            return "; ".join(f"rank {rank} failed: {text}" for rank, text in failed.items())
        gone = [rank for rank in self._others if before[rank] == after[rank]]
        done = {rank: int(after[rank].split()[1]) for rank in self._others if rank not in gone}
        done[self._rank] = self._activity
        late = [rank for rank in sorted(done) if done[rank] < max(done.values())]
        found = [f"rank {rank} is gone or stopped (no sign of life for {LOOK_SECONDS:g} s)" for rank in gone]
        found += [f"rank {rank} is late{' (this one)' if rank == self._rank else ''}" for rank in late]
        return "; ".join(found) or _ALL_ALIVE

    def _beat(self) -> None:
        seen, since, warned = self._activity, time.monotonic(), False
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._write_beat()
            except RuntimeError:
                return  # the store is gone, and rank 0 with it: the next collective fails
            stood_seconds = time.monotonic() - since
            if self._activity != seen:
                seen, since, warned = self._activity, time.monotonic(), False
            elif not warned and seen and stood_seconds > LATE_SHARE * self._limit_seconds:
                warned = True
                warn(f"rank {self._rank} has stood still for {stood_seconds:.0f} s: {self.diagnose()}")

    def _write_beat(self) -> None:
        with self._connection():
            self._beats += 1
            self._store.set(f"beat/{self._rank}", f"{self._beats} {self._activity}")

    def _read(self, key: str) -> str:
        with self._connection():
            found = self._store.get(key).decode() if self._store.check([key]) else ""
        return found or ("0 0" if key.startswith("beat/") else "")

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """The connection for one request; RuntimeError where another one waits for an answer that does not come."""
        if not self._lock.acquire(timeout=STORE_LIMIT_SECONDS / 2):
            raise RuntimeError("the ranks' store does not answer")
        try:
            yield
        finally:
            self._lock.release()


def is_broken_collective(error: RuntimeError) -> bool:
    """Whether an error is that of torch's collectives: a rank gone, a time-out, a network that broke."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(phrase in str(error) for phrase in _OF_COLLECTIVES)


def warn(text: str) -> None:
    """Print a warning to stderr, past the console's progress line: it may come from a thread."""
    print(f"WARNING {text}", file=sys.stderr, flush=True)


def collective_limit_seconds() -> float:
    """The time limit of collectives: `$HARNESS_COLLECTIVE_TIMEOUT_SECONDS`, else five minutes."""
    return seconds_of_environment("HARNESS_COLLECTIVE_TIMEOUT_SECONDS", 300)


def seconds_of_environment(variable: str, default: float) -> float:
    """A time that a variable may set. Raises HarnessError: it is no number above 0, or longer than a day."""
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        what = f'must be a number of seconds above 0 and up to 86400 (a day), it is "{text}"'
        raise HarnessError(what, where=variable, hint=f"Leave it out for {default:g}.")
    return seconds


def interface_towards(head: str, *, several_machines: bool) -> str | None:
    """The name of the interface that packets to `head`, a name or an address, leave by; None where it is not known.

    Gloo by itself takes the interface that the machine's own name resolves to, which often is loopback (in Debian
    127.0.1.1), by which other machines cannot reach it. A head that is known by name and resolves to loopback is this
    machine under its own name; where there are several machines, the others reach it by the default route's interface.
    """
    address = _own_address_towards(head)
    if several_machines and is_loopback(address) and not is_loopback(head):
        address = _own_address_towards(_ELSEWHERE) or address
    if address is None:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return "lo" if is_loopback(address) else None  # such as 127.0.1.1, which no interface lists


def _own_address_towards(head: str) -> str | None:
    """The address that this machine would send from; connecting a UDP socket sends nothing."""
    try:
        found = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    return None


def is_loopback(host: str | None) -> bool:
    """Whether a name or address means this machine's loopback by itself, without a look-up."""
    with suppress(ValueError):
        return host == "localhost" or (host is not None and ipaddress.ip_address(host).is_loopback)
    return False
