"""Prepared data sets: found, converted once, there whole or not at all, and never used when damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data.prepare import (
    PreparedDataset,
    list_prepared,
    locate,
    open_beton,
    open_prepared,
    prepare,
    verify,
    write_beton,
)
from harness.errors import HarnessError

SMALL = {"train_images": 40, "test_images": 20, "num_classes": 4}
LARGE = {"train_images": 20_000, "test_images": 500, "num_classes": 10}
CHILD = """
import json, logging, sys
from harness.data.prepare import prepare
logging.basicConfig(level=logging.INFO)
print(prepare("synthetic", synthetic=json.loads(sys.argv[1]), force=sys.argv[2] == "force").directory)
"""


def small(**options: Any) -> PreparedDataset:
    return prepare("synthetic", **({"synthetic": SMALL, "image_size_px": 8} | options))


def start(*, force: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(LARGE), "force" if force else "once"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def image_folder(root: Path) -> Path:
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(root / split / "a" / "0.png")
    return root


# --- the file


@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 1, 1), (3, 7, 2), (2000, 32, 32), (2, 300, 400), (1, 1, 65535)]
)
def test_a_file_is_read_as_it_was_written_as_one_mapped_block(
    tmp_path: Path, count: int, height: int, width: int
) -> None:
    images_BHWC, labels_B = some_images(count, height, width)
    write_beton(tmp_path / "a.beton", np.asfortranarray(images_BHWC), labels_B.astype(np.uint8))
    split = open_beton(tmp_path / "a.beton")
    assert isinstance(split.images_BHWC, np.memmap)
    assert not split.images_BHWC.flags.writeable
    assert split.labels_B.dtype == np.int64
    np.testing.assert_array_equal(split.images_BHWC, images_BHWC)
    np.testing.assert_array_equal(split.labels_B, labels_B)
    assert os.listdir(tmp_path) == ["a.beton"]


def some_images(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images_BHWC = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return images_BHWC, random.integers(0, 10, count)


def test_layout_byte_by_byte(tmp_path: Path) -> None:
    """Offsets worked out by hand from FFCV's format. Another byte would be other data to checkpoints."""
    path = tmp_path / "a.beton"
    images_BHWC, labels_B = some_images(3, 2, 4)
    write_beton(path, images_BHWC, labels_B)
    data = path.read_bytes()
    assert struct.unpack_from("<HHIQ", data) == (2, 2, 1 << 21, 3)
    (table_start,) = struct.unpack_from("<Q", data, 16)
    assert struct.unpack_from("B16s", data, 24) == (2, b"image" + bytes(11))
    assert struct.unpack_from("B16s", data, 24 + 1041) == (1, b"label" + bytes(11))
    for index in range(3):
        place = 24 + 2 * 1041 + 24 * index
        mode, width, height, pointer = struct.unpack_from("<BHHQ", data, place)
        assert (mode, width, height) == (1, 4, 2)
        assert struct.unpack_from("<q", data, place + 16) == (labels_B[index],)
        assert data[pointer : pointer + 24] == images_BHWC[index].tobytes()
        assert struct.unpack_from("<QQQ", data, table_start + 24 * index) == (index, pointer, 24)
    assert len(data) == table_start + 3 * 24
    assert hashlib.sha256(data).hexdigest()[:16] == "356d53508f4c772e"


@pytest.mark.parametrize("content", [b"", b"no such format\n" * 1000, b"\x80\x04", bytes(5000)])
def test_what_is_no_beton_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.beton").write_bytes(content)
    with pytest.raises(HarnessError, match=r"a\.beton: is no \.beton file") as caught:
        open_beton(tmp_path / "a.beton")
    assert "--force" in str(caught.value.hint)


# --- the data set


@pytest.mark.usefixtures("empty_cache")
def test_a_prepared_data_set_holds_what_the_source_gave() -> None:
    prepared = small()
    images = locate("synthetic", synthetic=SMALL).load(8)
    manifest = prepared.manifest
    for name, part in (("train", slice(40)), ("test", slice(40, None))):
        split = prepared.split(name)  # type: ignore[arg-type]
        np.testing.assert_array_equal(split.images_BHWC, images.images_BHWC[part])
        np.testing.assert_array_equal(split.labels_B, images.labels_B[part])
        assert split.count == manifest.counts[name]
    assert (manifest.source, manifest.image_size_px, manifest.classes) == ("synthetic", 8, ("0", "1", "2", "3"))
    pixels = images.images_BHWC[:40].reshape(-1, 3) / 255
    np.testing.assert_allclose([manifest.mean, manifest.std], [pixels.mean(0), pixels.std(0)], rtol=1e-13)
    assert sorted(os.listdir(prepared.directory)) == ["manifest.json", "test.beton", "train.beton"]


def test_converted_once_and_again_when_anything_changes(empty_cache: Path, tmp_path: Path) -> None:
    assert list_prepared() == []
    assert not empty_cache.exists()
    root = image_folder(tmp_path / "images")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (root, *root.rglob("*")))

    def directory(**options: Any) -> Path:
        return prepare("imagefolder", path=root, **({"image_size_px": 8} | options)).directory

    first = directory()
    made = (first.parent.stat().st_mtime_ns, (first / "train.beton").stat().st_ino)
    assert directory() == first
    # The second call writes nothing, not even a lock: a read-only cache can be used.
    assert made == (first.parent.stat().st_mtime_ns, (first / "train.beton").stat().st_ino)
    assert directory(force=True) == first
    assert (first / "train.beton").stat().st_ino != made[1]
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in (root, *root.rglob("*")))

    directories = {first, directory(image_size_px=4)}
    Image.new("RGB", (8, 8), (3, 2, 1)).save(root / "train" / "a" / "0.png")
    directories.add(directory())
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "a" / "1.png")
    directories |= {directory(), small().directory, small(synthetic=SMALL | {"seed": 1}).directory}
    assert len(directories) == 6
    assert list_prepared() == sorted(directories)
    assert all(verify(each) == [] for each in list_prepared())


def replace_by_other(directory: Path) -> None:
    shutil.copy(small(synthetic=SMALL | {"train_images": 30}).directory / "train.beton", directory)


def swap(directory: Path) -> None:
    (directory / "train.beton").rename(directory / "x")
    (directory / "test.beton").rename(directory / "train.beton")
    (directory / "x").rename(directory / "test.beton")


def swap_folders(directory: Path) -> None:
    other = small(synthetic=SMALL | {"seed": 1}).directory
    shutil.rmtree(directory)
    shutil.copytree(other, directory)


def another_version(folder: Path) -> None:
    changed = open_prepared(folder).manifest.model_copy(update={"format_version": 99})
    (folder / "manifest.json").write_text(changed.to_json())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / "test.beton", 3000), r"test\.beton: damaged: .* \(3,000 of [\d,]+ bytes"),
        (lambda folder: flip(folder / "train.beton", -2000), r"train\.beton: damaged: its SHA-256 is not that of"),
        (lambda folder: flip(folder / "test.beton", 8), r"test\.beton: damaged: its SHA-256 is not that of"),
        (replace_by_other, r"train\.beton: damaged: its SHA-256"),
        (swap, r"train\.beton: damaged: .*\n.*test\.beton: damaged: its SHA-256"),
        (swap_folders, r"holds the data set synthetic-\w+"),
        (lambda folder: (folder / "train.beton").unlink(), r"train\.beton: cannot be read: No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: cannot be read: No such file"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), r"manifest\.json: damaged"),
        (lambda folder: (folder / "manifest.json").write_text("["), r"manifest\.json: damaged"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), r"manifest\.json: damaged"),
        (lambda folder: flip(folder / "manifest.json", 200), r"manifest\.json: damaged: its checksum does not fit"),
        (another_version, r"manifest\.json: damaged: its format version is 99, not 1"),
        (lambda folder: [(folder / f).unlink() for f in ("test.beton", "train.beton")], r"train.*\n.*test"),
    ],
)
@pytest.mark.usefixtures("empty_cache")
def test_damaged_data_is_named_and_not_used(damage: Callable[[Path], Any], words: str) -> None:
    directory = small().directory
    damage(directory)
    for use in (small, lambda: open_prepared(directory)):
        with pytest.raises(HarnessError, match=words) as caught:
            use()
        assert "--force" in str(caught.value.hint)
        assert str(directory) in str(caught.value)
        assert str(caught.value).count("HINT") == 1
    assert small(force=True).directory == directory
    assert verify(directory) == []


def test_a_cache_that_cannot_be_locked(tmp_path: Path, empty_cache: Path) -> None:
    directory = small().directory
    shutil.rmtree(directory)
    lock = directory.with_name(f"{directory.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(HarnessError, match="the file cannot be locked"):
        small()


@pytest.mark.usefixtures("empty_cache")
def test_processes_at_the_same_time_convert_once() -> None:
    children = [start() for _ in range(3)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({out for out, _ in outputs}) == 1
    assert sum(err.count("converting synthetic patterns") for _, err in outputs) == 1
    assert verify(Path(outputs[0][0].strip())) == []


@pytest.mark.parametrize(("rank", "expected"), [("0", 1), ("1", 0)])
@pytest.mark.usefixtures("empty_cache")
def test_of_the_ranks_that_wait_for_the_conversion_the_first_says_so(
    rank: str, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = small().directory
    shutil.rmtree(directory)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with directory.with_name(f"{directory.name}.lock").open("w") as other:  # as another process holds it
        fcntl.flock(other, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN))
        timer.start()
        small()
        timer.join()
    assert caplog.text.count("another process is converting this data") == expected


@pytest.mark.parametrize("moment", ["reading", "building", "replacing"])
def test_a_killed_conversion_leaves_nothing_half_done(empty_cache: Path, moment: str) -> None:
    parent, force = empty_cache / "data", moment == "replacing"
    if force:
        prepare("synthetic", synthetic=LARGE)
    child = start(force=force)
    try:
        pattern = "*.lock" if moment == "reading" else ".synthetic-*/*train.beton*"
        limit = time.monotonic() + 60
        while not any(parent.glob(pattern)):
            assert time.monotonic() < limit
            assert child.poll() is None, child.communicate()
            time.sleep(0.001)
    finally:
        child.kill()
        child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert len([name for name in os.listdir(parent) if name.startswith(".")]) == (moment != "reading")
    assert [verify(each) for each in list_prepared()] == ([[]] if force else [])
    prepared = prepare("synthetic", synthetic=LARGE, force=force)
    assert prepared.split("train").count == LARGE["train_images"]
    assert sorted(os.listdir(parent)) == sorted([prepared.directory.name, f"{prepared.directory.name}.lock"])


@pytest.mark.cifar10
def test_the_real_cifar10() -> None:
    """In the cache of the whole session: other tests use it too."""
    files = locate("cifar10", download=False).files
    before = [(file, file.stat().st_mtime_ns) for file in files]
    prepared = prepare("cifar10", download=False)
    manifest = prepared.manifest
    assert manifest.counts == {"train": 50_000, "test": 10_000}
    assert manifest.classes[0] == "airplane"
    np.testing.assert_allclose(np.array(manifest.mean) * 255, [125.307, 122.950, 113.865], atol=5e-4)
    np.testing.assert_allclose(np.array(manifest.std) * 255, [62.993, 62.089, 66.705], atol=5e-4)
    for split in prepared.splits.values():
        assert split.images_BHWC.shape == (split.count, 32, 32, 3)
        assert (np.bincount(split.labels_B) == split.count // 10).all()
    assert before == [(file, file.stat().st_mtime_ns) for file in files]
