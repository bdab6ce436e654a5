"""Where images come from: find the input of a source, and read it whole.

`locate` is cheap: it finds the input files (or downloads them) and lists them, so that a converted copy can be
recognised without reading them again. `Located.load` reads and checks everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from harness.data import cifar10, embedded, folders, parquet
from harness.data.imagesets import ImageSets, Located
from harness.data.paths import DATA_VARIABLE, data_directories
from harness.errors import HarnessError, nearest
from harness.files import expand

SOURCES = ("cifar10", "parquet", "imagefolder", "digits", "synthetic")


def locate(
    source: str,
    *,
    path: str | Path | None = None,
    image_size_px: int = 32,
    image_column: str | None = None,
    label_column: str | None = None,
    synthetic: Mapping[str, int] | None = None,
    download: bool = True,
) -> Located:
    """Find the input of a source.

    Args:
        source: one of `SOURCES`.
        path: the folder of parquet and imagefolder; of cifar10 the folder or archive, where it is not to be
            looked for. A relative one is looked for here, then in each folder of `$HARNESS_DATA`.
        image_size_px: side of the square images that `load` returns; others are resized and cropped.
        image_column, label_column: of parquet; None finds img or image, and label.
        synthetic: train_images, test_images, num_classes and seed of synthetic; other sources ignore it.
        download: whether cifar10 may be downloaded to `$HARNESS_CACHE` where it is not found.

    Raises:
        HarnessError: an unknown source, a wrong option, or no input, with the places looked in.
    """
    if source not in SOURCES:
        raise HarnessError(f'unknown data source "{source}"', hint=nearest(source, SOURCES))
    if isinstance(image_size_px, bool) or not isinstance(image_size_px, int) or image_size_px < 1:
        raise HarnessError(
            f"image_size_px must be a whole number from 1, not {image_size_px!r}",
            hint="Set data.image_size_px, for example to 32.",
        )
    if source in ("digits", "synthetic"):
        if path is not None:
            raise HarnessError(f"the source {source} reads no files", hint="Leave the path out.")
        return _embedded(source, image_size_px, synthetic)
    try:
        resolved = None if path is None else _resolve(path)
        if source == "cifar10":
            return cifar10.locate_cifar10(resolved, image_size_px=image_size_px, download=download)
        if resolved is None:
            raise HarnessError(f"the source {source} needs a path", hint="data.path: /folder/of/the/images")
        if source == "parquet":
            return _parquet(resolved, image_size_px, parquet.Columns(image_column, label_column))
        return _imagefolder(resolved, image_size_px)
    except OSError as error:
        where = str(error.filename) if error.filename else None
        raise HarnessError(
            f"cannot be read: {error.strerror or error}",
            where=where,
            hint="See that it is there and that you may read it.",
        ) from error


def _resolve(path: str | Path) -> Path:
    given = Path(expand(str(path), where="data.path"))
    candidates = [given.absolute()]
    if not given.is_absolute():
        candidates += [directory / given for directory in data_directories()]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        looked = "" if given.is_absolute() else f" (looked for {', '.join(map(str, candidates))})"
        raise HarnessError(
            f"there is no such file or folder{looked}",
            where=str(path),
            hint=f"Mend data.path; a relative one is looked for here and in each folder of {DATA_VARIABLE}",
        )
    return found.resolve()


def _embedded(source: str, image_size_px: int, synthetic: Mapping[str, int] | None) -> Located:
    if source == "digits":
        origin = "scikit-learn's handwritten digits (load_digits)"
        return Located(source, origin, lambda: embedded.digits(image_size_px=image_size_px))
    options = embedded.check_synthetic(synthetic)

    def load() -> ImageSets:
        return embedded.synthetic(**options, image_size_px=image_size_px)

    return Located(source, f"synthetic patterns, seed {options['seed']}", load, options=options)


def _parquet(folder: Path, image_size_px: int, columns: parquet.Columns) -> Located:
    files = parquet.find_parquet(folder) if folder.is_dir() else None
    if files is None:
        raise HarnessError(
            "holds no files train-*.parquet and test-*.parquet",
            where=str(folder),
            hint="Give the folder that they lie in.",
        )

    def load() -> ImageSets:
        sets = parquet.read_parquet(files, image_size_px=image_size_px, columns=columns)
        named = cifar10.is_cifar10_name(folder.name) and sets.classes == cifar10.NUMBERED_CLASSES
        return dataclasses.replace(sets, classes=cifar10.CIFAR10_CLASSES) if named else sets

    options = {name: value for name, value in columns._asdict().items() if value is not None}
    inputs = (*files["train"], *files["test"])
    others = sorted(file.name for file in inputs[0].parent.glob("*.parquet") if file not in inputs)
    left_out = f"Parquet files of other splits: {', '.join(others)}" if others else ""
    origin = f"Parquet files in {folder}"
    return Located("parquet", origin, load, files=inputs, options=options, left_out=left_out)


def _imagefolder(root: Path, image_size_px: int) -> Located:
    listing = folders.list_images(root)

    def load() -> ImageSets:
        return folders.read_folders(listing, image_size_px=image_size_px)

    left_out = folders.in_words(listing.left_out)
    return Located("imagefolder", f"image folder {root}", load, files=listing.files, left_out=left_out)
