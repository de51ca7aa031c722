"""Encoder → anomaly map → prompt learner on one stream: each reads what the last wrote, where it lies.

Recorded once as a CUDA graph, the whole chain is one launch. Pixels go up, image embedding, map and prompt embeddings
come down; the patch features, by far the largest, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .device import Buffer, Device
from .gpu import Graph
from .tensorrt import TensorRtEngine

RESULTS = ("image_embedding", "anomaly_map", "prompt_embeddings")


class Chain:
    """The vision stages of one batch size.

    Args:
        localise: enqueues on a stream what turns the encoder's patch features into the learner's anomaly map;
            ``zero_shot`` makes one of the decoder, ``kernels.cuda.stages`` (Match, Upsample) one for few-shot.
    """

    def __init__(
        self,
        device: Device,
        encoder: TensorRtEngine,
        learner: TensorRtEngine,
        localise: Callable[[Any], object],
        batch: int = 1,
    ) -> None:
        self._device = device
        self._encoder, self._learner, self._localise = encoder, learner, localise
        self._batch = batch
        self._graph: Graph | None = None
        self.stream = encoder.stream
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
    encoder: TensorRtEngine,
    decoder: TensorRtEngine,
    learner: TensorRtEngine,
    text_features: np.ndarray,
    batch: int = 1,
) -> Chain:
    """The chain by the decoder, with one class's text features, float32 [2, E]. The engines run only in it then."""
    decoder.share("patch_features", encoder.buffers["patch_features"])
    learner.share("anomaly_map", decoder.buffers["anomaly_map"])
    with device.current():
        decoder.buffers["text_features"].upload(text_features, encoder.stream)
        encoder.stream.synchronize()
    return Chain(device, encoder, learner, lambda stream: decoder.enqueue(batch, stream), batch)
