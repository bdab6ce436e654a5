"""From a source to a verified, converted data set in `$HARNESS_CACHE/data`, converted once.

A store is built in a folder of its own, brought to disk and renamed: it is there whole or not at all. A file lock,
which the system releases when its process dies, lets one process convert while others wait. A store that is there
is checked byte by byte at every call, before anything is trained with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from harness.data.beton import write_beton
from harness.data.imagesets import ImageSets, Located
from harness.data.paths import CACHE_VARIABLE, cache_directory, writable_cache_directory
from harness.data.sources import locate
from harness.data.store import (
    BETON_FILES,
    FORMAT_VERSION,
    DataStore,
    Manifest,
    Split,
    read_manifest,
    verify,
    write_manifest,
)
from harness.errors import HarnessError
from harness.files import fsync_directory, hex_digest

__all__ = [
    "DataStore",
    "Manifest",
    "Split",
    "channel_statistics",
    "list_stores",
    "open_store",
    "prepare",
    "verify",
]

_STORES = "data"
_CHUNK = 1024  # images
_log = logging.getLogger(__name__)


def prepare(
    source: str,
    *,
    path: str | Path | None = None,
    image_size_px: int = 32,
    image_column: str | None = None,
    label_column: str | None = None,
    synthetic: Mapping[str, int] | None = None,
    download: bool = True,
    force: bool = False,
) -> DataStore:
    """A verified store of the source's images, converted now if it is not there or its input has changed.

    Args:
        source, path, image_size_px, image_column, label_column, synthetic, download: as `locate` takes them.
        force: convert again even where there is a store, which is replaced.

    Raises:
        HarnessError: no or wrong input, a damaged store (not repaired without `force`), or a cache folder that
            cannot be written to.
    """
    located = locate(
        source,
        path=path,
        image_size_px=image_size_px,
        image_column=image_column,
        label_column=label_column,
        synthetic=synthetic,
        download=download,
    )
    if located.left_out and os.environ.get("RANK", "0") == "0":
        print(f"data: left out {located.left_out}", file=sys.stderr)
    fingerprint = _fingerprint(located, image_size_px)
    name = f"{source}-{fingerprint}"
    directory = cache_directory(_STORES, name)
    if force or not _exists(directory):
        stores = writable_cache_directory(_STORES)
        with _locked(stores / f"{name}.lock"):
            _remove_leftovers(stores, name)
            if force or not _exists(directory):  # another process may have made it while this one waited
                _convert(located, directory, image_size_px, fingerprint)
    return open_store(directory)


def open_store(directory: str | Path) -> DataStore:
    """An existing store, checked byte by byte.

    Raises:
        HarnessError: names every file that is missing, truncated, changed or swapped.
    """
    directory = Path(directory)
    problems = verify(directory)
    if problems:
        raise HarnessError(
            "the converted data is damaged:\n    " + "\n    ".join(problems),
            hint=f"Make it again: harness data prepare --force RECIPE, or remove {directory}",
        )
    return DataStore(directory, read_manifest(directory))


def list_stores() -> list[Path]:
    """The folders of all stores in the cache, damaged ones included, sorted by name."""
    stores = cache_directory(_STORES)
    if not stores.is_dir():
        return []
    return sorted(entry for entry in stores.iterdir() if entry.is_dir() and entry.name[0] != ".")


def channel_statistics(images_BHWC: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, pixels scaled to [0, 1].

    Computed from histograms in whole numbers: exact but for the last rounding to float64.

    Args:
        images_BHWC: uint8 (B, H, W, 3).
    """
    histogram = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images_BHWC), _CHUNK):
        chunk = images_BHWC[start : start + _CHUNK]
        for channel in range(3):
            histogram[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    mean, std = [], []
    for counts in histogram.tolist():  # Python's whole numbers do not overflow
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / (255 * n))
        std.append(math.sqrt(n * squares - total * total) / (255 * n))
    return tuple(mean), tuple(std)


def _exists(directory: Path) -> bool:
    try:
        return directory.exists()
    except OSError as error:
        raise HarnessError(
            f"cannot be read: {error.strerror or error}",
            where=str(directory),
            hint=f"See that you may read that folder, or set {CACHE_VARIABLE} to another.",
        ) from error


def _fingerprint(located: Located, image_size_px: int) -> str:
    """16 hexadecimal digits that change with the source, its options, the image size and every input file."""
    digest = hashlib.sha256()
    options = dict(sorted(located.options.items()))
    digest.update(json.dumps([FORMAT_VERSION, located.source, options, image_size_px]).encode())
    for file in located.files:
        try:
            status = file.stat()
        except OSError as error:
            raise HarnessError(
                f"cannot be read: {error.strerror or error}",
                where=str(file),
                hint="See that the file is there and that you may read it.",
            ) from error
        identity = [str(file), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, taken at once or when the process that holds it is done or dead."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _tell_of_waiting(path)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise HarnessError(
            f"the file cannot be locked: {error}",
            where=str(path),
            hint=f"Set {CACHE_VARIABLE} to a folder on a disk that has file locks.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _tell_of_waiting(path: Path) -> None:
    """The ranks of a training on one node convert once; of those that wait, the first alone says so."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    alone = (os.environ.get("WORLD_SIZE") or "1") == "1"
    who = "another process" if alone else "another rank of this training, or another process,"
    _log.warning("%s is converting this data; waiting for it (lock %s)", who, path)


def _remove_leftovers(stores: Path, name: str) -> None:
    """Half-built folders of processes that were killed; only the holder of the lock may call this."""
    for leftover in stores.glob(f".{name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _convert(located: Located, directory: Path, image_size_px: int, fingerprint: str) -> None:
    _log.info("converting %s", located.origin)
    sets = located.load()
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        building.mkdir()
        _write(sets, located, building, image_size_px, fingerprint)
        if directory.exists():  # with force: a folder cannot be renamed onto one that is not empty
            directory.rename(directory.with_name(f".{directory.name}.{uuid.uuid4().hex}"))
        building.rename(directory)
        fsync_directory(directory.parent)
    except OSError as error:
        raise HarnessError(
            f"cannot be written: {error.strerror or error}",
            where=str(directory),
            hint=f"See that the disk has free space, or set {CACHE_VARIABLE} to a folder on another.",
        ) from error
    finally:
        _remove_leftovers(directory.parent, directory.name)


def _write(sets: ImageSets, located: Located, directory: Path, image_size_px: int, fingerprint: str) -> None:
    splits = {"train": sets.train, "test": sets.test}
    for split, labelled in splits.items():
        write_beton(directory / BETON_FILES[split], labelled.images_BHWC, labelled.labels_B)
    mean, std = channel_statistics(sets.train.images_BHWC)
    manifest = Manifest(
        source=located.source,
        classes=sets.classes,
        image_size_px=image_size_px,
        counts={split: len(labelled.labels_B) for split, labelled in splits.items()},
        mean=mean,
        std=std,
        sha256={name: hex_digest(directory / name) for name in BETON_FILES.values()},
        origin=located.origin,
        fingerprint=fingerprint,
    )
    write_manifest(directory, manifest)
