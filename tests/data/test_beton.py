"""The `.beton` writer and reader: against FFCV's own, and against damage of every kind."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.data.beton import open_beton, write_beton
from harness.errors import HarnessError

HEADER_BYTES = 24 + 2 * 1041  # header and field descriptors


def some_images(count: int, height: int = 4, width: int = 5, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images_BHWC = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return images_BHWC, random.integers(0, 10, count)


@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 1, 1), (3, 7, 2), (2000, 32, 32), (2, 300, 400), (1, 1, 65535)]
)
def test_reads_what_it_wrote_as_one_mapped_block(tmp_path: Path, count: int, height: int, width: int) -> None:
    images_BHWC, labels_B = some_images(count, height, width)
    write_beton(tmp_path / "a.beton", images_BHWC, labels_B)
    found_BHWC, found_B = open_beton(tmp_path / "a.beton")
    assert isinstance(found_BHWC, np.memmap)
    assert not found_BHWC.flags.writeable
    assert found_B.dtype == np.int64
    np.testing.assert_array_equal(found_BHWC, images_BHWC)
    np.testing.assert_array_equal(found_B, labels_B)
    assert os.listdir(tmp_path) == ["a.beton"]


def test_any_memory_order_and_label_type(tmp_path: Path) -> None:
    images_BHWC, labels_B = some_images(6)
    write_beton(tmp_path / "plain.beton", images_BHWC, labels_B)
    turned = np.asfortranarray(images_BHWC)[::-1][::-1]
    assert not turned.flags.c_contiguous
    write_beton(tmp_path / "turned.beton", turned, labels_B.astype(np.uint8))
    assert (tmp_path / "plain.beton").read_bytes() == (tmp_path / "turned.beton").read_bytes()


def test_layout_byte_by_byte(tmp_path: Path) -> None:
    """Offsets worked out by hand from FFCV's format, not from the writer's own tables."""
    path = tmp_path / "a.beton"
    images_BHWC, labels_B = some_images(3, 2, 4)
    write_beton(path, images_BHWC, labels_B)
    data = path.read_bytes()
    assert struct.unpack_from("<HHIQ", data) == (2, 2, 1 << 21, 3)
    (table_start,) = struct.unpack_from("<Q", data, 16)
    assert struct.unpack_from("B16s", data, 24) == (2, b"image" + bytes(11))
    assert struct.unpack_from("B16s", data, 24 + 1041) == (1, b"label" + bytes(11))
    for index in range(3):
        mode, width, height, pointer = struct.unpack_from("<BHHQ", data, HEADER_BYTES + 24 * index)
        assert (mode, width, height) == (1, 4, 2)
        assert struct.unpack_from("<q", data, HEADER_BYTES + 24 * index + 16) == (labels_B[index],)
        assert data[pointer : pointer + 24] == images_BHWC[index].tobytes()
        assert struct.unpack_from("<QQQ", data, table_start + 24 * index) == (index, pointer, 24)
    assert len(data) == table_start + 3 * 24


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), "uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), "no images"),
        (np.zeros((1, 0, 4, 3), np.uint8), np.zeros(1, int), "0×4"),
        (np.zeros((1, 1, 65536, 3), np.uint8), np.zeros(1, int), "1×65536"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), "2 integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), "2 integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]), "-1"),
        (np.zeros((1, 4, 4, 3), np.uint8), np.array([2**64 - 1], np.uint64), "18446744073709551615"),
    ],
)
def test_refuses_other_arrays(tmp_path: Path, images: np.ndarray, labels: np.ndarray, words: str) -> None:
    with pytest.raises(HarnessError, match=words):
        write_beton(tmp_path / "a.beton", images, labels)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    images_BHWC, labels_B = some_images(5)
    write_beton(path, images_BHWC, labels_B)
    before = path.read_bytes()
    script = (
        "import resource, sys, numpy as np\n"
        "from harness.data.beton import write_beton\n"
        "from harness.errors import HarnessError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # the system stops the write half-way
        "try: write_beton(sys.argv[1], np.zeros((100, 32, 32, 3), np.uint8), np.zeros(100, int))\n"
        "except HarnessError as error: print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert f"{path}: cannot be written" in output
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.beton"]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "text", "no_folder"])
def test_what_is_no_beton_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind / "a.beton" if kind == "no_folder" else tmp_path / "a.beton"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "no such format\n" * 1000)
    with pytest.raises(HarnessError, match=r"a\.beton") as caught:
        open_beton(path)
    assert caught.value.hint
    if kind == "no_folder":
        with pytest.raises(HarnessError, match="cannot be written"):
            write_beton(path, *some_images(1))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, np.ndarray, np.ndarray, Path]:
    """A file's bytes, what it holds, and a path to write damaged copies to."""
    path = tmp_path_factory.mktemp("beton") / "a.beton"
    images_BHWC, labels_B = some_images(7)
    write_beton(path, images_BHWC, labels_B)
    return path.read_bytes(), images_BHWC, labels_B, path


DAMAGE = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@DAMAGE
@given(data=st.data())
def test_every_truncation_and_extension_is_found(sound: tuple, data: st.DataObject) -> None:
    content, _, _, path = sound
    length = data.draw(st.integers(0, len(content) - 1), label="length")
    path.write_bytes(content[:length])
    with pytest.raises(HarnessError, match=r"a\.beton"):
        open_beton(path)
    path.write_bytes(content + content[:length] + b"x")
    with pytest.raises(HarnessError, match="damaged"):
        open_beton(path)


@DAMAGE
@given(bit=st.integers(0, 8 * HEADER_BYTES - 1))
def test_a_flipped_bit_of_the_header_is_found_or_harmless(sound: tuple, bit: int) -> None:
    content, images_BHWC, labels_B, path = sound
    path.write_bytes(flipped(content, bit))
    try:
        found_BHWC, found_B = open_beton(path)
    except HarnessError as caught:
        error: HarnessError | None = caught
    else:
        error = None
    if error:
        assert str(path) in str(error)
    else:
        np.testing.assert_array_equal(found_BHWC, images_BHWC)
        np.testing.assert_array_equal(found_B, labels_B)


@DAMAGE
@given(data=st.data())
def test_bits_flipped_anywhere_never_give_another_error_or_shape(sound: tuple, data: st.DataObject) -> None:
    content, images_BHWC, _, path = sound
    for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=6), label="bits"):
        content = flipped(content, bit)
    path.write_bytes(content)
    try:
        found_BHWC, found_B = open_beton(path)
    except HarnessError:
        return
    assert found_BHWC.shape == images_BHWC.shape
    assert found_B.shape == (7,)
    assert found_B.min() >= 0


@DAMAGE
@given(header=st.binary(min_size=24, max_size=24))
def test_any_header_is_answered_at_once(sound: tuple, header: bytes) -> None:
    content, _, _, path = sound
    path.write_bytes(b"\2\0\2\0" + header[4:] + content[24:])
    with pytest.raises(HarnessError, match=r"a\.beton"):
        open_beton(path)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# What FFCV's own writer and loader do, in a process of their own: they leave threads and shared memory behind.

WRITE = """
import sys, numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import RGBImageField, IntField, FloatField

class Rows:
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return self.images[i], self.labels[i]

def write(name, fields, images, labels, workers=1):
    writer = DatasetWriter(f"{sys.argv[1]}/{name}.beton", fields, page_size=1 << 21, num_workers=workers)
    writer.from_indexed_dataset(Rows(images, labels), chunksize=50)

saved = np.load(f"{sys.argv[1]}/images.npz")
images, labels = saved["images"], saved["labels"]
raw = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
write("pages", raw, images, labels)
write("workers", raw, images, labels, workers=3)
write("one_page", raw, images[:100], labels[:100])
write("jpeg", {"image": RGBImageField(write_mode="jpg"), "label": IntField()}, images[:3], labels[:3])
write("sizes", raw, [images[0], images[1][:30]], labels[:2])
write("names", {"picture": RGBImageField(write_mode="raw"), "label": IntField()}, images[:3], labels[:3])
write("float", {"image": RGBImageField(write_mode="raw"), "label": FloatField()}, images[:3], labels[:3])
"""

READ = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

for os_cache in (True, False):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(f"{sys.argv[1]}/ours.beton", batch_size=64, num_workers=2, os_cache=os_cache, drop_last=False,
                    order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    np.savez(f"{sys.argv[1]}/read_{os_cache}.npz", images=np.concatenate([i for i, _ in batches]),
             labels=np.concatenate([l for _, l in batches])[:, 0])
"""


@pytest.fixture(scope="module")
def written_by_ffcv(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    folder = tmp_path_factory.mktemp("ffcv")
    images_BHWC, labels_B = some_images(2000, 32, 32)
    np.savez(folder / "images.npz", images=images_BHWC, labels=labels_B)
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, capture_output=True, text=True)
    return folder, images_BHWC, labels_B


@pytest.mark.ffcv
@pytest.mark.parametrize(
    ("name", "count", "mapped"), [("pages", 2000, False), ("workers", 2000, False), ("one_page", 100, True)]
)
def test_reads_what_ffcv_wrote(written_by_ffcv: tuple, name: str, count: int, mapped: bool) -> None:
    folder, images_BHWC, labels_B = written_by_ffcv
    found_BHWC, found_B = open_beton(folder / f"{name}.beton")
    assert isinstance(found_BHWC, np.memmap) == mapped
    assert not found_BHWC.flags.writeable
    np.testing.assert_array_equal(found_BHWC, images_BHWC[:count])
    np.testing.assert_array_equal(found_B, labels_B[:count])


@pytest.mark.ffcv
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jpeg", "image 0 is not stored raw"),
        ("sizes", "image 1 has the size 30×32 where image 0 has 32×32"),
        ("names", 'field "picture" of type 2 stands where "image"'),
        ("float", 'field "label" of type 0'),
    ],
)
def test_says_what_it_does_not_read(written_by_ffcv: tuple, name: str, words: str) -> None:
    with pytest.raises(HarnessError, match=words):
        open_beton(written_by_ffcv[0] / f"{name}.beton")


@pytest.mark.ffcv
@pytest.mark.slow
def test_ffcv_loader_reads_what_we_wrote(tmp_path: Path) -> None:
    images_BHWC, labels_B = some_images(1000, 32, 32)
    write_beton(tmp_path / "ours.beton", images_BHWC, labels_B)
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, capture_output=True, text=True)
    for os_cache in (True, False):
        with np.load(tmp_path / f"read_{os_cache}.npz") as read:
            np.testing.assert_array_equal(read["images"], images_BHWC)
            np.testing.assert_array_equal(read["labels"], labels_B)
