"""Each operation on device arrays: built once for its shapes, then called for every frame.

Building checks everything, uploads tables and allocates buffers. A call checks the array it is given and puts
kernels on the driver's stream: no allocation, no copy from or to the host, no waiting. So one CUDA graph captures
all of them together with the engines (``runtime.engines.gpu.Graph``), as long as the same arrays are given.

A result belongs to its stage and is overwritten by the next call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dequantise import BLOCKS
from ..geometry import Box, Resize, check_box, placements
from ..sampling import Sampling, Taps, normalisation_table, sampling
from ..types import FORMATS, MAX_CELLS, Bank, PixelFormat, frame_size
from .driver import DeviceArray, Driver, empty, get, put

THREADS = 256
TILE = 128  # rows of a block of match.cu
ROW_ALIGNMENT = 64  # bytes of a row that it takes at a time
BLOCKS_PER_MULTIPROCESSOR = 2
SQUARE = 16  # side of a block of preprocess.cu, output pixels
STATE_BYTES = 5160  # of summarise.cu
FIGURES_BLOCKS = 256
PROJECT_WIDTH, PROJECT_HEIGHT = 32, 8
CHUNK = 1024  # of components.cu

_SHORT = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}


class Preprocess:
    """``kernels.preprocess`` for frames on the device: camera pixels → ``out``, the encoder's input.

    Args:
        frame_size: (height, width) in pixels of every frame to come.
        size, resize, mean, std, format, boxes, dtype: as in ``kernels.preprocess``.
        out: C-contiguous [B, 3, S, S] to write to, such as an engine's input; new memory when None.

    Raises:
        ValueError: as ``kernels.preprocess``.
    """

    def __init__(
        self,
        driver: Driver,
        frame_size: tuple[int, int],
        size: int,
        resize: Resize,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        format: PixelFormat = "BGR8",
        boxes: Sequence[Box] | None = None,
        dtype: Any = np.float16,
        out: DeviceArray | None = None,
    ) -> None:
        whole = (Box(0, 0, frame_size[1], frame_size[0]),)
        checked = whole if boxes is None else tuple(check_box(Box(*box), *frame_size) for box in boxes)
        table = normalisation_table(tuple(map(float, mean)), tuple(map(float, std)))
        if not np.isfinite(table).all():
            raise ValueError(f"mean {mean} and std {std} must be finite and std not 0")
        samplings = [sampling(box, size, resize) for box in checked]
        self._build(driver, frame_size, format, samplings, table, np.dtype(dtype), out)

    @classmethod
    def of_tables(
        cls,
        driver: Driver,
        frame_size: tuple[int, int],
        format: str,
        samplings: Sequence[Sampling],
        table: np.ndarray,
        dtype: Any,
    ) -> Preprocess:
        """The same from tables that ``kernels.preprocess`` has made."""
        self = cls.__new__(cls)
        self._build(driver, frame_size, format, samplings, table, np.dtype(dtype), None)
        return self

    def _build(
        self,
        driver: Driver,
        frame_size: tuple[int, int],
        format: str,
        samplings: Sequence[Sampling],
        table: np.ndarray,
        dtype: np.dtype,
        out: DeviceArray | None,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(
                f"the pixel format {format!r} is not known: convert to one of {', '.join(FORMATS)}"
            )
        if dtype not in _SHORT:
            raise ValueError(f"preprocess gives float32 or float16, not {dtype}")
        size = len(samplings[0].down.starts)
        self.format, self.frame_size = format, frame_size
        self.out = _output(driver, out, (len(samplings), 3, size, size), dtype)
        squares, tables = _squares(samplings)
        self._squares, self._tables, self._table = (put(driver, each) for each in (squares, tables, table))
        self._grid = (-(-size // SQUARE), -(-size // SQUARE), len(samplings))
        self._driver = driver
        self._kernel = driver.kernel("preprocess", f"preprocess_{format}_{_SHORT[dtype]}", "PPiiiPPPPi")

    def __call__(self, frame: Any, chroma: Any = None) -> DeviceArray:
        """Enqueue one frame.

        Args:
            frame: device uint8, as in ``kernels.preprocess``; rows may be padded, pixels of a row lie side by side.
            chroma: NV12 only, when it is not right below the luma: uint8 [H / 2, W], ``frame`` then being [H, W].

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        frame = DeviceArray.of(frame)
        height, width = self.frame_size
        stride = _row_stride(frame)
        if chroma is not None:
            chroma = DeviceArray.of(chroma)
            fits = (
                self.format == "NV12"
                and chroma.shape == (height // 2, width)
                and frame.shape == (height, width)
            )
            if (
                not fits
                or _row_stride(chroma) != stride
                or frame.dtype != np.uint8
                or chroma.dtype != np.uint8
            ):
                raise ValueError(
                    f"two planes are NV12's: uint8 {[height, width]} and {[height // 2, width]} with equal strides"
                )
        elif frame_size(frame, self.format) != self.frame_size:  # type: ignore[arg-type]
            raise ValueError(f"this stage takes frames of {width} x {height} pixels, not {list(frame.shape)}")
        below = chroma.address if chroma is not None else frame.address + height * stride
        self._driver.launch(
            self._kernel, self._grid, (THREADS, 1, 1), frame.address, below, stride, width, height,
            self._squares.address, self._tables.address, self._table.address, self.out.address, self.out.shape[2],
        )  # fmt: skip
        return self.out


@dataclass(frozen=True, eq=False)
class DeviceBank:
    """A bank in match.cu's layout: zeros pad each row to a multiple of 64 bytes and the rows to whole tiles."""

    rows: DeviceArray  # uint8 [T, padded rows, bytes]
    scales: DeviceArray  # float32 [T, padded rows]
    num_rows: int
    width: int
    dtype: np.dtype  # float16 or int8

    @classmethod
    def of(cls, driver: Driver, bank: Bank) -> DeviceBank:
        """A bank on the device; float32 rows are rounded to float16, tensor cores' type."""
        taps, num_rows, width = bank.rows.shape
        dtype = np.dtype(np.int8 if bank.rows.dtype == np.int8 else np.float16)
        padded = _padded(num_rows, TILE)
        rows = np.zeros(
            (taps, padded, _padded(width * dtype.itemsize, ROW_ALIGNMENT) // dtype.itemsize), dtype
        )
        rows[:, :num_rows, :width] = bank.rows
        scales = np.zeros((taps, padded), np.float32)
        scales[:, :num_rows] = bank.scales
        return cls(put(driver, rows.view(np.uint8)), put(driver, scales), num_rows, width, dtype)


class Match:
    """``kernels.match`` for features on the device → ``distance`` [B, P] and ``nearest`` [B, T, P].

    Features are rounded to the bank's type once they have unit length: distances are within 1e-3 of float64's with
    a float16 bank.

    Args:
        bank: ``DeviceBank.of``.
        shape: (B, T, P, V) of the features.
        dtype: float16 or float32 of the features.
        gains: float32 [T, N] on the host, as in ``kernels.match_scaled``; each call then writes ``scaled``, float32
            [B, P], too.

    Raises:
        ValueError: features or gains that do not fit the bank.
    """

    def __init__(
        self,
        driver: Driver,
        bank: DeviceBank,
        shape: tuple[int, ...],
        dtype: Any = np.float16,
        *,
        gains: np.ndarray | None = None,
    ) -> None:
        dtype = np.dtype(dtype)
        fits = len(shape) == 4 and (shape[1], shape[3]) == (bank.rows.shape[0], bank.width)
        if dtype not in _SHORT or not fits or 0 in shape:
            raise ValueError(
                f"match takes float16 or float32 features [B, T, P, V] and a bank [T, N, V] of the same T and V, "
                f"not {dtype} {list(shape)} and {[bank.rows.shape[0], bank.num_rows, bank.width]}"
            )
        batch, taps, patches, _ = shape
        _, padded_rows, row_bytes = bank.rows.shape
        padded = _padded(batch * patches, TILE)
        if max(padded, padded_rows) * taps >= 1 << 31:
            raise ValueError(
                f"{batch * patches} patches against {bank.num_rows} are too many for one call: split them"
            )
        self.shape, self.dtype, self.bank = tuple(shape), dtype, bank
        self.distance = empty(driver, (batch, patches), np.float32)
        self.nearest = empty(driver, (batch, taps, patches), np.int32)
        self.gains = self.scaled = None
        if gains is not None:
            if gains.shape != (taps, bank.num_rows) or gains.dtype != np.float32:
                raise ValueError(
                    f"gains are float32 {[taps, bank.num_rows]}, not {gains.dtype} {list(gains.shape)}"
                )
            self.gains = put(driver, gains)
            self.scaled = empty(driver, (batch, patches), np.float32)
        self._rows = empty(driver, (taps, padded, row_bytes), np.uint8)
        self._inverse = empty(driver, (taps, padded), np.float32)
        self._best = empty(driver, (taps, padded), np.uint64)
        self._driver = driver
        short = "i8" if bank.dtype == np.int8 else "f16"
        self._unit_rows = driver.kernel("unit_rows", f"unit_rows_{_SHORT[dtype]}_{short}", "PPPPiiiiii")
        self._match = driver.kernel("match", f"match_{short}", "PPPPiiiii")
        self._distance = driver.kernel("match", "match_distance", "PPPPPPiiiii")
        query_tiles, bank_tiles = padded // TILE, padded_rows // TILE
        self._tiles = split_bank(query_tiles * taps, bank_tiles, driver.num_multiprocessors)
        self._grid = (query_tiles, -(-bank_tiles // self._tiles), taps)

    def __call__(self, features: Any) -> DeviceArray:
        """Enqueue one match; returns ``distance``.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        features = _checked(features, self.shape, self.dtype, "match")
        batch, taps, patches, width = self.shape
        padded, row_bytes = self._rows.shape[1:]
        bank = self.bank
        warps = THREADS // 32
        self._driver.launch(
            self._unit_rows, (-(-taps * padded // warps), 1, 1), (THREADS, 1, 1), features.address, self._rows.address,
            self._inverse.address, self._best.address, batch, taps, patches, width, padded,
            row_bytes // bank.dtype.itemsize,
        )  # fmt: skip
        self._driver.launch(
            self._match, self._grid, (THREADS, 1, 1), self._rows.address, bank.rows.address, bank.scales.address,
            self._best.address, padded, bank.num_rows, bank.rows.shape[1], row_bytes, self._tiles,
        )  # fmt: skip
        self._driver.launch(
            self._distance, (-(-batch * patches // THREADS), 1, 1), (THREADS, 1, 1), self._best.address,
            self._inverse.address, self.distance.address, self.nearest.address,
            0 if self.gains is None else self.gains.address, 0 if self.scaled is None else self.scaled.address,
            batch * patches, patches, taps, padded, bank.num_rows,
        )  # fmt: skip
        return self.distance


def split_bank(query_blocks: int, bank_tiles: int, num_multiprocessors: int) -> int:
    """Tiles of the bank that a block walks over: few enough that every multiprocessor has its two blocks."""
    parts = max(1, BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors // query_blocks)
    return -(-bank_tiles // min(parts, bank_tiles))


class MatchPlaces:
    """``kernels.match_places`` for features on the device → ``distance`` [B, K, T, P].

    Args:
        reference: float32 [K, T, P, V] on the host, of unit length.
        shape: (B, T, P, V) of the features.
        radius: of the window in patches.
        dtype: float16 or float32 of the features.

    Raises:
        ValueError: features that do not fit the reference, patches that form no square, or a negative radius.
    """

    def __init__(
        self,
        driver: Driver,
        reference: np.ndarray,
        shape: tuple[int, ...],
        radius: int,
        dtype: Any = np.float16,
    ) -> None:
        dtype = np.dtype(dtype)
        fits = len(shape) == 4 and reference.ndim == 4 and reference.shape[1:] == tuple(shape[1:])
        if dtype not in _SHORT or reference.dtype != np.float32 or not fits or 0 in (*shape, len(reference)):
            raise ValueError(
                f"match_places takes float16 or float32 features [B, T, P, V] and a float32 reference [K, T, P, V] of "
                f"the same T, P and V, not {dtype} {list(shape)} and {reference.dtype} {list(reference.shape)}"
            )
        batch, taps, patches, _ = shape
        self._side = math.isqrt(patches)
        if self._side**2 != patches or radius < 0:
            raise ValueError(
                f"match_places takes the patches of a square grid and a radius of at least 0, "
                f"not {patches} patches and {radius}"
            )
        if batch * taps * patches >= 1 << 26 or len(reference) >= 1 << 16:
            raise ValueError(
                f"{batch} images against {len(reference)} normal images are too many for one call: split them"
            )
        self.shape, self.dtype, self.radius = tuple(shape), dtype, min(radius, self._side - 1)
        self.reference = put(driver, reference)
        self.distance = empty(driver, (batch, len(reference), taps, patches), np.float32)
        self._inverse = empty(driver, (batch, taps, patches), np.float32)
        self._driver = driver
        self._lengths = driver.kernel("match_places", f"place_lengths_{_SHORT[dtype]}", "PPii")
        self._match = driver.kernel("match_places", f"match_places_{_SHORT[dtype]}", "PPPPiiiiii")

    def __call__(self, features: Any) -> DeviceArray:
        """Enqueue one match; returns ``distance``.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        features = _checked(features, self.shape, self.dtype, "match_places")
        batch, taps, patches, width = self.shape
        rows, count = batch * taps * patches, self.reference.shape[0]
        grid, block = (-(-rows * 32 // THREADS), 1, 1), (THREADS, 1, 1)
        self._driver.launch(self._lengths, grid, block, features.address, self._inverse.address, rows, width)
        self._driver.launch(
            self._match, (grid[0], count, 1), block, features.address, self._inverse.address, self.reference.address,
            self.distance.address, batch, count, taps, self._side, width, self.radius,
        )  # fmt: skip
        return self.distance


class Localise:
    """``kernels.localise`` on the device: logits [B, T, G * G, 2] → ``out`` [B, S, S].

    Raises:
        ValueError: another shape or type, or a combination of types that no kernel was made for.
    """

    def __init__(
        self,
        driver: Driver,
        shape: tuple[int, ...],
        size: int,
        *,
        dtype: Any = np.float16,
        out_dtype: Any = np.float32,
        out: DeviceArray | None = None,
    ) -> None:
        fits = len(shape) == 4 and shape[3] == 2 and math.isqrt(shape[2]) ** 2 == shape[2]
        if not fits or 0 in shape or size < 1:
            raise ValueError(
                f"localise takes logits [B, T, G * G, 2] and a side of at least 1, not {list(shape)}, {size}"
            )
        _, taps, patches, _ = shape
        self._build(driver, "localise", tuple(shape), taps, math.isqrt(patches), size, dtype, out_dtype, out)

    def _build(
        self,
        driver: Driver,
        what: str,
        shape: tuple[int, ...],
        taps: int,
        grid: int,
        size: int,
        dtype: Any,
        out_dtype: Any,
        out: DeviceArray | None,
    ) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        kind = (_SHORT.get(self.dtype, "?"), _SHORT.get(np.dtype(out_dtype), "?"))
        if kind not in _LOCALISE_KINDS[what]:
            raise ValueError(
                f"{what} from {self.dtype} to {np.dtype(out_dtype)} is not offered: convert one of them"
            )
        self.out = _output(driver, out, (shape[0], size, size), np.dtype(out_dtype))
        self._arguments = (taps, grid, size)
        self._grid = (min(-(-size * size // THREADS), max(1, 4 * driver.num_multiprocessors)), shape[0], 1)
        self._what, self._driver = what, driver
        self._kernel = driver.kernel("localise", f"{what}_{kind[0]}_{kind[1]}", "PPiii")

    def __call__(self, values: Any) -> DeviceArray:
        """Enqueue one batch.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        values = _checked(values, self.shape, self.dtype, self._what)
        self._driver.launch(
            self._kernel, self._grid, (THREADS, 1, 1), values.address, self.out.address, *self._arguments
        )
        return self.out


_LOCALISE_KINDS = {
    "localise": (("f32", "f32"), ("f16", "f32"), ("f16", "f16")),
    "upsample": (("f32", "f32"), ("f32", "f16")),
}


class Upsample(Localise):
    """``kernels.upsample`` on the device: distances [B, G * G] → ``out`` [B, S, S].

    Raises:
        ValueError: another shape or type.
    """

    def __init__(
        self,
        driver: Driver,
        shape: tuple[int, ...],
        size: int,
        *,
        out_dtype: Any = np.float32,
        out: DeviceArray | None = None,
    ) -> None:
        if len(shape) != 2 or math.isqrt(shape[1]) ** 2 != shape[1] or 0 in shape or size < 1:
            raise ValueError(f"upsample takes [B, G * G] and a side of at least 1, not {list(shape)}, {size}")
        grid = math.isqrt(shape[1])
        self._build(driver, "upsample", tuple(shape), 1, grid, size, np.float32, out_dtype, out)


class Project:
    """``kernels.project`` on the device: maps [M, S, S] of boxes → ``out`` [H, W].

    Args:
        places: float64 [M, 6], ``geometry.placements`` of the boxes.
        size: side of the maps.
        frame_size: (height, width) of the frame in pixels.
        outside: value of pixels that no map covers.
    """

    def __init__(
        self,
        driver: Driver,
        places: np.ndarray,
        size: int,
        frame_size: tuple[int, int],
        *,
        outside: float = 0.0,
    ) -> None:
        if (
            places.ndim != 2
            or places.shape[1] != 6
            or places.dtype != np.float64
            or 0 in (*places.shape, *frame_size)
        ):
            raise ValueError(f"places are float64 [M, 6], not {places.dtype} {list(places.shape)}")
        height, width = frame_size
        self.shape = (len(places), size, size)
        self.out = empty(driver, (height, width), np.float32)
        self._places, self._outside, self._driver = put(driver, places), outside, driver
        self._grid = (-(-width // PROJECT_WIDTH), -(-height // PROJECT_HEIGHT), 1)
        self._kernel = driver.kernel("project", "project", "PPPiiiif")

    @classmethod
    def of_boxes(
        cls,
        driver: Driver,
        boxes: Sequence[Box],
        size: int,
        resize: Resize,
        frame_size: tuple[int, int],
        *,
        outside: float = 0.0,
    ) -> Project:
        """As ``kernels.project`` takes them.

        Raises:
            ValueError: a box that does not lie in the frame.
        """
        checked = tuple(check_box(Box(*box), *frame_size) for box in boxes)
        return cls(driver, placements(checked, size, resize), size, frame_size, outside=outside)

    def __call__(self, maps: Any) -> DeviceArray:
        """Enqueue one frame's maps.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        maps = _checked(maps, self.shape, np.dtype(np.float32), "project")
        height, width = self.out.shape
        self._driver.launch(
            self._kernel, self._grid, (THREADS, 1, 1), maps.address, self._places.address, self.out.address,
            self.shape[0], self.shape[1], width, height, self._outside,
        )  # fmt: skip
        return self.out


class Summarise:
    """``kernels.summarise`` on the device: a float32 map → ``figures`` (peak, lowest, median, mean of the highest).

    Args:
        num_values: of every map to come.
        count: how many of the highest values the mean is of.
    """

    def __init__(self, driver: Driver, num_values: int, count: int) -> None:
        if not 1 <= count <= num_values < 1 << 31:
            raise ValueError(f"the mean of {count} of {num_values} values is not defined")
        self.num_values, self.count = num_values, count
        self.figures = empty(driver, (4,), np.float32)
        self._state = empty(driver, (STATE_BYTES,), np.uint8)
        self._driver = driver
        self._grid = (min(-(-num_values // (4 * THREADS)), FIGURES_BLOCKS), 1, 1)
        self._begin = driver.kernel("summarise", "summarise_begin", "Pii")
        self._pass = driver.kernel("summarise", "summarise_pass", "PPii")
        self._figures = driver.kernel("summarise", "summarise_figures", "PPPii")

    def __call__(self, anomaly_map: Any) -> DeviceArray:
        """Enqueue one map.

        Raises:
            ValueError: another size, type or layout than this stage was built for.
        """
        values = DeviceArray.of(anomaly_map)
        if (
            math.prod(values.shape) != self.num_values
            or values.dtype != np.float32
            or not values.c_contiguous
        ):
            raise ValueError(
                f"summarise takes {self.num_values} float32 values, not {values.dtype} {list(values.shape)}"
            )
        block, state, size = (THREADS, 1, 1), self._state.address, self.num_values
        self._driver.launch(self._begin, (1, 1, 1), block, state, size, self.count)
        for step in range(4):
            self._driver.launch(self._pass, self._grid, block, values.address, state, size, step)
        self._driver.launch(
            self._figures, self._grid, block, values.address, state, self.figures.address, size, self.count
        )
        return self.figures


class CellPeaks:
    """``kernels.cell_peaks`` on the device: a map [H, W] → ``out`` [cells, cells].

    Raises:
        ValueError: a map without a pixel, or no cell.
    """

    def __init__(self, driver: Driver, shape: tuple[int, int], cells: int) -> None:
        if 0 in shape or not 1 <= cells <= MAX_CELLS:
            raise ValueError(f"a map {list(shape)} cannot be cut into {cells} cells a side: 1 to {MAX_CELLS}")
        self.shape = tuple(shape)
        self.out = empty(driver, (cells, cells), np.float32)
        self._driver = driver
        self._kernel = driver.kernel("cell_peaks", "cell_peaks", "PPii")

    def __call__(self, anomaly_map: Any) -> DeviceArray:
        """Enqueue one map.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        values = _checked(anomaly_map, self.shape, np.dtype(np.float32), "cell_peaks")
        cells = self.out.shape[0]
        self._driver.launch(
            self._kernel, (cells, cells, 1), (THREADS, 1, 1), values.address, self.out.address, *self.shape
        )
        return self.out


class Components:
    """``kernels.components`` on the device: a map [H, W] → ``count`` [1] and as many rows of ``regions``, int32:
    first pixel, left, right and bottom (both one past), area, and the peak's bits in the order of the values.

    Raises:
        ValueError: a map without a pixel or with 2**30 or more.
    """

    def __init__(self, driver: Driver, shape: tuple[int, int]) -> None:
        height, width = shape
        if not 1 <= height * width < 1 << 30:
            raise ValueError(f"components takes maps of 1 to 2**30 pixels, not {list(shape)}")
        self.shape = (height, width)
        self.count = empty(driver, (1,), np.int32)
        most = -(-height // 2) * -(-width // 2)  # two pixels of a 2 × 2 square touch
        self.regions = empty(driver, (most, 6), np.int32)
        self._chunks = -(-height * width // CHUNK)
        self._labels = empty(driver, self.shape, np.int32)
        self._counts = empty(driver, (self._chunks,), np.int32)
        self._blocks = min(-(-height * width // THREADS), 8 * driver.num_multiprocessors)
        self._driver = driver
        self._begin = driver.kernel("components", "components_begin", "PPif")
        self._join = driver.kernel("components", "components_join", "Pii")
        self._count = driver.kernel("components", "components_count", "PPi")
        self._number = driver.kernel("components", "components_number", "PPPPii")
        self._measure = driver.kernel("components", "components_measure", "PPPii")

    def __call__(self, anomaly_map: Any, level: float) -> DeviceArray:
        """Enqueue one map; returns ``count``.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        values = _checked(anomaly_map, self.shape, np.dtype(np.float32), "components")
        height, width = self.shape
        labels, counts, regions = (each.address for each in (self._labels, self._counts, self.regions))
        size, block = height * width, (THREADS, 1, 1)
        shared, chunks = (self._blocks, 1, 1), (self._chunks, 1, 1)
        launch = self._driver.launch
        launch(self._begin, shared, block, values.address, labels, size, np.float32(level))
        launch(self._join, shared, block, labels, height, width)
        launch(self._count, chunks, block, labels, counts, size)
        launch(self._number, chunks, block, labels, counts, regions, self.count.address, size, width)
        launch(self._measure, shared, block, values.address, labels, regions, height, width)
        return self.count

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The last map's, on the host: int32 [R, 5] (x, y, width, height, area) and float32 [R] peaks; waits."""
        number = int(get(self._driver, self.count)[0])
        rows = get(self._driver, DeviceArray(self.regions.address, (number, 6), self.regions.dtype))
        first, left, right, bottom, area, peak = rows.T
        top = first // self.shape[1]
        keys = peak.view(np.uint32)
        bits = np.where(keys >> 31, keys & np.uint32(0x7FFFFFFF), ~keys)
        return np.stack([left, top, right - left, bottom - top, area], axis=1), bits.view(np.float32)


class Coreset:
    """``kernels.coreset`` on the device: rows [T, N, V] → ``chosen`` [T, M].

    Raises:
        ValueError: no row, or more picks than rows.
    """

    def __init__(self, driver: Driver, shape: tuple[int, ...], picks: int) -> None:
        if len(shape) != 3 or 0 in shape or not 1 <= picks <= shape[1]:
            raise ValueError(f"a coreset is 1 to N rows of [T, N, V], not {picks} of {list(shape)}")
        taps, num_rows, width = shape
        self.shape = tuple(shape)
        self.chosen = empty(driver, (taps, picks), np.int32)
        self._nearest = empty(driver, (taps, num_rows), np.float32)
        self._centre = empty(driver, (taps, width), np.float32)
        self._best = empty(driver, (taps, picks + 1), np.uint64)
        self._blocks = min(-(-num_rows * 32 // THREADS), 8 * driver.num_multiprocessors)
        self._driver = driver
        self._begin = driver.kernel("coreset", "coreset_begin", "PPii")
        self._mean = driver.kernel("coreset", "coreset_centre", "PPii")
        self._first = driver.kernel("coreset", "coreset_first", "PPPiii")
        self._next = driver.kernel("coreset", "coreset_next", "PPPPiiii")

    def __call__(self, features: Any) -> DeviceArray:
        """Enqueue all picks.

        Raises:
            ValueError: another shape, type or layout than this stage was built for.
        """
        rows = _checked(features, self.shape, np.dtype(np.float32), "coreset").address
        taps, num_rows, width = self.shape
        picks = self.chosen.shape[1]
        nearest, centre, best = (each.address for each in (self._nearest, self._centre, self._best))
        grid, block = (self._blocks, taps, 1), (THREADS, 1, 1)
        launch = self._driver.launch
        launch(self._begin, grid, block, nearest, best, num_rows, picks)
        launch(self._mean, (-(-width // THREADS), taps, 1), block, rows, centre, num_rows, width)
        launch(self._first, grid, block, rows, centre, best, num_rows, width, picks)
        for step in range(picks):
            launch(
                self._next,
                grid,
                block,
                rows,
                nearest,
                best,
                self.chosen.address,
                num_rows,
                width,
                picks,
                step,
            )
        return self.chosen


class PackPrompt:
    """``kernels.pack_prompt`` with the table on the device → ``out`` [L, D].

    Args:
        table: device uint8 [vocab, bytes of a row], contiguous.
        type: its ggml type.
        token_ids: integers [L], -1 for the next injected row; fixed, as a prompt's layout is.

    Raises:
        ValueError: an unknown type, a row that is no whole number of blocks, or an id outside the table.
    """

    def __init__(self, driver: Driver, table: DeviceArray, type: str, token_ids: np.ndarray) -> None:
        if type not in BLOCKS:
            raise ValueError(f"embedding tables of type {type} are not known: use one of {', '.join(BLOCKS)}")
        values, block_bytes = BLOCKS[type]
        table = DeviceArray.of(table)
        if (
            len(table.shape) != 2
            or table.dtype != np.uint8
            or table.shape[1] % block_bytes
            or not table.c_contiguous
        ):
            raise ValueError(
                f"a {type} table is contiguous uint8 [vocab, n * {block_bytes}], not {table.dtype} {list(table.shape)}"
            )
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or len(ids) == 0 or ids.min() < -1 or ids.max() >= table.shape[0]:
            raise ValueError(f"token ids are integers [L] from -1 to below {table.shape[0]}")
        width = table.shape[1] // block_bytes * values
        injected = ids < 0
        self.injected_shape = (int(injected.sum()), width)
        sources = np.where(
            injected, -np.cumsum(injected, dtype=np.int64), ids
        )  # the k-th injected row is -1 - k
        self.out = empty(driver, (len(ids), width), np.float32)
        self._table, self._sources, self._driver = table, put(driver, sources.astype(np.int32)), driver
        self._kernel = driver.kernel("pack_prompt", f"pack_prompt_{type}", "PPPPqi")

    def __call__(self, injected: Any = None) -> DeviceArray:
        """Enqueue one prompt. ``injected``: device float32 [K, D], None when K = 0.

        Raises:
            ValueError: injected rows that do not fit.
        """
        address = 0
        if injected is not None or self.injected_shape[0]:
            address = _checked(injected, self.injected_shape, np.dtype(np.float32), "pack_prompt").address
        length, width = self.out.shape
        self._driver.launch(
            self._kernel, (length, 1, 1), (THREADS, 1, 1), self._table.address, self._sources.address, address,
            self.out.address, self._table.shape[1], width,
        )  # fmt: skip
        return self.out


# One box for preprocess.cu: struct Square.
_SQUARE = np.dtype(
    [
        ("rotation", np.int64, 6), ("x", np.int32), ("y", np.int32), ("rotated", np.int32),
        ("across", np.int32, 3), ("down", np.int32, 3), ("padding", np.int32),
    ]
)  # fmt: skip


def _squares(samplings: Sequence[Sampling]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes, and the filter tables they point into, int32; equal passes are stored once."""
    squares = np.zeros(len(samplings), _SQUARE)
    parts: list[np.ndarray] = []
    offsets: dict[int, tuple[int, int, int]] = {}
    length = 0

    def place(taps: Taps) -> tuple[int, int, int]:
        nonlocal length
        if id(taps) not in offsets:
            where = []
            for part in (taps.starts, taps.counts, taps.weights.T):  # a tap's weights side by side
                where.append(length)
                parts.append(np.ascontiguousarray(part, np.int32).ravel())
                length += parts[-1].size
            offsets[id(taps)] = (where[0], where[1], where[2])
        return offsets[id(taps)]

    for square, sampled in zip(squares, samplings, strict=True):
        if sampled.rotation is None:
            square["x"], square["y"] = int(sampled.box.x), int(sampled.box.y)
        else:
            square["rotation"], square["rotated"] = sampled.rotation, 1
        square["across"], square["down"] = place(sampled.across), place(sampled.down)
    if length >= 1 << 31:
        raise ValueError("the boxes' filter tables do not fit into 2**31 entries: use fewer or smaller boxes")
    return squares.view(np.uint8), np.concatenate(parts)


def _output(driver: Driver, out: DeviceArray | None, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    return empty(driver, shape, dtype) if out is None else _checked(out, shape, dtype, "out")


def _checked(array: Any, shape: tuple[int, ...], dtype: np.dtype, what: str) -> DeviceArray:
    """The array as a ``DeviceArray``, if it is exactly what a kernel was built for.

    Raises:
        ValueError: another shape, type or layout.
    """
    found = DeviceArray.of(array)
    if found.shape != tuple(shape) or found.dtype != dtype or not found.c_contiguous:
        layout = "" if found.c_contiguous else " with gaps"
        raise ValueError(
            f"{what} takes C-contiguous {dtype} {list(shape)} here, not {found.dtype} {list(found.shape)}{layout}"
        )
    return found


def _row_stride(frame: DeviceArray) -> int:
    """Bytes from row to row.

    Raises:
        ValueError: pixels of a row have gaps between them, or rows overlap or run backwards.
    """
    row = math.prod(frame.shape[1:])
    if frame.strides is None:
        return row
    stride, *inner = frame.strides
    dense = [math.prod(frame.shape[axis + 1 :]) for axis in range(1, len(frame.shape))]
    if inner != dense or stride < row or stride >= 1 << 31:
        raise ValueError(
            f"pixels of a row must lie side by side, not with strides {list(frame.strides)}: copy the frame"
        )
    return stride


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


__all__ = [
    "CellPeaks", "Components", "Coreset", "DeviceBank", "Localise", "Match", "MatchPlaces", "PackPrompt", "Preprocess",
    "Project", "Summarise", "Upsample", "get", "put",
]  # fmt: skip
