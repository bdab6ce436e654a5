"""CIFAR-10: where it is found, its makers' two forms (made here in full size from a few images), and its download.

Every test that changes the published MD5s does so because the real archives are not at hand.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from harness.data import cifar10
from harness.data.cifar10 import BINARY_ARCHIVE, BINARY_FOLDER, CLASSES, PYTHON_ARCHIVE, PYTHON_FOLDER
from harness.data.images import ImageSet
from harness.data.prepare import locate, prepare
from harness.errors import HarnessError

FORMS = [BINARY_FOLDER, PYTHON_FOLDER, BINARY_ARCHIVE, PYTHON_ARCHIVE]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Path:
    """An empty `$HARNESS_DATA`, with an empty cache and no way to the network."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("HARNESS_DATA", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar10, "DOWNLOAD_URL", f"http://127.0.0.1:9/{BINARY_ARCHIVE}")
    return folder


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_files(folder: Path, *, train: int = 50_000, test: int = 10_000) -> Path:
    """One image again and again, the classes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        columns = {"img": pa.array([png()] * count), "label": pa.array(np.arange(count) % 10)}
        pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return folder


def class_folders(root: Path, names: tuple[str, ...]) -> Path:
    for split in ("train", "test"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(png())
    return root


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# --- where it is found


@pytest.mark.parametrize("download", [True, False])
def test_no_data_and_no_network(data: Path, empty_cache: Path, download: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "CIFAR-10").mkdir()
    with pytest.raises(HarnessError) as caught:
        locate("cifar10", download=download)
    text = str(caught.value)
    for place in (data, data / "CIFAR-10", empty_cache / "downloads" / BINARY_ARCHIVE):
        assert f"\n    {place}\n" in text
    assert "HINT: Set HARNESS_DATA" in text
    assert text.count("HINT") == 1
    assert ("the download failed" in text) == download
    assert download or not empty_cache.exists()
    monkeypatch.delenv("HARNESS_DATA")
    with pytest.raises(HarnessError, match=r"\$HARNESS_DATA, which is not set"):
        locate("cifar10", download=download)


@pytest.mark.parametrize("name", ["cifar10", "Cifar-10", "CIFAR_10", "."])
@pytest.mark.parametrize("form", ["parquet", "folders"])
def test_cifar10_is_found_in_folders_of_its_name_and_at_the_top(data: Path, name: str, form: str) -> None:
    # Only files with the right number of rows are taken for CIFAR-10 in a folder of another name.
    parquet_files(data / name) if form == "parquet" else class_folders(data / name, CLASSES)
    located = locate("cifar10", download=False)
    assert located.source == "cifar10"
    assert str((data / name).resolve()) in located.origin
    assert len(located.files) == (2 if form == "parquet" else 20)


def test_other_data_sets_at_the_top_are_passed_over(data: Path) -> None:
    parquet_files(data, train=30, test=10)
    class_folders(data, CLASSES[:4])
    class_folders(data / "cifar100", CLASSES)
    for _ in range(2):
        with pytest.raises(HarnessError, match="CIFAR-10 was not found"):
            locate("cifar10", download=False)
        for path in data.glob("*.parquet"):
            path.write_text("not Parquet at all")


@pytest.mark.parametrize(("split", "words"), [("train", "50,000 .* 4,999 cat, 5,001 deer"), ("test", "999 cat, 1,001")])
def test_the_classes_of_cifar10_are_counted(split: str, words: str) -> None:
    labels_B = np.arange(60_000) % 10
    labels_B[3 if split == "train" else 50_003] = 4
    with pytest.raises(HarnessError, match=f"here: has .*{words}"):
        cifar10.checked(ImageSet(np.zeros((60_000, 1, 1, 3), np.uint8), labels_B, 50_000, CLASSES), Path("here"))


def test_wrong_class_folders_called_cifar10_are_named(data: Path) -> None:
    root = class_folders(data / "cifar10", CLASSES)
    with pytest.raises(HarnessError, match="has 10 images in its train split"):
        locate("cifar10", download=False).load(32)
    Image.new("RGB", (28, 28)).save(root / "test" / "frog" / "0.png")
    with pytest.raises(HarnessError, match=r"test/frog/0\.png: the image is 28×28 pixels where 32×32"):
        locate("cifar10", download=False).load(32)
    with pytest.raises(HarnessError, match="train: holds no CIFAR-10"):
        locate("cifar10", path=root / "train")


def test_parquet_with_numbered_labels_gets_the_class_names(data: Path) -> None:
    sets = locate("cifar10", path=parquet_files(data / "any")).load(32)
    assert sets.classes == CLASSES
    assert sets.images_BHWC[0, 0, 0].tolist() == [10, 200, 30]


# --- its makers' forms


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """A folder with both forms, extracted and as archives, with their pixels and labels. 370 MB, removed at the end.

    60,000 images: five of noise for each batch, over and over, so that they compress well.
    """
    base = np.random.default_rng(0).integers(0, 256, (6, 5, 3, 32, 32), dtype=np.uint8)
    pixels = base[:, np.arange(10_000) % 5].reshape(60_000, 3, 32, 32)
    labels_B = np.concatenate([np.random.default_rng(b).permutation(10_000) % 10 for b in range(6)])
    root = tmp_path_factory.mktemp("cifar")
    for folder, archive in ((BINARY_FOLDER, BINARY_ARCHIVE), (PYTHON_FOLDER, PYTHON_ARCHIVE)):
        (root / folder).mkdir()
        for index, name in enumerate(cifar10.BATCHES):
            part = slice(10_000 * index, 10_000 * (index + 1))
            if folder == BINARY_FOLDER:
                records = np.concatenate([labels_B[part, None].astype(np.uint8), pixels[part].reshape(10_000, -1)], 1)
                (root / folder / f"{name}.bin").write_bytes(records.tobytes())
            else:
                batch = {"labels": labels_B[part].tolist(), "data": pixels[part].reshape(10_000, -1)}
                (root / folder / name).write_bytes(pickle.dumps(batch))
        (root / folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
        with gzip.open(root / archive, "wb", compresslevel=1) as file, tarfile.open(mode="w", fileobj=file) as tar:
            tar.add(root / folder, arcname=folder)
    yield root, pixels, labels_B
    shutil.rmtree(root)


@pytest.fixture
def our_md5(copies: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, folder = torchvision.datasets.CIFAR10, copies[0] / PYTHON_FOLDER
    files = [[name, md5(folder / name)] for name in cifar10.BATCHES]
    monkeypatch.setattr(reference, "train_list", files[:5])
    monkeypatch.setattr(reference, "test_list", files[5:])
    monkeypatch.setattr(reference, "meta", {**reference.meta, "md5": md5(folder / "batches.meta")})
    for name in cifar10.ARCHIVE_MD5:
        monkeypatch.setitem(cifar10.ARCHIVE_MD5, name, md5(copies[0] / name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("our_md5")
def test_every_form_gives_the_same_images(
    copies: tuple[Path, np.ndarray, np.ndarray], form: str, data: Path, empty_cache: Path
) -> None:
    root, pixels, true_labels = copies
    (data / "CIFAR-10").mkdir()
    (data / "CIFAR-10" / form).symlink_to(root / form)
    located = locate("cifar10", download=False)
    assert form in located.origin
    sets = located.load(32)
    assert sets.classes == CLASSES
    assert (sets.train_count, sets.labels_B.dtype) == (50_000, np.int64)
    images_BCHW = sets.images_BHWC.transpose(0, 3, 1, 2)
    assert np.array_equal(images_BCHW[::7], pixels[::7])
    assert np.array_equal(images_BCHW[-5:], pixels[-5:])
    np.testing.assert_array_equal(sets.labels_B, true_labels)
    assert list(empty_cache.rglob("*batches*")) == []  # what was extracted is gone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.usefixtures("our_md5")
def test_damage_is_found_and_named(copies: tuple[Path, Any, Any], form: str, damage: str, data: Path) -> None:
    victim = place = data / form
    if form in (BINARY_FOLDER, PYTHON_FOLDER):
        shutil.copytree(copies[0] / form, place, copy_function=os.symlink)
        victim = place / f"{cifar10.BATCHES[3]}{'.bin' if form == BINARY_FOLDER else ''}"
    else:
        place.symlink_to(copies[0] / form)
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if damage != "missing":
        content[3073 * 8] ^= 128  # in the binary form a label
        victim.write_bytes(content if damage == "flipped" else content[:-100])
    with pytest.raises(HarnessError) as caught:
        prepare("cifar10", path=data, download=False)
    # In the binary form there is no checksum of a file: of a changed label the folder is said.
    named = place if (form, damage) == (BINARY_FOLDER, "flipped") else victim
    assert str(named) in str(caught.value) or place == victim
    assert caught.value.hint


def test_nothing_is_unpickled_without_its_published_checksum(data: Path, tmp_path: Path) -> None:
    assert cifar10.ARCHIVE_MD5[PYTHON_ARCHIVE] == torchvision.datasets.CIFAR10.tgz_md5
    trace = tmp_path / "it-ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    evil = pickle.dumps(Evil())
    folder = data / PYTHON_FOLDER
    folder.mkdir()
    for name in (*cifar10.BATCHES, "batches.meta"):
        (folder / name).write_bytes(evil)
    with pytest.raises(HarnessError, match=r"data_batch_1: damaged: its MD5 is \w+, published is c99cafc1"):
        locate("cifar10").load(32)
    with tarfile.open(data / PYTHON_ARCHIVE, "w:gz") as tar:
        tar.add(folder, arcname=PYTHON_FOLDER)
    with pytest.raises(HarnessError, match=r"python\.tar\.gz: damaged: its MD5 is \w+, published is c58f3010"):
        locate("cifar10", path=data / PYTHON_ARCHIVE).load(32)
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists(), "the pickle must be one that does run when it is loaded"


# --- download


@pytest.fixture
def address(data: Path) -> Iterator[str]:
    """Of a real web server on this machine, which serves the files in `data`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/cut_short":  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(bytes(1000))
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(data))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_into_the_cache_once(
    address: str, data: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / BINARY_ARCHIVE).write_bytes(b"stands for the archive")
    monkeypatch.setitem(cifar10.ARCHIVE_MD5, BINARY_ARCHIVE, md5(data / BINARY_ARCHIVE))
    monkeypatch.delenv("HARNESS_DATA")
    monkeypatch.setattr(cifar10, "DOWNLOAD_URL", f"{address}/{BINARY_ARCHIVE}")
    for _ in range(2):
        located = locate("cifar10")
        (data / BINARY_ARCHIVE).unlink(missing_ok=True)
    assert located.files == (empty_cache / "downloads" / BINARY_ARCHIVE,)
    assert located.files[0].read_bytes() == b"stands for the archive"
    assert f"downloading {address}/{BINARY_ARCHIVE} (0 MB)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wrong_content", "the download is damaged: its MD5"),
        ("not_there", "the download failed: .*404"),
        ("cut_short", "the download (failed|is damaged)"),
        ("no_server", "the download failed: .*refused"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    kind: str, words: str, address: str, data: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "wrong_content").write_bytes(b"something else")
    if kind != "no_server":
        monkeypatch.setattr(cifar10, "DOWNLOAD_URL", f"{address}/{kind}")
    with pytest.raises(HarnessError, match=words):
        locate("cifar10")
    assert os.listdir(empty_cache / "downloads") in ([], [f"{BINARY_ARCHIVE}.lock"])
