"""Images in Parquet files, in the layout of Hugging Face copies.

`train-*.parquet` and `test-*.parquet`, each row an image and a label. The column `img` (or `image`) holds
{bytes, path} or plain bytes of an encoded image, the column `label` a whole number.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.images import image_size, read_images
from harness.data.imagesets import ImageSets, LabelledImages
from harness.errors import HarnessError, nearest

SPLITS = ("train", "test")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"
_SUBFOLDERS = (".", "plain_text", "data")  # where Hugging Face repositories keep the files
_BROKEN_HINT = "Fetch the file again; one of a few hundred bytes is a Git LFS pointer and not the data"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def find_parquet(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split, sorted by name, in `folder` or below it where Hugging Face puts them.

    None where there is not one file of each split.
    """
    for subfolder in _SUBFOLDERS:
        files = {split: sorted((folder / subfolder).glob(f"{split}-*.parquet")) for split in SPLITS}
        if all(files.values()):
            return files
    return None


def count_rows(files: list[Path]) -> int:
    """Rows in all files together, from their footers.

    Raises:
        HarnessError: a file is no readable Parquet file.
    """
    return sum(_open(path).metadata.num_rows for path in files)


def read_parquet(
    files: dict[str, list[Path]], *, image_size_px: int, required_size_px: tuple[int, int] | None = None
) -> ImageSets:
    """Read and decode all images; they must have one size, and are resized where it is not `image_size_px`.

    Args:
        required_size_px: the (width, height) the stored images must have; that of the first one by default.

    Returns:
        images in the order of the files and rows. Class names come from the schema where it has them, else
        they are "0", "1", … and every one must occur in the training files.

    Raises:
        HarnessError: names the file, and the row counted from 0, of what is wrong: unreadable or missing
            files, columns, images or labels, labels out of range, images of different sizes, no images.
    """
    for paths in files.values():
        _check_shards(paths)
    columns = {split: _read_columns(paths) for split, paths in files.items()}
    classes = _class_names(files["train"][0]) or _numbered_classes(columns["train"])
    for split in SPLITS:
        for path, _, labels_B in columns[split]:
            wrong = np.flatnonzero((labels_B < 0) | (labels_B >= len(classes)))
            if len(wrong):
                raise HarnessError(
                    f"the label {labels_B[wrong[0]]} is out of range: there are {len(classes)} classes",
                    where=_row(path, int(wrong[0])),
                    hint=f"Labels run from 0 to {len(classes) - 1}; mend the label or the class names in the schema.",
                )
    first_path, first_images, _ = next(column for column in columns["train"] if len(column[1]))
    size_px = required_size_px or image_size(first_images[0], where=_row(first_path, 0))
    sets: list[LabelledImages] = []
    for split in SPLITS:
        parts = []
        for path, encoded, _ in columns[split]:
            part_BHWC = read_images(
                encoded,
                image_size_px=image_size_px,
                where=lambda row, path=path: _row(path, row),  # type: ignore[misc]
                required_size_px=size_px,
            )
            parts.append(part_BHWC)
            encoded.clear()  # the encoded images of one file go as the decoded ones come
        labels_B = np.concatenate([part_B for _, _, part_B in columns[split]])
        sets.append(LabelledImages(np.concatenate(parts), labels_B))
    return ImageSets(sets[0], sets[1], classes)


def _row(path: Path, row: int) -> str:
    return f"{path}, row {row}"


def _check_shards(paths: list[Path]) -> None:
    """Of files numbered -00000-of-00003 every one must be there."""
    numbered = [(path, match) for path in paths if (match := _SHARD.search(path.name))]
    if not numbered:
        return
    totals = {int(match[2]) for _, match in numbered}
    if len(totals) > 1 or len(numbered) != len(paths):
        raise HarnessError(
            "files of different sets lie together: " + ", ".join(path.name for path in paths),
            where=str(paths[0].parent),
            hint="Keep one set of numbered files in the folder.",
        )
    missing = sorted(set(range(totals.pop())) - {int(match[1]) for _, match in numbered})
    if missing:
        path, match = numbered[0]
        name = f"{path.name[: match.start()]}-{missing[0]:0{len(match[1])}}-of-{match[2]}.parquet"
        raise HarnessError(
            f"the file {name} is missing", where=str(path.parent), hint="Fetch that file too, or all of them again."
        )


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise HarnessError(f"not a readable Parquet file ({error})", where=str(path), hint=_BROKEN_HINT) from error


def _read_columns(paths: list[Path]) -> list[tuple[Path, list[bytes], np.ndarray]]:
    """(file, encoded images, int64 labels) of each file of a split."""
    columns = [(path, *_read_file(path)) for path in paths]
    if not any(len(labels_B) for _, _, labels_B in columns):
        raise HarnessError(
            "holds no images",
            where=", ".join(str(path) for path in paths),
            hint="Fetch the files again, or give files that have rows.",
        )
    return columns


def _read_file(path: Path) -> tuple[list[bytes], np.ndarray]:
    import pyarrow
    import pyarrow.types

    file = _open(path)
    names = file.schema_arrow.names
    image_column = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image_column is None:
        raise HarnessError(
            f"has no column {' or '.join(IMAGE_COLUMNS)}",
            where=str(path),
            hint=nearest(IMAGE_COLUMNS[0], names),
        )
    if LABEL_COLUMN not in names:
        raise HarnessError(f"has no column {LABEL_COLUMN}", where=str(path), hint=nearest(LABEL_COLUMN, names))
    try:
        table = file.read(columns=[image_column, LABEL_COLUMN], use_threads=False)
        images, labels = table[image_column].combine_chunks(), table[LABEL_COLUMN].combine_chunks()
        if pyarrow.types.is_struct(images.type):
            images = images.field("bytes")
        if not pyarrow.types.is_binary(images.type) and not pyarrow.types.is_large_binary(images.type):
            raise HarnessError(
                f"the column {image_column} holds {images.type}, not image bytes",
                where=str(path),
                hint="Store each image as the bytes of a PNG or JPEG file, or as {bytes, path}.",
            )
        if not pyarrow.types.is_integer(labels.type):
            raise HarnessError(
                f"the column label holds {labels.type}, not whole numbers",
                where=str(path),
                hint="Number the classes from 0 and store these numbers.",
            )
        for name, column in ((image_column, images), (LABEL_COLUMN, labels)):
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise HarnessError(
                    f"the column {name} is empty", where=_row(path, row), hint="Fill it in or remove the row."
                )
        return images.to_pylist(), labels.to_numpy(zero_copy_only=False).astype(np.int64)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise HarnessError(f"not a readable Parquet file ({error})", where=str(path), hint=_BROKEN_HINT) from error


def _class_names(path: Path) -> tuple[str, ...] | None:
    """Class names that Hugging Face's `datasets` wrote into the schema, where it did."""
    metadata = _open(path).schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _numbered_classes(train: list[tuple[Path, list[bytes], np.ndarray]]) -> tuple[str, ...]:
    present = np.unique(np.concatenate([labels_B for _, _, labels_B in train]))
    present = present[present >= 0]  # a negative one is reported with its row
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        beyond = present[gaps[0]]
        path, rows = next((path, np.flatnonzero(y == beyond)) for path, _, y in train if beyond in y)
        raise HarnessError(
            f"the label {beyond} is out of range: no training image has the label {gaps[0]}",
            where=_row(path, int(rows[0])),
            hint="Number the classes from 0 without gaps.",
        )
    return tuple(str(label) for label in present)
