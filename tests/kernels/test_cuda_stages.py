"""Device arrays: what is refused before a launch, what a call may do, how pycuda is driven."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalygpt_edge import kernels
from anomalygpt_edge.kernels import Box, choice, cuda, prepare_bank
from anomalygpt_edge.kernels.cuda import compiler, stages
from anomalygpt_edge.kernels.cuda.driver import DeviceArray, PycudaDriver, empty, get, put
from tools.cuda_shim import ShimDriver

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="compiled with g++: install it")


class RecordingDriver:
    """Memory is numbers, launches are remembered."""

    num_multiprocessors = 16

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.live: set[int] = set()
        self.next = 1 << 20

    def kernel(self, file: str, name: str, arguments: str) -> tuple[str, str]:
        assert (compiler.SOURCES / f"{file}.cu").is_file()
        return name, arguments

    def launch(self, kernel: tuple[str, str], grid: Any, block: Any, *arguments: Any) -> None:
        assert len(kernel[1]) == len(arguments)
        assert all(1 <= side < 1 << 16 for side in (*grid[1:], *block))
        self.calls.append(("launch", kernel[0], grid, arguments))

    def allocate(self, nbytes: int) -> int:
        self.calls.append(("allocate", nbytes))
        self.next += 1 << 20
        self.live.add(self.next)
        return self.next

    def free(self, address: int) -> None:
        self.live.remove(address)

    def upload(self, address: int, array: np.ndarray) -> None:
        self.calls.append(("upload", array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        self.calls.append(("download", array.nbytes))


def device_array(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> DeviceArray:
    return DeviceArray(1 << 40, shape, np.dtype(dtype), strides)


def every_stage(driver: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Stages with arrays that fit them."""
    bank = prepare_bank(np.random.default_rng(0).normal(size=(4, 1000, 40)).astype(np.float32), np.float16)
    table = device_array((50, 144), np.uint8)
    return [
        (stages.Preprocess(driver, (48, 64), 14, "crop", MEAN, STD), (device_array((48, 64, 3), np.uint8),)),
        (
            stages.Preprocess(driver, (48, 64), 14, "crop", MEAN, STD, format="NV12"),
            (device_array((48, 64), np.uint8, (256, 1)), device_array((24, 64), np.uint8, (256, 1))),
        ),
        (
            stages.Match(driver, stages.DeviceBank.of(driver, bank), (1, 4, 256, 40)),
            (device_array((1, 4, 256, 40), np.float16),),
        ),
        (
            stages.Match(
                driver,
                stages.DeviceBank.of(driver, bank),
                (1, 4, 256, 40),
                gains=np.ones((4, 1000), np.float32),
            ),
            (device_array((1, 4, 256, 40), np.float16),),
        ),
        (
            stages.MatchPlaces(driver, np.ones((3, 4, 256, 40), np.float32), (1, 4, 256, 40), 2),
            (device_array((1, 4, 256, 40), np.float16),),
        ),
        (stages.Localise(driver, (1, 4, 16, 2), 28), (device_array((1, 4, 16, 2), np.float16),)),
        (stages.Upsample(driver, (1, 16), 28), (device_array((1, 16), np.float32),)),
        (
            stages.Project.of_boxes(driver, [Box(0, 0, 64, 48)], 14, "crop", (48, 64)),
            (device_array((1, 14, 14), np.float32),),
        ),
        (stages.Summarise(driver, 14 * 14, 2), (device_array((14, 14), np.float32),)),
        (stages.CellPeaks(driver, (14, 18), 3), (device_array((14, 18), np.float32),)),
        (stages.Components(driver, (14, 18)), (device_array((14, 18), np.float32), 0.5)),
        (stages.Coreset(driver, (4, 30, 8), 3), (device_array((4, 30, 8), np.float32),)),
        (stages.PackPrompt(driver, table, "Q4_K", np.array([3, -1])), (device_array((1, 256), np.float32),)),
    ]


def test_a_call_only_launches() -> None:
    """What a CUDA graph captures must neither allocate, nor copy, nor wait."""
    driver = RecordingDriver()
    for stage, arrays in every_stage(driver):
        driver.calls.clear()
        stage(*arrays)
        assert driver.calls
        assert {call[0] for call in driver.calls} == {"launch"}, type(stage).__name__
        again = list(driver.calls)
        driver.calls.clear()
        stage(*arrays)
        assert driver.calls == again, "the same addresses every time"


def test_memory_is_freed_with_its_stage() -> None:
    driver = RecordingDriver()
    built = every_stage(driver)
    assert driver.live
    del built
    gc.collect()
    assert not driver.live


def test_every_stage_refuses_another_shape_type_or_layout() -> None:
    driver = RecordingDriver()
    for stage, (array, *others) in every_stage(driver):
        gap = tuple(2 * size for size in np.empty(array.shape, array.dtype).strides)
        wrong = [
            DeviceArray(array.address, (*array.shape[:-1], array.shape[-1] + 2), array.dtype),
            DeviceArray(array.address, array.shape, np.dtype(np.float64)),
            DeviceArray(array.address, array.shape, array.dtype, gap),
            np.zeros(array.shape, array.dtype),
        ]
        driver.calls.clear()
        for each in wrong:
            with pytest.raises(ValueError, match=r"takes|must lie|is no device array|is uint8|two planes"):
                stage(each, *others)
        assert not driver.calls, type(stage).__name__


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda d: stages.Preprocess(d, (9, 9), 4, "crop", MEAN, STD, boxes=[Box(5, 5, 9, 9)]),
            "does not lie in",
        ),
        (lambda d: stages.Preprocess(d, (9, 9), 4, "crop", MEAN, (0, 1, 1)), "std not 0"),
        (lambda d: stages.Preprocess(d, (9, 9), 4, "crop", MEAN, STD, format="XYZ"), "is not known"),
        (lambda d: stages.Preprocess(d, (9, 9), 4, "crop", MEAN, STD, dtype=np.int8), "float32 or float16"),
        (
            lambda d: stages.Preprocess(
                d, (9, 9), 4, "crop", MEAN, STD, out=device_array((1, 3, 5, 5), np.float16)
            ),
            r"out takes C-contiguous float16 \[1, 3, 4, 4\]",
        ),
        (lambda d: stages.Localise(d, (1, 1, 15, 2), 4), "G \\* G"),
        (lambda d: stages.Localise(d, (1, 16, 2), 4), "G \\* G"),
        (lambda d: stages.Upsample(d, (1, 4, 4), 4), "G \\* G"),
        (
            lambda d: stages.Localise(d, (1, 1, 16, 2), 4, dtype=np.float32, out_dtype=np.float16),
            "not offered",
        ),
        (lambda d: stages.Upsample(d, (1, 15), 4), "G \\* G"),
        (lambda d: stages.Summarise(d, 10, 11), "not defined"),
        (lambda d: stages.CellPeaks(d, (4, 4), 0), "cells a side"),
        (lambda d: stages.Components(d, (0, 4)), "pixels"),
        (lambda d: stages.Coreset(d, (1, 3, 4), 4), "1 to N rows"),
        (
            lambda d: stages.PackPrompt(d, device_array((5, 144), np.uint8), "Q9_Z", np.array([0])),
            "not known",
        ),
        (
            lambda d: stages.PackPrompt(d, device_array((5, 145), np.uint8), "Q4_K", np.array([0])),
            "n \\* 144",
        ),
        (lambda d: stages.PackPrompt(d, device_array((5, 144), np.uint8), "Q4_K", np.array([5])), "below 5"),
        (lambda d: stages.Project(d, np.zeros((1, 5)), 4, (9, 9)), r"\[M, 6\]"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(build: Any, words: str) -> None:
    driver = RecordingDriver()
    with pytest.raises(ValueError, match=words):
        build(driver)


def test_match_refuses_what_does_not_fit_the_bank() -> None:
    driver = RecordingDriver()
    bank = stages.DeviceBank.of(driver, prepare_bank(np.ones((2, 3, 8), np.float32)))
    for shape, dtype in (((1, 3, 4, 8), np.float16), ((1, 2, 4, 9), np.float16), ((1, 2, 4, 8), np.float64)):
        with pytest.raises(ValueError, match="same T and V"):
            stages.Match(driver, bank, shape, dtype)
    for gains in (np.ones((2, 4), np.float32), np.ones((2, 3))):
        with pytest.raises(ValueError, match=r"gains are float32 \[2, 3\]"):
            stages.Match(driver, bank, (1, 2, 4, 8), gains=gains)


def test_match_places_refuses_what_does_not_fit_the_reference() -> None:
    driver, reference = RecordingDriver(), np.ones((3, 2, 9, 8), np.float32)
    for shape, dtype in (((1, 3, 9, 8), np.float16), ((1, 2, 9, 9), np.float16), ((1, 2, 9, 8), np.float64)):
        with pytest.raises(ValueError, match="same T, P and V"):
            stages.MatchPlaces(driver, reference, shape, 1, dtype)
    for patches, radius in ((9, -1), (8, 1)):
        with pytest.raises(ValueError, match="square grid and a radius of at least 0"):
            stages.MatchPlaces(driver, reference[:, :, :patches], (1, 2, patches, 8), radius)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 1), (1024, 4), (100_000, 4)])
def test_the_bank_is_split_so_that_the_device_is_full(rows: int, blocks: int) -> None:
    """4 taps x 2 tiles of queries on 16 multiprocessors with two blocks each: four parts of the bank."""
    driver = RecordingDriver()
    bank = stages.DeviceBank(
        device_array((4, -(-rows // 128) * 128, 2560), np.uint8), device_array((4, rows), np.float32),
        rows, 1280, np.dtype(np.float16),
    )  # fmt: skip
    stages.Match(driver, bank, (1, 4, 256, 1280))(device_array((1, 4, 256, 1280), np.float16))
    launches = {call[1]: call for call in driver.calls if call[0] == "launch"}
    assert launches["match_f16"][2] == (2, blocks, 4)
    tiles_per_block, padded_rows = launches["match_f16"][3][-1], launches["match_f16"][3][6]
    assert (blocks - 1) * tiles_per_block * 128 < padded_rows <= blocks * tiles_per_block * 128
    assert launches["unit_rows_f16_f16"][2] == (4 * 256 // 8, 1, 1)
    assert launches["match_distance"][2] == (1, 1, 1)


@needs_gxx
def test_frames_lie_in_padded_rows_and_separate_planes() -> None:
    rng = np.random.default_rng(0)
    nv12 = rng.integers(0, 256, (60, 50), dtype=np.uint8)
    driver = ShimDriver("address")
    pitched = np.zeros((60, 64), np.uint8)
    pitched[:, :50] = nv12
    luma, chroma = put(driver, pitched[:40]), put(driver, pitched[40:])
    stage = stages.Preprocess(driver, (40, 50), 14, "crop", MEAN, STD, format="NV12", dtype=np.float32)
    found = stage(
        DeviceArray(luma.address, (40, 50), luma.dtype, (64, 1), luma),
        DeviceArray(chroma.address, (20, 50), chroma.dtype, (64, 1), chroma),
    )
    expected = kernels.preprocess(nv12, 14, "crop", MEAN, STD, format="NV12")
    np.testing.assert_array_equal(get(driver, found), expected)
    whole = put(driver, pitched)
    found = stage(DeviceArray(whole.address, (60, 50), whole.dtype, (64, 1), whole))
    np.testing.assert_array_equal(get(driver, found), expected)
    driver.close()


def test_arrays_of_others_are_taken_by_their_interface() -> None:
    class Theirs:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (2, 3), "typestr": "<f2", "data": (4096, True), "strides": (8, 2), "version": 3,
        }  # fmt: skip

    found = DeviceArray.of(Theirs())
    assert (found.address, found.shape, found.dtype, found.strides) == (4096, (2, 3), np.float16, (8, 2))
    assert not found.c_contiguous
    assert DeviceArray.of(found) is found
    assert DeviceArray(1, (3, 1, 4), np.dtype(np.float32), (16, 99, 4)).c_contiguous
    again = DeviceArray.of(types.SimpleNamespace(__cuda_array_interface__=found.__cuda_array_interface__))
    assert (again.address, again.shape, again.strides) == (found.address, found.shape, found.strides)
    with pytest.raises(ValueError, match="ndarray is no device array: copy it with put"):
        DeviceArray.of(np.zeros(3))


class FakeMemory(int):
    """``pycuda.driver.DeviceAllocation``: an address that can be freed."""

    def __new__(cls, cuda: FakeCuda, address: int) -> FakeMemory:
        memory = super().__new__(cls, address)
        memory.cuda = cuda  # type: ignore[attr-defined]
        return memory

    def free(self) -> None:
        self.cuda.freed += 1  # type: ignore[attr-defined]


class FakeCuda(types.ModuleType):
    """``pycuda.driver``: contexts are counted, modules and functions remember what they get."""

    class Error(Exception):
        pass

    def __init__(self, refused: bytes = b"") -> None:
        super().__init__("pycuda.driver")
        self.depth = 0
        self.loaded: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []
        self.refused = refused
        self.device_attribute = types.SimpleNamespace(
            MULTIPROCESSOR_COUNT=1, COMPUTE_CAPABILITY_MAJOR=2, COMPUTE_CAPABILITY_MINOR=3
        )
        self.Context = types.SimpleNamespace(pop=self._pop)
        self.allocated = self.freed = 0

    def _pop(self) -> None:
        self.depth -= 1

    def init(self) -> None:
        pass

    def Device(self, index: int) -> Any:
        if index > 0:
            raise self.Error("invalid device ordinal")
        device = types.SimpleNamespace(get_attribute=lambda number: {1: 16, 2: 8, 3: 7}[number])

        def push() -> None:
            self.depth += 1

        context = types.SimpleNamespace(push=push, get_device=lambda: device)
        return types.SimpleNamespace(retain_primary_context=lambda: context)

    def Stream(self) -> Any:
        return types.SimpleNamespace(synchronize=lambda: None, handle=77)

    def module_from_buffer(self, code: bytes) -> Any:
        assert self.depth == 1, "no context is current"
        if self.refused and code.startswith(self.refused):
            raise self.Error("device kernel image is invalid")
        self.loaded.append(code)

        def get_function(name: str) -> Any:
            def call(grid: Any, block: Any, stream: Any, *arguments: Any) -> None:
                assert self.depth == 1
                self.launched.append((name, grid, block, stream.handle, arguments))

            return types.SimpleNamespace(prepare=lambda types: None, prepared_async_call=call)

        return types.SimpleNamespace(get_function=get_function)

    def mem_alloc(self, nbytes: int) -> Any:
        assert self.depth == 1

        self.allocated += 4096
        return FakeMemory(self, self.allocated)

    mem_host_register_flags = types.SimpleNamespace(DEVICEMAP=2)

    def register_host_memory(self, array: np.ndarray, flags: int) -> Any:
        assert self.depth == 1
        assert flags == 2
        if array.nbytes > 1000:
            raise self.Error("out of memory")
        return types.SimpleNamespace(base=types.SimpleNamespace(get_device_pointer=lambda: 8192))

    def memcpy_htod_async(self, address: int, array: np.ndarray, stream: Any) -> None:
        assert self.depth == 1

    def memcpy_dtoh_async(self, array: np.ndarray, address: int, stream: Any) -> None:
        array[...] = 5


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(refused=b"shipped")
    package = types.ModuleType("pycuda")
    package.driver = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    yield fake
    assert fake.depth == 0, "every context that was pushed was popped"


def test_pycuda_is_driven_in_the_primary_context(
    fake_cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "shipped_binary", lambda file: tmp_path / f"{file}.fatbin")
    (tmp_path / "summarise.fatbin").write_bytes(b"good code")
    driver = PycudaDriver()
    assert driver.num_multiprocessors == 16
    assert driver.compute_capability == (8, 7)
    stage = stages.Summarise(driver, 5000, 50)
    figures = stage(put(driver, np.zeros(5000, np.float32)))
    assert fake_cuda.loaded == [b"good code"], "one module, whatever the number of its kernels"
    assert [launch[0] for launch in fake_cuda.launched] == [
        "summarise_begin", *["summarise_pass"] * 4, "summarise_figures",
    ]  # fmt: skip
    assert {launch[3] for launch in fake_cuda.launched} == {77}, "all on one stream"
    assert get(driver, figures).tolist() == [5] * 4
    del stage, figures
    gc.collect()
    assert fake_cuda.freed >= 2


def test_code_that_the_driver_refuses_is_compiled_on_the_device(
    fake_cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "shipped_binary", lambda file: tmp_path / f"{file}.fatbin")
    (tmp_path / "project.fatbin").write_bytes(b"shipped, by a newer CUDA")
    asked = []
    monkeypatch.setattr(
        compiler, "compile_for_device", lambda file, target: asked.append((file, target)) or b"own code"
    )
    PycudaDriver().kernel("project", "project", "PPPiiiif")
    assert asked == [("project", "87")]
    assert fake_cuda.loaded == [b"own code"]


def test_code_that_does_not_load_at_all_is_one_sentence(
    fake_cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "shipped_binary", lambda file: tmp_path / f"{file}.fatbin")
    monkeypatch.setattr(compiler, "compile_for_device", lambda file, target: b"shipped code is no better")
    with pytest.raises(
        RuntimeError, match=r"match.cu, compiled here, does not load \(device kernel image is"
    ):
        PycudaDriver().kernel("match", "match_f16", "PPPPiiiii")


def test_a_cameras_buffer_is_read_where_it_lies(fake_cuda: FakeCuda) -> None:
    driver = PycudaDriver()
    mapped = driver.map_host(np.zeros((4, 32), np.uint8))
    assert (mapped.address, mapped.shape, mapped.c_contiguous) == (8192, (4, 32), True)
    assert mapped.owner is not None, "the mapping lives as long as the array"
    with pytest.raises(
        RuntimeError, match=r"cannot map this host memory \(out of memory\): copy it with put"
    ):
        driver.map_host(np.zeros(2000, np.uint8))
    with pytest.raises(ValueError, match="map the whole buffer"):
        driver.map_host(np.zeros((4, 32), np.uint8)[:, :20])


def test_no_such_device(fake_cuda: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device 3: invalid device ordinal"):
        PycudaDriver(3)


def test_without_pycuda_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(RuntimeError, match=r"pip install 'anomalygpt-edge\[cuda\]'"):
        PycudaDriver()


def test_cuda_is_available_where_it_runs_and_works_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (False, True):
        monkeypatch.setattr(cuda, "runs_here", lambda found=found: found)
        choice._found.cache_clear()
        choice._chosen.cache_clear()
        assert ("cuda" in kernels.available()) == found
        assert kernels.active() != "cuda"
    with kernels.using("cuda"):
        assert kernels.active() == "cuda"
    monkeypatch.undo()
    choice._found.cache_clear()
    choice._chosen.cache_clear()


def test_looking_for_a_gpu_imports_no_pycuda() -> None:
    script = "import sys, anomalygpt_edge.kernels as k; k.available(); print('pycuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_empty_arrays_still_have_an_address() -> None:
    driver = RecordingDriver()
    assert empty(driver, (0, 4), np.float32).address
    assert driver.calls == [("allocate", 1)]
