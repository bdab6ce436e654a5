"""Where a data set of the user's own comes from: class folders, Parquet files, or nowhere (digits, synthetic)."""

from __future__ import annotations

import colorsys
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data.images import ImageSet, Located, raise_all, read_images, resize_images
from harness.data.order import hash64, uniform_below
from harness.errors import HarnessError, closest, nearest

TEST_FOLDERS = ("test", "val", "valid")  # as a folder of images calls the split
_NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows by name and cannot decode
_PARQUET_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # as files call a split
_PARQUET_FOLDERS = (".", "plain_text", "data")  # where Hugging Face repositories keep the files
_PARQUET_HINT = "Fetch the file again; one of a few hundred bytes is a Git LFS pointer and not the data"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.parquet")
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label",)
_DIGITS_SEED = 20  # of the split; a new number would be a new data set
_TEST_SHARE = 5  # every fifth image
_NOISE = 48  # peak to peak, of 255
_CHUNK = 512


# --- folders of classes: train/CLASS/*.png next to test/, val/ or valid/ in the same form


def find_test_folder(root: Path) -> Path | None:
    """The folder with the test images of an image folder, None where `root` is no image folder."""
    found = (root / name for name in TEST_FOLDERS if (root / name).is_dir())
    return next(found, None) if (root / "train").is_dir() else None


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, sorted by code point; hidden ones and macOS's are passed over."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def locate_class_folders(root: Path, *, required_size_px: int | None = None) -> Located:
    """Every image below the class folders, through links too; what else lies there is counted.

    An image is what has a suffix of Pillow's formats, in any case. torchvision's ImageFolder knows nine of them, and
    names neither what it leaves out nor links that lead nowhere.

    Raises:
        HarnessError: a split is missing, the two have different classes, a name is not UTF-8, links lead nowhere, or
            there are no images, in all or in a class of the training set.
    """
    train, test, layout = root / "train", find_test_folder(root), "The layout is train/CLASS/IMAGE.png."
    if test is None:
        wanted = " or ".join(TEST_FOLDERS) if train.is_dir() else "train"
        raise HarnessError(f"has no folder {wanted}", where=str(root), hint=layout)
    classes = class_names(train)
    if not classes:
        raise HarnessError("has no class folders", where=str(train), hint=layout)
    walk = _Walk()
    walk.count_others(root, "next to train and test", wanted=[train.name, test.name])
    train_samples, test_samples = walk.samples(train, classes), walk.samples(test, classes)
    raise_all(f"problems in {root}", [*_wrong_classes(train, classes, test, class_names(test)), *walk.dangling])
    if not test_samples:
        hint = f"Put images in its class folders, for example {test.name}/{classes[0]}/IMAGE.png."
        raise HarnessError("holds no images", where=str(test), hint=hint)
    for name in sorted(set(classes) - {classes[label] for _, label in train_samples}):
        hint = f"Put images there, or remove this folder and {test / name}"
        raise HarnessError("holds no images", where=str(train / name), hint=hint)
    files, labels = zip(*train_samples, *test_samples, strict=True)

    def load(image_size_px: int) -> ImageSet:
        images_BHWC = read_images(files, image_size_px, lambda index: str(files[index]), required_size_px)
        return ImageSet(images_BHWC, np.array(labels, np.int64), len(train_samples), tuple(classes))

    kinds = ", ".join(f"{number:,} {kind}" for kind, number in walk.left_out.most_common())
    left_out = f"{walk.left_out.total():,} files or folders: {kinds}" if kinds else ""
    return Located("imagefolder", f"image folder {root}", load, files, left_out=left_out)


def _wrong_classes(train: Path, classes: list[str], test: Path, test_classes: list[str]) -> Iterator[HarnessError]:
    for name in classes:
        if not name.isprintable():  # as what is not UTF-8 is not either
            shown = repr(os.fsencode(name))[2:-1]
            hint = "Class names are printed and written to files: rename it, for example by convmv."
            yield HarnessError(f'the class name "{shown}" is not printable UTF-8', where=str(train), hint=hint)
    for name in sorted(set(test_classes) - set(classes)):
        what = f'the class "{name}" has no folder in {train}'
        yield HarnessError(what, where=str(test / name), hint=nearest(name, classes))
    for name in sorted(set(classes) - set(test_classes)):
        hint = "Make an empty one where there really are no test images of that class."
        yield HarnessError(f'has no folder for the class "{name}"', where=str(test), hint=hint)


class _Walk:
    """Walks class folders: finds images, counts what else there is, collects links that lead nowhere."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.dangling: list[HarnessError] = []
        Image.init()
        kinds = Image.OPEN.keys() - _NO_PICTURES
        self._suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds}

    def samples(self, folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
        """The images of a split with their class indices, sorted."""
        there = class_names(folder)
        self.count_others(folder, "next to the class folders", wanted=there)
        return [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted(self._images(folder / name, {os.path.realpath(folder)}) if name in there else ())
        ]

    def count_others(self, folder: Path, kind: str, wanted: list[str]) -> None:
        """Count what lies in a folder next to the wanted ones."""
        for entry in os.scandir(folder):
            if entry.name not in wanted:
                self._leave_out(entry, kind)

    def _images(self, folder: Path, seen: set[str]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen:  # followed again, links among folders would go round, or multiply their images
            self.left_out["link to a folder that was there before"] += 1
            return
        seen.add(real)
        for entry in os.scandir(folder):
            suffix = os.path.splitext(entry.name)[1].lower()
            is_file = os.path.isfile(entry.path)  # False, too, for links that go round
            if os.path.isdir(entry.path) and not _is_hidden(entry.name):
                yield from self._images(folder / entry.name, seen)
            elif suffix in self._suffixes and is_file and not _is_hidden(entry.name):
                yield folder / entry.name
            else:
                self._leave_out(entry, suffix or "without a suffix" if is_file else "no regular file")

    def _leave_out(self, entry: os.DirEntry[str], kind: str) -> None:
        if _is_hidden(entry.name):
            self.left_out["hidden"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            hint = "Fetch what it stands for (`dvc pull`, `git annex get`), or remove it; `find -L . -type l` lists all"
            what = f"is a link to {os.readlink(entry.path)}, which is not there"
            self.dangling.append(HarnessError(what, where=entry.path, hint=hint))
        else:
            self.left_out[kind] += 1


def _is_hidden(name: str) -> bool:
    """Hidden, or what file managers leave: they are no images whatever their names say."""
    return name[0] == "." or name == "__MACOSX" or name.lower() in ("thumbs.db", "desktop.ini")


# --- Parquet files in the layout of Hugging Face copies: a row has an encoded image and a label


def find_parquet(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split, sorted by name, in `folder` or where Hugging Face puts them; None where one has none."""
    for subfolder in _PARQUET_FOLDERS:
        files: dict[str, list[Path]] = {}
        for split, names in _PARQUET_NAMES.items():
            found = (sorted((folder / subfolder).glob(f"{name}-*.parquet")) for name in names)
            files[split] = next((paths for paths in found if paths), [])  # the first name wins
        if all(files.values()):
            return files
    return None


def count_rows(files: dict[str, list[Path]]) -> dict[str, int]:
    """Rows of each split, from the files' footers; 0 where one is no readable Parquet file."""
    try:
        return {split: sum(_open(path).metadata.num_rows for path in paths) for split, paths in files.items()}
    except HarnessError:
        return dict.fromkeys(files, 0)


def locate_parquet(
    folder: Path,
    files: dict[str, list[Path]],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    required_size_px: int | None = None,
) -> Located:
    """The images in these files, in their order; `load` names file and row of what is wrong.

    A column (img, image or as named) holds {bytes, path} or bytes of encoded images, one (label) whole numbers.
    """

    def load(image_size_px: int) -> ImageSet:
        encoded: list[bytes] = []
        places: list[str] = []
        labels: dict[str, np.ndarray] = {}
        for split, paths in files.items():
            _check_shards(paths)
            shards = [_read_shard(path, image_column, label_column) for path in paths]
            labels[split] = np.concatenate([labels_B for _, labels_B in shards])
            if not len(labels[split]):
                hint = "Fetch the files again, or give files that have rows."
                raise HarnessError("holds no images", where=", ".join(map(str, paths)), hint=hint)
            for path, (images, _) in zip(paths, shards, strict=True):
                encoded += images
                places += [f"{path}, row {row}" for row in range(len(images))]
        labels_B = np.concatenate([labels["train"], labels["test"]])
        classes = _classes(files["train"][0], label_column, labels_B, places, len(labels["train"]))
        images_BHWC = read_images(encoded, image_size_px, places.__getitem__, required_size_px)
        return ImageSet(images_BHWC, labels_B, len(labels["train"]), tuple(classes))

    columns = {"image_column": image_column, "label_column": label_column}
    options = {key: name for key, name in columns.items() if name is not None}
    inputs = (*files["train"], *files["test"])
    others = sorted(file.name for file in inputs[0].parent.glob("*.parquet") if file not in inputs)
    left_out = f"Parquet files of other splits: {', '.join(others)}" if others else ""
    return Located("parquet", f"Parquet files in {folder}", load, inputs, options, left_out)


def _check_shards(paths: list[Path]) -> None:
    """Of files numbered -00000-of-00003 every one must be there."""
    match = next(filter(None, (_SHARD.fullmatch(path.name) for path in paths)), None)
    if match is None:
        return
    stem, digits, total = match.groups()
    expected = [f"{stem}-{number:0{len(digits)}}-of-{total}.parquet" for number in range(int(total))]
    names = [path.name for path in paths]
    where = str(paths[0].parent)
    if set(names) - set(expected):
        hint = "Keep one set of numbered files in the folder."
        raise HarnessError(f"files of different sets lie together: {', '.join(names)}", where=where, hint=hint)
    missing = [name for name in expected if name not in names]
    if missing:
        hint = "Fetch that file too, or all of them again."
        raise HarnessError(f"the file {missing[0]} is missing", where=where, hint=hint)


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise HarnessError(f"not a readable Parquet file ({error})", where=str(path), hint=_PARQUET_HINT) from error


def _read_shard(path: Path, image_column: str | None, label_column: str | None) -> tuple[list[bytes], np.ndarray]:
    """The encoded images and int64 labels of one file."""
    import pyarrow
    from pyarrow import compute, types

    file = _open(path)
    names = file.schema_arrow.names
    image_column = _column("image_column", image_column, _IMAGE_COLUMNS, names, path)
    label_column = _column("label_column", label_column, _LABEL_COLUMNS, names, path)
    try:
        table = file.read(columns=[image_column, label_column], use_threads=False)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise HarnessError(f"not a readable Parquet file ({error})", where=str(path), hint=_PARQUET_HINT) from error
    images, labels = table[image_column], table[label_column]
    if types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = compute.struct_field(images, "bytes")
    if types.is_dictionary(images.type):
        images = images.cast(images.type.value_type)
    if not types.is_binary(images.type) and not types.is_large_binary(images.type):
        hint = "Store each image as the bytes of a PNG or JPEG file, or as {bytes, path}."
        what = f"the column {image_column} holds {images.type}, not image bytes"
        raise HarnessError(what, where=str(path), hint=hint)
    if not types.is_integer(labels.type):
        what = f"the column {label_column} holds {labels.type}, not whole numbers"
        raise HarnessError(what, where=str(path), hint="Number the classes from 0 and store these numbers.")
    for name, column in ((image_column, images), (label_column, labels)):
        if column.null_count:
            where = f"{path}, row {column.is_null().to_pylist().index(True)}"
            hint = "Fill it in or remove the row; of an image its bytes are needed, not only its path."
            raise HarnessError(f"the column {name} is empty", where=where, hint=hint)
    return images.to_pylist(), labels.to_numpy().astype(np.int64)


def _column(key: str, given: str | None, usual: tuple[str, ...], names: list[str], path: Path) -> str:
    """The column's name, as given or the one usual name that is there."""
    wanted = (given,) if given else usual
    found = [name for name in wanted if name in names]
    if len(found) == 1:
        return found[0]
    what = f"has no column {' or '.join(wanted)}" if not found else f"has the columns {' and '.join(found)}"
    others = [name for name in names if given or name not in (*_IMAGE_COLUMNS, *_LABEL_COLUMNS)]
    likely = closest(wanted[0], others) or next((name for name in others if usual[-1] in name), "NAME")
    hint = f"Its columns are {', '.join(names)}: set data.{key}, for example data.{key}={likely}."
    raise HarnessError(what, where=str(path), hint=hint)


def _classes(path: Path, label_column: str | None, labels_B: np.ndarray, places: list[str], count: int) -> list[str]:
    """The names that Hugging Face's `datasets` wrote into the schema, else numbers; the first `count` must have all."""
    try:
        features = json.loads(_open(path).schema_arrow.metadata[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label_column or _LABEL_COLUMNS[0]]["names"]]
        hint = f"Labels run from 0 to {len(names) - 1}; correct the label or the class names in the schema."
    except (KeyError, TypeError, ValueError):
        present = np.unique(labels_B[:count][labels_B[:count] >= 0])
        names = [str(label) for label in present[present == np.arange(len(present))]]
        hint = f"Number the classes from 0 without gaps; no training image has the label {len(names)}."
    wrong = np.flatnonzero((labels_B < 0) | (labels_B >= len(names)))
    if len(wrong):
        what = f"the label {labels_B[wrong[0]]} is out of range: there are {len(names)} classes"
        raise HarnessError(what, where=places[wrong[0]], hint=hint)
    return names


# --- without files: made with whole numbers and a stateless hash, the same on every machine


def digits(image_size_px: int) -> ImageSet:
    """1,797 handwritten digits, real: 8×8 pixels of 17 grey levels, enlarged (bilinear) and repeated as RGB.

    The split is stratified and fixed: of each digit, the fifth with the smallest hash of (seed, digit, index) is for
    testing. 1,438 train, 359 test.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI machine learning
    repository (1998), the test part, as scikit-learn's `load_digits` holds it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey_BHW = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels_B = bunch.target.astype(np.int64)
    images_BHWC = resize_images(np.repeat(grey_BHW[..., None], 3, axis=3), image_size_px)
    is_test_B = np.zeros(len(labels_B), dtype=bool)
    for digit in range(10):
        ids = np.flatnonzero(labels_B == digit)
        ids = ids[np.argsort(hash64(_DIGITS_SEED, digit, ids), kind="stable")]
        is_test_B[ids[: (2 * len(ids) + _TEST_SHARE) // (2 * _TEST_SHARE)]] = True
    order_B = np.argsort(is_test_B, kind="stable")  # the training images first
    return ImageSet(images_BHWC[order_B], labels_B[order_B], int((~is_test_B).sum()), tuple("0123456789"))


def synthetic(
    image_size_px: int, *, train_images: int = 512, test_images: int = 256, num_classes: int = 10, seed: int = 0
) -> ImageSet:
    """Coloured waves with noise: colour, direction and frequency tell the class, the phase is random.

    Image i has the class i modulo num_classes. A pure function of its arguments, in whole numbers.
    """
    how = {"image_size_px": image_size_px, "num_classes": num_classes, "seed": seed}
    parts = [_waves(count, split=split, **how) for split, count in enumerate((train_images, test_images))]
    images_BHWC, labels_B = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ImageSet(images_BHWC, labels_B, train_images, tuple(str(label) for label in range(num_classes)))


def _waves(count: int, *, split: int, image_size_px: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels_B = np.arange(count, dtype=np.int64) % num_classes
    # Hues a golden section apart differ for neighbouring classes, however many there are.
    hues = [label * 0.6180339887498949 % 1.0 for label in range(num_classes)]
    colours = np.array([[round(224 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 1.0)] for hue in hues])
    images_BHWC = np.empty((count, image_size_px, image_size_px, 3), dtype=np.uint8)
    y_HW, x_HW = np.mgrid[:image_size_px, :image_size_px]
    pixels = np.arange(image_size_px * image_size_px * 3).reshape(1, image_size_px, image_size_px, 3)
    for start in range(0, count, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count))
        label_B11 = labels_B[ids].reshape(-1, 1, 1)
        phase_B11 = uniform_below(256, hash64(seed, split, ids)).reshape(-1, 1, 1)
        # Cycles across the image along y and x; the phase runs from 0 to 255, and so does a cycle.
        cycles_y, cycles_x = 1 + label_B11 % 3, label_B11 // 3 % 4
        phase_BHW = (256 * (cycles_y * y_HW + cycles_x * x_HW) // image_size_px + phase_B11) % 256
        wave_BHW = np.abs(phase_BHW - 128)  # a triangle from 128 down to 0 and up again
        hashes_BHWC = hash64(seed, split, ids.reshape(-1, 1, 1, 1), pixels)
        noise_BHWC = uniform_below(_NOISE, hashes_BHWC) - _NOISE // 2
        base_BHWC = (64 + wave_BHW[..., None]) * colours[labels_B[ids]].reshape(-1, 1, 1, 3) // 192
        images_BHWC[ids] = np.clip(base_BHWC + 16 + noise_BHWC, 0, 255)
    return images_BHWC, labels_B
