"""Class folders: what they give, and what is said about wrong ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from harness.data.images import fit
from harness.data.prepare import prepare
from harness.data.sources import locate
from harness.errors import HarnessError


def save(path: Path, seed: int = 0, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(["zebra", "ape", "Cat"]):
            for index in range(count):
                save(tmp_path / split / name / f"{index}.png", seed=10 * label + index)
    return tmp_path


def load(root: Path, image_size_px: int = 8) -> Any:
    return locate("imagefolder", path=root, image_size_px=image_size_px).load()


@pytest.mark.parametrize("test_folder", ["test", "val", "valid"])
def test_equals_torchvisions_image_folder(root: Path, test_folder: str) -> None:
    (root / "test").rename(root / test_folder)
    sets = load(root)
    assert sets.classes == ("Cat", "ape", "zebra")
    for split, folder in ((sets.train, "train"), (sets.test, test_folder)):
        reference = ImageFolder(root / folder)
        assert tuple(reference.classes) == sets.classes
        np.testing.assert_array_equal(split.images_BHWC, np.stack([np.asarray(image) for image, _ in reference]))
        assert split.labels_B.tolist() == reference.targets


def test_other_sizes_are_resized_and_other_formats_read(root: Path) -> None:
    path = save(root / "train" / "Cat" / "deep" / "wide.JPG", height=20, width=50)
    wanted_HWC = np.asarray(fit(Image.open(path), 8))
    sets = load(root)
    assert sets.train.labels_B.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    np.testing.assert_array_equal(sets.train.images_BHWC[3], wanted_HWC)


def test_what_is_left_out_is_counted(root: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", "list.TXT", "README"):
        (root / "train" / "Cat" / name).write_text("x")
    for folder in ("train/.cache", "train/__MACOSX", "train/Cat/__MACOSX"):
        (root / folder).mkdir()
    os.mkfifo(root / "train" / "Cat" / "pipe.png")
    (root / "test" / "0.png").write_text("x")
    empty_cache.mkdir()  # next to train and test
    for again in range(2):  # also where the converted copy is there
        assert len(prepare("imagefolder", path=root, image_size_px=8).split("train").labels_B) == 9, again
        told = "data: left out 12 files or folders: 6 hidden, 2 .txt, 1 without a suffix, 1 no regular file, "
        assert capsys.readouterr().err.startswith(told.rsplit(", 1 without", 1)[0])


@pytest.mark.timeout(20)
def test_links_are_followed_and_loops_are_not(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "more" / "x.png")
    save(elsewhere / "cat.png")
    ape = root / "train" / "ape"
    (ape / "linked").symlink_to(elsewhere / "more")
    (ape / "y.png").symlink_to(elsewhere / "cat.png")
    (root / "train" / "yak").symlink_to(elsewhere / "more")
    (root / "test" / "yak").mkdir()
    assert len(load(root).train.labels_B) == 9 + 2 + 1 == len(ImageFolder(root / "train").samples)
    (ape / "above").symlink_to(root / "train")
    (ape / "itself").symlink_to(ape)
    (ape / "linked-again").symlink_to(elsewhere / "more")  # else links among folders would multiply images
    located = locate("imagefolder", path=root, image_size_px=8)
    assert located.left_out == "3 files or folders: 3 link to a folder that was there before"
    assert len(located.load().train.labels_B) == 12


def test_what_lies_next_to_the_splits_is_counted(root: Path) -> None:
    save(root / "extra" / "Cat" / "0.png")
    (root / "loose.png").touch()
    save(root / "train" / "Cat" / "meta.h5.png").rename(root / "train" / "Cat" / "meta.h5")
    left_out = locate("imagefolder", path=root, image_size_px=8).left_out
    assert left_out == "3 files or folders: 2 next to train and test, 1 .h5"
    (root / "test").rename(root / "val")
    (root / "test").symlink_to(root / "nowhere")
    with pytest.raises(HarnessError, match=r"test: is a link to .*nowhere, which is not there"):
        load(root)


def test_all_broken_images_are_named(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "Cat" / "0.png").write_text("no image")
    with pytest.raises(HarnessError, match=r"^2 images cannot be used") as caught:
        load(root)
    assert all(f"{split}/Cat/0.png: not a readable image" in str(caught.value) for split in ("train", "test"))


def test_variables_in_paths_are_expanded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("PLACE", root.name)
    assert len(locate("imagefolder", path="~/$PLACE").files) == 15
    for path, words in (("$NOWHERE/x", r"\$NOWHERE is not set"), ("~nobody_here/x", "no user nobody_here")):
        with pytest.raises(HarnessError, match=words):
            locate("imagefolder", path=path)


def not_utf8(root: Path) -> None:
    for split in ("train", "test"):
        os.mkdir(os.fsencode(root / split) + b"/caf\xe9")


def decomposed(root: Path) -> None:
    save(root / "train" / "caf\u00e9" / "0.png")
    save(root / "test" / "cafe\u0301" / "0.png")


def dangling_links(root: Path) -> None:
    for index in range(25):
        (root / "train" / "ape" / f"link{index:02}.png").symlink_to(root / "annex" / str(index))


def broken_image(root: Path) -> None:
    path = root / "test" / "zebra" / "1.png"
    path.write_bytes(path.read_bytes()[:90])


def extra_test_class(root: Path) -> None:
    save(root / "test" / "zebr" / "0.png")


def missing_test_class(root: Path) -> None:
    for path in (root / "test" / "ape").iterdir():
        path.unlink()
    (root / "test" / "ape").rmdir()


def empty_train_class(root: Path) -> None:
    for path in (root / "train" / "ape").iterdir():
        path.unlink()


def empty_test(root: Path) -> None:
    for path in root.glob("test/*/*.png"):
        path.unlink()


def no_test(root: Path) -> None:
    (root / "test").rename(root / "testing")


def no_train(root: Path) -> None:
    (root / "train").rename(root / "training")


def no_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split).rename(root / f"old-{split}")
        save(root / split / "0.png")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (not_utf8, r'the class name "caf\\xe9" is not printable UTF-8'),
        (decomposed, "The given name has U\\+0301 COMBINING ACUTE ACCENT"),
        (dangling_links, r"(?s)21 errors.*link19\.png: is a link to .*dvc pull.*and 5 more links"),
        (broken_image, r"test/zebra/1\.png: not a readable image"),
        (extra_test_class, r'test/zebr: the class "zebr" has no folder in .*train\s+HINT: Did you mean "zebra"'),
        (missing_test_class, 'test: has no folder for the class "ape"'),
        (empty_train_class, "train/ape: holds no images"),
        (empty_test, "test: holds no images"),
        (no_test, "has no folder test or val or valid"),
        (no_train, "has no folder train"),
        (no_classes, "train: has no class folders"),
    ],
)
def test_wrong_folders_are_named(root: Path, break_it: Callable[[Path], None], words: str) -> None:
    break_it(root)
    with pytest.raises(HarnessError, match=words):
        load(root)


def test_an_empty_class_folder_stands_for_no_test_images(root: Path) -> None:
    for path in (root / "test" / "ape").iterdir():
        path.unlink()
    assert load(root).test.labels_B.tolist() == [0, 0, 2, 2]
