"""Where data is looked for and where converted data is kept.

`$HARNESS_DATA`: one folder or several, separated as in `$PATH`; only ever read.
`$HARNESS_CACHE`: one folder (default `~/.cache/harness`) for converted files, downloads, locks and checks.
Both are read at each call, so a test or a notebook can change them.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import HarnessError
from harness.files import expand

DATA_VARIABLE = "HARNESS_DATA"
CACHE_VARIABLE = "HARNESS_CACHE"


def data_directories() -> list[Path]:
    """The folders named by `$HARNESS_DATA`, absolute, in their order; none when it is unset.

    Raises:
        HarnessError: an entry is not a folder, which is a misspelt path far more often than a wish.
    """
    directories = []
    for entry in os.environ.get(DATA_VARIABLE, "").split(os.pathsep):
        if not entry.strip():
            continue
        directory = Path(expand(entry.strip(), where=DATA_VARIABLE)).absolute()
        if not directory.is_dir():
            raise HarnessError(
                f"${DATA_VARIABLE} names a folder that is not there: {directory}",
                hint=f"Mend or unset {DATA_VARIABLE}",
            )
        directories.append(directory)
    return directories


def cache_directory(*parts: str) -> Path:
    """`$HARNESS_CACHE` or `~/.cache/harness`, absolute, with `parts` below it; nothing is made on disk."""
    entry = os.environ.get(CACHE_VARIABLE, "").strip()
    root = Path(expand(entry or "~/.cache/harness", where=CACHE_VARIABLE))
    return root.absolute().joinpath(*parts)


def writable_cache_directory(*parts: str) -> Path:
    """As `cache_directory`, made on disk when it is not there.

    Raises:
        HarnessError: the folder cannot be made or written to.
    """
    directory = cache_directory(*parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(directory, error.strerror or str(error)) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _not_writable(directory, "permission denied")
    return directory


def _not_writable(directory: Path, reason: str) -> HarnessError:
    return HarnessError(
        f"the cache folder cannot be written to ({reason})",
        where=str(directory),
        hint=f"Set {CACHE_VARIABLE} to a folder of yours with about 1 GB of free space.",
    )
