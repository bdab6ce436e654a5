"""A folder held by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.errors import HarnessError
from harness.run_directory import LOCK

LOCK_SECONDS = 0.5  # whoever only looks whether a folder is held holds its lock for an instant


@contextmanager
def holding(folder: Path, *, taken: HarnessError, use: str, hint: str, reentrant: bool = False) -> Iterator[None]:
    """Hold a folder, which is made where it is not there, against any other process.

    Args:
        taken: what is raised where another process holds it.
        use: what the folder is for, such as "a run directory".
        hint: what to do where it cannot be made or locked.
        reentrant: a process that holds it may hold it once more.

    Raises:
        HarnessError: `taken`, or the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=LOCK_SECONDS, is_singleton=reentrant)
        lock.acquire()
    except Timeout:
        raise taken from None
    except OSError as error:
        raise HarnessError(f"cannot be used as {use} ({error.strerror})", where=str(folder), hint=hint) from None
    try:
        yield
    finally:
        lock.release()
