"""CUDA kernels (``*.cu``) behind the functions of ``kernels``, for host arrays, and for device arrays.

Host arrays: this module is an ``implementation.Implementation`` (``AGPT_KERNELS=cuda``); every call copies to the
device and back. Device arrays, without copies: ``stages`` (one class an operation) and ``driver`` (memory,
stream). pycuda is imported when the driver is opened.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from ..sampling import Sampling
from ..types import Bank
from . import stages
from .driver import Driver, get, open_device, put

name = "cuda"

MAX_STAGES = 16  # kept for calls of the same shapes

_driver: Driver | None = None
_stages: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
_lock = Lock()  # a stage's buffers hold one call at a time


def runs_here() -> bool:
    """Whether pycuda is installed and the CUDA driver finds a GPU; imports nothing and makes no context."""
    if importlib.util.find_spec("pycuda") is None:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def use_driver(driver: Driver | None) -> None:
    """Set the driver that the functions below work with; None stands for that of ``open_device``."""
    global _driver
    _driver = driver
    _stages.clear()


def preprocess(
    frame: np.ndarray,
    format: str,
    samplings: Sequence[Sampling],
    table: np.ndarray,
    out: np.ndarray,
    threads: int,
) -> None:
    height, width = frame.shape[:2]
    size = (height // 3 * 2 if format == "NV12" else height, width)
    key = ("preprocess", size, format, *map(id, samplings), id(table), out.dtype)
    with _lock:
        stage = _kept(
            key,
            lambda driver: stages.Preprocess.of_tables(driver, size, format, samplings, table, out.dtype),
            (tuple(samplings), table),
        )
        get_into(out, stage(put(_device(), frame)))


def pack_bank(bank: Bank) -> stages.DeviceBank:
    return stages.DeviceBank.of(_device(), bank)


def match(
    features: np.ndarray,
    bank: stages.DeviceBank,
    distance: np.ndarray,
    nearest: np.ndarray | None,
    threads: int,
    gains: np.ndarray | None = None,
    scaled: np.ndarray | None = None,
) -> None:
    with _lock:
        stage = _kept(
            ("match", id(bank), features.shape, features.dtype, gains is None),
            lambda driver: stages.Match(driver, bank, features.shape, features.dtype, gains=gains),
            bank,
        )
        if gains is not None:
            _device().upload(stage.gains.address, gains)  # the stage may have been built with others
        get_into(distance, stage(put(_device(), features)))
        if nearest is not None:
            get_into(nearest, stage.nearest)
        if scaled is not None:
            get_into(scaled, stage.scaled)


def match_places(
    features: np.ndarray, reference: np.ndarray, radius: int, out: np.ndarray, threads: int
) -> None:
    with _lock:
        stage = _kept(
            ("match_places", features.shape, reference.shape, radius),
            lambda driver: stages.MatchPlaces(driver, reference, features.shape, radius, features.dtype),
        )
        _device().upload(stage.reference.address, reference)  # the stage may have been built with another
        get_into(out, stage(put(_device(), features)))


def localise(logits: np.ndarray, out: np.ndarray, threads: int) -> None:
    with _lock:
        stage = _kept(
            ("localise", logits.shape, out.shape),
            lambda driver: stages.Localise(driver, logits.shape, out.shape[1], dtype=np.float32),
        )
        get_into(out, stage(put(_device(), logits)))


def upsample(patch_map: np.ndarray, out: np.ndarray, threads: int) -> None:
    with _lock:
        stage = _kept(
            ("upsample", patch_map.shape, out.shape),
            lambda driver: stages.Upsample(driver, patch_map.shape, out.shape[1]),
        )
        get_into(out, stage(put(_device(), patch_map)))


def project(maps: np.ndarray, places: np.ndarray, out: np.ndarray, threads: int) -> None:
    outside = float(out[0, 0])  # out comes filled with one value
    with _lock:
        stage = _kept(
            ("project", maps.shape, places.tobytes(), out.shape, outside),
            lambda driver: stages.Project(driver, places, maps.shape[1], out.shape, outside=outside),
        )
        get_into(out, stage(put(_device(), maps)))


def summarise(anomaly_map: np.ndarray, count: int) -> tuple[float, float, float, float]:
    with _lock:
        stage = _kept(
            ("summarise", anomaly_map.size, count),
            lambda driver: stages.Summarise(driver, anomaly_map.size, count),
        )
        peak, lowest, median, top_mean = get(_device(), stage(put(_device(), anomaly_map))).tolist()
    return peak, lowest, median, top_mean


def cell_peaks(anomaly_map: np.ndarray, out: np.ndarray) -> None:
    with _lock:
        stage = _kept(
            ("cell_peaks", anomaly_map.shape, out.shape),
            lambda driver: stages.CellPeaks(driver, anomaly_map.shape, len(out)),
        )
        get_into(out, stage(put(_device(), anomaly_map)))


def components(anomaly_map: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    with _lock:
        stage = _kept(
            ("components", anomaly_map.shape), lambda driver: stages.Components(driver, anomaly_map.shape)
        )
        stage(put(_device(), anomaly_map), level)
        return stage.found()


def coreset(features: np.ndarray, chosen: np.ndarray, threads: int) -> None:
    driver = _device()  # the stage is not kept: it holds as much as the bank
    stage = stages.Coreset(driver, features.shape, chosen.shape[1])
    get_into(chosen, stage(put(driver, features)))


def pack_prompt(
    table: np.ndarray, type: str, token_ids: np.ndarray, injected: np.ndarray, out: np.ndarray, threads: int
) -> None:
    if len(token_ids) == 0:
        return
    own = token_ids >= 0
    rows = table[token_ids[own]] if own.any() else table[:1]  # only the rows asked for travel
    places = np.where(own, np.cumsum(own) - 1, -1)
    driver = _device()
    stage = stages.PackPrompt(driver, put(driver, rows), type, places)
    get_into(out, stage(put(driver, injected) if len(injected) else None))


def get_into(out: np.ndarray, array: Any) -> None:
    _device().download(out, array.address)


def _device() -> Driver:
    return _driver if _driver is not None else open_device()


def _kept(key: Any, build: Callable[[Driver], Any], alive: Any = None) -> Any:
    """The stage of ``key``, built if it is not there; ``alive``: the objects whose ids the key holds, kept with it."""
    if key in _stages:
        _stages.move_to_end(key)
    else:
        _stages[key] = (build(_device()), alive)
        if len(_stages) > MAX_STAGES:
            _stages.popitem(last=False)
    return _stages[key][0]
