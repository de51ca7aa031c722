"""The stages around TensorRT's networks on the GPU: each reads what the one before wrote, where it lies.

Pixels are uploaded; image embeddings, maps, nearest patches and prompt embeddings are downloaded; the patch features,
by far the largest, stay on the device. Each stage is recorded as a CUDA graph when it runs for the second time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kernels.cuda.driver import DeviceArray, Driver, PycudaDriver
from ...kernels.cuda.stages import DeviceBank, Localise, Match, Upsample
from ..bundles.bundle import NETWORKS, Bundle
from ..common.errors import ConfigError
from .engines import Engine
from .engines.device import Buffer, Device
from .engines.gpu import Graph
from .engines.tensorrt import TensorRtEngine
from .memory_bank import MemoryBank
from .stages import Encoded, Matches, Reference, Stages

MAX_PREPARED_BANKS = 8  # of products that take turns on a line


class ResidentEncoded(Encoded):
    """The encoder's output with the patch features on the device; they are downloaded when something reads them."""

    def __init__(self, image_embeddings: np.ndarray, download: Callable[[], np.ndarray]) -> None:
        object.__setattr__(self, "image_embeddings", image_embeddings)
        object.__setattr__(self, "_download", download)

    @property
    def patch_features(self) -> np.ndarray:
        """float32 [views, T, P, V].

        Raises:
            RuntimeError: the encoder has run again since.
        """
        return self._download()  # type: ignore[attr-defined]


class ResidentStages(Stages):
    """Encoder, decoder and prompt learner of TensorRT with the CUDA kernels between them, on one stream.

    What does not fit into the plans' batch, or comes from elsewhere than the stage before, goes through host memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        networks: dict[str, Engine],
        threads: int,
        device: Device,
        driver: Driver,
        make_graph: Callable[[], Graph] = Graph,
    ) -> None:
        """
        Args:
            networks: ``TensorRtEngine``s.
            driver: on the encoder's stream.

        Raises:
            RuntimeError: the CUDA kernels do not compile here.
        """
        super().__init__(bundle, networks, threads)
        encoder, decoder, learner = (networks[name] for name in NETWORKS)
        assert isinstance(encoder, TensorRtEngine)
        assert isinstance(decoder, TensorRtEngine)
        assert isinstance(learner, TensorRtEngine)
        self._encoder, self._decoder, self._learner = encoder, decoder, learner
        self._device, self._driver, self._make_graph = device, driver, make_graph
        self.stream = encoder.stream
        self._graphs: dict[Any, Graph | None] = {}  # None: ran once, or cannot be recorded
        self._banks: dict[tuple[int, int], tuple[MemoryBank, Match, Upsample]] = {}
        self._localise: dict[int, Localise] = {}
        self._text: np.ndarray | None = None  # what lies on the device
        self._num_samples: tuple[int, int] | None = None
        self._encoded: ResidentEncoded | None = None
        self._maps: np.ndarray | None = None
        decoder.share("patch_features", encoder.buffers["patch_features"])
        if "pixels" in learner.buffers:
            learner.share("pixels", encoder.buffers["pixels"])
        with device.current():
            self._prepare_localise(1)

    def encode(self, pixels: np.ndarray) -> Encoded:
        """See ``Stages.encode``."""
        self._encoded = self._maps = None
        batch = len(pixels)
        if batch > self._encoder.max_batch:
            return super().encode(pixels)
        with self._device.current():
            self._encoder.buffers["pixels"].upload(pixels, self.stream)
            self._run(("encode", batch), lambda: self._encoder.enqueue(batch, self.stream))
            embeddings = self._download(self._encoder.buffers["image_embedding"], batch)
        self._encoded = ResidentEncoded(embeddings, lambda: self._download_features(embeddings))
        return self._encoded

    def localise(self, encoded: Encoded, reference: Reference) -> tuple[np.ndarray, Matches | None]:
        """See ``Stages.localise``."""
        self._maps = None
        if encoded is not self._encoded or (reference.bank is not None and len(reference.bank.prepared) > 1):
            return super().localise(encoded, reference)
        batch = len(encoded.image_embeddings)
        matches = None
        with self._device.current():
            if reference.bank is None:
                self._enqueue_zero_shot(reference.text_features, batch)
            else:
                match = self._enqueue_few_shot(reference.bank, batch)
                matches = Matches(self._get(match.distance), self._get(match.nearest))
            self._maps = self._download(self._learner.buffers["anomaly_map"], batch)
        return self._maps, matches

    def prompt(self, maps: np.ndarray, pixels: np.ndarray, reference: Reference) -> np.ndarray:
        """See ``Stages.prompt``."""
        if maps is not self._maps:
            return super().prompt(maps, pixels, reference)
        batch = len(maps)
        num_samples = 0 if reference.bank is None else reference.bank.num_samples
        with self._device.current():
            counts = self._learner.buffers.get("num_samples")
            if counts is not None and self._num_samples != (num_samples, batch):
                counts.upload(np.full(batch, num_samples, np.float32), self.stream)
                self._num_samples = num_samples, batch
            self._run(("prompt", batch), lambda: self._learner.enqueue(batch, self.stream))
            return self._download(self._learner.buffers["prompt_embeddings"], batch)

    def close(self) -> None:
        """See ``Stages.close``."""
        with self._device.current():
            for graph in self._graphs.values():
                if graph is not None:
                    graph.close()
        self._graphs.clear()
        self._banks.clear()
        self._localise.clear()
        super().close()

    def _enqueue_zero_shot(self, text_features: np.ndarray, batch: int) -> None:
        if self._text is not text_features:
            self._decoder.buffers["text_features"].upload(text_features, self.stream)
            self._text = text_features
        localise = self._localise.get(batch) or self._prepare_localise(batch)
        logits = first_images(self._decoder.buffers["patch_logits"], batch)

        def enqueue() -> None:
            self._decoder.enqueue(batch, self.stream)
            localise(logits)

        self._run(("zero-shot", batch), enqueue)

    def _prepare_localise(self, batch: int) -> Localise:
        logits = first_images(self._decoder.buffers["patch_logits"], batch)
        anomaly_map = first_images(self._learner.buffers["anomaly_map"], batch)
        side = anomaly_map.shape[-1]
        stage = Localise(self._driver, logits.shape, side, dtype=logits.dtype, out=anomaly_map)
        self._localise[batch] = stage
        return stage

    def _enqueue_few_shot(self, bank: MemoryBank, batch: int) -> Match:
        key = id(bank), batch
        features = first_images(self._encoder.buffers["patch_features"], batch)
        if key not in self._banks:
            while len(self._banks) >= MAX_PREPARED_BANKS:
                self._forget_bank(next(iter(self._banks)))
            anomaly_map = first_images(self._learner.buffers["anomaly_map"], batch)
            device_bank = DeviceBank.of(self._driver, bank.prepared[0])
            match = Match(self._driver, device_bank, features.shape, features.dtype)
            upsample = Upsample(self._driver, match.distance.shape, anomaly_map.shape[-1], out=anomaly_map)
            self._banks[key] = bank, match, upsample
        _, match, upsample = self._banks[key]
        self._run(("few-shot", key), lambda: upsample(match(features)))
        return match

    def _forget_bank(self, key: tuple[int, int]) -> None:
        """Its graph holds addresses of its buffers: both go."""
        graph = self._graphs.pop(("few-shot", key), None)
        if graph is not None:
            graph.close()
        del self._banks[key]

    def _run(self, key: Any, enqueue: Callable[[], object]) -> None:
        """Run a stage: plainly the first time, which sets things up that must not be recorded, then as a graph."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self.stream.handle)
            return
        enqueue()
        self.stream.synchronize()
        if key in self._graphs:
            return  # it cannot be recorded
        self._graphs[key] = None
        graph = self._make_graph()
        try:
            with graph.capture(self.stream.handle):
                enqueue()
        except ConfigError:
            return
        self._graphs[key] = graph

    def _download(self, buffer: Buffer, batch: int) -> np.ndarray:
        found = buffer.download((batch, *buffer.host.shape[1:]), self.stream)
        self.stream.synchronize()
        return found.copy()

    def _download_features(self, embeddings: np.ndarray) -> np.ndarray:
        if self._encoded is None or self._encoded.image_embeddings is not embeddings:
            raise RuntimeError("the encoder has run again since: its patch features are gone")
        with self._device.current():
            return self._download(self._encoder.buffers["patch_features"], len(embeddings))

    def _get(self, array: DeviceArray) -> np.ndarray:
        found = np.empty(array.shape, array.dtype)
        self._driver.download(found, array.address)
        return found


def open_resident_stages(bundle: Bundle, networks: dict[str, Engine], threads: int) -> ResidentStages | None:
    """The stages on the GPU; None for engines other than TensorRT's, and where the CUDA kernels do not run."""
    encoder = networks["encoder"]
    if not isinstance(encoder, TensorRtEngine):
        return None
    try:
        driver = PycudaDriver(stream=encoder.stream)
        return ResidentStages(bundle, networks, threads, encoder.device, driver)
    except RuntimeError as error:
        warnings.warn(f"anomaly maps are made on the CPU: {error}", RuntimeWarning, stacklevel=2)
        return None


def first_images(buffer: Buffer, batch: int) -> DeviceArray:
    """The first images of a buffer as the kernels take them."""
    return DeviceArray(buffer.address, (batch, *buffer.host.shape[1:]), buffer.host.dtype, owner=buffer)
