"""Decoding and resizing: against torchvision, and against files that are no images."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from harness.data.images import fit, raise_all, read_image, read_images, resize_images
from harness.errors import HarnessError


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(32, 32), (31, 97), (97, 31), (8, 8), (1, 5), (33, 32)])
@pytest.mark.parametrize("image_size_px", [32, 17])
def test_sizes_are_fitted_as_by_torchvisions_classes(size: tuple[int, int], image_size_px: int) -> None:
    image = Image.fromarray(noise(*size))
    wanted = np.asarray(Compose([Resize(image_size_px), CenterCrop(image_size_px)])(image))
    np.testing.assert_array_equal(np.asarray(fit(image, image_size_px)), wanted)
    resized_BHWC = resize_images(np.stack([noise(*size)] * 2), image_size_px)
    np.testing.assert_array_equal(resized_BHWC, np.stack([wanted] * 2))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(16, 16)).convert(mode)
    image_HWC = read_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), 16, "here")
    assert (image_HWC.shape, image_HWC.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(image_HWC, np.asarray(image.convert("RGB")))


DEEP = encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)))
BOMB = b"P6 40000 40000 255\n"  # says 4.8 GB of pixels and holds none


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a readable image"),
        (b"not an image", r"not a readable image \(in no format that Pillow knows\)"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (encoded(Image.new("RGB", (9, 9)))[:60], "not a readable image"),
        (BOMB, "not a readable image .*bomb"),
        (DEEP, "the image has more than 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    for file in (tmp_path / "bad.png", content):
        with pytest.raises(HarnessError, match=f"row 3: {words}"):
            read_image(file, 9, "row 3")


@pytest.mark.timeout(20)
def test_missing_files_folders_and_pipes_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for file, words in (
        (tmp_path / "none.png", "there is no such file"),
        (tmp_path, r"is a folder, not an image\n  HINT: Give the image files in it, such as"),
        (tmp_path / "pipe.png", "is not a file"),
    ):
        with pytest.raises(HarnessError, match=f"here: {words}"):
            read_image(file, 8, "here")


def test_a_required_size_is_held() -> None:
    assert read_image(encoded(Image.new("RGB", (8, 8))), 4, "here", required_size_px=8).shape == (4, 4, 3)
    for size in ((9, 8), (8, 9)):
        with pytest.raises(HarnessError, match=f"the image is {size[0]}×{size[1]} pixels where 8×8 are wanted"):
            read_image(encoded(Image.new("RGB", size)), 8, "here", required_size_px=8)


def test_no_flipped_bit_of_a_png_changes_pixels_unnoticed() -> None:
    pixels_HWC = noise(10, 10)
    content = encoded(Image.fromarray(pixels_HWC))
    noticed = 0
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(read_image(bytes(changed), 10, "here"), pixels_HWC)
        except HarnessError:
            noticed += 1
    assert noticed > len(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_images_never_give_another_error(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    content = bytearray(encoded(Image.fromarray(noise(12, 12)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image_HWC = read_image(bytes(content[: data.draw(st.integers(0, len(content)))]), 12, "here")
    except HarnessError:
        return
    assert image_HWC.shape == (12, 12, 3)


def test_many_images_keep_their_order_and_all_that_is_wrong_is_one_error() -> None:
    images = [noise(16, 16) ^ np.uint8(index % 256) for index in range(600)]
    files = [encoded(Image.fromarray(image), "BMP") for image in images]
    np.testing.assert_array_equal(read_images(files, 16, str), np.stack(images))
    assert read_images([], 8, str).shape == (0, 8, 8, 3)
    files[270] = b"broken"
    with pytest.raises(HarnessError, match=r"^row 270: not a readable image"):
        read_images(files, 16, lambda index: f"row {index}")
    files[290:326] = [b"broken"] * 36
    with pytest.raises(HarnessError, match=r"^37 images cannot be used, the first 20: 20 errors") as caught:
        read_images(files, 16, lambda index: f"row {index}")
    assert [f"row {row}:" in str(caught.value) for row in (270, 290, 308, 309)] == [True, True, True, False]
    raise_all("images", [])


def test_warnings_of_pillow_name_the_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(100, 164)))
    read_images([tmp_path / "palette.png"] * 3, 8, lambda index: "palette.png")
    error = capsys.readouterr().err
    assert error.startswith("WARNING palette.png: Palette images with Transparency")
    assert error.count("\n") == 1
