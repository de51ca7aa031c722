"""Images: every format expands as the original's decoder does; everything else is one sentence."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalygpt_edge.runtime.common.errors import ImageError
from anomalygpt_edge.runtime.vision.images import check_frame, decode_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_formats_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS[:, :, ::-1]).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, PIXELS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "comment": b"x" * 300}])
def test_jpeg_is_read(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path, **options)
    image = read_image(path)
    assert image.shape == (20, 30, 3)
    assert abs(image.astype(int) - 90).max() <= 2


def test_lossy_webp_is_read(tmp_path: Path) -> None:
    path = tmp_path / "image.webp"
    Image.fromarray(PIXELS).save(path, quality=80)
    assert read_image(path).shape == PIXELS.shape


def test_grey_palette_and_alpha_become_three_channels(tmp_path: Path) -> None:
    grey = PIXELS[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "palette.png")[:, :, ::-1], np.asarray(palette.convert("RGB"))
    )
    Image.fromarray(np.dstack([PIXELS[:, :, ::-1], grey])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), PIXELS)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == PIXELS.shape


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    for suffix in (".png", ".tif"):
        cv2.imwrite(str(tmp_path / f"deep{suffix}"), PIXELS.astype(np.uint16) * 256)
        with pytest.raises(ImageError, match="convert it to 8 bits"):
            read_image(tmp_path / f"deep{suffix}")


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot read"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot read"):
        read_image(tmp_path)
    for content in (b"", b"hello", b"GIF89a" + bytes(50), b"%PDF-1.7"):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ImageError, match="not a PNG, JPEG, BMP, TIFF or WebP"):
            read_image(tmp_path / "x.png")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk)


def encoded(extension: str) -> bytes:
    return cv2.imencode(extension, PIXELS)[1].tobytes()


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_the_header_is_read_as_the_decoder_reads_it(extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalygpt_edge.runtime.vision import images

    assert images._size_in_header(encoded(extension), "x") == (31, 23)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([".png", ".jpg", ".bmp", ".tif", ".webp"]), st.data())
def test_damage_gives_a_frame_or_an_image_error(extension: str, data: st.DataObject) -> None:
    content = bytearray(encoded(extension))[: data.draw(st.integers(0, 4000))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    try:
        frame = decode_image(bytes(content))
    except ImageError:
        return
    check_frame(frame)


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (None, "NumPy array"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((5, 5), np.uint8), "three channels"),
        (np.zeros((5, 5, 4), np.uint8), "three channels"),
        (np.zeros((5, 5, 3), np.uint16), "8 bits"),
        (np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (10_001, 10_001, 3)), "smaller"),
    ],
)
def test_what_is_no_frame_is_refused(frame: object, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        check_frame(frame)  # type: ignore[arg-type]
