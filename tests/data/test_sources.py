"""Class folders, Parquet files, digits and synthetic patterns: what they give, and what is said about wrong ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from harness.data.images import ImageSet, fit
from harness.data.prepare import locate, prepare
from harness.errors import HarnessError


def png(seed: int = 0, height: int = 8, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if content is None else content)
    return path


# --- class folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(["zebra", "ape", "Cat"]):
            for index in range(count):
                save(tmp_path / split / name / f"{index}.png", png(10 * label + index))
    return tmp_path


def load_folders(root: Path) -> ImageSet:
    return locate("imagefolder", path=root).load(8)


@pytest.mark.parametrize("test_folder", ["test", "val", "valid"])
def test_equals_torchvisions_image_folder(root: Path, test_folder: str) -> None:
    (root / "test").rename(root / test_folder)
    sets = load_folders(root)
    assert sets.classes == ("Cat", "ape", "zebra")
    references = [ImageFolder(root / folder) for folder in ("train", test_folder)]
    assert sets.classes == tuple(references[0].classes)
    assert sets.train_count == len(references[0])
    wanted_BHWC = np.stack([np.asarray(image) for reference in references for image, _ in reference])
    np.testing.assert_array_equal(sets.images_BHWC, wanted_BHWC)
    assert sets.labels_B.tolist() == references[0].targets + references[1].targets


def test_other_sizes_are_resized_and_other_formats_read(root: Path) -> None:
    path = save(root / "train" / "Cat" / "deep" / "wide.JPG", png(0, 20, 50))
    sets = load_folders(root)
    assert sets.labels_B[:10].tolist() == [0] * 4 + [1] * 3 + [2] * 3
    np.testing.assert_array_equal(sets.images_BHWC[3], np.asarray(fit(Image.open(path), 8)))


def test_what_is_left_out_is_counted(root: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cat = root / "train" / "Cat"
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.txt", "list.TXT", "README", "meta.h5"):
        save(cat / name)
    for folder in ("train/.cache", "train/__MACOSX", "train/Cat/__MACOSX", "extra/Cat"):
        (root / folder).mkdir(parents=True)
    os.mkfifo(cat / "pipe.png")
    save(root / "test" / "0.png")
    empty_cache.mkdir()  # next to train and test
    for again in range(2):  # also where the converted copy is there
        assert len(prepare("imagefolder", path=root, image_size_px=8).split("train").labels_B) == 9, again
        printed = capsys.readouterr().err
        assert printed.startswith("data: left out 14 files or folders: 6 hidden, 2 ")
        kinds = ("2 next to train and test", "2 .txt", "1 without a suffix", "1 no regular file", "1 .h5")
        assert all(kind in printed for kind in (*kinds, "1 next to the class folders"))


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
    assert load_folders(root).train_count == 9 + 2 + 1 == len(ImageFolder(root / "train").samples)
    (ape / "above").symlink_to(root / "train")
    (ape / "itself").symlink_to(ape)
    (ape / "linked-again").symlink_to(elsewhere / "more")  # else links among folders would multiply images
    located = locate("imagefolder", path=root)
    assert located.left_out == "3 files or folders: 3 link to a folder that was there before"
    assert located.load(8).train_count == 12


def empty(root: Path, pattern: str) -> None:
    for path in root.glob(f"{pattern}/*.png"):
        path.unlink()


def not_utf8(root: Path) -> None:
    for split in ("train", "test"):
        os.mkdir(os.fsencode(root / split) + b"/caf\xe9")


def decomposed(root: Path) -> None:
    save(root / "train" / "caf\u00e9" / "0.png")
    save(root / "test" / "cafe\u0301" / "0.png")


def dangling_links(root: Path) -> None:
    for index in range(25):
        (root / "train" / "ape" / f"link{index:02}.png").symlink_to(root / "annex" / str(index))


def dangling_split(root: Path) -> None:
    (root / "test").rename(root / "val")
    (root / "test").symlink_to(root / "nowhere")


def broken_images(root: Path) -> None:
    for path in ("test/zebra/1.png", "train/Cat/0.png"):
        save(root / path, png()[:90])


def no_classes(root: Path) -> None:
    (root / "train").rename(root / "old")
    save(root / "train" / "0.png")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (not_utf8, r'the class name "caf\\xe9" is not printable UTF-8'),
        (decomposed, "The given name has U\\+0301 COMBINING ACUTE ACCENT"),
        (dangling_links, r"(?s)25 problems in .*the first 20: 20 errors.*: is a link to .*dvc pull.*find -L"),
        (dangling_split, r"test: is a link to .*nowhere, which is not there"),
        (
            broken_images,
            r"(?s)^2 images cannot be used.*Cat/0\.png: not a readable.*zebra/1\.png: not a readable image",
        ),
        (
            lambda root: (root / "test" / "ape").rename(root / "test" / "zebr"),
            r'(?s)test/zebr: the class "zebr" has no folder .*Did you mean "zebra".*test: has no folder for .* "ape"',
        ),
        (lambda root: empty(root, "train/ape"), "train/ape: holds no images"),
        (lambda root: empty(root, "test/*"), "test: holds no images"),
        (lambda root: (root / "test").rename(root / "testing"), "has no folder test or val or valid"),
        (lambda root: (root / "train").rename(root / "training"), "has no folder train"),
        (no_classes, "train: has no class folders"),
    ],
)
def test_wrong_folders_are_named(root: Path, break_it: Callable[[Path], Any], words: str) -> None:
    break_it(root)
    with pytest.raises(HarnessError, match=words):
        load_folders(root)


def test_an_empty_class_folder_stands_for_no_test_images(root: Path) -> None:
    empty(root, "test/ape")
    assert load_folders(root).labels_B[9:].tolist() == [0, 0, 2, 2]


# --- Parquet files

Rows = list[tuple[Any, Any]]


def rows(count: int, *, start: int = 0, classes: int = 3) -> Rows:
    return [(png(i), i % classes) for i in range(start, start + count)]


def write(
    folder: Path, *, train: list[Rows], test: list[Rows], image: str = "img", label: str = "label", names: Any = None
) -> Path:
    """Shards as Hugging Face's `datasets` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
    for split, shards in (("train", train), ("test", test)):
        for index, shard in enumerate(shards):
            images = [
                None if data is None else {"bytes": data, "path": f"{i}.png"} for i, (data, _) in enumerate(shard)
            ]
            image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns = {image: pa.array(images, image_type), label: pa.array([y for _, y in shard], pa.int64())}
            table = pa.table(columns, metadata={"huggingface": json.dumps(features)} if names else None)
            name = f"{split}-{index:05}-of-{len(shards):05}.parquet"
            pq.write_table(table, folder / name, row_group_size=3)
    return folder


def load_parquet(folder: Path) -> ImageSet:
    return locate("parquet", path=folder).load(8)


@pytest.mark.parametrize(("subfolder", "image"), [(".", "img"), ("plain_text", "image"), ("data", "img")])
def test_pixels_and_order_come_through(tmp_path: Path, subfolder: str, image: str) -> None:
    write(tmp_path / subfolder, train=[rows(7), rows(4, start=7)], test=[rows(3, start=11)], image=image)
    sets = load_parquet(tmp_path)
    assert sets.classes == ("0", "1", "2")
    assert sets.train_count == 11
    wanted = [np.asarray(Image.open(io.BytesIO(png(i)))) for i in range(14)]
    np.testing.assert_array_equal(sets.images_BHWC, np.stack(wanted))
    np.testing.assert_array_equal(sets.labels_B, np.arange(14) % 3)
    assert locate("parquet", path=tmp_path).load(5).images_BHWC.shape == (14, 5, 5, 3)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_plain_byte_columns_and_small_labels(tmp_path: Path, kind: pa.DataType) -> None:
    for split in ("train", "test"):
        columns = {"img": pa.array([png(0), png(1)], kind), "label": pa.array([0, 1], pa.uint8())}
        pq.write_table(pa.table(columns), tmp_path / f"{split}-all.parquet")
    sets = load_parquet(tmp_path)
    assert sets.labels_B.tolist() == [0, 1, 0, 1]
    assert sets.labels_B.dtype == np.int64


def test_class_names_come_from_the_schema(tmp_path: Path) -> None:
    names = ["cat", "dog", "fox", "owl"]
    assert load_parquet(write(tmp_path, train=[rows(4)], test=[rows(1)], names=names)).classes == tuple(names)


def test_the_columns_can_be_named(tmp_path: Path) -> None:
    """As CIFAR-100 has them."""
    for split, count in (("train", 6), ("validation", 3)):
        images = pa.array([{"bytes": png(i), "path": ""} for i in range(count)])
        labels = {"fine_label": [i % 3 for i in range(count)], "coarse_label": [i % 2 for i in range(count)]}
        pq.write_table(pa.table({"img": images, **labels}), tmp_path / f"{split}-00000-of-00001.parquet")
    located = [locate("parquet", path=tmp_path, label_column=f"{kind}_label") for kind in ("fine", "coarse")]
    assert [len(each.load(8).classes) for each in located] == [3, 2]
    assert located[0].options != located[1].options  # so that each has a converted copy of its own
    with pytest.raises(HarnessError, match=r"has no column label\n.*coarse_label: set data\.label_column.*fine_label"):
        load_parquet(tmp_path)
    with pytest.raises(HarnessError, match=r"has no column pixels\n .*set data\.image_column"):
        locate("parquet", path=tmp_path, image_column="pixels", label_column="fine_label").load(8)


def test_other_splits_are_named(tmp_path: Path) -> None:
    write(tmp_path, train=[rows(3)], test=[rows(1)])
    pq.write_table(pa.table({"img": [png()], "label": [0]}), tmp_path / "validation-00000-of-00001.parquet")
    left_out = locate("parquet", path=tmp_path).left_out
    assert left_out == "Parquet files of other splits: validation-00000-of-00001.parquet"


def mixed_shards(folder: Path) -> None:
    for shards in ([rows(2)], [rows(2), rows(2)]):
        write(folder, train=shards, test=[rows(1)])


def missing_shard(folder: Path) -> None:
    write(folder, train=[rows(2), rows(2), rows(2)], test=[rows(1)])
    (folder / "train-00001-of-00003.parquet").unlink()


def cut_file(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[rows(2)])
    path = folder / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def columns(folder: Path, images: Any, labels: Any) -> None:
    write(folder, train=[rows(1)], test=[rows(1)])
    pq.write_table(pa.table({"img": images, "label": labels}), folder / "train-00000-of-00001.parquet")


FIRST, CUT = png(0), png(3)[:-40]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"train": [rows(4), [*rows(3), (CUT, 0)]]}, r"train-00001-of-00002\.parquet, row 3: not a readable image"),
        ({"train": [[*rows(4), (CUT, 0)]], "test": [[(CUT, 1)]]}, r"(?s)2 images cannot .*row 4: .*test.*row 0: not a"),
        ({"test": [[*rows(2), (FIRST, 3)]]}, r"test-0.*, row 2: the label 3 is out of range: there are 3 classes"),
        ({"train": [[*rows(4), (FIRST, -2)]]}, r"train-0.*, row 4: the label -2 is out of range"),
        (
            {"train": [[*rows(4), (FIRST, 10**12)]]},
            r"row 4: the label 1000000000000 .*\n.* no training image .* label 3",
        ),
        ({"names": ["cat", "dog"]}, r"row 2: the label 2 is out of range: there are 2 .*\n.* the schema"),
        ({"train": [[(FIRST, 0), (png(1), None)]]}, r"train-0.*, row 1: the column label is empty"),
        ({"train": [[(FIRST, 0), (None, 1)]]}, r"train-0.*, row 1: the column img is empty"),
        ({"train": [[], []]}, r"train-00000-of-00002\.parquet.*: holds no images"),
        ({"image": "imgs"}, "has no column img or image\n  HINT: Its columns are imgs, label: .*image_column=imgs"),
        ({"label": "labels"}, "has no column label\n  HINT: Its columns are img, labels: .*label_column=labels"),
        ({"test": []}, r"holds no files train-\*\.parquet and test-\*\.parquet"),
        (lambda folder: columns(folder, [png()], ["cat"]), "the column label holds string, not whole numbers"),
        (lambda folder: columns(folder, [7], [0]), "the column img holds int64, not image bytes"),
        (lambda folder: columns(folder, [{"data": b""}], [0]), "img holds struct<data: binary>, not image bytes"),
        (missing_shard, r"the file train-00001-of-00003\.parquet is missing"),
        (mixed_shards, "files of different sets lie together"),
        (cut_file, r"test-00000-of-00001\.parquet: not a readable Parquet file"),
    ],
)
def test_wrong_parquet_files_are_named(tmp_path: Path, made: Any, words: str) -> None:
    made(tmp_path) if callable(made) else write(tmp_path, **{"train": [rows(4)], "test": [rows(2)], **made})
    with pytest.raises(HarnessError, match=words) as caught:
        load_parquet(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "BytesIO" not in str(caught.value)


# --- without files; whatever changes these sums changes the data that recorded results stand on

DIGITS_SHA256 = {
    8: "07948ae260791aecc037ca530282789abb6b001fe25816945e8c8b87c4afabac",
    32: "6686fec47028e1683c06f3f9ec2e2c507e50a550da7cec3466eeb02c54b2e075",
}
SYNTHETIC_SHA256 = "5d0f63986cfae188ef6bdaf379133f04d335edcffd9a186ff2ac1eb9ed4d1db9"


def digest(images: ImageSet) -> str:
    sha256 = hashlib.sha256()
    for part in (slice(images.train_count), slice(images.train_count, None)):
        sha256.update(np.ascontiguousarray(images.images_BHWC[part]))
        sha256.update(images.labels_B[part].astype("<i8"))
    return sha256.hexdigest()


@pytest.mark.parametrize("image_size_px", [8, 32])
def test_digits_are_always_the_same(image_size_px: int) -> None:
    images = locate("digits").load(image_size_px)
    assert digest(images) == DIGITS_SHA256[image_size_px]
    assert (images.train_count, len(images.labels_B)) == (1438, len(load_digits().target))


def test_synthetic_is_a_pure_function_of_its_options() -> None:
    options = {"train_images": 600, "test_images": 50, "num_classes": 7}
    first = locate("synthetic", synthetic=options).load(16)
    assert digest(first) == SYNTHETIC_SHA256
    assert digest(locate("synthetic", synthetic=options | {"seed": 1}).load(16)) != SYNTHETIC_SHA256
    more = locate("synthetic", synthetic=options | {"train_images": 700}).load(16)
    np.testing.assert_array_equal(more.images_BHWC[:600], first.images_BHWC[:600])
    assert locate("synthetic").load(4).images_BHWC.shape == (512 + 256, 4, 4, 3)
