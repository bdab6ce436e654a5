"""Functions compiled by numba, once a machine: later processes load the machine code from the cache.

numba itself keeps what it compiles, under a key of the source file's content, its own version, the processor and the
argument types, and reads it back by unpickling. So the folder must be this user's own, and nobody else's to write in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba

from harness.data.paths import cache_directory
from harness.files import private_directory

Function = Callable[..., None]


def compiled(signature: Any, *, parallel: bool = False) -> Callable[[Function], Function]:
    """A decorator: compiles for one signature, at once, or loads what an earlier process compiled for it.

    Kept in `$HARNESS_CACHE/numba/<user id>`, or where `$NUMBA_CACHE_DIR` says. Without a place that can be trusted and
    written to, each process compiles for itself; a damaged cache is made anew.

    Args:
        signature: numba's types of the arguments, such as `numba.void(numba.int64)`.
        parallel: spread `numba.prange` over threads.
    """

    def decorate(function: Function) -> Function:
        for _ in range(2):
            folder = _folder()
            if folder is None:
                break
            try:
                with _kept_in(folder):
                    return numba.njit(signature, parallel=parallel, nogil=True, cache=True)(function)
            except Exception:  # unpickling damaged files raises anything; what is wrong with the code is raised below
                if numba.config.CACHE_DIR:
                    break  # the user's own folder is not ours to clear
                shutil.rmtree(folder, ignore_errors=True)
        return numba.njit(signature, parallel=parallel, nogil=True)(function)

    return decorate


@contextlib.contextmanager
def plain_dictionaries() -> Iterator[None]:
    """Whoever asks for numba's typed dictionary meanwhile gets Python's own.

    For the import of ffcv 1.0.2: it puts the names of its two image modes in a typed one, which is compiled at each
    import for seconds, and which Python code alone reads.
    """
    import numba.typed

    kept = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = kept


def _folder() -> Path | None:
    """Where compiled code is kept, or None where that cannot be trusted or written to."""
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR)
    return private_directory(cache_directory("numba", str(os.getuid())))


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """numba's own setting, for the moment in which it makes up its mind about a function."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
