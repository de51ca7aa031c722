"""The computation between a frame and its verdict uses the selected kernels, and no NumPy on large arrays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from anomalygpt_edge import kernels
from anomalygpt_edge.kernels import choice, cuda
from anomalygpt_edge.runtime.inspection.inspector import Inspector, Product
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.vision import memory_bank, pipeline, stages
from anomalygpt_edge.runtime.vision.views import FrameSize, Layout, Tiles
from tools.cuda_shim import ShimDriver

HEIGHT, WIDTH = 120, 160
TILED = Layout(frame=FrameSize(width=WIDTH, height=HEIGHT), tiles=Tiles(rows=1, columns=2, overlap=0.2))


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


def products(inspector: Inspector) -> dict[str, Product]:
    """Products: zero-shot, with a memory bank, and tiles with a memory bank."""
    zero_shot = inspector.product
    tiled = replace(zero_shot, layout=TILED, resize="stretch")
    found = {"zero-shot": zero_shot}
    for name, product in (("few-shot", zero_shot), ("tiles", tiled)):
        inspector.use(product)
        found[name] = replace(product, bank=inspector.make_bank([frame(1), frame(2)]))
    return found


# -- NumPy --------------------------------------------------------------------------------------


class Watched(np.ndarray):
    """Pixels, patches, logits or maps that record every NumPy computation with them."""

    seen: ClassVar[list[str]] = []

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        self.seen.append(f"{ufunc.__name__}.{method} of {[np.shape(each) for each in inputs]}")
        plain = [each.view(np.ndarray) if isinstance(each, Watched) else each for each in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self.seen.append(function.__name__)
        return super().__array_function__(function, types, args, kwargs)


def watch(found: Any) -> Any:
    """A function's result with every float array watched."""
    if isinstance(found, np.ndarray):
        return found.view(Watched) if found.dtype.kind == "f" else found
    return tuple(map(watch, found)) if isinstance(found, tuple) else found


@pytest.fixture
def watched(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Inspector:
    """An inspector whose kernels' and networks' results, except the embeddings, are watched."""
    for module, name in (
        (pipeline, "preprocess"),
        (stages, "localise"),
        (stages, "upsample"),
        (memory_bank, "match"),
    ):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, kernel=kernel, **k: watch(kernel(*a, **k)))
    for name, output in (("encoder", "patch_features"), ("decoder", "patch_logits")):
        run = inspector.vision.networks[name].run

        def watched_run(run: Any = run, output: str = output, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            outputs = run(**inputs)
            return {**outputs, output: watch(outputs[output])}

        monkeypatch.setattr(inspector.vision.networks[name], "run", watched_run)
    return inspector


def test_computations_with_watched_arrays_are_recorded() -> None:
    array = np.arange(6.0).reshape(2, 3).view(Watched)
    for compute in (
        lambda: array * 2,
        lambda: array[0].max(),
        lambda: np.sort(array),
        lambda: np.isfinite(array),
    ):
        Watched.seen.clear()
        compute()
        assert Watched.seen


def test_numpy_computes_nothing_with_pixels_patches_or_maps(watched: Inspector) -> None:
    """Except the index of the largest of 256 distances."""
    for name, product in products(watched).items():
        watched.use(product)
        Watched.seen.clear()
        verdict = watched.inspect(frame().view(Watched))
        assert verdict.status is Status.FAIL, verdict.reason
        assert isinstance(verdict.anomaly_map, Watched)
        assert verdict.regions
        assert verdict.to_record()["regions"]
        assert Watched.seen == [], name


# -- CUDA ---------------------------------------------------------------------------------------


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimDriver]:
    """The host shim in place of a GPU, and AGPT_KERNELS=cuda."""
    if shutil.which("g++") is None:
        pytest.skip("the shim is compiled with g++: install it")
    driver = ShimDriver()
    cuda.use_driver(driver)
    monkeypatch.setattr(cuda, "runs_here", lambda: True)
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    forget_choice()
    yield driver
    monkeypatch.undo()
    forget_choice()
    cuda.use_driver(None)
    driver.close()


def forget_choice() -> None:
    choice._found.cache_clear()
    choice._chosen.cache_clear()


def test_a_whole_inspection_with_the_cuda_kernels(tiny_bundle: Path, shim: ShimDriver) -> None:
    assert kernels.active() == "cuda"
    assert "cuda" in kernels.available()
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        found = {name: inspect(inspector, product, shim) for name, product in products(inspector).items()}
    with kernels.using(kernels.available()[0]), Inspector.open(tiny_bundle, threads=1) as inspector:
        for name, product in products(inspector).items():
            expected, _ = inspect(inspector, product, shim)
            same(found[name][0], expected, 1e-4 if name == "zero-shot" else 5e-3)  # float16 distances in units
    few_shot = {
        "preprocess_BGR8_f32",
        "match_f16",
        "upsample_f32_f32",
        "summarise_figures",
        "components_measure",
    }
    few_shot |= {"cell_peaks", "pack_prompt_F16"}
    assert found["few-shot"][1] >= few_shot
    assert found["tiles"][1] >= few_shot | {"project"}
    assert found["zero-shot"][1] >= few_shot - {"match_f16", "upsample_f32_f32"} | {"localise_f32_f32"}


def inspect(inspector: Inspector, product: Product, shim: ShimDriver) -> tuple[Verdict, set[str]]:
    """A verdict, and the CUDA kernels that were launched for it."""
    inspector.use(product)
    shim.launches.clear()
    return inspector.inspect(frame()), {name for name, *_ in shim.launches}


def same(found: Verdict, expected: Verdict, tolerance: float) -> None:
    """Check that maps, scores and peaks agree to ``tolerance`` of the peak, and the rest exactly."""
    assert (found.status, found.sentence, found.view) == (expected.status, expected.sentence, expected.view)
    assert found.anomaly_map is not None
    assert expected.anomaly_map is not None
    tolerance *= max(1.0, float(expected.anomaly_map.max()))
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=tolerance)
    assert found.score == pytest.approx(expected.score, abs=tolerance)
    assert found.peak == pytest.approx(expected.peak, abs=tolerance)
    assert len(found.regions) == len(expected.regions)
