"""The stages that stay on the GPU: the host path's results, and only pixels and results are copied. The GPU is a fake,
and its kernels run in the shim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, open_bundle
from anomalygpt_edge.runtime.common.errors import ClosedError
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision import resident_stages
from anomalygpt_edge.runtime.vision.engines import gpu, open_networks
from anomalygpt_edge.runtime.vision.engines.agreement import compare_with_cpu
from anomalygpt_edge.runtime.vision.engines.gpu import Graph
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
from anomalygpt_edge.runtime.vision.pipeline import VisionPipeline
from anomalygpt_edge.runtime.vision.resident_stages import ResidentStages, open_resident_stages
from anomalygpt_edge.runtime.vision.stages import Stages

SAME = 1e-4  # onnxruntime runs both; the kernels differ by roundings
FEW_SHOT_SAME = 2e-3  # the CUDA kernels match in float16
RESULTS = ("image_embedding", "anomaly_map", "prompt_embeddings")


@dataclass(frozen=True, eq=False)
class Against:
    """A ``Reference``."""

    text_features: np.ndarray
    bank: MemoryBank | None = None


def text(seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(2, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pixels(batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, 224, 224)).astype(np.float32)


def results(stages: Stages, images: np.ndarray, reference: Against) -> dict[str, np.ndarray]:
    encoded = stages.encode(images)
    localised = stages.localise(encoded, reference)
    prompts = stages.prompt(localised.prompt_maps, images, reference)
    found = dict(zip(RESULTS, (encoded.image_embeddings, localised.maps, prompts), strict=True))
    if localised.matches is None:
        return found
    return found | {name: each for name, each in localised.matches._asdict().items() if each is not None}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """All but ``nearest``: of rows that are nearly as far either may be found."""
    assert found.keys() == expected.keys()
    tolerance = FEW_SHOT_SAME if "nearest" in expected else SAME
    for name in expected.keys() - {"nearest"}:
        limit = tolerance * np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=limit, err_msg=name)


@dataclass
class Machine:
    """The fake machine, and how stages are opened on it."""

    cuda: Any
    libcuda: Any
    device: Any
    make_driver: Callable[[Any], Any]
    folder: Path
    with_plans: Callable[..., Any]
    opened: list[ResidentStages]

    def open(
        self, source: Path, engine: str = "tensorrt", make_graph: Callable[[], Graph] | str | None = "fake"
    ) -> ResidentStages:
        bundle = self.with_plans(source, self.folder / f"bundle{len(self.opened)}", engine)
        networks = open_networks(bundle, engine)
        driver = self.make_driver(networks["encoder"].stream)
        make = self.graph if make_graph == "fake" else make_graph
        self.opened.append(ResidentStages(bundle, networks, 1, self.device, driver, make))
        return self.opened[-1]

    def graph(self) -> Graph:
        return Graph(self.libcuda)

    @property
    def num_graphs(self) -> int:
        """That have not been freed."""
        calls = self.libcuda.calls
        return calls.count("cuGraphInstantiateWithFlags") - calls.count("cuGraphExecDestroy")


@pytest.fixture
def machine(fakes, gpu_machine: SimpleNamespace, shim, tmp_path: Path) -> Iterator[Machine]:
    libcuda = fakes.FakeDriver()
    libcuda.cuda = gpu_machine.cuda

    def make_driver(stream: Any) -> Any:
        return fakes.KernelsOnShim(gpu_machine.cuda, stream, shim)

    opened: list[ResidentStages] = []
    yield Machine(
        gpu_machine.cuda, libcuda, gpu_machine.device, make_driver, tmp_path, fakes.with_plans, opened
    )
    for stages in opened:
        stages.close()
    assert gpu_machine.cuda.depth == 0, "every context that was pushed was popped"


@pytest.fixture(scope="module")
def host(tiny_bundle: Path) -> Iterator[Stages]:
    bundle = open_bundle(tiny_bundle)
    stages = Stages(bundle, open_networks(bundle, "onnxruntime"), 1)
    yield stages
    stages.close()


def make_bank(stages: Stages, seed: int, num_samples: int = 1) -> MemoryBank:
    samples = [
        stages.encode(pixels(1, 1000 + 10 * seed + index)).patch_features for index in range(num_samples)
    ]
    return MemoryBank.from_features(samples, "0" * 64)


def test_zero_shot_copies_pixels_and_results_only(machine: Machine, tiny_bundle: Path, host: Stages) -> None:
    stages, reference = machine.open(tiny_bundle), Against(text())
    for _ in range(2):
        results(stages, pixels(), reference)
    machine.cuda.copies.clear()
    assert_same(results(stages, pixels(), reference), results(host, pixels(), reference))
    assert machine.cuda.copies == ["htod", "dtoh", "dtoh", "dtoh"]  # pixels; embedding, map, prompts


def test_few_shot_copies_distances_and_rows_too(machine: Machine, tiny_bundle: Path, host: Stages) -> None:
    stages, reference = machine.open(tiny_bundle), Against(text(), make_bank(host, 1, 2))
    for _ in range(2):
        results(stages, pixels(), reference)
    machine.cuda.copies.clear()
    found = results(stages, pixels(), reference)
    assert machine.cuda.copies == ["htod", *["dtoh"] * 5]
    expected = results(host, pixels(), reference)
    assert_same(found, expected)
    assert (found["nearest"] == expected["nearest"]).mean() > 0.9


def test_graphs_are_recorded_in_the_second_run_and_read_what_lies_there_now(
    machine: Machine, tiny_bundle: Path, host: Stages
) -> None:
    stages, plain = machine.open(tiny_bundle), machine.open(tiny_bundle, make_graph=None)
    for reference in (Against(text()), Against(text(), make_bank(host, 1))):
        first = results(stages, pixels(), reference)
        recorded = machine.num_graphs
        second = results(stages, pixels(), reference)
        assert machine.num_graphs > recorded
        third = results(stages, pixels(), reference)
        other = results(stages, pixels(seed=1), reference)
        for name, array in results(plain, pixels(), reference).items():
            np.testing.assert_array_equal(first[name], array)
            np.testing.assert_array_equal(second[name], array)
            np.testing.assert_array_equal(third[name], array)
            assert np.abs(other[name] - array).max() > 0
        assert_same(other, results(host, pixels(seed=1), reference))
    assert len(stages.steps) == len(plain.steps) == 4
    assert all(step.graph is not None for step in stages.steps)
    assert all(step.graph is None for step in plain.steps)
    assert (stages.records, plain.records) == (True, False)


def test_batches_up_to_the_plans_stay_there_and_larger_ones_take_the_host_path(
    machine: Machine, tiny_bundle: Path, host: Stages
) -> None:
    """In any order: a change of batch makes the graphs invalid that were recorded before."""
    stages, bank = machine.open(tiny_bundle), make_bank(host, 1)
    for seed, batch in enumerate([1, 1, 1, 2, 2, 2, 1, 3, 3, 1, 1, 2]):
        for reference in (Against(text()), Against(text(), bank)):
            images = pixels(batch, seed)
            assert_same(results(stages, images, reference), results(host, images, reference))
    assert len(stages.steps) == 8  # four of each batch that the plans take


def test_products_may_take_turns(
    machine: Machine, tiny_bundle: Path, host: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_stages, "MAX_PREPARED_BANKS", 2)
    stages = machine.open(tiny_bundle)
    banks = [make_bank(host, seed) for seed in range(3)]
    products = [Against(text(0)), Against(text(1)), *(Against(text(2), bank) for bank in banks)]
    expected = [results(host, pixels(), product) for product in products]
    for index in (0, 1, 0, 2, 2, 2, 3, 2, 1, 4, 3, 3, 4, 2, 0, 2, 2):
        assert_same(results(stages, pixels(), products[index]), expected[index])
        assert len(stages.steps) <= 2 + 1 + 2, "forgotten banks are gone"
    assert machine.num_graphs == sum(step.graph is not None for step in stages.steps)


def test_a_bank_is_uploaded_once(machine: Machine, tiny_bundle: Path, host: Stages, monkeypatch) -> None:
    """The bank that was used longest ago makes room."""
    monkeypatch.setattr(resident_stages, "MAX_PREPARED_BANKS", 2)
    stages, (first, second, third) = machine.open(tiny_bundle), (make_bank(host, seed) for seed in range(3))

    def uploads(bank: MemoryBank, batch: int = 1) -> int:
        encoded = stages.encode(pixels(batch))
        machine.cuda.copies.clear()
        stages.localise(encoded, Against(text(), bank))
        return machine.cuda.copies.count("htod")

    assert [uploads(bank) for bank in (first, second, first, third, first, second)] == [2, 2, 0, 2, 0, 2]
    assert uploads(second, batch=2) == 0, "another batch shares the bank"


def test_patch_features_are_downloaded_when_they_are_read(
    machine: Machine, tiny_bundle: Path, host: Stages
) -> None:
    stages, images = machine.open(tiny_bundle), pixels(2)
    encoded = stages.encode(images)
    machine.cuda.copies.clear()
    expected = host.encode(images).patch_features
    np.testing.assert_allclose(encoded.patch_features, expected, atol=SAME * np.abs(expected).max())
    assert machine.cuda.copies == ["dtoh"]
    maps = stages.localise(encoded, Against(text())).prompt_maps
    stages.prompt(maps, images, Against(text()))
    encoded.patch_features  # noqa: B018  the stages behind leave them there
    stages.encode(images)
    with pytest.raises(RuntimeError, match="encoder has run again since"):
        encoded.patch_features  # noqa: B018
    with pytest.raises(RuntimeError, match="encoder has run again since"):
        stages.localise(encoded, Against(text()))


def test_features_that_others_overwrote_are_not_taken_for_the_encoders(
    machine: Machine, tiny_bundle: Path, host: Stages
) -> None:
    """The decoder shares the encoder's buffer, and the host path writes to it."""
    stages, reference = machine.open(tiny_bundle), Against(text())
    encoded, other = stages.encode(pixels()), host.encode(pixels(seed=1))
    found, expected = (each.localise(other, reference).maps for each in (stages, host))
    np.testing.assert_allclose(found, expected, atol=SAME)
    with pytest.raises(RuntimeError, match="overwritten"):
        stages.localise(encoded, reference)


def test_the_host_path_in_between_changes_nothing(machine: Machine, seeing_bundle: Path) -> None:
    """It overwrites text features, counts, maps and pixels on the device."""
    stages = machine.open(seeing_bundle)
    bundle = open_bundle(seeing_bundle)
    plain = Stages(bundle, open_networks(bundle, "onnxruntime"), 1)
    bank = make_bank(plain, 1, 2)
    references = [Against(text(0)), Against(text(1)), Against(text(0), bank)]
    expected = [results(plain, pixels(), reference) for reference in references]
    for index in (0, 1, 2, 0, 2):
        assert_same(results(stages, pixels(), references[index]), expected[index])
        large, reference = pixels(3, seed=9), references[(index + 1) % 3]
        assert_same(results(stages, large, reference), results(plain, large, reference))
    encoded = stages.encode(pixels())
    maps = stages.localise(encoded, references[0]).prompt_maps
    stages.prompt(maps + 1, pixels(seed=5), references[2])  # a map that is not the last stage's
    found = stages.prompt(maps, pixels(), references[0])
    limit = SAME * np.abs(found).max()
    np.testing.assert_allclose(found, expected[0]["prompt_embeddings"], atol=limit)
    compare_with_cpu(bundle, "tensorrt", stages.networks)  # as agpt doctor does
    assert_same(results(stages, pixels(), references[1]), expected[1])
    plain.close()


def test_a_learner_that_reads_more_reads_the_encoders_pixels_and_the_number_of_normals(
    machine: Machine, seeing_bundle: Path
) -> None:
    bundle = open_bundle(seeing_bundle)
    stages, plain = machine.open(seeing_bundle), Stages(bundle, open_networks(bundle, "onnxruntime"), 1)
    bank = make_bank(plain, 1, 2)
    for batch in (1, 2):
        for reference in (Against(text()), Against(text(), bank)):
            for seed in range(3):
                images = pixels(batch, seed)
                machine.cuda.copies.clear()
                found = results(stages, images, reference)
                assert_same(found, results(plain, images, reference))
            copies = ["htod", *["dtoh"] * (3 if reference.bank is None else 5)]
            assert machine.cuda.copies == copies, "pixels are uploaded once, unchanged counts not at all"
    images = pixels()
    maps = stages.localise(stages.encode(images), Against(text())).prompt_maps
    other = pixels(seed=7)  # not what was encoded
    found, expected = (each.prompt(maps, other, Against(text())) for each in (stages, plain))
    np.testing.assert_allclose(found, expected, atol=SAME * np.abs(expected).max())
    assert np.abs(found - plain.prompt(maps, images, Against(text()))).max() > 10 * SAME
    plain.close()


def test_the_encoder_cache_keeps_features_on_the_host(
    machine: Machine, tiny_bundle: Path, host: Stages
) -> None:
    stages, reference = machine.open(tiny_bundle), Against(text())
    pipeline = VisionPipeline(open_bundle(tiny_bundle), "tensorrt", stages, 1)
    with pipeline.encoder_cache():
        for seed in (0, 1, 0, 0, 1, 2):
            found = results(pipeline, pixels(seed=seed), reference)  # type: ignore[arg-type]
            assert_same(found, results(host, pixels(seed=seed), reference))
    found = results(pipeline, pixels(), reference)  # type: ignore[arg-type]
    assert_same(found, results(host, pixels(), reference))


def test_pixels_are_checked_before_anything_native(machine: Machine, tiny_bundle: Path) -> None:
    stages = machine.open(tiny_bundle)
    machine.cuda.copies.clear()
    with pytest.raises(ValueError, match="pixels is float64"):
        stages.encode(pixels().astype(np.float64))
    with pytest.raises(ValueError, match="pixels is float32"):
        stages.encode(pixels()[..., :100])
    assert not machine.cuda.copies


def test_closing_frees_everything_and_ends_its_use(machine: Machine, tiny_bundle: Path, host: Stages) -> None:
    stages, references = machine.open(tiny_bundle), (Against(text()), Against(text(), make_bank(host, 1)))
    for reference in references:
        for _ in range(3):
            results(stages, pixels(), reference)
    encoded = stages.encode(pixels())
    maps = stages.localise(encoded, references[0]).prompt_maps
    assert machine.cuda.memory
    assert machine.num_graphs == 4
    stages.close()
    stages.close()
    assert machine.cuda.memory == {}
    assert machine.num_graphs == 0
    for use in (
        lambda: stages.encode(pixels()),
        lambda: stages.localise(encoded, references[0]),
        lambda: stages.prompt(maps, pixels(), references[0]),
        lambda: encoded.patch_features,
    ):
        with pytest.raises(ClosedError, match="the vision pipeline is closed: open it again"):
            use()


def test_what_cannot_be_recorded_runs_plainly_and_says_why(
    machine: Machine, tiny_bundle: Path, host: Stages, gpu_machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, reference = machine.open(tiny_bundle), Against(text())
    machine.libcuda.fail = "cuGraphInstantiateWithFlags"
    expected = results(host, pixels(), reference)
    for _ in range(3):
        assert_same(results(stages, pixels(), reference), expected)
    assert machine.libcuda.calls.count("cuGraphInstantiateWithFlags") == 3, "tried once each"
    assert all("cuGraphInstantiateWithFlags" in step.not_recorded_because and not step.graph for step in stages.steps)

    machine.libcuda.fail = ""
    refusing = machine.open(tiny_bundle)
    context = refusing._encoder._context
    execute = context.execute_async_v3
    captured = gpu_machine.cuda.streams[refusing.stream.handle]
    monkeypatch.setattr(
        context, "execute_async_v3", lambda handle: captured.captured is None and execute(handle)
    )
    for _ in range(3):
        assert_same(results(refusing, pixels(), reference), expected)
    encode, *others = refusing.steps
    assert "TensorRT cannot run encoder.tensorrt.plan" in encode.not_recorded_because
    assert all(step.graph is not None for step in others)


def test_rtx_keeps_what_it_compiled(machine: Machine, tiny_bundle: Path, tmp_path: Path, gpu_machine) -> None:
    gpu_machine.gpu = gpu.Gpu("NVIDIA GeForce RTX 4090", "8.9", integrated=False)
    gpu_machine.apis["tensorrt-rtx"].cache.content = b"compiled here"
    stages = machine.open(tiny_bundle, "tensorrt-rtx")
    results(stages, pixels(), Against(text()))
    files = list((tmp_path / "cache" / "tensorrt-rtx").iterdir())
    assert [file.read_bytes() for file in files] == [b"compiled here"] * len(NETWORKS)


def test_the_inspector_runs_them_and_finds_what_the_cpu_finds(
    machine: Machine, fakes, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_stages, "PycudaDriver", machine.make_driver)
    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(CDLL=lambda name: machine.libcuda))
    folder = fakes.with_plans(tiny_bundle, tmp_path / "bundle").folder
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 240, 240, 3), np.uint8)
    with (
        Inspector.open(folder, threads=1, engine="tensorrt") as ours,
        Inspector.open(tiny_bundle, threads=1, engine="onnxruntime") as plain,
    ):
        stages = ours.vision._stages
        assert isinstance(stages, ResidentStages)
        assert [bool(step.graph) for step in stages.steps] == [True] * 3, "recorded in the warm-up"
        for tolerance in (SAME, FEW_SHOT_SAME):
            for frame in frames[:2]:
                found, expected = ours.inspect(frame), plain.inspect(frame)
                assert (found.status, found.sentence) == (expected.status, expected.sentence)
                np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=tolerance)
                assert found.score == pytest.approx(expected.score, abs=tolerance)
            for inspector in (ours, plain):
                inspector.use(inspector.make_bank(list(frames[2:])))
        assert len(stages.steps) > 3, "few-shot maps were made there, too"
    assert machine.cuda.memory == {}
    assert machine.num_graphs == 0


def test_without_its_kernels_the_host_path_runs(
    machine: Machine, fakes, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Stages
) -> None:
    """Whether there is no pycuda, or one file of kernels does not load."""

    def no_pycuda(stream: Any) -> Any:
        raise RuntimeError("pycuda does not load")

    def no_match(stream: Any) -> Any:
        driver = machine.make_driver(stream)
        load = driver.kernel

        def kernel(file: str, name: str, arguments: str) -> Any:
            if file == "match":
                raise RuntimeError("match.cu needs nvcc")
            return load(file, name, arguments)

        driver.kernel = kernel
        return driver

    bundle = fakes.with_plans(tiny_bundle, tmp_path / "bundle")
    for make_driver, reason in ((no_pycuda, "pycuda does not load"), (no_match, r"match.cu needs nvcc")):
        monkeypatch.setattr(resident_stages, "PycudaDriver", make_driver)
        with pytest.warns(RuntimeWarning, match=f"anomaly maps are made on the CPU: {reason}"):
            pipeline = VisionPipeline.open(bundle, "tensorrt", 1)
        assert type(pipeline._stages) is Stages
        encoder, decoder = (pipeline.networks[name] for name in ("encoder", "decoder"))
        assert decoder.buffers["patch_features"] is not encoder.buffers["patch_features"]
        found = results(pipeline, pixels(), Against(text()))  # type: ignore[arg-type]
        assert_same(found, results(host, pixels(), Against(text())))
        pipeline.close()
    assert machine.cuda.memory == {}


def test_other_engines_have_none(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert open_resident_stages(bundle, open_networks(bundle, "onnxruntime"), 1) is None
