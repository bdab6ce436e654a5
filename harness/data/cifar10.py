"""CIFAR-10 in whatever form there is: its makers' archives, Parquet files or class folders.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images" (2009); 60,000 images of 32×32, in
10 classes, 5,000 of each for training and 1,000 for testing (https://www.cs.toronto.edu/~kriz/cifar.html).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.data import archives, folders, parquet
from harness.data.images import resize_images
from harness.data.imagesets import ImageSets, LabelledImages, Located
from harness.data.paths import (
    CACHE_VARIABLE,
    DATA_VARIABLE,
    cache_directory,
    data_directories,
    writable_cache_directory,
)
from harness.errors import HarnessError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUMBERED_CLASSES = tuple("0123456789")

_SIZE_PX = (32, 32)
_PER_CLASS = {"train": 5_000, "test": 1_000}
_DOWNLOADS = "downloads"
_HINT = (
    f"Set {DATA_VARIABLE} to a folder that holds {archives.BINARY_ARCHIVE} or {archives.PYTHON_ARCHIVE}, either "
    "of them extracted, train-*.parquet and test-*.parquet, or train/CLASS/*.png and test/CLASS/*.png; "
    f"or run once where there is a network, with the same {CACHE_VARIABLE}"
)
_OTHER_HINT = (
    "Get a whole copy of CIFAR-10; another data set is read with data.source=parquet or imagefolder and data.path"
)


def is_cifar10_name(name: str) -> bool:
    """Whether a folder is called cifar10, CIFAR-10, cifar_10 …"""
    return name.lower().replace("-", "").replace("_", "") == "cifar10"


def locate_cifar10(path: Path | None, *, image_size_px: int, download: bool) -> Located:
    """Find CIFAR-10 at `path`, or else under `$HARNESS_DATA`, then in `$HARNESS_CACHE`, then on the network.

    Raises:
        HarnessError: there is none, with the places looked in.
        OSError: a folder cannot be listed.
    """
    if path is not None:
        located = _at(path, image_size_px, sure=True)
        if located is None:
            raise HarnessError("holds no CIFAR-10", where=str(path), hint=_HINT)
        return located
    looked = []
    for directory in data_directories():
        named = [entry for entry in sorted(directory.iterdir()) if entry.is_dir() and is_cifar10_name(entry.name)]
        for folder in (*named, directory):
            looked.append(str(folder))
            # Parquet files and class folders in a folder of any other name may well be another data set.
            located = _at(folder.resolve(), image_size_px, sure=is_cifar10_name(folder.name))
            if located is not None:
                return located
    if not looked:
        looked.append(f"${DATA_VARIABLE}, which is not set")
    archive = cache_directory(_DOWNLOADS) / archives.BINARY_ARCHIVE
    looked.append(str(archive))
    reason, hint = "Downloading was not allowed.", _HINT
    if not archive.is_file() and download:
        try:
            writable_cache_directory(_DOWNLOADS)
            archives.download(archives.DOWNLOAD_URL, archive, md5=archives.ARCHIVE_MD5[archive.name])
        except HarnessError as error:
            reason, hint = f"{error.where}: {error.what}", f"{_HINT}; or {error.hint}"
    if archive.is_file():
        return _archive(archive, image_size_px)
    places = "".join(f"\n    {place}" for place in looked)
    raise HarnessError(f"CIFAR-10 was not found. Looked in{places}\n  {reason}", hint=hint)


def _at(place: Path, image_size_px: int, *, sure: bool) -> Located | None:
    """CIFAR-10 in any of its forms at one place; None where there is nothing that could be it.

    `sure`: whatever is there is meant to be CIFAR-10, so if it is not, loading it tells what is wrong.
    """
    if place.is_file():
        return _archive(place, image_size_px) if place.name in archives.ARCHIVE_MD5 else None
    for name, batches in archives.BATCHES.items():
        folder = place if place.name == name else place / name
        if folder.is_dir():
            files = tuple(folder / batch for batch in batches)
            return _batches(folder, files, archives.read_cifar10_folder, image_size_px)
    for name in archives.ARCHIVE_MD5:
        if (place / name).is_file():
            return _archive(place / name, image_size_px)
    shards = parquet.find_parquet(place)
    if shards is not None and (sure or _has_rows(shards)):
        return _parquet(place, shards, image_size_px)
    if folders.find_test_folder(place) is not None:
        count = len(folders.class_names(place / folders.TRAIN_FOLDER))
        if sure or count == len(CIFAR10_CLASSES):
            return _class_folders(place, image_size_px)
    return None


def _archive(path: Path, image_size_px: int) -> Located:
    return _batches(path, (path,), archives.read_cifar10_archive, image_size_px)


def _batches(
    place: Path, files: tuple[Path, ...], read: Callable[[Path], list[LabelledImages]], image_size_px: int
) -> Located:
    def load() -> ImageSets:
        *train, test = read(place)
        images_BHWC = np.concatenate([batch.images_BHWC for batch in train])
        labels_B = np.concatenate([batch.labels_B for batch in train])
        splits = (LabelledImages(images_BHWC, labels_B), test)
        resized = [LabelledImages(resize_images(s.images_BHWC, image_size_px), s.labels_B) for s in splits]
        return checked(ImageSets(resized[0], resized[1], CIFAR10_CLASSES), place)

    return Located("cifar10", f"CIFAR-10 from {place}", load, files)


def _parquet(folder: Path, shards: dict[str, list[Path]], image_size_px: int) -> Located:
    def load() -> ImageSets:
        sets = parquet.read_parquet(shards, image_size_px=image_size_px, required_size_px=_SIZE_PX)
        return checked(sets, folder)

    files = (*shards["train"], *shards["test"])
    return Located("cifar10", f"CIFAR-10 from Parquet files in {folder}", load, files)


def _class_folders(root: Path, image_size_px: int) -> Located:
    listing = folders.list_images(root)

    def load() -> ImageSets:
        sets = folders.read_folders(listing, image_size_px=image_size_px, required_size_px=_SIZE_PX)
        return checked(sets, root)

    left_out = folders.in_words(listing.left_out)
    return Located("cifar10", f"CIFAR-10 from the image folder {root}", load, listing.files, left_out=left_out)


def _has_rows(shards: dict[str, list[Path]]) -> bool:
    try:
        counts = {split: parquet.count_rows(paths) for split, paths in shards.items()}
    except HarnessError:
        return False
    return counts == {split: len(CIFAR10_CLASSES) * each for split, each in _PER_CLASS.items()}


def checked(sets: ImageSets, place: Path) -> ImageSets:
    """The sets, with CIFAR-10's class names where they were numbers, once their counts are right.

    Raises:
        HarnessError: there are not 10 classes with 5,000 training and 1,000 test images each.
    """
    if len(sets.classes) != len(CIFAR10_CLASSES):
        raise HarnessError(f"has {len(sets.classes)} classes, CIFAR-10 has 10", where=str(place), hint=_OTHER_HINT)
    for split, labelled in (("train", sets.train), ("test", sets.test)):
        wanted = _PER_CLASS[split] * len(CIFAR10_CLASSES)
        found = len(labelled.labels_B)
        if found != wanted:
            raise HarnessError(
                f"has {found:,} images in its {split} split, CIFAR-10 has {wanted:,}",
                where=str(place),
                hint=_OTHER_HINT,
            )
        for label, count in enumerate(np.bincount(labelled.labels_B, minlength=len(CIFAR10_CLASSES))):
            if count != _PER_CLASS[split]:
                raise HarnessError(
                    f'has {count:,} images of the class "{sets.classes[label]}" in its {split} split, '
                    f"CIFAR-10 has {_PER_CLASS[split]:,}",
                    where=str(place),
                    hint=_OTHER_HINT,
                )
    return dataclasses.replace(sets, classes=CIFAR10_CLASSES) if sets.classes == NUMBERED_CLASSES else sets
