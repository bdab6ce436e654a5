"""A folder held by one process at a time, and who holds it.

The holder has an flock of `.lock`, and signs it before it writes anything else. Locks of a file server may outlive the
node that took them, so a folder can be taken over: the newcomer's own file, locked and signed, takes the place of
`.lock`, and whoever held the former file finds another name there when it looks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, TRANSIENT_DISK_ERRORS, HarnessError
from harness.run_directory import LOCK

LOCK_SECONDS = 0.5  # whoever only looks whether a folder is held holds its lock for an instant
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Owner:
    """A process that holds a folder, or wants to.

    Attributes:
        job: of SLURM, with its cluster; empty outside jobs.
        start: how often SLURM has started the job again, and within that start our batch script its ranks.
    """

    job: str
    start: tuple[int, int]
    host: str
    pid: int
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(
            job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}".strip() if job else "",
            start=(_count("SLURM_RESTART_COUNT"), _count("HARNESS_ATTEMPT")),
            host=socket.gethostname(),
            pid=os.getpid(),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """Who signed for a folder last; None where nobody has."""
        try:  # opening it makes a network file system look at the server
            data = json.loads((folder / LOCK).read_text())
            restarts, attempt = map(int, data["start"])
            return cls(str(data["job"]), (restarts, attempt), str(data["host"]), int(data["pid"]), str(data["token"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def is_newer_start_than(self, other: Owner | None) -> bool:
        """Whether both are starts of one job, this one the later."""
        return other is not None and self.job != "" and self.job == other.job and self.start > other.start

    def __str__(self) -> str:
        job = f"job {self.job.split()[-1]}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Hold:
    """A folder that this process holds, by the open lock file."""

    folder: Path
    handle: int
    owner: Owner

    def sign(self) -> None:
        """Write this process down as the owner.

        Raises:
            HarnessError: another process has taken the folder over.
        """
        if not _is_in_place(self.handle, self.folder):
            raise self._lost(Owner.of(self.folder))
        _write(self.handle, self.owner)

    def clear_signature(self) -> None:
        """Remove the former holder's, by which a newer start of its job might take the folder from this process."""
        os.ftruncate(self.handle, 0)

    def check(self) -> None:
        """See that nobody has taken the folder over.

        Between this look and what is written after it another process may still take the folder: no file system
        offers both in one step.

        Raises:
            HarnessError: somebody has.
        """
        now = Owner.of(self.folder)
        if now is not None and now.token != self.owner.token:
            raise self._lost(now)

    def _lost(self, now: Owner | None) -> HarnessError:
        return HarnessError(
            f"was taken over by another start ({now or 'unknown'}); this one stops and writes nothing more",
            where=str(self.folder),
            hint="Nothing to do: that start resumes the run from its last checkpoint.",
            exit_code=EXIT_FAILED,
        )

    def release(self) -> None:
        fcntl.flock(self.handle, fcntl.LOCK_UN)  # closing alone would leave it to processes that were forked
        os.close(self.handle)


@contextmanager
def holding(folder: Path, *, taken: HarnessError, use: str, hint: str) -> Iterator[None]:
    """Hold a folder, which is made where it is not there, against any other process.

    Args:
        taken: what is raised where another process holds it.
        use: what the folder is for, such as "a run directory".
        hint: what to do where it cannot be made or locked.

    Raises:
        HarnessError: `taken`, or the folder cannot be used.
    """
    own, deadline = Owner.this_process(), time.monotonic() + LOCK_SECONDS
    with usable(folder, use=use, hint=hint):
        while (hold := take(folder, own)) is None:
            if time.monotonic() > deadline:
                raise taken
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        hold.release()


@contextmanager
def usable(folder: Path, *, use: str, hint: str) -> Iterator[None]:
    """Make a folder to be taken in the block.

    Raises:
        HarnessError: it cannot be made or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        code = EXIT_FAILED if error.errno in TRANSIENT_DISK_ERRORS else EXIT_BAD_INPUT
        what = f"cannot be used as {use} ({error.strerror})"
        raise HarnessError(what, where=str(folder), hint=hint, exit_code=code) from None


def take(folder: Path, own: Owner) -> Hold | None:
    """Hold a folder if nobody else does. Nothing is written: see `Hold.sign`.

    Raises:
        OSError: it cannot be locked.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_in_place(handle, folder):
            return Hold(folder, handle, own)
    except BlockingIOError:
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def take_over(folder: Path, own: Owner) -> Hold:
    """Hold a folder whoever else does, and sign for it: at no time is it held by nobody.

    Raises:
        OSError: the lock file cannot be replaced.
    """
    new = folder / f"{LOCK}.{own.token}.tmp"
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _write(handle, own)
        new.replace(folder / LOCK)
    except OSError:
        os.close(handle)
        new.unlink(missing_ok=True)
        raise
    return Hold(folder, handle, own)


def _is_in_place(handle: int, folder: Path) -> bool:
    """Whether an open lock file is still the folder's, and not one that was replaced or deleted."""
    try:
        return os.path.samestat(os.fstat(handle), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _write(handle: int, own: Owner) -> None:
    data = json.dumps(asdict(own)).encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fsync(handle)  # other machines see it only then


def _count(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
