"""From a recipe's `data` to a verified, converted data set in `$HARNESS_CACHE/data`, converted once.

    <source>-<fingerprint>/train.beton, test.beton, manifest.json

It is there whole or not at all, built by one process while others wait. The manifest has the SHA-256 of both files and
of itself: at each call every byte is checked against it once, and then believed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel

from harness.data import cifar10, sources
from harness.data.images import ImageSet, Located
from harness.errors import HarnessError
from harness.files import cache_directory, find_input, fsync_directory, hex_digest, replacing, writable_cache_directory

FORMAT_VERSION = 1
BETON_FILES: Mapping[str, str] = {"train": "train.beton", "test": "test.beton"}  # by split
_SELF_DIGEST = "manifest_sha256"
_AGAIN_HINT = "Make the data again: harness data prepare --force RECIPE"
_CHUNK = 1024  # images
_log = logging.getLogger(__name__)


def locate(
    source: str,
    *,
    path: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    synthetic: Mapping[str, int] | None = None,
    download: bool = True,
) -> Located:
    """Find what a recipe's `data` names, without reading it.

    Args:
        path: a relative one is looked for here, then in each folder of `$HARNESS_DATA`.
        download: whether cifar10 may be downloaded to `$HARNESS_CACHE` where it is not found.

    Raises:
        HarnessError: there is no such input, with the places looked in.
    """
    if source == "digits":
        return Located(source, "scikit-learn's handwritten digits (load_digits)", sources.digits)
    if source == "synthetic":
        options = {"train_images": 512, "test_images": 256, "num_classes": 10, "seed": 0, **(synthetic or {})}
        load = functools.partial(sources.synthetic, **options)
        return Located(source, f"synthetic patterns, seed {options['seed']}", load, options=options)
    found = None if path is None else find_input(str(path))
    if source == "cifar10":
        return cifar10.locate_cifar10(found, download=download)
    assert found is not None  # a rule of recipes
    if source == "imagefolder":
        return sources.locate_class_folders(found)
    files = sources.find_parquet(found)
    if files is None:
        what = "holds no files train-*.parquet and test-*.parquet"
        raise HarnessError(what, where=str(found), hint="Give the folder that they lie in.")
    return sources.locate_parquet(found, files, image_column=image_column, label_column=label_column)


# FFCV's .beton, version 2, of raw RGB images and whole numbers, as ffcv 1.0.2 writes it (its `types.py`, `writer.py`,
# `fields/rgb_image.py`, `fields/basics.py`): header, descriptor of each field, metadata of each sample, pixels (uint8,
# height × width × 3), allocation table. FFCV leaves holes between pages. Here the pixels of all images lie in one block
# that can be mapped as one array, and FFCV's own Loader reads it all the same.
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_start", "<u8")]
)
_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
_FIELDS = np.array([(2, b"image", 0), (1, b"label", 0)], dtype=_DESCRIPTOR)
_SAMPLE = np.dtype(  # the padding aligns the label
    [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("padding", "V3"), ("label", "<i8")]
)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_METADATA_START = _HEADER.itemsize + _FIELDS.nbytes
_MODE_RAW = 1
_ALIGN_BYTES = 4096  # pixels begin on a page of memory


def _pixels_start(count: int) -> int:
    metadata_end = _METADATA_START + count * _SAMPLE.itemsize
    return -(-metadata_end // _ALIGN_BYTES) * _ALIGN_BYTES


def _file_bytes(count: int, height: int, width: int) -> int:
    return _pixels_start(count) + count * (height * width * 3 + _ALLOCATION.itemsize)


def write_beton(path: Path, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
    """Write uint8 images (B, H, W, 3) and labels (B,); the file appears complete, or HarnessError is raised."""
    count, height, width, _ = images_BHWC.shape
    image_bytes, pixels_start = height * width * 3, _pixels_start(count)
    pixels_end = pixels_start + count * image_bytes
    # One page covers the file: with `os_cache=False` FFCV reads whole pages and an image must not cross two. A page has
    # from 2 MiB to 2 GiB; larger files need FFCV's default, `os_cache=True`.
    page_bytes = min(max(1 << 21, 1 << (pixels_end - 1).bit_length()), 1 << 31)
    header = np.array((2, len(_FIELDS), page_bytes, count, pixels_end), dtype=_HEADER)
    metadata, table = np.zeros(count, dtype=_SAMPLE), np.zeros(count, dtype=_ALLOCATION)
    metadata["mode"], metadata["width"], metadata["height"], metadata["label"] = _MODE_RAW, width, height, labels_B
    metadata["ptr"] = table["ptr"] = pixels_start + np.arange(count) * image_bytes
    table["sample_id"], table["size"] = np.arange(count), image_bytes
    with replacing(path) as file:
        head = header.tobytes() + _FIELDS.tobytes() + metadata.tobytes()
        file.write(head.ljust(pixels_start, b"\0"))
        file.write(np.ascontiguousarray(images_BHWC).data)
        file.write(table.tobytes())


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set: images uint8 (B, H, W, 3), read-only and mapped from the file, and labels int64 (B,)."""

    path: Path
    images_BHWC: np.ndarray  # noqa: N815
    labels_B: np.ndarray  # noqa: N815

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels_B)


def open_beton(path: Path) -> Split:
    """Map a file that `write_beton` wrote; raises HarnessError for another length. Its SHA-256 is checked elsewhere."""
    wanted = _METADATA_START + _SAMPLE.itemsize
    with path.open("rb") as file:
        head = file.read(wanted).ljust(wanted, b"\0")
    header, first = np.frombuffer(head, _HEADER, 1)[0], np.frombuffer(head, _SAMPLE, 1, _METADATA_START)[0]
    count, height, width = int(header["num_samples"]), int(first["height"]), int(first["width"])
    if path.stat().st_size != _file_bytes(count, height, width):
        raise HarnessError("is no .beton file of this program", where=str(path), hint=_AGAIN_HINT)
    metadata = np.fromfile(path, _SAMPLE, count, offset=_METADATA_START)
    shape = (count, height, width, 3)
    images_BHWC = np.memmap(path, dtype=np.uint8, mode="r", offset=_pixels_start(count), shape=shape)
    return Split(path, images_BHWC, metadata["label"].astype(np.int64))


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What a prepared data set holds; the file adds a checksum of its own."""

    source: str
    classes: tuple[str, ...]
    image_size_px: int
    counts: Mapping[str, int]  # images by split
    mean: tuple[float, float, float]  # of the training pixels, red, green, blue, scaled to [0, 1]
    std: tuple[float, float, float]  # that of the population
    sha256: Mapping[str, str]  # by the name of the file
    origin: str  # for people
    format_version: int = FORMAT_VERSION
    fingerprint: str  # of the input, the last part of the folder's name

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, _SELF_DIGEST: _digest(content)}, indent=2, ensure_ascii=False) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PreparedDataset:
    """A converted data set, each byte of which was checked when it was opened."""

    directory: Path
    manifest: Manifest
    splits: Mapping[str, Split]

    def split(self, name: Literal["train", "test"]) -> Split:
        """One of the two splits."""
        return self.splits[name]


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; raises HarnessError where it is missing or changed."""
    path = directory / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop(_SELF_DIGEST, None) != _digest(content):
            raise ValueError("its checksum does not fit its content")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format version is {content.get('format_version')}, not {FORMAT_VERSION}")
        return Manifest.model_validate(content)
    except OSError as error:
        raise HarnessError(f"cannot be read: {error.strerror or error}", where=str(path), hint=_AGAIN_HINT) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or not as written
        raise HarnessError(f"damaged: {error}", where=str(path), hint=_AGAIN_HINT) from error


def verify(directory: Path) -> list[str]:
    """Everything that is wrong with a prepared data set, one sentence each. Reads every byte (0.2 s for CIFAR-10)."""
    try:
        manifest = read_manifest(directory)
    except HarnessError as error:
        return [f"{error.where}: {error.what}"]
    problems = []
    if not directory.name.endswith(f"-{manifest.fingerprint}"):
        problems.append(f"{directory}: holds the data set {manifest.source}-{manifest.fingerprint}")
    for split, name in BETON_FILES.items():
        path, size_px = directory / name, manifest.image_size_px
        try:
            digest, length = hex_digest(path), path.stat().st_size
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror or error}")
            continue
        if digest != manifest.sha256.get(name):
            expected = _file_bytes(manifest.counts.get(split, 0), size_px, size_px)
            what = f"damaged: its SHA-256 is not that of the manifest ({length:,} of {expected:,} bytes)"
            problems.append(f"{path}: {what}")
    return problems


def open_prepared(directory: Path) -> PreparedDataset:
    """An existing data set, checked byte by byte; raises HarnessError with every file that is missing or damaged."""
    problems = verify(directory)
    if problems:
        hint = f"Make it again: harness data prepare --force RECIPE, or remove {directory}"
        raise HarnessError("the converted data is damaged:\n    " + "\n    ".join(problems), hint=hint)
    splits = {split: open_beton(directory / name) for split, name in BETON_FILES.items()}
    return PreparedDataset(directory, read_manifest(directory), splits)


def list_prepared() -> list[Path]:
    """The folders of all prepared data sets in the cache, damaged ones included, sorted by name."""
    return sorted(entry for entry in cache_directory("data").glob("[!.]*") if entry.is_dir())


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What the system says of an input that cannot be read, in the user's words."""
    try:
        yield
    except OSError as error:
        where = str(error.filename) if error.filename else None
        hint = "See that it is there and that you may read it."
        raise HarnessError(f"cannot be read: {error.strerror or error}", where=where, hint=hint) from error


@_readable()
def prepare(source: str, *, image_size_px: int = 32, force: bool = False, **where: Any) -> PreparedDataset:
    """The verified images of a source, converted now if they are not there, the input has changed, or by `force`.

    `where` is as `locate` takes it.

    Raises:
        HarnessError: no or wrong input, damaged data (repaired by `force` alone), or a cache that cannot be written to.
    """
    located = locate(source, **where)
    if located.left_out and os.environ.get("RANK", "0") == "0":
        print(f"data: left out {located.left_out}", file=sys.stderr)
    fingerprint = _fingerprint(located, image_size_px)
    directory = cache_directory("data", f"{source}-{fingerprint}")
    if force or not directory.exists():
        with _lock(writable_cache_directory("data") / f"{directory.name}.lock"):
            _remove_leftovers(directory)
            if force or not directory.exists():  # another process may have made it while this one waited
                _convert(located, directory, image_size_px, fingerprint)
    return open_prepared(directory)


def channel_statistics(images_BHWC: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, pixels scaled to [0, 1].

    Summed up in whole numbers: exact but for the last rounding to float64.
    """
    sums, squares, n = np.zeros(3, np.int64), np.zeros(3, np.int64), images_BHWC.size // 3
    for start in range(0, len(images_BHWC), _CHUNK):
        pixels = images_BHWC[start : start + _CHUNK].reshape(-1, 3).astype(np.int64)
        sums += pixels.sum(axis=0)
        squares += (pixels * pixels).sum(axis=0)
    both = list(zip(sums.tolist(), squares.tolist(), strict=True))  # Python's whole numbers, which do not overflow
    std = tuple(math.sqrt(n * square - total * total) / (255 * n) for total, square in both)
    return tuple(total / (255 * n) for total, _ in both), std


def _fingerprint(located: Located, image_size_px: int) -> str:
    """16 hexadecimal digits that change with the source, its options, the image size and every input file."""
    options = dict(sorted(located.options.items()))
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, located.source, options, image_size_px]).encode())
    for file in located.files:
        status = file.stat()
        digest.update(json.dumps([str(file), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()[:16]


def _lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    """A lock held for a block, taken at once or when the process that holds it is done or dead."""
    lock = FileLock(path)
    try:
        with contextlib.suppress(Timeout):
            return lock.acquire(timeout=0)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a node's ranks that wait, the first alone says so
            _log.warning("another process is converting this data; waiting for it (lock %s)", path)
        return lock.acquire()
    except (OSError, NotImplementedError) as error:
        hint = "Set HARNESS_CACHE to a folder on a disk that has file locks."
        raise HarnessError(f"the file cannot be locked: {error}", where=str(path), hint=hint) from error


def _remove_leftovers(directory: Path) -> None:
    """Half-built folders of processes that were killed; only the holder of the lock may call this."""
    for leftover in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _convert(located: Located, directory: Path, image_size_px: int, fingerprint: str) -> None:
    _log.info("converting %s", located.origin)
    images = located.load(image_size_px)
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        building.mkdir()
        _write(images, located, building, image_size_px, fingerprint)
        if directory.exists():  # with force: a folder cannot be renamed onto one that is not empty
            directory.rename(directory.with_name(f".{directory.name}.{uuid.uuid4().hex}"))
        building.rename(directory)
        fsync_directory(directory.parent)
    except OSError as error:
        hint = "See that the disk has free space, or set HARNESS_CACHE to a folder on another."
        what = f"cannot be written: {error.strerror or error}"
        raise HarnessError(what, where=str(directory), hint=hint) from error
    finally:
        _remove_leftovers(directory)


def _write(images: ImageSet, located: Located, directory: Path, image_size_px: int, fingerprint: str) -> None:
    counts, sha256 = {}, {}
    for split, part in (("train", slice(images.train_count)), ("test", slice(images.train_count, None))):
        path = directory / BETON_FILES[split]
        write_beton(path, images.images_BHWC[part], images.labels_B[part])
        counts[split], sha256[path.name] = len(images.labels_B[part]), hex_digest(path)
    mean, std = channel_statistics(images.images_BHWC[: images.train_count])
    manifest = Manifest(
        source=located.source,
        classes=images.classes,
        image_size_px=image_size_px,
        counts=counts,
        mean=mean,
        std=std,
        sha256=sha256,
        origin=located.origin,
        fingerprint=fingerprint,
    )
    with replacing(directory / "manifest.json") as file:
        file.write(manifest.to_json().encode())
