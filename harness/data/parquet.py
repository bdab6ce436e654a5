"""Images in Parquet files, in the layout of Hugging Face copies.

`train-*.parquet` and `test-*.parquet` (or `validation-`, `valid-`, `val-`), each row an image and a label. One column
(`img` or `image`, or as said) holds {bytes, path} or plain bytes of an encoded image, one (`label`, or as said) a whole
number.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data.images import image_size, raise_all, read_images
from harness.data.imagesets import ImageSets, LabelledImages
from harness.errors import HarnessError, closest

SPLITS = ("train", "test")
_NAMED = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # how files call a split
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"


class Columns(NamedTuple):
    """Names of the columns; None finds the usual one."""

    image_column: str | None = None
    label_column: str | None = None

    def found_in(self, names: list[str], path: Path) -> tuple[str, str]:
        """The image and the label column of a file with these columns.

        Raises:
            HarnessError: one is not there, or none was said and several might be meant.
        """
        return (
            self._find("image_column", self.image_column, IMAGE_COLUMNS, names, path),
            self._find("label_column", self.label_column, (LABEL_COLUMN,), names, path),
        )

    def _find(self, key: str, given: str | None, usual: tuple[str, ...], names: list[str], path: Path) -> str:
        wanted = (given,) if given else usual
        found = [name for name in wanted if name in names]
        if len(found) == 1:
            return found[0]
        what = f"has no column {' or '.join(wanted)}" if not found else f"has the columns {' and '.join(found)}"
        others = [name for name in names if given or name not in (*IMAGE_COLUMNS, LABEL_COLUMN)]
        likely = closest(wanted[0], others) or next((name for name in others if usual[-1] in name), "NAME")
        hint = f"Its columns are {', '.join(names)}: set data.{key}, for example data.{key}={likely}."
        raise HarnessError(what, where=str(path), hint=hint)


_SUBFOLDERS = (".", "plain_text", "data")  # where Hugging Face repositories keep the files
_BROKEN_HINT = "Fetch the file again; one of a few hundred bytes is a Git LFS pointer and not the data"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def find_parquet(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split, sorted by name, in `folder` or below it where Hugging Face puts them.

    None where there is not one file of each split.
    """
    for subfolder in _SUBFOLDERS:
        found = [
            (split, sorted((folder / subfolder).glob(f"{name}-*.parquet")))
            for split in SPLITS
            for name in _NAMED[split]
        ]
        files = {split: paths for split, paths in reversed(found) if paths}  # the first name wins
        if len(files) == len(SPLITS):
            return {split: files[split] for split in SPLITS}
    return None


def count_rows(files: list[Path]) -> int:
    """Rows in all files together, from their footers.

    Raises:
        HarnessError: a file is no readable Parquet file.
    """
    return sum(_open(path).metadata.num_rows for path in files)


def read_parquet(
    files: dict[str, list[Path]],
    *,
    image_size_px: int,
    columns: Columns = Columns(),  # noqa: B008 - immutable
    required_size_px: tuple[int, int] | None = None,
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
    rows = {split: _read_columns(paths, columns) for split, paths in files.items()}
    classes = _class_names(files["train"][0], columns) or _numbered_classes(rows["train"])
    for split in SPLITS:
        for path, _, labels_B in rows[split]:
            wrong = np.flatnonzero((labels_B < 0) | (labels_B >= len(classes)))
            if len(wrong):
                raise HarnessError(
                    f"the label {labels_B[wrong[0]]} is out of range: there are {len(classes)} classes",
                    where=_row(path, int(wrong[0])),
                    hint=f"Labels run from 0 to {len(classes) - 1}; mend the label or the class names in the schema.",
                )
    size_px = required_size_px or _first_size_px(rows["train"])
    sets: list[LabelledImages] = []
    problems: list[HarnessError] = []
    for split in SPLITS:
        parts = []
        for path, encoded, _ in rows[split]:
            part_BHWC, unreadable = read_images(
                encoded,
                image_size_px=image_size_px,
                where=lambda row, path=path: _row(path, row),  # type: ignore[misc]
                required_size_px=size_px,
            )
            parts.append(part_BHWC)
            problems += unreadable
            encoded.clear()  # the encoded images of one file go as the decoded ones come
        labels_B = np.concatenate([part_B for _, _, part_B in rows[split]])
        sets.append(LabelledImages(np.concatenate(parts), labels_B))
    raise_all(problems)
    return ImageSets(sets[0], sets[1], classes)


def _first_size_px(parts: list[tuple[Path, list[bytes], np.ndarray]]) -> tuple[int, int] | None:
    """(width, height) of the first image that can be read; None where none can, which reading them will tell."""
    for _, encoded, _ in parts:
        for image in encoded:
            with contextlib.suppress(HarnessError):
                return image_size(image)
    return None


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


def _read_columns(paths: list[Path], columns: Columns) -> list[tuple[Path, list[bytes], np.ndarray]]:
    """(file, encoded images, int64 labels) of each file of a split."""
    rows = [(path, *_read_file(path, columns)) for path in paths]
    if not any(len(labels_B) for _, _, labels_B in rows):
        raise HarnessError(
            "holds no images",
            where=", ".join(str(path) for path in paths),
            hint="Fetch the files again, or give files that have rows.",
        )
    return rows


def _read_file(path: Path, columns: Columns) -> tuple[list[bytes], np.ndarray]:
    import pyarrow
    import pyarrow.types

    file = _open(path)
    image_column, label_column = columns.found_in(file.schema_arrow.names, path)
    try:
        table = file.read(columns=[image_column, label_column], use_threads=False)
        images, labels = table[image_column].combine_chunks(), table[label_column].combine_chunks()
        if pyarrow.types.is_struct(images.type):
            fields = [field.name for field in images.type]
            if "bytes" not in fields:
                raise HarnessError(
                    f"the column {image_column} has the fields {', '.join(fields)}, and no bytes",
                    where=str(path),
                    hint="Store each image as {bytes, path}, or as the bytes of a PNG or JPEG file.",
                )
            images = images.field("bytes")
        if pyarrow.types.is_dictionary(images.type):
            images = images.dictionary_decode()
        if not pyarrow.types.is_binary(images.type) and not pyarrow.types.is_large_binary(images.type):
            raise HarnessError(
                f"the column {image_column} holds {images.type}, not image bytes",
                where=str(path),
                hint="Store each image as the bytes of a PNG or JPEG file, or as {bytes, path}.",
            )
        if not pyarrow.types.is_integer(labels.type):
            raise HarnessError(
                f"the column {label_column} holds {labels.type}, not whole numbers",
                where=str(path),
                hint="Number the classes from 0 and store these numbers.",
            )
        for name, column in ((image_column, images), (label_column, labels)):
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise HarnessError(
                    f"the column {name} is empty",
                    where=_row(path, row),
                    hint="Fill it in or remove the row; of an image its bytes are needed, not only its path.",
                )
        return images.to_pylist(), labels.to_numpy(zero_copy_only=False).astype(np.int64)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise HarnessError(f"not a readable Parquet file ({error})", where=str(path), hint=_BROKEN_HINT) from error


def _class_names(path: Path, columns: Columns) -> tuple[str, ...] | None:
    """Class names that Hugging Face's `datasets` wrote into the schema, where it did."""
    metadata = _open(path).schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][columns.label_column or LABEL_COLUMN]["names"]
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
