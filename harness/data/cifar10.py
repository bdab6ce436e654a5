"""CIFAR-10 in whatever form there is (its makers' archives, Parquet files, class folders), and its download.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images" (2009); 60,000 images of 32×32, in
10 classes, 5,000 of each for training and 1,000 for testing (https://www.cs.toronto.edu/~kriz/cifar.html).

Its makers publish a binary form (records of a label byte and 3 × 32 × 32 pixel bytes), which is the one downloaded, and
pickles, which torchvision unpickles here once their published MD5 is confirmed. Nothing else is ever unpickled.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from harness.data import sources
from harness.data.images import ImageSet, Located, resize_images
from harness.errors import HarnessError
from harness.files import cache_directory, data_directories, hex_digest, replacing, writable_cache_directory

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
BINARY_FOLDER, PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
BINARY_ARCHIVE, PYTHON_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
ARCHIVE_MD5 = {  # as published on the data set's page
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
}
DOWNLOAD_URL = f"https://www.cs.toronto.edu/~kriz/{BINARY_ARCHIVE}"

_SIZE_PX = 32
_RECORD_BYTES = 1 + 3 * _SIZE_PX * _SIZE_PX
_BROKEN_HINT = "Remove it, so that it is looked for elsewhere or downloaded again"
_DOWNLOAD_HINT = "Check the network and run it again"
_HINT = (
    f"Set HARNESS_DATA to a folder that holds {BINARY_ARCHIVE} or {PYTHON_ARCHIVE}, either "
    "of them extracted, train-*.parquet and test-*.parquet, or train/CLASS/*.png and test/CLASS/*.png; "
    "or run once where there is a network, with the same HARNESS_CACHE"
)
_OTHER_HINT = (
    "Get a whole copy of CIFAR-10; another data set is read with data.source=parquet or imagefolder and data.path"
)


def locate_cifar10(path: Path | None, *, download: bool) -> Located:
    """Find CIFAR-10 at `path`, or else under `$HARNESS_DATA`, then in `$HARNESS_CACHE`, then on the network."""
    if path is not None:
        located = _at(path, sure=True)
        if located is None:
            raise HarnessError("holds no CIFAR-10", where=str(path), hint=_HINT)
        return located
    looked = []
    for directory in data_directories():
        named = [entry for entry in sorted(directory.iterdir()) if entry.is_dir() and _is_cifar10_name(entry.name)]
        for folder in (*named, directory):
            looked.append(str(folder))
            # Parquet files and class folders in a folder of any other name may well be another data set.
            located = _at(folder.resolve(), sure=_is_cifar10_name(folder.name))
            if located is not None:
                return located
    archive = cache_directory("downloads", BINARY_ARCHIVE)
    reason, hint = "Downloading was not allowed.", _HINT
    if not archive.is_file() and download:
        try:
            _download(writable_cache_directory("downloads") / BINARY_ARCHIVE)
        except HarnessError as error:
            reason, hint = f"{error.where}: {error.what}", f"{_HINT}; or {error.hint}"
    if archive.is_file():
        return _published(archive)
    looked = [*(looked or ["$HARNESS_DATA, which is not set"]), str(archive)]
    places = "".join(f"\n    {place}" for place in looked)
    raise HarnessError(f"CIFAR-10 was not found. Looked in{places}\n  {reason}", hint=hint)


def _is_cifar10_name(name: str) -> bool:
    return name.lower().replace("-", "").replace("_", "") == "cifar10"


def _at(place: Path, *, sure: bool) -> Located | None:
    """CIFAR-10 in any of its forms at one place; None where there is nothing that could be it.

    `sure`: whatever is there is meant to be CIFAR-10, so if it is not, loading it says what is wrong.
    """
    names = (BINARY_FOLDER, PYTHON_FOLDER, BINARY_ARCHIVE, PYTHON_ARCHIVE)
    for candidate in [place] if place.name in names else [place / name for name in names]:
        if candidate.exists():
            return _published(candidate)
    located = None
    files = sources.find_parquet(place)
    if files is not None and (sure or sources.count_rows(files) == {"train": 50_000, "test": 10_000}):
        located = sources.locate_parquet(place, files, required_size_px=_SIZE_PX)
    elif sources.find_test_folder(place) is not None and (sure or len(sources.class_names(place / "train")) == 10):
        located = sources.locate_class_folders(place, required_size_px=_SIZE_PX)
    if located is not None:
        load, origin = located.load, f"CIFAR-10 from {located.origin}"
        return Located("cifar10", origin, lambda px: checked(load(px), place), located.files, left_out=located.left_out)
    return None


def checked(images: ImageSet, place: Path) -> ImageSet:
    """The images, with CIFAR-10's class names where they were numbers; raises HarnessError where a count is wrong."""
    train_B, test_B = np.split(images.labels_B, [images.train_count])
    for split, labels_B, each in (("train", train_B, 5_000), ("test", test_B, 1_000)):
        counts = np.bincount(labels_B, minlength=len(images.classes)).tolist()
        if counts != [each] * len(CLASSES):
            found = ", ".join(f"{count:,} {name}" for name, count in zip(images.classes, counts, strict=False))[:150]
            what = f"has {len(labels_B):,} images in its {split} split ({found}), CIFAR-10 has {each:,} of each class"
            raise HarnessError(what, where=str(place), hint=_OTHER_HINT)
    return replace(images, classes=CLASSES) if images.classes == tuple("0123456789") else images


def _published(place: Path) -> Located:
    """One of its makers' archives, or what such an archive extracts to."""

    def load(image_size_px: int) -> ImageSet:
        images_BHWC, labels_B = _read_folder(place) if place.is_dir() else _read_archive(place)
        return checked(ImageSet(resize_images(images_BHWC, image_size_px), labels_B, 50_000, CLASSES), place)

    suffix = ".bin" if place.name == BINARY_FOLDER else ""
    files = tuple(place / f"{name}{suffix}" for name in BATCHES) if place.is_dir() else (place,)
    return Located("cifar10", f"CIFAR-10 from {place}", load, files)


def _read_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    _check_md5(path, ARCHIVE_MD5[path.name])
    with tempfile.TemporaryDirectory(dir=writable_cache_directory("downloads")) as scratch:
        with tarfile.open(path, "r:gz") as archive:
            archive.extractall(scratch, filter="data")
        return _read_folder(Path(scratch, BINARY_FOLDER if path.name == BINARY_ARCHIVE else PYTHON_FOLDER))


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 (60000, 32, 32, 3), the test set last, and their labels, int64."""
    if folder.name == BINARY_FOLDER:
        records = np.concatenate([_read_records(folder / f"{name}.bin") for name in BATCHES])
        images_BCHW = records[:, 1:].reshape(-1, 3, _SIZE_PX, _SIZE_PX)
        return images_BCHW.transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)
    from torchvision.datasets import CIFAR10

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta):
        _check_md5(folder / name, md5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy deprecates what these files of 2009 hold
        train, test = (CIFAR10(folder.parent, train=is_train) for is_train in (True, False))
    return np.concatenate([train.data, test.data]), np.array(train.targets + test.targets, np.int64)


def _read_records(path: Path) -> np.ndarray:
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) != 10_000 * _RECORD_BYTES:
        what = f"{len(content)} bytes long where {10_000 * _RECORD_BYTES} are wanted"
        raise HarnessError(what, where=str(path), hint=_BROKEN_HINT)
    return content.reshape(-1, _RECORD_BYTES)


def _check_md5(path: Path, expected: str) -> None:
    found = hex_digest(path, "md5")
    if found != expected:
        what = f"damaged: its MD5 is {found}, published is {expected}"
        raise HarnessError(what, where=str(path), hint=_BROKEN_HINT)


def _download(target: Path) -> None:
    """Fetch the binary archive, with progress on stderr; the file appears once its MD5 is right, else HarnessError."""
    quiet = not sys.stderr.isatty()  # a bar in a log file is a thousand lines
    content = io.BytesIO()  # in memory, so that a network that fails does not read as a disk that does
    with FileLock(f"{target}.lock"):
        if target.is_file():  # another process has fetched it meanwhile
            return
        try:
            with urllib.request.urlopen(DOWNLOAD_URL, timeout=30) as answer:
                if quiet:
                    print(f"downloading {DOWNLOAD_URL} ({(answer.length or 0) / 1e6:.0f} MB)", file=sys.stderr)
                with tqdm.wrapattr(answer, "read", total=answer.length, desc="CIFAR-10", disable=quiet) as stream:
                    shutil.copyfileobj(stream, content, 1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise HarnessError(f"the download failed: {error}", where=DOWNLOAD_URL, hint=_DOWNLOAD_HINT) from error
        found, expected = hashlib.md5(content.getbuffer(), usedforsecurity=False).hexdigest(), ARCHIVE_MD5[target.name]
        if found != expected:
            what = f"the download is damaged: its MD5 is {found}, published is {expected}"
            raise HarnessError(what, where=DOWNLOAD_URL, hint=_DOWNLOAD_HINT)
        with replacing(target) as file:
            file.write(content.getbuffer())
