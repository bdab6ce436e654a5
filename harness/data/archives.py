"""CIFAR-10 in the forms its makers publish (https://www.cs.toronto.edu/~kriz/cifar.html), and its download.

Binary: six files of 10,000 records, each one label byte and 3,072 pixel bytes (3 channels × 32 × 32).
Python: six pickles of a dictionary with the same bytes. A pickle is a program, and none is ever run here: the
files must have their published MD5, and even then only the listing of their opcodes is read
(`pickletools.genops`, which executes nothing), and the pixel string and the labels are taken from it.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import hashlib
import http.client
import pickletools
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from harness.data.imagesets import LabelledImages
from harness.errors import HarnessError
from harness.files import hex_digest, replacing

DOWNLOAD_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_ARCHIVE, BINARY_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
PYTHON_ARCHIVE, PYTHON_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
ARCHIVE_MD5 = {  # as published on the data set's page
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
}
PYTHON_BATCH_MD5 = {  # as in torchvision.datasets.CIFAR10
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BATCHES = {  # the files of an extracted folder, the test set last
    BINARY_FOLDER: tuple(f"{name}.bin" for name in PYTHON_BATCH_MD5),
    PYTHON_FOLDER: tuple(PYTHON_BATCH_MD5),
}

# Opcodes by which a pickle names what it wants called, and the names in a true batch.
_NAMING_OPCODES = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
_KNOWN_GLOBALS = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")
_PER_BATCH = 10_000
_PIXELS = 3 * 32 * 32
_TIMEOUT_SECONDS = 30
_BROKEN_HINT = "Remove it, so that it is looked for elsewhere or downloaded again"
_DOWNLOAD_HINT = "Check the network and run it again"


def read_cifar10_folder(folder: Path) -> list[LabelledImages]:
    """The six batches of an extracted `cifar-10-batches-bin` or `cifar-10-batches-py`.

    Returns:
        five batches for training and one for testing, each of 10,000 images of 32×32.

    Raises:
        HarnessError: a file is missing, has the wrong length or MD5, or a label above 9.
    """

    def read(name: str) -> tuple[str, bytes]:
        path = folder / name
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise HarnessError(
                f"cannot be read: {error.strerror or error}", where=str(path), hint=_BROKEN_HINT
            ) from error

    return _read_batches(read, python=folder.name == PYTHON_FOLDER)


def read_cifar10_archive(path: Path) -> list[LabelledImages]:
    """As `read_cifar10_folder`, from one of the two archives; nothing is extracted to disk.

    Raises:
        HarnessError: the archive has not the published MD5, or as `read_cifar10_folder`.
    """
    expected = ARCHIVE_MD5[path.name]
    try:
        found = hex_digest(path, "md5")
        if found != expected:
            raise HarnessError(
                f"damaged: its MD5 is {found}, published is {expected}", where=str(path), hint=_BROKEN_HINT
            )
        with tarfile.open(path, "r:gz") as archive:
            python = path.name == PYTHON_ARCHIVE
            folder = PYTHON_FOLDER if python else BINARY_FOLDER

            def read(name: str) -> tuple[str, bytes]:
                member = archive.extractfile(f"{folder}/{name}")
                if member is None:
                    raise KeyError(f"{name} is no file")
                return f"{path}:{name}", member.read()

            return _read_batches(read, python=python)
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise HarnessError(f"cannot be read: {error}", where=str(path), hint=_BROKEN_HINT) from error


def _read_batches(read: Callable[[str], tuple[str, bytes]], *, python: bool) -> list[LabelledImages]:
    batches: list[LabelledImages] = []
    for name in BATCHES[PYTHON_FOLDER if python else BINARY_FOLDER]:
        where, data = read(name)
        if python:
            _check_md5(where, data, PYTHON_BATCH_MD5[name])
            pixels, labels_B = parse_python_batch(data, where)
        else:
            pixels, labels_B = _parse_binary_batch(data, where)
        if labels_B.max() > 9:
            row = int(np.argmax(labels_B > 9))
            raise HarnessError(f"image {row} has the label {labels_B[row]}", where=where, hint=_BROKEN_HINT)
        images_BCHW = pixels.reshape(_PER_BATCH, 3, 32, 32)
        batches.append(LabelledImages(images_BCHW.transpose(0, 2, 3, 1), labels_B))
    return batches


def _check_md5(where: str, data: bytes, expected: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise HarnessError(f"damaged: its MD5 is {found}, published is {expected}", where=where, hint=_BROKEN_HINT)


def _parse_binary_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    wanted = _PER_BATCH * (1 + _PIXELS)
    if len(data) != wanted:
        raise HarnessError(f"{len(data)} bytes long where {wanted} are wanted", where=where, hint=_BROKEN_HINT)
    records = np.frombuffer(data, dtype=np.uint8).reshape(_PER_BATCH, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def parse_python_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of one Python batch, from the listing of its opcodes: nothing in it is executed.

    Returns:
        pixels: uint8 (10000, 3072), the one string of that length in the file.
        labels_B: int64 (10000,), the whole numbers between the key "labels" and the next string.

    Raises:
        HarnessError: the bytes are no pickle or hold other things.
    """
    pixels: bytes | None = None
    labels: list[int] = []
    key: object = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if isinstance(argument, str | bytes) and opcode.name.endswith(("STRING", "BYTES", "UNICODE")):
                text = argument.encode("latin-1") if isinstance(argument, str) else argument
                if len(text) == _PER_BATCH * _PIXELS:
                    pixels = text
                key = text[:16]
            elif opcode.name in _NAMING_OPCODES and argument not in _KNOWN_GLOBALS:
                raise ValueError(f"it names {argument or 'a global'}, as no batch of CIFAR-10 does")
            elif key == b"labels" and opcode.name in ("BININT1", "BININT2", "BININT"):
                labels.append(int(argument))  # type: ignore[arg-type]
    except (ValueError, UnicodeError) as error:
        raise HarnessError(f"not a CIFAR-10 batch ({error})", where=where, hint=_BROKEN_HINT) from error
    if pixels is None or len(labels) != _PER_BATCH or min(labels) < 0:
        raise HarnessError(
            f"not a CIFAR-10 batch: {_PER_BATCH} labels and their pixels are wanted",
            where=where,
            hint=_BROKEN_HINT,
        )
    flat = np.frombuffer(pixels, dtype=np.uint8)
    return flat.reshape(_PER_BATCH, _PIXELS), np.array(labels, dtype=np.int64)


def download(url: str, target: Path, *, md5: str) -> None:
    """Fetch `url` to `target`, which appears only once its MD5 is right; progress on stderr.

    A file lock beside `target` lets one process fetch while others wait and then find the file there.

    Raises:
        HarnessError: no network, an answer other than the file, or a wrong MD5.
    """
    with FileLock(f"{target}.lock"):
        if target.exists() and hex_digest(target, "md5") == md5:
            return
        try:
            answer = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _download_failed(url, error) from error
        with answer, replacing(target) as file:
            found = _copy(answer, file, url)
            if found != md5:
                raise HarnessError(
                    f"the download is damaged: its MD5 is {found}, published is {md5}", where=url, hint=_DOWNLOAD_HINT
                )


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, url: str) -> str:
    """The MD5 of what was copied. A network that fails here must not read as a disk that does."""
    digest = hashlib.md5(usedforsecurity=False)
    length = answer.length or 0
    quiet = not sys.stderr.isatty()  # a bar in a log file is a thousand lines
    if quiet:
        print(f"downloading {url} ({length / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    with tqdm(total=length or None, unit="B", unit_scale=True, desc="CIFAR-10", disable=quiet) as bar:
        while True:
            try:
                chunk = answer.read(1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise _download_failed(url, error) from error
            if not chunk:
                return digest.hexdigest()
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))


def _download_failed(url: str, error: Exception) -> HarnessError:
    return HarnessError(f"the download failed: {error}", where=url, hint=_DOWNLOAD_HINT)
