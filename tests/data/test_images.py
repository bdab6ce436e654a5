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

from harness.data.images import fit, image_size, raise_all, read_image, read_images, resize_images
from harness.errors import HarnessError


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(32, 32), (31, 97), (97, 31), (8, 8), (1, 5), (33, 32)])
@pytest.mark.parametrize("image_size_px", [32, 17])
def test_fit_equals_torchvision(size: tuple[int, int], image_size_px: int) -> None:
    image = Image.fromarray(noise(*size))
    reference = Compose([Resize(image_size_px), CenterCrop(image_size_px)])(image)
    np.testing.assert_array_equal(np.asarray(fit(image, image_size_px)), np.asarray(reference))


def test_png_pixels_come_through_unchanged(tmp_path: Path) -> None:
    pixels_HWC = noise(32, 32)
    Image.fromarray(pixels_HWC).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", image_size_px=32), pixels_HWC)
    content = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(read_image(content, image_size_px=32), pixels_HWC)
    assert image_size(content) == (32, 32)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(16, 16)).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    image_HWC = read_image(encoded(image, form), image_size_px=16)
    assert (image_HWC.shape, image_HWC.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(image_HWC, np.asarray(image.convert("RGB")))


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(HarnessError, match=r"deep\.png: the image has more than 8 bits"):
        read_image(tmp_path / "deep.png", image_size_px=4)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", encoded(Image.new("RGB", (9, 9)))[:60]]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(HarnessError, match=r"bad\.png: not a readable image"):
        read_image(tmp_path / "bad.png", image_size_px=9)
    with pytest.raises(HarnessError, match="row 3: not a readable image"):
        read_image(content, image_size_px=9, where="row 3")


def test_missing_files_folders_and_bombs_are_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"none\.png: there is no such file"):
        read_image(tmp_path / "none.png", image_size_px=8)
    with pytest.raises(HarnessError, match=r"is a folder, not an image\n  HINT: Give the image files in it, such as"):
        read_image(tmp_path, image_size_px=8)
    header = b"P6 40000 40000 255\n"  # says 4.8 GB of pixels and holds none
    with pytest.raises(HarnessError, match="bomb"):
        read_image(header, image_size_px=8)
    with pytest.raises(HarnessError, match="not a readable image"):
        image_size(b"none")


def test_no_flipped_bit_of_a_png_changes_pixels_unnoticed() -> None:
    pixels_HWC = noise(10, 10)
    content = encoded(Image.fromarray(pixels_HWC))
    noticed = 0
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            image_HWC = read_image(bytes(changed), image_size_px=10)
        except HarnessError:
            noticed += 1
        else:
            np.testing.assert_array_equal(image_HWC, pixels_HWC)
    assert noticed > len(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_images_never_give_another_error(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    content = bytearray(encoded(Image.fromarray(noise(12, 12)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image_HWC = read_image(bytes(content[: data.draw(st.integers(0, len(content)))]), image_size_px=12)
    except HarnessError:
        return
    assert image_HWC.shape == (12, 12, 3)


@pytest.mark.parametrize("side", [16, 160])  # below and above the size from which threads decode
def test_many_images_keep_their_order(side: int) -> None:
    count = 600 if side == 16 else 300
    images = [noise(side, side) ^ np.uint8(index % 256) for index in range(count)]
    files = [encoded(Image.fromarray(image), "BMP") for image in images]
    found_BHWC, problems = read_images(files, image_size_px=side, where=str)
    np.testing.assert_array_equal(found_BHWC, np.stack(images))
    assert problems == []
    files[270] = files[290] = b"broken"
    _, problems = read_images(files, image_size_px=side, where=lambda index: f"row {index}")
    reason = "not a readable image (in no format that Pillow knows)"
    assert [f"{p.where}: {p.what}" for p in problems] == [f"row {row}: {reason}" for row in (270, 290)]


def test_all_that_is_wrong_is_raised_as_one_error() -> None:
    raise_all([])
    problems = [HarnessError("is broken", where=f"image {index}", hint="Replace it.") for index in range(1, 38)]
    with pytest.raises(HarnessError, match=r"^image 1: is broken\n  HINT: Replace it"):
        raise_all(problems[:1])
    with pytest.raises(HarnessError, match=r"^37 images cannot be used, the first 20: 20 errors") as caught:
        raise_all(problems)
    assert str(caught.value).count("is broken") == 20


def test_warnings_of_pillow_name_the_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(100, 164)))
    files = [tmp_path / "palette.png"] * 3
    read_images(files, image_size_px=8, where=lambda index: files[index].name)
    error = capsys.readouterr().err
    assert error.startswith("WARNING palette.png: Palette images with Transparency")
    assert error.count("\n") == 1


@pytest.mark.timeout(20)
def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(HarnessError, match=r"pipe\.png: is not a file"):
        read_image(tmp_path / "pipe.png", image_size_px=8)


def test_a_required_size_is_held(tmp_path: Path) -> None:
    files = [encoded(Image.fromarray(noise(8, height))) for height in (8, 8, 9)]
    _, (problem,) = read_images(files, image_size_px=8, where=str, required_size_px=(8, 8))
    assert "2: the image is 9×8 pixels where 8×8 are wanted" in problem.render()
    assert read_images([], image_size_px=8, where=str)[0].shape == (0, 8, 8, 3)


def test_resize_images_equals_fit() -> None:
    images_BHWC = np.stack([noise(8, 8), noise(8, 8) // 2])
    resized_BHWC = resize_images(images_BHWC, 20)
    for before, after in zip(images_BHWC, resized_BHWC, strict=True):
        np.testing.assert_array_equal(np.asarray(fit(Image.fromarray(before), 20)), after)
    assert resize_images(images_BHWC, 8) is images_BHWC
