"""Files that appear complete or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import EXIT_BAD_INPUT, EXIT_FAILED, TRANSIENT_DISK_ERRORS, HarnessError


def private_directory(path: Path) -> Path | None:
    """Make a folder for this user alone, for files that are run or could run code; None where there is no such folder.

    One that is there already must be this user's own and nobody else's to write in.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_write else None


def expand(path: str, *, where: str) -> str:
    """A path of the user's with `~` and `$VARIABLES` replaced.

    Args:
        where: the key or variable that the path stands in, for the error.

    Raises:
        HarnessError: a variable that is not set, or a user that is not there.
    """
    if not path.isprintable():
        shown = repr(os.fsencode(path))[2:-1]
        hint = "Rename it: paths are printed and written to files."
        raise HarnessError("is not printable UTF-8", where=f"{where}: {shown}", hint=hint)
    if os.path.exists(path):  # whatever is in its name
        return path
    expanded = os.path.expandvars(os.path.expanduser(path))
    left = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if left is not None:
        raise HarnessError(f"{left[0]} is not set", where=f"{where}: {path}", hint="Set it, or write the path in full.")
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise HarnessError(
            f"there is no user {user[1:]}", where=f"{where}: {path}", hint="Write ~/ for your own folder."
        )
    return expanded


# Read at each call, so a test or a notebook can change them. `$HARNESS_DATA` (one folder or several, separated as in
# `$PATH`) is only ever read; `$HARNESS_CACHE` has converted files, downloads, locks and checks.
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    It is written under a name of its own in the same folder, brought to disk and renamed.

    Raises:
        HarnessError: the file cannot be written, an OSError within the block included.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
    except OSError as error:
        raise HarnessError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            hint="See that the disk has space and that you may write to the folder.",
            exit_code=EXIT_FAILED if error.errno in TRANSIENT_DISK_ERRORS else EXIT_BAD_INPUT,
        ) from error


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
    """The checksum of a file's bytes, as lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
