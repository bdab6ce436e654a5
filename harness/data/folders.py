"""Images in one folder a class: train/CLASS/*.png next to test/, val/ or valid/ in the same form."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.images import raise_all, read_images
from harness.data.imagesets import ImageSets, LabelledImages
from harness.errors import HarnessError, ManyErrors, nearest

TRAIN_FOLDER = "train"
TEST_FOLDERS = ("test", "val", "valid")
_NAMED = 20  # of the links that lead nowhere
_NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows by name and cannot decode


@dataclass(frozen=True)
class FolderListing:
    """The image files of both splits with their class indices, sorted by class name and path.

    Attributes:
        left_out: what else lies there, by kind, with its number.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]
    test: tuple[tuple[Path, int], ...]
    left_out: Mapping[str, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in (*self.train, *self.test))


def find_test_folder(root: Path) -> Path | None:
    """The folder with the test images of an image folder, None where `root` is no image folder."""
    if not (root / TRAIN_FOLDER).is_dir():
        return None
    return next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted by code point; hidden ones and macOS's are passed over."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))


def in_words(left_out: Mapping[str, int]) -> str:
    """Such as "3 files or folders: 2 hidden, 1 .txt"; empty for none."""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(left_out.items(), key=lambda kind: -kind[1]))
    total = sum(left_out.values())
    return f"{total:,} file{'s' if total > 1 else ''} or folder{'s' if total > 1 else ''}: {kinds}" if total else ""


def list_images(root: Path) -> FolderListing:
    """Every image below the class folders, through links too; what else lies there is counted.

    An image is what has a suffix of Pillow's formats, in any case. torchvision's ImageFolder knows nine of them, and
    names neither what it leaves out nor links that lead nowhere.

    Raises:
        HarnessError: train/ or test/ (val/, valid/) is missing, the two have different classes, a name is not UTF-8,
            links lead nowhere, or there are no images, in all or in a class of the training set.
    """
    train = root / TRAIN_FOLDER
    test = find_test_folder(root)
    if test is None:
        wanted = " or ".join(TEST_FOLDERS) if train.is_dir() else TRAIN_FOLDER
        raise HarnessError(f"has no folder {wanted}", where=str(root), hint="The layout is train/CLASS/IMAGE.png.")
    classes = class_names(train)
    if not classes:
        raise HarnessError("has no class folders", where=str(train), hint="The layout is train/CLASS/IMAGE.png.")
    errors = list(_wrong_classes(train, classes, test, class_names(test)))
    walk = _Walk()
    walk.around(root, "next to train and test", wanted={train.name, test.name})
    listing = FolderListing(root, classes, walk.split(train, classes), walk.split(test, classes), walk.left_out)
    errors += walk.dangling[:_NAMED]
    if len(walk.dangling) > _NAMED:
        more = f"and {len(walk.dangling) - _NAMED:,} more links that lead nowhere"
        errors.append(HarnessError(more, where=str(root), hint="`find -L . -type l` lists all of them."))
    if errors:
        raise errors[0] if len(errors) == 1 else ManyErrors(str(root), errors)
    return _not_empty(listing, train, test)


def _wrong_classes(
    train: Path, classes: tuple[str, ...], test: Path, test_classes: tuple[str, ...]
) -> Iterator[HarnessError]:
    for name in classes:
        if not name.isprintable():  # as what is not UTF-8 is not either
            shown = repr(os.fsencode(name))[2:-1]
            hint = "Class names are printed and written to files: rename it, for example by convmv."
            yield HarnessError(f'the class name "{shown}" is not printable UTF-8', where=str(train), hint=hint)
    for name in sorted(set(test_classes) - set(classes)):
        yield HarnessError(
            f'the class "{name}" has no folder in {train}',
            where=str(test / name),
            hint=nearest(name, classes),
        )
    for name in sorted(set(classes) - set(test_classes)):
        yield HarnessError(
            f'has no folder for the class "{name}"',
            where=str(test),
            hint="Make an empty one where there really are no test images of that class.",
        )


def _not_empty(listing: FolderListing, train: Path, test: Path) -> FolderListing:
    if not listing.test:
        raise HarnessError(
            "holds no images",
            where=str(test),
            hint=f"Put images in its class folders, for example {test.name}/{listing.classes[0]}/IMAGE.png.",
        )
    filled = {label for _, label in listing.train}
    for label, name in enumerate(listing.classes):
        if label not in filled:
            raise HarnessError(
                "holds no images",
                where=str(train / name),
                hint=f"Put images there, or remove this folder and {test / name}",
            )
    return listing


class _Walk:
    """Walks class folders: finds images, counts what else there is, remembers links that lead nowhere."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.dangling: list[HarnessError] = []
        Image.init()
        kinds = Image.OPEN.keys() - _NO_PICTURES
        self._suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}

    def split(self, folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Path, int], ...]:
        """The images of a split with their class indices, sorted."""
        self.around(folder, "next to the class folders", wanted=set(class_names(folder)))
        return tuple(
            (path, label)
            for label, name in enumerate(classes)
            if (folder / name).is_dir()
            for path in sorted(self._images(folder / name, seen={os.path.realpath(folder)}))
        )

    def around(self, folder: Path, kind: str, wanted: set[str]) -> None:
        """Count what lies in a folder next to the wanted ones."""
        for entry in os.scandir(folder):
            if _is_hidden(entry.name):
                self.left_out["hidden"] += 1
            elif entry.name not in wanted:
                self._other(entry, kind)

    def _images(self, folder: Path, seen: set[str]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen:  # followed again, links among folders would go round, or multiply their images
            self.left_out["link to a folder that was there before"] += 1
            return
        seen.add(real)
        for entry in os.scandir(folder):
            suffix = os.path.splitext(entry.name)[1].lower()
            is_file = os.path.isfile(entry.path)  # False, too, for links that go round
            if _is_hidden(entry.name):
                self.left_out["hidden"] += 1
            elif os.path.isdir(entry.path):
                yield from self._images(folder / entry.name, seen)
            elif suffix not in self._suffixes or not is_file:
                self._other(entry, suffix or "without a suffix" if is_file else "no regular file")
            else:
                yield folder / entry.name

    def _other(self, entry: os.DirEntry[str], kind: str) -> None:
        if entry.is_symlink() and not os.path.exists(entry.path):
            where, target = entry.path, os.readlink(entry.path)
            hint = "Fetch what it stands for (`dvc pull`, `git annex get`), or remove it."
            self.dangling.append(HarnessError(f"is a link to {target}, which is not there", where=where, hint=hint))
        else:
            self.left_out[kind] += 1


def _is_hidden(name: str) -> bool:
    """Hidden, or what file managers leave: they are no images whatever their names say."""
    return name[0] == "." or name == "__MACOSX" or name.lower() in ("thumbs.db", "desktop.ini")


def read_folders(
    listing: FolderListing, *, image_size_px: int, required_size_px: tuple[int, int] | None = None
) -> ImageSets:
    """Decode all images; those of another size are resized and cropped (`harness.data.images.fit`).

    Raises:
        HarnessError: names all files that are no images, or have not the required (width, height).
    """
    files = listing.files
    images_BHWC, problems = read_images(
        files,
        image_size_px=image_size_px,
        where=lambda index: str(files[index]),
        required_size_px=required_size_px,
    )
    raise_all(problems)
    labels_B = np.array([label for _, label in (*listing.train, *listing.test)], dtype=np.int64)
    count = len(listing.train)
    return ImageSets(
        LabelledImages(images_BHWC[:count], labels_B[:count]),
        LabelledImages(images_BHWC[count:], labels_B[count:]),
        listing.classes,
    )
