"""Images in one folder a class: train/CLASS/*.png beside test/, val/ or valid/ in the same form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.images import read_images
from harness.data.imagesets import ImageSets, LabelledImages
from harness.errors import HarnessError, nearest

TRAIN_FOLDER = "train"
TEST_FOLDERS = ("test", "val", "valid")
_NOT_IMAGES = {
    "thumbs.db",
    "desktop.ini",
}  # what file managers leave behind; hidden files are passed over too


@dataclass(frozen=True)
class FolderListing:
    """The image files of both splits with their class indices, sorted by class name and path."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]
    test: tuple[tuple[Path, int], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in (*self.train, *self.test))


def find_test_folder(root: Path) -> Path | None:
    """The folder with the test images of an image folder, None where `root` is no image folder."""
    if not (root / TRAIN_FOLDER).is_dir():
        return None
    return next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted by code point; hidden ones are passed over."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))


def list_images(root: Path) -> FolderListing:
    """Every file below the class folders; that all are images shows when they are decoded.

    Raises:
        HarnessError: train/ or test/ (val/, valid/) is missing, the two have different classes, or there are
            no images, in all or in a class of the training set.
    """
    train = root / TRAIN_FOLDER
    test = find_test_folder(root)
    if test is None:
        wanted = " or ".join(TEST_FOLDERS) if train.is_dir() else TRAIN_FOLDER
        raise HarnessError(f"has no folder {wanted}", where=str(root), hint="The layout is train/CLASS/IMAGE.png.")
    classes, test_classes = class_names(train), class_names(test)
    if not classes:
        raise HarnessError("has no class folders", where=str(train), hint="The layout is train/CLASS/IMAGE.png.")
    for name in sorted(set(test_classes) - set(classes)):
        raise HarnessError(
            f'the class "{name}" has no folder in {train}',
            where=str(test / name),
            hint=nearest(name, classes),
        )
    for name in sorted(set(classes) - set(test_classes)):
        raise HarnessError(
            f'has no folder for the class "{name}"',
            where=str(test),
            hint="Make an empty one where there really are no test images of that class.",
        )
    listing = FolderListing(root, classes, tuple(_files(train, classes)), tuple(_files(test, classes)))
    if not listing.test:
        raise HarnessError(
            "holds no images",
            where=str(test),
            hint=f"Put images in its class folders, for example {test.name}/{classes[0]}/IMAGE.png.",
        )
    filled = {label for _, label in listing.train}
    for label, name in enumerate(classes):
        if label not in filled:
            raise HarnessError(
                "holds no images",
                where=str(train / name),
                hint=f"Put images there, or remove this folder and {test / name}",
            )
    return listing


def read_folders(
    listing: FolderListing, *, image_size_px: int, required_size_px: tuple[int, int] | None = None
) -> ImageSets:
    """Decode all images; those of another size are resized and cropped (`harness.data.images.fit`).

    Raises:
        HarnessError: names the file that is no image, or has not the required (width, height).
    """
    sets: list[LabelledImages] = []
    for split in (listing.train, listing.test):
        paths = [path for path, _ in split]
        images_BHWC = read_images(
            paths,
            image_size_px=image_size_px,
            where=lambda index, paths=paths: str(paths[index]),  # type: ignore[misc]
            required_size_px=required_size_px,
        )
        sets.append(LabelledImages(images_BHWC, np.array([label for _, label in split], dtype=np.int64)))
    return ImageSets(sets[0], sets[1], listing.classes)


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and path.name[0] != "." and path.name.lower() not in _NOT_IMAGES
    ]
