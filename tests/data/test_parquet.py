"""Parquet files: what they give, and what is said about wrong ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness.data.sources import locate
from harness.errors import HarnessError

Rows = list[tuple[Any, Any]]


def png(value: int, height: int = 8, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    random = np.random.default_rng(value)
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(rows: Rows, *, image: str = "img", label: str = "label", names: list[str] | None = None) -> pa.Table:
    images = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, (data, _) in enumerate(rows)]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    made = pa.table({image: pa.array(images, image_type), label: pa.array([y for _, y in rows], pa.int64())})
    if names is None:
        return made
    features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(features)})


def write(folder: Path, *, train: list[Rows], test: list[Rows], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", train), ("test", test)):
        for index, rows in enumerate(shards):
            name = f"{split}-{index:05}-of-{len(shards):05}.parquet"
            pq.write_table(table(rows, **options), folder / name, row_group_size=3)
    return folder


def rows(count: int, *, start: int = 0, classes: int = 3) -> Rows:
    return [(png(i), i % classes) for i in range(start, start + count)]


def load(folder: Path, image_size_px: int = 8) -> Any:
    return locate("parquet", path=folder, image_size_px=image_size_px).load()


@pytest.mark.parametrize("subfolder", [".", "plain_text", "data"])
@pytest.mark.parametrize("image", ["img", "image"])
def test_pixels_and_order_come_through(tmp_path: Path, subfolder: str, image: str) -> None:
    write(tmp_path / subfolder, train=[rows(7), rows(4, start=7)], test=[rows(3, start=11)], image=image)
    sets = load(tmp_path)
    assert sets.classes == ("0", "1", "2")
    for split, start, count in ((sets.train, 0, 11), (sets.test, 11, 3)):
        wanted = [np.asarray(Image.open(io.BytesIO(png(i)))) for i in range(start, start + count)]
        np.testing.assert_array_equal(split.images_BHWC, np.stack(wanted))
        np.testing.assert_array_equal(split.labels_B, np.arange(start, start + count) % 3)
    assert load(tmp_path, 5).test.images_BHWC.shape == (3, 5, 5, 3)


def test_plain_byte_columns_and_small_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        columns = {"img": pa.array([png(0), png(1)], pa.large_binary()), "label": pa.array([0, 1], pa.uint8())}
        pq.write_table(pa.table(columns), tmp_path / f"{split}-all.parquet")
    sets = load(tmp_path)
    assert sets.train.labels_B.tolist() == [0, 1]
    assert sets.train.labels_B.dtype == np.int64


def test_class_names_come_from_the_schema_or_the_folder(tmp_path: Path) -> None:
    names = ["cat", "dog", "fox", "owl"]
    sets = load(write(tmp_path / "a", train=[rows(4)], test=[rows(1)], names=names))
    assert sets.classes == tuple(names)
    ten = {"train": [rows(10, classes=10)], "test": [rows(1)]}
    assert load(write(tmp_path / "cifar-10", **ten)).classes[9] == "truck"
    assert load(write(tmp_path / "other", **ten)).classes[9] == "9"


def test_the_columns_can_be_said(tmp_path: Path) -> None:
    """As CIFAR-100 has them."""
    for split, count in (("train", 6), ("validation", 3)):
        images = pa.array([{"bytes": png(i), "path": ""} for i in range(count)])
        labels = {"fine_label": [i % 3 for i in range(count)], "coarse_label": [i % 2 for i in range(count)]}
        pq.write_table(pa.table({"img": images, **labels}), tmp_path / f"{split}-00000-of-00001.parquet")
    located = [locate("parquet", path=tmp_path, label_column=f"{kind}_label") for kind in ("fine", "coarse")]
    assert [len(each.load().classes) for each in located] == [3, 2]
    assert located[0].options != located[1].options  # so that each has a converted copy of its own
    with pytest.raises(HarnessError, match=r"has no column label\n.*coarse_label: set data\.label_column.*fine_label"):
        load(tmp_path)
    with pytest.raises(HarnessError, match=r"has no column pixels\n .*set data\.image_column"):
        locate("parquet", path=tmp_path, image_column="pixels", label_column="fine_label").load()


def test_images_without_bytes_and_other_splits_are_told(tmp_path: Path) -> None:
    write(tmp_path, train=[rows(3)], test=[rows(1)])
    pq.write_table(table(rows(2)), tmp_path / "validation-00000-of-00001.parquet")
    located = locate("parquet", path=tmp_path, image_size_px=8)
    assert located.left_out == "Parquet files of other splits: validation-00000-of-00001.parquet"
    images = pa.array([{"data": png(0), "path": ""}])
    pq.write_table(pa.table({"img": images, "label": [0]}), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(HarnessError, match="the column img has the fields data, path, and no bytes"):
        located.load()


def test_all_unreadable_images_are_named(tmp_path: Path) -> None:
    bad = [(png(i)[:-40], 0) for i in range(3)]
    write(tmp_path, train=[[*bad[:2], *rows(4)], rows(2)], test=[[*rows(2), bad[2]]])
    with pytest.raises(HarnessError, match=r"^3 images cannot be used") as caught:
        load(tmp_path)
    assert all(f"{place}: not a readable image" in str(caught.value) for place in ("row 0", "row 1", "row 2"))
    assert "BytesIO" not in str(caught.value)


def broken_png(folder: Path) -> None:
    shard = rows(5)
    shard[3] = (png(3)[:-40], 0)
    write(folder, train=[rows(4), shard], test=[rows(2)])


def other_size(folder: Path) -> None:
    write(folder, train=[rows(4)], test=[[*rows(2), (png(0, 8, 9), 1)]])


def label_too_high(folder: Path) -> None:
    write(folder, train=[rows(4)], test=[[*rows(2), (png(0), 3)]])


def label_negative(folder: Path) -> None:
    write(folder, train=[[*rows(4), (png(0), -2)]], test=[rows(1)])


def label_far_off(folder: Path) -> None:
    write(folder, train=[[*rows(4), (png(0), 10**12)]], test=[rows(1)])


def label_beyond_names(folder: Path) -> None:
    write(folder, train=[rows(4)], test=[rows(1)], names=["cat", "dog"])


def no_label(folder: Path) -> None:
    write(folder, train=[[(png(0), 0), (png(1), None)]], test=[rows(1)])


def no_image(folder: Path) -> None:
    write(folder, train=[[(png(0), 0), (None, 1)]], test=[rows(1)])


def no_rows(folder: Path) -> None:
    write(folder, train=[[], []], test=[rows(1)])


def no_image_column(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[rows(2)], image="imgs")


def no_label_column(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[rows(2)], label="labels")


def text_labels(folder: Path) -> None:
    write(folder, train=[rows(1)], test=[rows(1)])
    columns = {"img": pa.array([png(0)]), "label": pa.array(["cat"])}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")


def number_images(folder: Path) -> None:
    write(folder, train=[rows(1)], test=[rows(1)])
    pq.write_table(pa.table({"img": [7], "label": [0]}), folder / "train-00000-of-00001.parquet")


def missing_shard(folder: Path) -> None:
    write(folder, train=[rows(2), rows(2), rows(2)], test=[rows(1)])
    (folder / "train-00001-of-00003.parquet").unlink()


def mixed_shards(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[rows(1)])
    write(folder, train=[rows(2), rows(2)], test=[rows(1)])


def cut_file(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[rows(1)])
    path = folder / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def no_test_files(folder: Path) -> None:
    write(folder, train=[rows(2)], test=[])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (broken_png, r"train-00001-of-00002\.parquet, row 3: not a readable image"),
        (other_size, r"test-00000-of-00001\.parquet, row 2: the image is 9×8 pixels where 8×8"),
        (label_too_high, r"test-00000-of-00001\.parquet, row 2: the label 3 is out of range: there are 3"),
        (label_negative, r"train-00000-of-00001\.parquet, row 4: the label -2 is out of range"),
        (label_far_off, r"train-00000-of-00001\.parquet, row 4: the label 1000000000000 is out of range"),
        (label_beyond_names, r"train-00000-of-00001\.parquet, row 2: the label 2 is out of range: there are 2"),
        (no_label, r"train-00000-of-00001\.parquet, row 1: the column label is empty"),
        (no_image, r"train-00000-of-00001\.parquet, row 1: the column img is empty"),
        (no_rows, r"train-00000-of-00002\.parquet.*: holds no images"),
        (no_image_column, "has no column img or image\n  HINT: Its columns are imgs, label: .*image_column=imgs"),
        (no_label_column, "has no column label\n  HINT: Its columns are img, labels: .*label_column=labels"),
        (text_labels, "the column label holds string, not whole numbers"),
        (number_images, "the column img holds int64, not image bytes"),
        (missing_shard, r"the file train-00001-of-00003\.parquet is missing"),
        (mixed_shards, "files of different sets lie together"),
        (cut_file, r"test-00000-of-00001\.parquet: not a readable Parquet file"),
        (no_test_files, r"holds no files train-\*\.parquet and test-\*\.parquet"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, break_it: Callable[[Path], None], words: str) -> None:
    break_it(tmp_path)
    with pytest.raises(HarnessError, match=words) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_flipped_bytes_are_noticed(tmp_path: Path) -> None:
    """Parquet pages carry no checksum unless asked for, but the images in them do."""
    write(tmp_path, train=[rows(3)], test=[rows(3)])
    path = tmp_path / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    reference = load(tmp_path).train.images_BHWC
    noticed = 0
    for position in range(4, len(content) - 8, 41):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            found_BHWC = load(tmp_path).train.images_BHWC
        except HarnessError:
            noticed += 1
        else:
            np.testing.assert_array_equal(found_BHWC, reference)
    assert noticed > 5
