"""The vision pipeline: its stages give the maps of an inspection, and the encoder cache is limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision.pipeline import EncoderCache, size_of
from anomalygpt_edge.runtime.vision.stages import Encoded


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


def test_the_stages_give_the_map_of_an_inspection(inspector: Inspector) -> None:
    vision, product = inspector.vision, inspector.product
    found = vision.localise(vision.encode_frame(frame(), product), product)
    np.testing.assert_array_equal(found.maps[0], inspector.inspect(frame()).anomaly_map)
    assert found.matches is None


def test_cached_features_equal_the_encoders(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = inspector.vision.networks["encoder"].run
    monkeypatch.setattr(
        inspector.vision.networks["encoder"], "run", lambda **inputs: calls.append(1) or run(**inputs)
    )
    plain = [inspector.inspect(frame(seed)).anomaly_map for seed in (0, 1)]
    calls.clear()
    with inspector.vision.encoder_cache():
        for seed in (0, 0, 1, 0, 1):
            np.testing.assert_array_equal(inspector.inspect(frame(seed)).anomaly_map, plain[seed])
        assert len(calls) == 2
    inspector.inspect(frame(0))
    assert len(calls) == 3, "the cache ends with its context"


def encoded(value: float) -> Encoded:
    return Encoded(np.full((1, 4), value, np.float32), np.full((1, 2, 3, 4), value, np.float32))


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 500))
def test_the_cache_is_correct_and_limited(images: list[int], max_bytes: int) -> None:
    cache, misses = EncoderCache(max_bytes), []

    def encode(pixels: np.ndarray) -> Encoded:
        misses.append(float(pixels[0]))
        return encoded(float(pixels[0]))

    for before, image in zip([None, *images], images, strict=False):
        num_misses = len(misses)
        found = cache.get(np.array([image], np.float32), encode)
        assert (found.patch_features == image).all()
        assert cache.num_bytes <= max_bytes
        if image == before and max_bytes >= size_of(encoded(0)):
            assert len(misses) == num_misses, "the same image twice in a row is encoded once"


def test_a_full_cache_still_helps_repeated_passes_over_the_same_images() -> None:
    cache, misses = EncoderCache(5 * size_of(encoded(0))), []
    for _ in range(3):
        for image in range(10):
            cache.get(
                np.array([image], np.float32), lambda pixels: misses.append(1) or encoded(float(pixels[0]))
            )
    assert len(misses) < 25
