"""Encoder → anomaly map → prompt learner on one stream: each reads what the last wrote, where it lies.

Recorded once as a CUDA graph, the whole chain is one launch. Pixels go up, image embedding, map and prompt embeddings
come down; the patch features, by far the largest, stay. A learner that looks at the picture reads the encoder's pixels;
the number of normal samples, where it reads that, went up when the chain was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....kernels import Bank
from ....kernels.cuda.driver import DeviceArray, Driver
from ....kernels.cuda.stages import DeviceBank, Localise, Match, Upsample
from .device import Buffer, Device
from .gpu import Graph
from .tensorrt import TensorRtEngine

RESULTS = ("image_embedding", "anomaly_map", "prompt_embeddings")


class Chain:
    """The vision stages of one batch size.

    Args:
        localise: enqueues on a stream what turns the encoder's patch features into the learner's anomaly map;
            ``zero_shot`` makes one of the decoder, ``few_shot`` one of a memory bank.
        num_samples: normal images that its map comes from, which a learner may read; 0: zero-shot.
    """

    def __init__(
        self,
        device: Device,
        encoder: TensorRtEngine,
        learner: TensorRtEngine,
        localise: Callable[[Any], object],
        num_samples: int,
        batch: int = 1,
    ) -> None:
        self._device = device
        self._encoder, self._learner, self._localise = encoder, learner, localise
        self._batch = batch
        self._graph: Graph | None = None
        self.stream = encoder.stream
        if "pixels" in learner.buffers:  # it looks at what the encoder looks at
            learner.share("pixels", encoder.buffers["pixels"])
        if counts := learner.buffers.get("num_samples"):  # one chain's never change
            with device.current():
                counts.upload(np.full(batch, num_samples, np.float32), self.stream)
                self.stream.synchronize()
        self.buffers: dict[str, Buffer] = {**learner.buffers, **encoder.buffers}

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [batch, 3, S, S] → image_embedding, anomaly_map and prompt_embeddings on the host."""
        with self._device.current():
            self.buffers["pixels"].upload(pixels, self.stream)
            self.launch()
            shapes = {name: (self._batch, *self.buffers[name].host.shape[1:]) for name in RESULTS}
            found = {name: self.buffers[name].download(shapes[name], self.stream) for name in RESULTS}
            self.stream.synchronize()
        return {name: array.copy() for name, array in found.items()}

    def launch(self) -> None:
        """Enqueue the chain on what lies in the pixels' buffer: as one graph once it was recorded."""
        if self._graph is not None:
            self._graph.launch(self.stream.handle)
        else:
            self._enqueue()

    def record(self, graph: Graph | None = None) -> None:
        """Record the chain as a CUDA graph.

        Raises:
            ConfigError: the driver cannot record it.
        """
        graph = graph or Graph()
        with self._device.current():
            self._enqueue()  # what a first run sets up is not to be recorded
            self.stream.synchronize()
            with graph.capture(self.stream.handle):
                self._enqueue()
        self._graph = graph

    def close(self) -> None:
        if self._graph is not None:
            with self._device.current():
                self._graph.close()

    def _enqueue(self) -> None:
        self._encoder.enqueue(self._batch, self.stream)
        self._localise(self.stream)
        self._learner.enqueue(self._batch, self.stream)


def zero_shot(
    device: Device,
    driver: Driver,
    encoder: TensorRtEngine,
    decoder: TensorRtEngine,
    learner: TensorRtEngine,
    text_features: np.ndarray,
    batch: int = 1,
) -> Chain:
    """The chain by the decoder, with one class's text features, float32 [2, E]. The engines run only in it then.

    Args:
        driver: of the encoder's stream.
    """
    decoder.share("patch_features", encoder.buffers["patch_features"])
    logits = of_batch(decoder.buffers["patch_logits"], batch)
    anomaly_map = of_batch(learner.buffers["anomaly_map"], batch)
    localise = Localise(driver, logits.shape, anomaly_map.shape[-1], dtype=logits.dtype, out=anomaly_map)
    with device.current():
        decoder.buffers["text_features"].upload(text_features, encoder.stream)
        encoder.stream.synchronize()

    def enqueue(stream: Any) -> None:
        decoder.enqueue(batch, stream)
        localise(logits)

    return Chain(device, encoder, learner, enqueue, 0, batch)


def few_shot(
    device: Device,
    driver: Driver,
    encoder: TensorRtEngine,
    learner: TensorRtEngine,
    bank: Bank,
    num_samples: int,
    batch: int = 1,
) -> Chain:
    """The chain by a memory bank. The engines run only in it then.

    Args:
        driver: of the encoder's stream.
        num_samples: normal images that the bank is of.
    """
    features = of_batch(encoder.buffers["patch_features"], batch)
    anomaly_map = of_batch(learner.buffers["anomaly_map"], batch)
    match = Match(driver, DeviceBank.of(driver, bank), features.shape, features.dtype)
    upsample = Upsample(driver, match.distance.shape, anomaly_map.shape[-1], out=anomaly_map)
    return Chain(device, encoder, learner, lambda stream: upsample(match(features)), num_samples, batch)


def of_batch(buffer: Buffer, batch: int) -> DeviceArray:
    """The first images of a buffer as the kernels take them."""
    return DeviceArray(buffer.address, (batch, *buffer.host.shape[1:]), buffer.host.dtype, owner=buffer)
