"""Decode image files to uint8 RGB arrays of one size: the only place where image formats are read.

Training data and the images given to a prediction go through here, so that both are resized alike.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from harness.errors import HarnessError, ManyErrors

_WIDE_MODES = ("I", "F")  # also "I;16", "I;16B" …: Pillow's conversion to RGB clips their values at 255
_CHUNK = 256
_NAMED = 20  # of the images that cannot be read
_NOT_READABLE_HINT = "Replace it or leave it out; PNG, JPEG and all other formats that Pillow knows are read"
# Below this, Pillow spends its time in Python: 2 threads took 1.4 s for 17,000 CIFAR images, one took 0.95 s.
_THREADS_FROM_BYTES = 16 * 1024


def fit(image: Image.Image, image_size_px: int) -> Image.Image:
    """The shorter side to `image_size_px` (bilinear, antialiased), then the square in the middle.

    Equals torchvision's `Resize(image_size_px)` and `CenterCrop(image_size_px)` on PIL images. An image that
    has the size already is returned as it is.
    """
    width, height = image.size
    if (width, height) == (image_size_px, image_size_px):
        return image
    if width <= height:
        new_width, new_height = image_size_px, int(image_size_px * height / width)
    else:
        new_width, new_height = int(image_size_px * width / height), image_size_px
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    left, top = round((new_width - image_size_px) / 2), round((new_height - image_size_px) / 2)
    return resized.crop((left, top, left + image_size_px, top + image_size_px))


def read_image(
    file: Path | bytes,
    *,
    image_size_px: int,
    where: str | None = None,
    required_size_px: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode one image.

    Args:
        file: a path, or the bytes of an image file, in any format Pillow reads.
        image_size_px: side of the square result; other sizes go through `fit`.
        where: what an error names; the path by default.
        required_size_px: the (width, height) that the stored image must have; any by default.

    Returns:
        uint8 (H, W, 3), H = W = image_size_px. Grey images are repeated over the channels, transparency is
        dropped.

    Raises:
        HarnessError: there is no readable image, it has more than 8 bits a channel, or another size.
    """
    where = where or (str(file) if isinstance(file, Path) else "image")
    if isinstance(file, Path) and file.exists() and not file.is_file() and not file.is_dir():
        raise HarnessError("is not a file", where=where, hint="A pipe or device is no image.")  # opening might not end
    try:
        _check_png(file)
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            mode, size = image.mode, image.size
            wide = mode.startswith(_WIDE_MODES)
            if not wide and required_size_px in (None, size):
                image_HWC = np.asarray(fit(image if mode == "RGB" else image.convert("RGB"), image_size_px))
    except FileNotFoundError as error:
        raise HarnessError("there is no such file", where=where, hint="Check the path and its spelling.") from error
    except IsADirectoryError as error:
        hint = f"Give the image files in it, such as {where}/*.png."
        raise HarnessError("is a folder, not an image", where=where, hint=hint) from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything, SyntaxError included
        raise _not_readable(error, where) from error
    if wide:
        raise HarnessError(
            f'the image has more than 8 bits a channel (mode "{mode}")',
            where=where,
            hint="Convert it to 8 bits.",
        )
    if required_size_px not in (None, size):
        wanted = f"{required_size_px[0]}×{required_size_px[1]}"
        raise HarnessError(
            f"the image is {size[0]}×{size[1]} pixels where {wanted} are wanted",
            where=where,
            hint="Bring it to that size or leave it out.",
        )
    return image_HWC


def _check_png(file: Path | bytes) -> None:
    """Raise, as Pillow does, for a PNG with a wrong checksum.

    Decoding leaves the checksum of the pixels unread: of single flipped bits in CIFAR images, one in 170 changed
    pixels and was not noticed. This takes a tenth of the time of decoding.
    """
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
        if image.format == "PNG":
            image.verify()


def image_size(file: Path | bytes, *, where: str | None = None) -> tuple[int, int]:
    """(width, height) of a stored image in pixels, from its header.

    Raises:
        HarnessError: there is no readable image.
    """
    where = where or (str(file) if isinstance(file, Path) else "image")
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            return image.size
    except Exception as error:  # as in read_image
        raise _not_readable(error, where) from error


def _not_readable(error: Exception, where: str) -> HarnessError:
    unknown = isinstance(error, UnidentifiedImageError)  # whose text names a Python object
    reason = "in no format that Pillow knows" if unknown else str(error) or type(error).__name__
    return HarnessError(f"not a readable image ({reason})", where=where, hint=_NOT_READABLE_HINT)


def read_images(
    files: Sequence[Path | bytes],
    *,
    image_size_px: int,
    where: Callable[[int], str],
    required_size_px: tuple[int, int] | None = None,
) -> tuple[np.ndarray, list[HarnessError]]:
    """Decode many images with `read_image`, in threads where that is quicker.

    Args:
        where: what an error or a warning of Pillow's names, from the index of the image.

    Returns:
        uint8 (B, H, W, 3) in the order of `files`, and an error for each that cannot be read, in that order.
    """
    images_BHWC = np.empty((len(files), image_size_px, image_size_px, 3), dtype=np.uint8)
    problems: dict[int, HarnessError] = {}
    current = threading.local()

    def decode(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            current.where = where(index)
            try:
                images_BHWC[index] = read_image(
                    files[index],
                    image_size_px=image_size_px,
                    where=current.where,
                    required_size_px=required_size_px,
                )
            except HarnessError as error:
                problems[index] = error

    said: set[tuple[str, str]] = set()

    def name_file(message: Warning | str, *_: object) -> None:
        text = (getattr(current, "where", "image"), str(message))
        if text not in said:
            said.add(text)
            print(f"WARNING {text[0]}: {text[1]}", file=sys.stderr)

    starts = range(0, len(files), _CHUNK)
    with warnings.catch_warnings():  # a setting of the whole process, so once around all threads
        warnings.simplefilter("always")
        warnings.showwarning = name_file  # type: ignore[assignment]
        with ThreadPoolExecutor(_decode_workers(files), thread_name_prefix="decode") as executor:
            list(executor.map(decode, starts))
    return images_BHWC, [problems[index] for index in sorted(problems)]


def raise_all(problems: Sequence[HarnessError]) -> None:
    """Raise what is wrong with images as one error: the number, and the first ones by name; nothing for none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        more = f", the first {_NAMED}" if len(problems) > _NAMED else ""
        raise ManyErrors(f"{len(problems):,} images cannot be used{more}", list(problems[:_NAMED]))


def resize_images(images_BHWC: np.ndarray, image_size_px: int) -> np.ndarray:
    """Every image through `fit`. uint8 (B, H, W, 3) to uint8 (B, image_size_px, image_size_px, 3)."""
    if images_BHWC.shape[1:3] == (image_size_px, image_size_px):
        return images_BHWC
    resized_BHWC = np.empty((len(images_BHWC), image_size_px, image_size_px, 3), dtype=np.uint8)
    for index, image_HWC in enumerate(images_BHWC):
        resized_BHWC[index] = np.asarray(fit(Image.fromarray(image_HWC), image_size_px))
    return resized_BHWC


def _decode_workers(files: Sequence[Path | bytes]) -> int:
    sample = files[:: max(1, len(files) // 64)]
    sizes = [len(file) if isinstance(file, bytes) else _file_bytes(file) for file in sample]
    if not sizes or sum(sizes) / len(sizes) < _THREADS_FROM_BYTES:
        return 1
    return min(16, len(os.sched_getaffinity(0)))


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will give the error
