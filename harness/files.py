"""Where data and caches lie; files that appear complete or not at all; folders held by one process at a time.

`$HARNESS_DATA`: one folder or several, separated as in `$PATH`; only ever read.
`$HARNESS_CACHE`: one folder (default `~/.cache/harness`) for converted files, downloads, locks and checks.
Both are read at each call, so a test or a notebook can change them.

The holder of a folder has an flock of its `.lock`, and signs it before it writes anything else. Locks of a file server
may outlive the node that took them, so a folder can be taken over: the newcomer's own file, locked and signed, takes
the place of `.lock`, and whoever held the former file finds another name there when it looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import EXIT_FAILED, HarnessError, exit_code_of

LOCK = ".lock"
LOCK_SECONDS = 0.5  # whoever only looks whether a folder is held holds its lock for an instant
POLL_SECONDS = 0.1

DATA_VARIABLE = "HARNESS_DATA"
CACHE_VARIABLE = "HARNESS_CACHE"


def data_directories() -> list[Path]:
    """The folders named by `$HARNESS_DATA`, absolute, in their order; none when it is unset.

    Raises:
        HarnessError: an entry is not a folder, which is a misspelt path far more often than a wish.
    """
    entries = [entry.strip() for entry in os.environ.get(DATA_VARIABLE, "").split(os.pathsep)]
    directories = [Path(expand(entry, where=DATA_VARIABLE)).absolute() for entry in entries if entry]
    for directory in directories:
        if not directory.is_dir():
            what = f"${DATA_VARIABLE} names a folder that is not there: {directory}"
            raise HarnessError(what, hint=f"Correct or unset {DATA_VARIABLE}")
    return directories


def find_input(path: str) -> Path:
    """An existing file or folder that a recipe's data.path names, looked for here, then in each `data_directories`.

    Raises:
        HarnessError: it is nowhere, or a variable in it is not set.
    """
    given = Path(expand(path, where="data.path"))
    candidates = [given.absolute()]
    if not given.is_absolute():
        candidates += [directory / given for directory in data_directories()]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    looked = "" if given.is_absolute() else f" (looked for {', '.join(map(str, candidates))})"
    hint = f"Correct data.path; a relative one is looked for here and in each folder of {DATA_VARIABLE}"
    raise HarnessError(f"there is no such file or folder{looked}", where=path, hint=hint)


def cache_directory(*parts: str) -> Path:
    """`$HARNESS_CACHE` or `~/.cache/harness`, absolute, with `parts` below it; nothing is made on disk."""
    entry = os.environ.get(CACHE_VARIABLE, "").strip()
    root = Path(expand(entry or "~/.cache/harness", where=CACHE_VARIABLE))
    return root.absolute().joinpath(*parts)


def writable_cache_directory(*parts: str) -> Path:
    """As `cache_directory`, made on disk where it is not there; raises HarnessError where it cannot be written to."""
    directory = cache_directory(*parts)
    reason = "permission denied"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    except OSError as error:
        reason = error.strerror or str(error)
    hint = f"Set {CACHE_VARIABLE} to a folder of yours with about 1 GB of free space."
    raise HarnessError(f"the cache folder cannot be written to ({reason})", where=str(directory), hint=hint)


def private_directory(path: Path) -> Path | None:
    """Make a folder for files that could run code, of this user alone; None where that cannot be had."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not others_write:
            return path
    return None


def expand(path: str, *, where: str) -> str:
    """A path of the user's with `~` and `$VARIABLES` replaced; `where` is the key or variable that it stands in.

    Raises HarnessError for a variable that is not set, or a user that is not there.
    """
    if not path.isprintable():
        shown = f"{where}: {repr(os.fsencode(path))[2:-1]}"
        hint = "Rename it: paths are printed and written to files."
        raise HarnessError("is not printable UTF-8", where=shown, hint=hint)
    if os.path.exists(path):  # whatever is in its name
        return path
    where = f"{where}: {path}"
    expanded = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", expanded):
        raise HarnessError(f"{unset[0]} is not set", where=where, hint="Set it, or write the path in full.")
    if expanded.startswith("~"):
        user = expanded.split("/")[0][1:]
        raise HarnessError(f"there is no user {user}", where=where, hint="Write ~/ for your own folder.")
    return expanded


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Raises HarnessError where it cannot be written, for an OSError within the block too.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        fsync_directory(path.parent)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        hint = "See that the disk has space and that you may write to the folder."
        raise HarnessError(what, where=str(path), hint=hint, exit_code=exit_code_of(error)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `replacing` does; NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def fsync_directory(directory: str | Path) -> None:
    """Make renames within `directory` durable: a power cut loses them until the folder itself is on disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hex_digest(path: Path, algorithm: str = "sha256") -> str:
    """The checksum of a file's bytes, as lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@dataclass(frozen=True)
class Owner:
    """A process that holds a folder, or wants to."""

    job: str  # of SLURM, with its cluster; empty outside jobs
    start: tuple[int, int]  # how often SLURM has started the job again, and within that our batch script its ranks
    host: str
    pid: int
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        job = os.environ.get("SLURM_JOB_ID", "")
        job = f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}".strip() if job else ""
        counts = [os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "HARNESS_ATTEMPT")]
        restarts, attempt = (int(count) if count.isdecimal() else 0 for count in counts)
        return cls(job, (restarts, attempt), socket.gethostname(), os.getpid(), uuid.uuid4().hex)

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
        """Write this process down as the owner. Raises HarnessError where another has taken the folder over."""
        if not self._is_in_place():
            raise self._lost(Owner.of(self.folder))
        self._write_owner()

    def clear_signature(self) -> None:
        """Remove the former holder's, by which a newer start of its job might take the folder from this process."""
        os.ftruncate(self.handle, 0)

    def check(self) -> None:
        """See that nobody has taken the folder over, else raise HarnessError.

        Between this look and what is written after it another process may still take the folder: no file system
        offers both in one step.
        """
        now = Owner.of(self.folder)
        if now is not None and now.token != self.owner.token:
            raise self._lost(now)

    def release(self) -> None:
        fcntl.flock(self.handle, fcntl.LOCK_UN)  # closing alone would leave it to processes that were forked
        os.close(self.handle)

    def _is_in_place(self) -> bool:
        """Whether the open lock file is still the folder's, and not one that was replaced or deleted."""
        try:
            return os.path.samestat(os.fstat(self.handle), (self.folder / LOCK).stat())
        except FileNotFoundError:
            return False

    def _write_owner(self) -> None:
        data = json.dumps(asdict(self.owner)).encode()
        os.pwrite(self.handle, data, 0)
        os.ftruncate(self.handle, len(data))
        os.fsync(self.handle)  # other machines see it only then

    def _lost(self, now: Owner | None) -> HarnessError:
        return HarnessError(
            f"was taken over by another start ({now or 'unknown'}); this one stops and writes nothing more",
            where=str(self.folder),
            hint="Nothing to do: that start resumes the run from its last checkpoint.",
            exit_code=EXIT_FAILED,
        )


@contextlib.contextmanager
def directory_lock(folder: Path, *, taken: HarnessError, use: str, hint: str) -> Iterator[None]:
    """Hold a folder, which is made where it is not there, against any other process, or raise `taken`."""
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


@contextlib.contextmanager
def usable(folder: Path, *, use: str, hint: str) -> Iterator[None]:
    """Make a folder to be taken in the block; `use` is what it is for, such as "a run directory".

    Raises HarnessError with the hint where it cannot be made or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        what = f"cannot be used as {use} ({error.strerror})"
        raise HarnessError(what, where=str(folder), hint=hint, exit_code=exit_code_of(error)) from None


def take(folder: Path, own: Owner) -> Hold | None:
    """Hold a folder if nobody else does; OSError where it cannot be locked. Nothing is written: see `Hold.sign`."""
    hold = Hold(folder, os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), own)
    in_place = False
    try:
        fcntl.flock(hold.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        in_place = hold._is_in_place()
    except BlockingIOError:
        pass
    finally:
        if not in_place:
            os.close(hold.handle)
    return hold if in_place else None


def take_over(folder: Path, own: Owner) -> Hold:
    """Hold a folder whoever else does, and sign for it: at no time is it held by nobody."""
    new = folder / f"{LOCK}.{own.token}.tmp"
    hold = Hold(folder, os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), own)
    try:
        fcntl.flock(hold.handle, fcntl.LOCK_EX)
        hold._write_owner()
        new.replace(folder / LOCK)
    except OSError:
        os.close(hold.handle)
        new.unlink(missing_ok=True)
        raise
    return hold


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder now, on this machine or, where the file system tells, another."""
    try:
        lock = (folder / LOCK).open()
    except OSError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
