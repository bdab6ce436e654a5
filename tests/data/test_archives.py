"""CIFAR-10 in its makers' two forms, made here in full size from a few images; and its download.

Every test that changes the published MD5s does so because the real archives are not at hand: the reading is the
same, and the real numbers are compared with torchvision's.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import pickletools
import shutil
import struct
import tarfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import archives
from harness.data.sources import locate
from harness.errors import HarnessError

BIN, PY = archives.BINARY_FOLDER, archives.PYTHON_FOLDER


def python2_pickle(pixels: bytes, labels: list[int]) -> bytes:
    """What Python 2's cPickle wrote in 2009, opcode by opcode: a dictionary of batch_label, labels and data."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    chunks = b"".join(
        b"(" + b"".join(b"K" + bytes([label]) for label in labels[start : start + 1000]) + b"e"
        for start in range(0, len(labels), 1000)
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a\x87Rq\x0b"
        b"(K\x01M\x10'M\x00\x0c\x86q\x0ccnumpy\ndtype\nq\x0dU\x02u1q\x0eK\x00K\x01\x87Rq\x0f"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89"
        + b"T"
        + struct.pack("<i", len(pixels))
        + pixels
        + b"tq\x11b"
    )
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03"
        + text(b"labels") + b"q\x04]q\x05" + chunks + text(b"data") + b"q\x06" + array
        + text(b"filenames") + b"]" + text(b"leptodactylus_pentadactylus_s_000004.png") + b"au."
    )  # fmt: skip


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """60,000 images: five of noise for each batch, over and over, so that they compress well."""
    base = np.random.default_rng(0).integers(0, 256, (6, 5, 3, 32, 32), dtype=np.uint8)
    return base[:, np.arange(10_000) % 5].reshape(60_000, 3, 32, 32)


@pytest.fixture(scope="module")
def true_labels() -> np.ndarray:
    labels_B = np.concatenate([np.random.default_rng(b).permutation(10_000) % 10 for b in range(6)])
    assert (np.bincount(labels_B[:50_000]) == 5_000).all()
    return labels_B


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray, true_labels: np.ndarray) -> Iterator[Path]:
    """A folder with both forms, extracted and as archives. 370 MB, so it goes when this module is done."""
    root = tmp_path_factory.mktemp("cifar")
    for folder, archive in ((BIN, archives.BINARY_ARCHIVE), (PY, archives.PYTHON_ARCHIVE)):
        (root / folder).mkdir()
        for index, name in enumerate(archives.BATCHES[folder]):
            part = slice(10_000 * index, 10_000 * (index + 1))
            if folder == BIN:
                labelled = np.concatenate(
                    [true_labels[part, None].astype(np.uint8), pixels[part].reshape(10_000, -1)], axis=1
                )
                (root / folder / name).write_bytes(labelled.tobytes())
            else:
                (root / folder / name).write_bytes(python2_pickle(pixels[part].tobytes(), true_labels[part].tolist()))
        meta = {"label_names": list("abcdefghij")}
        (root / folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
        with gzip.open(root / archive, "wb", compresslevel=1) as file, tarfile.open(mode="w", fileobj=file) as tar:
            tar.add(root / folder, arcname=folder)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def our_md5(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in archives.ARCHIVE_MD5:
        monkeypatch.setitem(archives.ARCHIVE_MD5, name, md5(copies / name))
    for name in archives.PYTHON_BATCH_MD5:
        monkeypatch.setitem(archives.PYTHON_BATCH_MD5, name, md5(copies / PY / name))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_published_checksums_are_torchvisions() -> None:
    reference = torchvision.datasets.CIFAR10
    assert dict(reference.train_list + reference.test_list) == archives.PYTHON_BATCH_MD5
    assert archives.ARCHIVE_MD5[reference.filename] == reference.tgz_md5


@pytest.mark.parametrize("form", [BIN, PY, archives.BINARY_ARCHIVE, archives.PYTHON_ARCHIVE])
@pytest.mark.usefixtures("our_md5")
def test_every_form_gives_the_same_images(
    copies: Path,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pixels: np.ndarray,
    true_labels: np.ndarray,
) -> None:
    folder = tmp_path / "CIFAR-10"
    folder.mkdir()
    (folder / form).symlink_to(copies / form)
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    located = locate("cifar10", download=False)
    assert form in located.origin
    sets = located.load()
    assert sets.classes[:3] == ("airplane", "automobile", "bird")
    images_BCHW = np.concatenate([sets.train.images_BHWC, sets.test.images_BHWC]).transpose(0, 3, 1, 2)
    assert np.array_equal(images_BCHW[::7], pixels[::7])
    assert np.array_equal(images_BCHW[-5:], pixels[-5:])
    np.testing.assert_array_equal(np.concatenate([sets.train.labels_B, sets.test.labels_B]), true_labels)
    assert sets.train.labels_B.dtype == np.int64


@pytest.mark.filterwarnings("ignore")  # torchvision does unpickle, and numpy deprecates what it finds
def test_the_python_form_made_here_is_read_by_torchvision_alike(
    copies: Path, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, true_labels: np.ndarray
) -> None:
    reference = torchvision.datasets.CIFAR10
    files = {name: md5(copies / PY / name) for name in archives.PYTHON_BATCH_MD5}
    monkeypatch.setattr(reference, "train_list", list(files.items())[:5])
    monkeypatch.setattr(reference, "test_list", list(files.items())[5:])
    monkeypatch.setattr(reference, "meta", {**reference.meta, "md5": md5(copies / PY / "batches.meta")})
    test = reference(copies, train=False)
    np.testing.assert_array_equal(test.data, pixels[50_000:].transpose(0, 2, 3, 1))
    assert test.targets == true_labels[50_000:].tolist()


@pytest.mark.parametrize("form", [BIN, PY, archives.BINARY_ARCHIVE, archives.PYTHON_ARCHIVE])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.usefixtures("our_md5")
def test_damage_is_found_and_named(copies: Path, form: str, damage: str, tmp_path: Path) -> None:
    place = tmp_path / form
    if form in (BIN, PY):
        shutil.copytree(copies / form, place, copy_function=os.symlink)
        victim = place / archives.BATCHES[form][3]
    else:
        victim = place
        os.symlink(copies / form, place)
    content = bytearray(victim.read_bytes())
    victim.unlink()
    if damage == "flipped":
        content[3073 * 8] ^= 128  # in the binary form a label
        victim.write_bytes(content)
    elif damage == "truncated":
        victim.write_bytes(content[:-100])
    with pytest.raises(HarnessError) as caught:
        locate("cifar10", path=tmp_path, download=False).load()
    if damage != "missing" or form in (BIN, PY):
        assert str(victim) in str(caught.value)
    assert caught.value.hint


def test_checksums_come_before_reading(copies: Path) -> None:
    with pytest.raises(HarnessError, match=r"data_batch_1: damaged: its MD5 is \w+, published is c99cafc1"):
        archives.read_cifar10_folder(copies / PY)
    with pytest.raises(HarnessError, match=r"python\.tar\.gz: damaged: its MD5 is \w+, published is c58f3010"):
        archives.read_cifar10_archive(copies / archives.PYTHON_ARCHIVE)


@pytest.mark.parametrize("kind", ["alone", "before_a_true_batch", "protocol_4"])
def test_a_pickle_that_runs_code_is_refused_and_never_run(
    kind: str, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its MD5 stands in the table."""
    trace = tmp_path / "it-ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    evil = pickle.dumps(Evil(), protocol=4 if kind == "protocol_4" else 2)
    true = (copies / PY / "data_batch_1").read_bytes()
    content = evil[:-1] + b"0" + true[2:] if kind == "before_a_true_batch" else evil
    list(pickletools.genops(content))  # well formed
    folder = tmp_path / PY
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(content)
    monkeypatch.setitem(archives.PYTHON_BATCH_MD5, "data_batch_1", hashlib.md5(content).hexdigest())
    with pytest.raises(HarnessError, match="data_batch_1: not a CIFAR-10 batch"):
        archives.read_cifar10_folder(folder)
    assert not trace.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy deprecates what it finds in a true batch
        pickle.loads(content, encoding="latin1")
    assert trace.exists(), "the pickle must be one that does run when it is loaded"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused(content: bytes) -> None:
    for prefix in (b"", b"\x80\x02}q\x01(U\x06labelsq\x04]q\x05("):
        with pytest.raises(HarnessError, match="not a CIFAR-10 batch"):
            archives.parse_python_batch(prefix + content, "here")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A real web server on this machine; gives its address and the list of what was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form: str, *values: Any) -> None:
            asked.append(form % values)

        def do_GET(self) -> None:
            if self.path == "/cut.bin":  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(bytes(1000))
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_download_into_the_cache_once(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    name = archives.BINARY_ARCHIVE
    monkeypatch.setitem(archives.ARCHIVE_MD5, name, md5(copies / name))
    with serving(copies) as (address, asked):
        monkeypatch.setattr(archives, "DOWNLOAD_URL", f"{address}/{name}")
        for _ in range(2):
            located = locate("cifar10")
        assert located.files == (tmp_path / "downloads" / name,)
        assert len(asked) == 1
        assert name in capsys.readouterr().err
    assert md5(located.files[0]) == md5(copies / name)


@pytest.mark.parametrize("kind", ["wrong_content", "not_there", "cut_short", "no_server", "no_url"])
def test_a_download_that_fails_leaves_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file.bin").write_bytes(b"something else")
    (tmp_path / "target").mkdir()
    target = tmp_path / "target" / "file.bin"
    words = {
        "wrong_content": "the download is damaged: its MD5",
        "not_there": "the download failed: .*404",
        "cut_short": "the download (failed|is damaged)",
        "no_server": "the download failed: .*refused",
        "no_url": "the download failed: unknown url type",
    }[kind]
    with serving(tmp_path / "served") as (address, _):
        url = {"not_there": f"{address}/none", "cut_short": f"{address}/cut.bin", "no_url": "cifar"}.get(
            kind, f"{address}/file.bin"
        )
        if kind != "no_server":
            with pytest.raises(HarnessError, match=words):
                archives.download(url, target, md5="0" * 32)
    if kind == "no_server":
        with pytest.raises(HarnessError, match=words):
            archives.download(url, target, md5="0" * 32)
    assert [entry for entry in os.listdir(target.parent) if not entry.endswith(".lock")] == []


def test_an_archive_without_its_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / archives.BINARY_ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("other"), io.BytesIO())
    monkeypatch.setitem(archives.ARCHIVE_MD5, path.name, md5(path))
    with pytest.raises(HarnessError, match=r"binary\.tar\.gz: cannot be read: .*data_batch_1"):
        archives.read_cifar10_archive(path)
