"""Write and read FFCV's `.beton` files of raw RGB images and integer labels, with numpy alone.

Format: version 2, as ffcv 1.0.2 writes it (its `types.py`, `writer.py`, `fields/rgb_image.py`,
`fields/basics.py`). All numbers are little-endian. One after the other in the file lie

    header            24 bytes: version, number of fields, page size, number of samples, place of the table
    descriptors       1041 bytes a field: type (2 = RGB image, 1 = integer), name, arguments (zero for both)
    metadata          24 bytes a sample: mode (1 = raw), width, height, place of the pixels, label
    pixels            raw uint8, height × width × 3
    allocation table  24 bytes a sample: sample id, place, size in bytes; it ends the file

FFCV leaves holes between pages. `write_beton` does not: the pixels of all images lie in one block, in order,
so that the block can be memory-mapped as one (N, H, W, 3) array, and FFCV's own Loader reads it all the same.

A file holds no checksum of its pixels: the manifest beside a prepared file does.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness.errors import HarnessError
from harness.files import replacing

VERSION = 2
IMAGE_FIELD = "image"
LABEL_FIELD = "label"

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
# FFCV aligns the fields of a sample: the image takes 13 bytes, the label begins at the next multiple of 8.
_SAMPLE = np.dtype(
    {"names": [IMAGE_FIELD, LABEL_FIELD], "formats": [_IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24}
)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_FIELDS = ((IMAGE_FIELD, 2), (LABEL_FIELD, 1))  # name, type id
_MODE_RAW = 1
_MIN_PAGE_BYTES = 1 << 21  # the smallest that FFCV's writer accepts
_MAX_PAGE_BYTES = 1 << 31  # the largest power of two that fits the header's 32 bits
_ALIGN_BYTES = 4096  # pixels begin on a page of memory
_METADATA_START = _HEADER.itemsize + len(_FIELDS) * _DESCRIPTOR.itemsize


def write_beton(path: str | Path, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
    """Write a `.beton` file with the fields `image` (raw RGB) and `label`, replacing `path` in one step.

    Args:
        path: the file; it appears complete or not at all (temporary file in the same folder, fsync, rename).
        images_BHWC: uint8 (B, H, W, 3), B ≥ 1, H and W from 1 to 65,535; any memory order.
        labels_B: (B,) of any integer type, values ≥ 0.

    Raises:
        HarnessError: the arrays do not fit this description, or the file cannot be written.
    """
    path = Path(path)
    images_BHWC, labels_B = np.asarray(images_BHWC), np.asarray(labels_B)
    _check_arrays(path, images_BHWC, labels_B)
    count, height, width, _ = images_BHWC.shape
    image_bytes = height * width * 3
    metadata_end = _METADATA_START + count * _SAMPLE.itemsize
    pixels_start = -(-metadata_end // _ALIGN_BYTES) * _ALIGN_BYTES
    pixels_end = pixels_start + count * image_bytes
    pointers = pixels_start + np.arange(count, dtype="<u8") * np.uint64(image_bytes)

    header = np.zeros((), dtype=_HEADER)
    header["version"], header["num_fields"], header["num_samples"] = VERSION, len(_FIELDS), count
    header["page_size"], header["alloc_table_ptr"] = _page_bytes(pixels_end), pixels_end
    metadata = np.zeros(count, dtype=_SAMPLE)
    metadata[IMAGE_FIELD]["mode"] = _MODE_RAW
    metadata[IMAGE_FIELD]["width"], metadata[IMAGE_FIELD]["height"] = width, height
    metadata[IMAGE_FIELD]["data_ptr"], metadata[LABEL_FIELD] = pointers, labels_B
    table = np.zeros(count, dtype=_ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), pointers, image_bytes

    with replacing(path) as file:
        file.write(header.tobytes() + _descriptors().tobytes() + metadata.tobytes())
        file.write(bytes(pixels_start - metadata_end))
        chunk = max(1, (64 << 20) // image_bytes)  # 64 MiB: a mapped or transposed input is not copied whole
        for start in range(0, count, chunk):
            file.write(np.ascontiguousarray(images_BHWC[start : start + chunk]).data)
        file.write(table.tobytes())


def open_beton(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Check a `.beton` file of raw RGB images of one size and integer labels, and map it.

    Reads what `write_beton` wrote, and what FFCV's DatasetWriter wrote from
    `{"image": RGBImageField(write_mode="raw"), "label": IntField()}`.

    Returns:
        images_BHWC: uint8 (B, H, W, 3), read-only: a view of the mapped file where the pixels lie in one
            block in order (as `write_beton` lays them), else a gathered copy in memory.
        labels_B: int64 (B,).

    Raises:
        HarnessError: the file cannot be read, is truncated or damaged, or holds other fields, JPEG images,
            images of several sizes or negative labels. Changed pixels or labels cannot be told from one file.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise _broken(path, "is not a file")
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            header = np.frombuffer(_read(file, _HEADER.itemsize, path, "header"), dtype=_HEADER)[0]
            count = _check_header(path, header, length)
            raw = _read(file, len(_FIELDS) * _DESCRIPTOR.itemsize, path, "field descriptors")
            _check_descriptors(path, raw)
            metadata = np.frombuffer(_read(file, count * _SAMPLE.itemsize, path, "metadata"), dtype=_SAMPLE)
            file.seek(int(header["alloc_table_ptr"]))
            table = np.frombuffer(
                _read(file, count * _ALLOCATION.itemsize, path, "allocation table"), dtype=_ALLOCATION
            )
            height, width = _check_samples(path, metadata)
            table_start = int(header["alloc_table_ptr"])
            pointers = _check_allocations(path, metadata, table, height * width * 3, table_start)
            images_BHWC = _map_images(file, pointers, height, width)
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror or error}") from error
    return images_BHWC, metadata[LABEL_FIELD].astype(np.int64)


def _check_arrays(path: Path, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
    where = str(path)
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3:
        raise HarnessError(
            f"images must be uint8 (N, H, W, 3), not {images_BHWC.dtype} {images_BHWC.shape}",
            where=where,
            hint="Give RGB images of 8 bits a channel, with the channels last.",
        )
    count, height, width, _ = images_BHWC.shape
    if count == 0:
        raise HarnessError(
            "there are no images to write", where=where, hint="Check that each split of the input holds images."
        )
    if not (1 <= height <= 65535 and 1 <= width <= 65535):
        raise HarnessError(
            f"image sides must be 1 to 65,535 pixels, not {height}×{width}",
            where=where,
            hint="Set data.image_size_px to a number in that range.",
        )
    if labels_B.shape != (count,) or labels_B.dtype.kind not in "iu":
        raise HarnessError(
            f"labels must be {count} integers, not {labels_B.dtype} {labels_B.shape}",
            where=where,
            hint="Give one whole number for each image.",
        )
    if int(labels_B.min()) < 0 or int(labels_B.max()) > np.iinfo(np.int64).max:
        raise HarnessError(
            f"labels run from {labels_B.min()} to {labels_B.max()}", where=where, hint="Number the classes from 0."
        )


def _page_bytes(pixels_end: int) -> int:
    """The header's page size, in bytes: one page that covers the file.

    With `os_cache=False` FFCV reads whole pages and an image must not cross two. A file above 2 GiB cannot
    have one page; it needs FFCV's default, `os_cache=True`.
    """
    return min(max(_MIN_PAGE_BYTES, 1 << (pixels_end - 1).bit_length()), _MAX_PAGE_BYTES)


def _descriptors() -> np.ndarray:
    descriptors = np.zeros(len(_FIELDS), dtype=_DESCRIPTOR)
    for row, (name, type_id) in zip(descriptors, _FIELDS, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype="u1")
    return descriptors


def _broken(path: Path, what: str) -> HarnessError:
    return HarnessError(
        what, where=str(path), hint="Remove the file and make it again: harness data prepare --force RECIPE"
    )


def _read(file: BinaryIO, size: int, path: Path, part: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _broken(path, f"truncated: its {part} needs {size} bytes, the file ends after {len(data)}")
    return data


def _check_header(path: Path, header: np.void, length: int) -> int:
    """The number of samples, once every number of the header fits the others and the file's length."""
    version, page_bytes = int(header["version"]), int(header["page_size"])
    count, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if version != VERSION:
        raise _broken(path, f"not a .beton file of version {VERSION}: its header says version {version}")
    if int(header["num_fields"]) != len(_FIELDS):
        raise _broken(path, f"its header says {header['num_fields']} fields; an image and a label are wanted")
    if not _MIN_PAGE_BYTES <= page_bytes <= _MAX_PAGE_BYTES or page_bytes & (page_bytes - 1):
        raise _broken(path, f"damaged header: page size {page_bytes} is no power of two from 2 MiB to 2 GiB")
    if count == 0:
        raise _broken(path, "holds no images")
    if table_start < _METADATA_START + count * _SAMPLE.itemsize:
        raise _broken(path, f"damaged header: {count} samples do not fit before the allocation table")
    expected = table_start + count * _ALLOCATION.itemsize
    if length != expected:
        kind = "truncated" if length < expected else "damaged"
        raise _broken(path, f"{kind}: {length} bytes long where its header says {expected}")
    return count


def _check_descriptors(path: Path, raw: bytes) -> None:
    for found, (name, type_id) in zip(np.frombuffer(raw, dtype=_DESCRIPTOR), _FIELDS, strict=True):
        found_name = found["name"].tobytes().rstrip(b"\0").decode("ascii", errors="replace")
        if (found_name, int(found["type_id"])) != (name, type_id):
            raise _broken(
                path,
                f'field "{found_name}" of type {found["type_id"]} stands where "{name}" of type {type_id} '
                "should (2: RGB image, 1: integer)",
            )
        if found["arguments"].any():
            raise _broken(path, f'damaged descriptor of the field "{name}": its arguments are not zero')


def _check_samples(path: Path, metadata: np.ndarray) -> tuple[int, int]:
    """(height, width) of all images, in pixels."""
    images = metadata[IMAGE_FIELD]
    not_raw = np.flatnonzero(images["mode"] != _MODE_RAW)
    if len(not_raw):
        raise _broken(path, f"image {not_raw[0]} is not stored raw (mode {images['mode'][not_raw[0]]})")
    height, width = int(images["height"][0]), int(images["width"][0])
    if height == 0 or width == 0:
        raise _broken(path, f"image 0 has the size {height}×{width}")
    other = np.flatnonzero((images["height"] != height) | (images["width"] != width))
    if len(other):
        size = f"{images['height'][other[0]]}×{images['width'][other[0]]}"
        raise _broken(path, f"image {other[0]} has the size {size} where image 0 has {height}×{width}")
    negative = np.flatnonzero(metadata[LABEL_FIELD] < 0)
    if len(negative):
        raise _broken(path, f"image {negative[0]} has the label {metadata[LABEL_FIELD][negative[0]]}")
    return height, width


def _check_allocations(
    path: Path, metadata: np.ndarray, table: np.ndarray, image_bytes: int, table_start: int
) -> np.ndarray:
    """Where each image begins, int64 (B,), once metadata, table and file length agree."""
    table = table[np.argsort(table["sample_id"], kind="stable")]
    pointers = metadata[IMAGE_FIELD]["data_ptr"]
    wrong = np.flatnonzero(
        (table["sample_id"] != np.arange(len(table), dtype=np.uint64))
        | (table["ptr"] != pointers)
        | (table["size"] != image_bytes)
    )
    if len(wrong):
        raise _broken(path, f"damaged: metadata and allocation table disagree about image {wrong[0]}")
    first = _METADATA_START + metadata.nbytes
    outside = np.flatnonzero((pointers < first) | (pointers > max(0, table_start - image_bytes)))
    if len(outside):
        raise _broken(path, f"damaged: the pixels of image {outside[0]} lie outside the file's pixel region")
    if (np.diff(np.sort(pointers)) < image_bytes).any():
        raise _broken(path, "damaged: the pixels of two images overlap")
    return pointers.astype(np.int64)


def _map_images(file: BinaryIO, pointers: np.ndarray, height: int, width: int) -> np.ndarray:
    count, image_bytes = len(pointers), height * width * 3
    run_starts = np.flatnonzero(np.diff(pointers, prepend=pointers[0] - 2 * image_bytes) != image_bytes)
    if len(run_starts) == 1:
        shape = (count, height, width, 3)
        return np.memmap(file, dtype=np.uint8, mode="r", offset=int(pointers[0]), shape=shape)
    data = np.memmap(file, dtype=np.uint8, mode="r")
    images_BHWC = np.empty((count, height, width, 3), dtype=np.uint8)
    for start, stop in zip(run_starts, [*run_starts[1:], count], strict=True):
        begin = int(pointers[start])
        block = data[begin : begin + (int(stop) - int(start)) * image_bytes]
        images_BHWC[start:stop] = block.reshape(-1, height, width, 3)
    images_BHWC.flags.writeable = False
    return images_BHWC
