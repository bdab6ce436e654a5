"""What a source gives, and how image files are decoded: to uint8 RGB arrays of one size.

Training data and the images given to a prediction go through here, so that both are resized alike.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from harness.errors import HarnessError, ManyErrors

_WIDE_MODES = ("I", "F")  # also "I;16", "I;16B" …: Pillow's conversion to RGB clips their values at 255
_CHUNK = 256
_NAMED = 20  # of what is wrong alike
_NOT_READABLE_HINT = "Replace it or leave it out; PNG, JPEG and all other formats that Pillow knows are read"


@dataclass(frozen=True)
class ImageSet:
    """A whole data set in memory; the first `train_count` images are for training, the others for testing."""

    images_BHWC: np.ndarray  # noqa: N815 - uint8, of one size
    labels_B: np.ndarray  # noqa: N815 - int64, indices into `classes`
    train_count: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Located:
    """The input of a source, found but not yet read.

    `load` reads and checks everything, at a height and width in pixels; it raises HarnessError or OSError.
    """

    source: str
    origin: str  # for people
    load: Callable[[int], ImageSet]
    files: tuple[Path, ...] = ()  # whose path, size and time of change tell whether a converted copy is up to date
    options: Mapping[str, int | str] = field(default_factory=dict)  # whatever else decides the pixels or labels
    left_out: str = ""  # what lies there and is no image of the data set, in words


def fit(image: Any, image_size_px: int) -> Any:
    """A Pillow image, its shorter side brought to `image_size_px` (bilinear, antialiased), then the middle square."""
    if image.size == (image_size_px, image_size_px):
        return image
    from torchvision.transforms.v2 import functional

    return functional.center_crop(functional.resize(image, [image_size_px]), [image_size_px])


def resize_images(images_BHWC: np.ndarray, image_size_px: int) -> np.ndarray:
    """Every image through `fit`, uint8 (B, image_size_px, image_size_px, 3)."""
    if images_BHWC.shape[1:3] == (image_size_px, image_size_px):
        return images_BHWC
    return np.stack([np.asarray(fit(Image.fromarray(image_HWC), image_size_px)) for image_HWC in images_BHWC])


def read_image(file: Path | bytes, image_size_px: int, where: str, required_size_px: int | None = None) -> np.ndarray:
    """Decode one image, a path or the bytes of a file, to uint8 (image_size_px, image_size_px, 3).

    Grey images are repeated over the channels, transparency is dropped.

    Raises:
        HarnessError: there is no readable image at `where`, it has more than 8 bits a channel, or not the required
            height and width.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file() and not file.is_dir():
        raise HarnessError("is not a file", where=where, hint="A pipe or device is no image.")  # opening might not end
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            # Decoding leaves the checksum of the pixels unread: of single flipped bits in CIFAR images, one in 170
            # changed pixels and was not noticed. This takes a tenth of the time of decoding, and closes the file.
            if image.format == "PNG":
                image.verify()
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            mode, (width, height) = image.mode, image.size
            wide = mode.startswith(_WIDE_MODES)
            if not wide and required_size_px in (None, width) and required_size_px in (None, height):
                return np.asarray(fit(image if mode == "RGB" else image.convert("RGB"), image_size_px))
    except FileNotFoundError as error:
        raise HarnessError("there is no such file", where=where, hint="Check the path and its spelling.") from error
    except IsADirectoryError as error:
        hint = f"Give the image files in it, such as {where}/*.png."
        raise HarnessError("is a folder, not an image", where=where, hint=hint) from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything, SyntaxError included
        unknown = isinstance(error, UnidentifiedImageError)  # whose text names a Python object
        reason = "in no format that Pillow knows" if unknown else str(error) or type(error).__name__
        raise HarnessError(f"not a readable image ({reason})", where=where, hint=_NOT_READABLE_HINT) from error
    if wide:
        what = f'the image has more than 8 bits a channel (mode "{mode}")'
        raise HarnessError(what, where=where, hint="Convert it to 8 bits.")
    what = f"the image is {width}×{height} pixels where {required_size_px}×{required_size_px} are wanted"
    raise HarnessError(what, where=where, hint="Bring it to that size or leave it out.")


def read_images(
    files: Sequence[Path | bytes],
    image_size_px: int,
    where: Callable[[int], str],
    required_size_px: int | None = None,
) -> np.ndarray:
    """Decode many images with `read_image`, in threads where that is quicker: uint8 (B, H, W, 3).

    `where` gives the place of an image by its index, for errors and Pillow's warnings.

    Raises:
        HarnessError: all that cannot be read, by name up to a number.
    """
    images_BHWC = np.empty((len(files), image_size_px, image_size_px, 3), dtype=np.uint8)
    problems: dict[int, HarnessError] = {}
    current = threading.local()

    def decode(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            current.where = where(index)
            try:
                images_BHWC[index] = read_image(files[index], image_size_px, current.where, required_size_px)
            except HarnessError as error:
                problems[index] = error

    shown: set[str] = set()

    def name_file(message: Warning | str, *_: object) -> None:
        text = f"WARNING {getattr(current, 'where', 'image')}: {message}"
        if text not in shown:
            shown.add(text)
            print(text, file=sys.stderr)

    with warnings.catch_warnings():  # a setting of the whole process, so once around all threads
        warnings.simplefilter("always")
        warnings.showwarning = name_file  # type: ignore[assignment]
        with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))), thread_name_prefix="decode") as executor:
            list(executor.map(decode, range(0, len(files), _CHUNK)))
    raise_all("images cannot be used", [problems[index] for index in sorted(problems)])
    return images_BHWC


def raise_all(what: str, problems: list[HarnessError]) -> None:
    """Raise several as one error: their number, and the first ones by name; nothing for none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        more = f", the first {_NAMED}" if len(problems) > _NAMED else ""
        raise ManyErrors(f"{len(problems):,} {what}{more}", problems[:_NAMED])
