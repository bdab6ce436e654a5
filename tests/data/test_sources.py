"""Finding the input of a source: names, paths, and where CIFAR-10 may lie."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness.data import archives
from harness.data.cifar10 import CIFAR10_CLASSES, checked, is_cifar10_name
from harness.data.imagesets import ImageSets, LabelledImages
from harness.data.paths import cache_directory, data_directories, writable_cache_directory
from harness.data.sources import SOURCES, locate
from harness.errors import HarnessError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Path:
    """An empty `$HARNESS_DATA`, with an empty cache and no way to the network."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("HARNESS_DATA", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(archives, "DOWNLOAD_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
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


@pytest.mark.parametrize("source", ["cifar", "cifar-10", "image_folder", "", "CIFAR10"])
def test_an_unknown_source_is_answered_with_a_name(source: str) -> None:
    with pytest.raises(HarnessError, match=f'unknown data source "{source}"') as caught:
        locate(source)
    assert any(name in str(caught.value.hint) for name in SOURCES)


@pytest.mark.parametrize("size", [0, -1, 3.5, "32", True])
def test_a_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(HarnessError, match="image_size_px must be a whole number"):
        locate("digits", image_size_px=size)


def test_paths_where_they_do_not_belong_or_are_missing(data: Path) -> None:
    for source in ("digits", "synthetic"):
        with pytest.raises(HarnessError, match="reads no files"):
            locate(source, path=data)
    for source in ("parquet", "imagefolder"):
        with pytest.raises(HarnessError, match="needs a path"):
            locate(source)
        with pytest.raises(HarnessError, match="nowhere: there is no such file or folder") as caught:
            locate(source, path="nowhere")
        assert str(data / "nowhere") in str(caught.value)
        with pytest.raises(HarnessError, match=r"^/nowhere/at/all: there is no such file or folder\n"):
            locate(source, path="/nowhere/at/all")
    (data / "file").write_text("x")
    for source in SOURCES[:3]:
        with pytest.raises(HarnessError, match="file: h"):
            locate(source, path="file")


def test_a_relative_path_is_looked_for_in_the_data_folders(data: Path) -> None:
    class_folders(data / "mine", ("a", "b"))
    assert locate("imagefolder", path="mine").load().classes == ("a", "b")


def test_data_folders_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("HARNESS_DATA", os.pathsep.join([str(tmp_path), "", str(tmp_path / "b")]))
    assert data_directories() == [tmp_path, tmp_path / "b"]
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "none"))
    with pytest.raises(HarnessError, match=r"\$HARNESS_DATA names a folder that is not there: .*none"):
        data_directories()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HARNESS_CACHE", "~/c")
    assert cache_directory("x", "y") == tmp_path / "c" / "x" / "y"
    monkeypatch.delenv("HARNESS_CACHE")
    assert cache_directory() == tmp_path / ".cache" / "harness"
    assert not cache_directory().exists()
    assert writable_cache_directory("z").is_dir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarnessError, match="the cache folder cannot be written to") as caught:
        writable_cache_directory("z")
    assert "HARNESS_CACHE" in str(caught.value.hint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_cache_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    with pytest.raises(HarnessError, match="permission denied"):
        writable_cache_directory()


@pytest.mark.parametrize("name", ["cifar10", "cifar-10", "CIFAR10", "CIFAR-10", "Cifar_10"])
def test_names_of_cifar10(name: str) -> None:
    assert is_cifar10_name(name)
    assert not is_cifar10_name(name + "0")


@pytest.mark.parametrize("download", [True, False])
def test_no_data_and_no_network(data: Path, empty_cache: Path, download: bool) -> None:
    (data / "CIFAR-10").mkdir()
    with pytest.raises(HarnessError) as caught:
        locate("cifar10", download=download)
    text = str(caught.value)
    for place in (data, data / "CIFAR-10", empty_cache / "downloads" / archives.BINARY_ARCHIVE):
        assert f"\n    {place}\n" in text
    assert "HINT: Set HARNESS_DATA" in text
    assert text.count("HINT") == 1
    assert ("the download failed" in text) == download
    if not download:
        assert not empty_cache.exists()


def test_no_data_folder_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA")
    with pytest.raises(HarnessError, match=r"\$HARNESS_DATA, which is not set"):
        locate("cifar10", download=False)


@pytest.mark.parametrize("name", ["cifar10", "Cifar-10", "."])
@pytest.mark.parametrize("form", ["parquet", "folders"])
def test_cifar10_is_found_in_folders_of_its_name_and_at_the_top(data: Path, name: str, form: str) -> None:
    if form == "parquet":
        # Only files with the right number of rows are taken for CIFAR-10 in a folder of another name.
        parquet_files(data / name)
    else:
        class_folders(data / name, CIFAR10_CLASSES)
    located = locate("cifar10", download=False)
    assert located.source == "cifar10"
    assert str((data / name).resolve()) in located.origin
    assert len(located.files) == (2 if form == "parquet" else 20)


def test_other_data_sets_at_the_top_are_passed_over(data: Path) -> None:
    parquet_files(data, train=30, test=10)
    class_folders(data, CIFAR10_CLASSES[:4])
    with pytest.raises(HarnessError, match="CIFAR-10 was not found"):
        locate("cifar10", download=False)
    for path in data.glob("*.parquet"):
        path.write_text("not Parquet at all")
    with pytest.raises(HarnessError, match="CIFAR-10 was not found"):
        locate("cifar10", download=False)


def test_the_first_data_folder_wins(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = class_folders(tmp_path / "first" / "cifar10", CIFAR10_CLASSES)
    class_folders(data / "cifar10", CIFAR10_CLASSES)
    monkeypatch.setenv("HARNESS_DATA", f"{first.parent}{os.pathsep}{data}")
    assert str(first) in locate("cifar10", download=False).origin


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"train": 1_234, "test": 20}, "has 1,234 images in its train split, CIFAR-10 has 50,000"),
        ({"train": 9, "test": 20}, "the label 9 is out of range: there are 9 classes"),
        ({"train": 9, "test": 8}, "has 9 classes, CIFAR-10 has 10"),
    ],
)
def test_what_is_called_cifar10_must_be_it(data: Path, numbers: dict[str, int], words: str) -> None:
    parquet_files(data / "cifar10", **numbers)
    with pytest.raises(HarnessError, match=words) as caught:
        locate("cifar10", download=False).load()
    assert str(data / "cifar10") in str(caught.value)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", r'here: has 4,999 images of the class "cat" in its train split, CIFAR-10 has 5,000'),
        ("test", r'here: has 999 images of the class "cat" in its test split, CIFAR-10 has 1,000'),
        ("count", "here: has 9,999 images in its test split, CIFAR-10 has 10,000"),
    ],
)
def test_the_classes_of_cifar10_are_counted(split: str, words: str) -> None:
    labels = {"train": np.arange(50_000) % 10, "test": np.arange(10_000) % 10}
    if split == "count":
        labels["test"] = labels["test"][:-1]
    else:
        labels[split][3] = 4
    train, test = (LabelledImages(np.zeros((len(y), 1, 1, 3), np.uint8), y) for y in labels.values())
    with pytest.raises(HarnessError, match=words):
        checked(ImageSets(train, test, CIFAR10_CLASSES), Path("here"))


def test_wrong_class_folders_called_cifar10_are_named(data: Path) -> None:
    root = class_folders(data / "cifar10", CIFAR10_CLASSES)
    with pytest.raises(HarnessError, match="has 10 images in its train split"):
        locate("cifar10", download=False).load()
    Image.new("RGB", (28, 28)).save(root / "test" / "frog" / "0.png")
    with pytest.raises(HarnessError, match=r"test/frog/0\.png: the image is 28×28 pixels where 32×32"):
        locate("cifar10", download=False).load()
    class_folders(root, ("airship",))
    (root / "test" / "frog" / "0.png").write_bytes(png())
    with pytest.raises(HarnessError, match="has 11 classes, CIFAR-10 has 10"):
        locate("cifar10", path=root).load()
    with pytest.raises(HarnessError, match="train: holds no CIFAR-10"):
        locate("cifar10", path=root / "train")


def test_parquet_with_numbered_labels_gets_the_class_names(data: Path) -> None:
    sets = locate("cifar10", path=parquet_files(data / "any")).load()
    assert sets.classes == CIFAR10_CLASSES
    assert sets.train.images_BHWC[0, 0, 0].tolist() == [10, 200, 30]
