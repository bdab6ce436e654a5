"""Converted data sets: made once, whole or not at all, and never used when damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from harness.data.prepare import DataStore, Split, channel_statistics, list_stores, open_store, prepare, verify
from harness.data.sources import locate
from harness.data.store import Manifest
from harness.errors import HarnessError

SMALL = {"train_images": 40, "test_images": 20, "num_classes": 4}
LARGE = {"train_images": 20_000, "test_images": 500, "num_classes": 10}
CHILD = """
import json, logging, sys
from harness.data.prepare import prepare
logging.basicConfig(level=logging.INFO)
store = prepare("synthetic", synthetic=json.loads(sys.argv[1]), force=sys.argv[2] == "force")
print(store.directory)
"""


def small(**options: Any) -> DataStore:
    return prepare("synthetic", **({"synthetic": SMALL, "image_size_px": 8} | options))


def start(options: dict[str, int], *, force: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(options), "force" if force else "once"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("empty_cache")
def test_a_store_holds_what_the_source_gave() -> None:
    store = small()
    sets = locate("synthetic", synthetic=SMALL, image_size_px=8).load()
    for name, wanted in (("train", sets.train), ("test", sets.test)):
        split = store.split(name)
        np.testing.assert_array_equal(split.images_BHWC, wanted.images_BHWC)
        np.testing.assert_array_equal(split.labels_B, wanted.labels_B)
        assert isinstance(split.images_BHWC, np.memmap)
        assert split.count == store.manifest.counts[name] == len(wanted.labels_B)
    manifest = store.manifest
    assert (manifest.source, manifest.image_size_px, manifest.classes) == ("synthetic", 8, ("0", "1", "2", "3"))
    scaled = sets.train.images_BHWC.reshape(-1, 3) / 255
    np.testing.assert_allclose(manifest.mean, scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, scaled.std(0), rtol=1e-12)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert sorted(os.listdir(store.directory)) == ["manifest.json", "test.beton", "train.beton"]
    with pytest.raises(HarnessError, match=r'no split "trian"\s+HINT: Did you mean "train"'):
        store.split("trian")  # type: ignore[arg-type]


@pytest.mark.usefixtures("empty_cache")
def test_a_split_goes_to_another_process_by_its_path() -> None:
    split = small().split("train")
    content = pickle.dumps(split)
    assert len(content) < 500
    copy = pickle.loads(content)
    assert isinstance(copy, Split)
    np.testing.assert_array_equal(copy.images_BHWC, split.images_BHWC)


@pytest.mark.parametrize(
    "images",
    [
        np.random.default_rng(0).integers(0, 256, (1500, 3, 5, 3), dtype=np.uint8),
        np.full((2, 4, 4, 3), 255, dtype=np.uint8),
        np.zeros((1, 1, 1, 3), dtype=np.uint8),
    ],
)
def test_channel_statistics_equal_numpys(images: np.ndarray) -> None:
    mean, std = channel_statistics(images)
    scaled = images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(0), rtol=1e-13)
    np.testing.assert_allclose(std, scaled.std(0), rtol=1e-13, atol=0)


def test_converted_once_and_again_when_anything_changes(empty_cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(root / split / "a" / "0.png")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (root, *root.rglob("*")))

    def directory(**options: Any) -> Path:
        return prepare("imagefolder", path=root, **({"image_size_px": 8} | options)).directory

    first = directory()
    stores = first.parent
    made = (stores.stat().st_mtime_ns, (first / "train.beton").stat().st_ino)
    assert directory() == first
    # The second call writes nothing, not even a lock: a read-only cache can be used.
    assert made == (stores.stat().st_mtime_ns, (first / "train.beton").stat().st_ino)
    assert directory(force=True) == first
    assert (first / "train.beton").stat().st_ino != made[1]
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in (root, *root.rglob("*")))

    directories = {first, directory(image_size_px=4)}
    Image.new("RGB", (8, 8), (3, 2, 1)).save(root / "train" / "a" / "0.png")
    directories.add(directory())
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "a" / "1.png")
    directories.add(directory())
    directories.add(small().directory)
    directories.add(small(synthetic=SMALL | {"seed": 1}).directory)
    assert len(directories) == 6
    assert list_stores() == sorted(directories)
    assert all(verify(store) == [] for store in list_stores())
    assert empty_cache in first.parents


def test_no_stores_in_an_empty_cache(empty_cache: Path) -> None:
    assert list_stores() == []
    assert not empty_cache.exists()


def truncate(store: Path) -> None:
    os.truncate(store / "test.beton", 3000)


def flip_pixel(store: Path) -> None:
    flip(store / "train.beton", -2000)


def flip_header(store: Path) -> None:
    flip(store / "train.beton", 8)


def replace_by_other(store: Path) -> None:
    shutil.copy(small(synthetic=SMALL | {"train_images": 30}).directory / "train.beton", store)


def swap(store: Path) -> None:
    (store / "train.beton").rename(store / "x")
    (store / "test.beton").rename(store / "train.beton")
    (store / "x").rename(store / "test.beton")


def swap_stores(store: Path) -> None:
    other = small(synthetic=SMALL | {"seed": 1}).directory
    shutil.rmtree(store)
    shutil.copytree(other, store)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"test\.beton: truncated: 3000 bytes long"),
        (flip_pixel, r"train\.beton: damaged: its SHA-256 is not that of the manifest"),
        (flip_header, r"train\.beton: truncated: \d+ bytes .*SHA-256"),
        (replace_by_other, r"train\.beton: holds 30 images where the manifest says 40"),
        (swap, r"train\.beton and test\.beton are swapped"),
        (swap_stores, r"holds the data set synthetic-\w+"),
        (lambda store: (store / "train.beton").unlink(), r"train\.beton: is missing"),
        (lambda store: (store / "manifest.json").unlink(), r"manifest\.json: is missing"),
        (lambda store: (store / "manifest.json").write_text("{}"), r"manifest\.json: damaged"),
        (lambda store: (store / "manifest.json").write_text("["), r"manifest\.json: damaged"),
        (lambda store: (store / "manifest.json").write_bytes(b"\xff"), r"manifest\.json: damaged"),
        (lambda store: [(store / f).unlink() for f in ("test.beton", "train.beton")], r"train.*\n.*test"),
    ],
)
@pytest.mark.usefixtures("empty_cache")
def test_a_damaged_store_is_named_and_not_used(damage: Callable[[Path], Any], words: str) -> None:
    store = small().directory
    damage(store)
    for use in (small, lambda: open_store(store)):
        with pytest.raises(HarnessError, match=words) as caught:
            use()
        assert "--force" in str(caught.value.hint)
        assert str(store) in str(caught.value)
        assert str(caught.value).count("HINT") == 1
    assert verify(store) != []
    assert small(force=True).directory == store
    assert verify(store) == []


@pytest.mark.usefixtures("empty_cache")
def test_every_changed_byte_of_the_manifest_is_found() -> None:
    path = small().directory / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            meaning = json.loads(changed)
        except ValueError:
            meaning = None
        if meaning != json.loads(content):  # white space may change
            path.write_bytes(changed)
            assert verify(path.parent), f"byte {position}"


@pytest.mark.usefixtures("empty_cache")
def test_another_format_version_is_named() -> None:
    store = small()
    changed = Manifest(**{**vars(store.manifest), "format_version": 99})
    (store.directory / "manifest.json").write_text(changed.to_json())
    assert "format version is 99" in verify(store.directory)[0]


@pytest.mark.usefixtures("empty_cache")
def test_a_manifest_that_does_not_fit_its_files_is_named() -> None:
    store = small()
    changed = {**vars(store.manifest), "classes": ("a", "b"), "counts": {"train": 40, "test": 7}}
    (store.directory / "manifest.json").write_text(Manifest(**changed).to_json())
    text = "\n".join(verify(store.directory))
    assert "label 3 where there are 2 classes" in text
    assert "count, height and width are (20, 8, 8) where the manifest says (7, 8, 8)" in text


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarnessError, match="the cache folder cannot be written to"):
        small()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    store = small().directory
    shutil.rmtree(store)
    (store.parent / f"{store.name}.lock").unlink(missing_ok=True)
    (store.parent / f"{store.name}.lock").mkdir()
    with pytest.raises(HarnessError, match="the file cannot be locked"):
        small()


def test_wrong_input_leaves_no_store(empty_cache: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_text("no image")
    with pytest.raises(HarnessError, match=r"0\.png: not a readable image"):
        prepare("imagefolder", path=tmp_path)
    assert list_stores() == []
    assert [name for name in os.listdir(empty_cache / "data") if not name.endswith(".lock")] == []


@pytest.mark.usefixtures("empty_cache")
def test_processes_at_the_same_time_convert_once() -> None:
    children = [start(LARGE) for _ in range(3)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({out for out, _ in outputs}) == 1
    assert (
        sum(err.count("converting") for _, err in outputs) - sum(err.count("is converting") for _, err in outputs) == 1
    )
    assert verify(outputs[0][0].strip()) == []


@pytest.mark.parametrize(
    ("rank", "world_size", "said"),
    [
        (None, None, ["another process is converting this data"]),
        ("0", "2", ["another rank of this training, or another process, is converting this data"]),
        ("1", "2", []),
    ],
)
def test_of_the_ranks_that_wait_for_the_conversion_the_first_says_so(
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str | None,
    world_size: str | None,
    said: list[str],
) -> None:
    for name, value in (("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    directory = Path(small().directory)
    shutil.rmtree(directory)
    taken = threading.Event()

    def convert() -> None:
        with FileLock(directory.parent / f"{directory.name}.lock"):
            taken.set()
            time.sleep(0.3)

    other = threading.Thread(target=convert)
    other.start()
    assert taken.wait(10)
    small()
    other.join()
    told = [record.getMessage().partition(";")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert told == said


@pytest.mark.parametrize("moment", ["reading", "building", "replacing"])
def test_a_killed_conversion_leaves_nothing_half_done(empty_cache: Path, moment: str) -> None:
    stores = empty_cache / "data"
    force = moment == "replacing"
    if force:
        finished = start(LARGE)
        assert finished.communicate(timeout=120)
        assert finished.returncode == 0
    child = start(LARGE, force=force)
    try:
        pattern = "*.lock" if moment == "reading" else ".synthetic-*/*train.beton*"
        limit = time.monotonic() + 60
        while not any(stores.glob(pattern)):
            assert time.monotonic() < limit
            assert child.poll() is None, child.communicate()
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        assert child.returncode == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
    left = [name for name in os.listdir(stores) if name.startswith(".")]
    assert len(left) == (moment != "reading")
    assert [verify(store) for store in list_stores()] == ([[]] if force else [])
    store = prepare("synthetic", synthetic=LARGE, force=force)
    assert verify(store.directory) == []
    assert store.split("train").count == LARGE["train_images"]
    assert sorted(os.listdir(stores)) == sorted([store.directory.name, f"{store.directory.name}.lock"])


@pytest.mark.cifar10
def test_the_real_cifar10() -> None:
    """In the cache of the whole session: other tests use it too."""
    files = locate("cifar10", download=False).files
    before = [(file, file.stat().st_mtime_ns) for file in files]
    store = prepare("cifar10", download=False)
    manifest = store.manifest
    assert manifest.counts == {"train": 50_000, "test": 10_000}
    assert manifest.classes[0] == "airplane"
    np.testing.assert_allclose(np.array(manifest.mean) * 255, [125.307, 122.950, 113.865], atol=5e-4)
    np.testing.assert_allclose(np.array(manifest.std) * 255, [62.993, 62.089, 66.705], atol=5e-4)
    for name, each in (("train", 5_000), ("test", 1_000)):
        split = store.split(name)  # type: ignore[arg-type]
        assert split.images_BHWC.shape == (10 * each, 32, 32, 3)
        assert (np.bincount(split.labels_B) == each).all()
    assert before == [(file, file.stat().st_mtime_ns) for file in files]
