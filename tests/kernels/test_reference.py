"""The NumPy kernels against Pillow, torch and plain arithmetic."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalygpt_edge.kernels import match, normalise, preprocess, resize_window, upsample
from anomalygpt_edge.models.anomalygpt import few_shot_distance, upsample_map

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDES = st.integers(1, 300)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """Undo the normalisation: [3, S, S] → integers [S, S, 3], RGB."""
    return np.rint((pixels.transpose(1, 2, 0) * np.float32(STD) + np.float32(MEAN)) * 255).astype(int)


def pillow(frame: np.ndarray, size: int, resize: str) -> np.ndarray:
    """The original's transform: torchvision's Resize(bicubic) and CenterCrop, written with Pillow."""
    image = Image.fromarray(frame[:, :, ::-1])
    if resize == "stretch":
        return np.asarray(columns_first(image, (size, size)), int)
    width, height = image.size
    if width <= height:
        target = size, int(size * height / width)
    else:
        target = int(size * width / height), size
    image = columns_first(image, target)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), int)


def columns_first(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Pillow before 13 resizes columns, then rows; newer ones choose, so the passes are asked for one by one."""
    for size in ((target[0], image.height), target):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return image


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize(
    "shape", [(480, 640), (640, 480), (224, 224), (97, 131), (301, 224), (60, 1000), (1, 1), (225, 449)]
)
def test_preprocess_equals_pillow(shape: tuple[int, int], resize: str) -> None:
    frame = noise(*shape)
    pixels = preprocess(frame, 224, resize, MEAN, STD)[0]  # type: ignore[arg-type]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(grey_levels(pixels), pillow(frame, 224, resize), err_msg=PIL.__version__)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from([7, 32, 56]), st.sampled_from(["crop", "stretch"]), st.integers(0, 9))
def test_preprocess_equals_pillow_at_any_size(h: int, w: int, size: int, resize: str, seed: int) -> None:
    frame = noise(h, w, seed)
    pixels = preprocess(frame, size, resize, MEAN, STD)[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(grey_levels(pixels), pillow(frame, size, resize))


def test_preprocess_normalises_as_torch_does() -> None:
    frame = noise(32, 32)
    expected = torch.tensor(frame[:, :, ::-1].copy()).permute(2, 0, 1).float().div(255)
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    np.testing.assert_array_equal(preprocess(frame, 32, "crop", MEAN, STD)[0], expected.numpy())


def test_preprocess_takes_views() -> None:
    frame = noise(90, 120)
    flipped = frame[::-1, ::-1]
    np.testing.assert_array_equal(
        preprocess(flipped, 56, "crop", MEAN, STD), preprocess(flipped.copy(), 56, "crop", MEAN, STD)
    )


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3)),
    ],
    ids=lambda frame: f"{frame.dtype}{frame.shape}",
)
def test_preprocess_refuses_what_is_no_frame(frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        preprocess(frame, 224, "crop", MEAN, STD)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from(["crop", "stretch"]))
def test_the_window_lies_in_the_resized_frame(h: int, w: int, resize: str) -> None:
    window = resize_window(h, w, 224, resize)  # type: ignore[arg-type]
    assert 0 <= window.top <= window.height - 224
    assert 0 <= window.left <= window.width - 224
    if resize == "crop":
        assert min(window.height, window.width) == 224
        assert abs(2 * window.left + 224 - window.width) <= 1


def test_window_rounds_half_to_even_and_truncates() -> None:
    assert resize_window(224, 225, 224, "crop").left == 0  # 0.5 → 0
    assert resize_window(224, 227, 224, "crop").left == 2  # 1.5 → 2
    assert resize_window(427, 611, 224, "crop").width == 320  # 320.53


def test_normalise_gives_unit_length_and_keeps_zero() -> None:
    features = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    features[1, 2] = 0
    lengths = np.linalg.norm(normalise(features), axis=-1)
    assert lengths[1, 2] == 0
    np.testing.assert_allclose(np.delete(lengths.ravel(), 7), 1, rtol=1e-6)


def test_match_equals_torch() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 4, 49, 24)).astype(np.float32)
    bank = rng.normal(size=(4, 130, 24)).astype(np.float32)
    distance = match(query, normalise(bank))
    expected = few_shot_distance(torch.tensor(query), torch.tensor(bank).expand(2, -1, -1, -1))
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, expected.numpy(), atol=1e-5)


def test_match_finds_itself_whatever_the_length() -> None:
    query = np.random.default_rng(0).normal(size=(1, 4, 9, 16)).astype(np.float32)
    np.testing.assert_allclose(match(7 * query, normalise(query[0])), 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 0, 16), (3, 9, 16), (4, 9, 8)])
def test_match_refuses_a_bank_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bank"):
        match(np.ones((1, 4, 9, 16), np.float32), np.ones(shape, np.float32))


@pytest.mark.parametrize(("grid", "size"), [(16, 224), (3, 10), (2, 2), (16, 16)])
def test_upsample_equals_torch(grid: int, size: int) -> None:
    values = np.random.default_rng(0).random((2, grid * grid)).astype(np.float32)
    expected = upsample_map(torch.tensor(values), size).numpy()
    np.testing.assert_allclose(upsample(values, size), expected, atol=1e-5)
