"""The stages around TensorRT's networks on the GPU: each reads what the one before wrote, where it lies.

Pixels are uploaded; image embeddings, maps, nearest patches and prompt embeddings are downloaded; the patch features,
by far the largest, stay on the device. Each stage is recorded as a CUDA graph when it runs for the second time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import Bank
from ...kernels.cuda.driver import DeviceArray, Driver, PycudaDriver, get
from ...kernels.cuda.stages import DeviceBank, Localise, Match, Upsample
from ..bundles.bundle import NETWORKS, Bundle
from ..common.errors import AgptError
from ..common.lifetime import Lifetime
from .engines import Engine, check_inputs
from .engines.device import Buffer, Device
from .engines.gpu import Graph
from .engines.tensorrt import TensorRtEngine
from .memory_bank import MemoryBank
from .stages import Encoded, Localised, Matches, Reference, Stages

MAX_PREPARED_BANKS = 8  # of products that take turns on a line


class ResidentEncoded(Encoded):
    """The encoder's output with the patch features on the device; they are downloaded when something reads them."""

    def __init__(
        self, image_embeddings: np.ndarray, download: Callable[[ResidentEncoded], np.ndarray]
    ) -> None:
        object.__setattr__(self, "image_embeddings", image_embeddings)
        object.__setattr__(self, "_download", download)

    @property
    def patch_features(self) -> np.ndarray:
        """float32 [views, T, P, V].

        Raises:
            RuntimeError: they were overwritten on the device: the encoder has run again since, or other features went
                through the decoder.
            ClosedError: the stages were closed.
        """
        return self._download(self)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class PreparedBank:
    """A memory bank on the device.

    Attributes:
        bank: the memory bank.
        match: matches features with it.
        maps: float32 [B, M, M] in units of normal variation; None if the prompt learner reads the same maps.
    """

    bank: MemoryBank
    match: Match
    maps: DeviceArray | None


class Step:
    """Work on a stream that is recorded as a CUDA graph when it runs for the second time.

    Attributes:
        graph: the record, once there is one.
        not_recorded_because: why it cannot be recorded; "" when it can, or when it has not been tried.
    """

    def __init__(
        self,
        enqueue: Callable[[], object],
        stream: Any,
        make_graph: Callable[[], Graph] | None,
        state: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            enqueue: puts the work on the stream, the same each time.
            make_graph: None: nothing is recorded.
            state: a number that changes when graphs that were recorded before must not be launched any more.
        """
        self.graph: Graph | None = None
        self.not_recorded_because = ""
        self._enqueue, self._stream, self._make_graph, self._state = enqueue, stream, make_graph, state
        self._state_of_run: int | None = None

    def run(self) -> None:
        """Enqueue the work: plainly the first time and after a change of state, as that sets up what must not be
        recorded."""
        if self._state_of_run != self._state():
            self.close()
            self._enqueue()
            self._state_of_run = self._state()
            return
        if self.graph is None and not self.not_recorded_because and self._make_graph is not None:
            self._record(self._make_graph())
        if self.graph is None:
            self._enqueue()
        else:
            self.graph.launch(self._stream.handle)

    def close(self) -> None:
        """Free the graph; harmless when called twice."""
        if self.graph is not None:
            self.graph.close()
            self.graph = None

    def _record(self, graph: Graph) -> None:
        try:
            with graph.capture(self._stream.handle):
                self._enqueue()
        except AgptError as error:
            self.not_recorded_because = str(error)
            return
        self.graph = graph


class ResidentStages(Stages):
    """Encoder, decoder and prompt learner of TensorRT with the CUDA kernels between them, on one stream.

    What does not fit into the plans' batch, or comes from elsewhere than the stage before, goes through host memory.

    Attributes:
        stream: everything but the host path is enqueued on it.
        records: whether stages are recorded as CUDA graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        networks: dict[str, Engine],
        threads: int,
        device: Device,
        driver: Driver,
        make_graph: Callable[[], Graph] | None = Graph,
    ) -> None:
        """
        Args:
            networks: ``TensorRtEngine``s.
            driver: on the encoder's stream.
            make_graph: None: nothing is recorded.

        Raises:
            RuntimeError: the CUDA kernels do not load here; the networks are as they were.
            BundleError: the plans do not fit each other.
        """
        super().__init__(bundle, networks, threads)
        encoder, decoder, learner = (networks[name] for name in NETWORKS)
        assert isinstance(encoder, TensorRtEngine)
        assert isinstance(decoder, TensorRtEngine)
        assert isinstance(learner, TensorRtEngine)
        self._encoder, self._decoder, self._learner = encoder, decoder, learner
        self._device, self._driver, self._make_graph = device, driver, make_graph
        self._lifetime = Lifetime("the vision pipeline")
        self.stream, self.records = encoder.stream, make_graph is not None
        self._max_batch = min(engine.max_batch for engine in (encoder, decoder, learner))
        self._steps: dict[Any, Step] = {}
        self._banks: dict[tuple[int, int], PreparedBank] = {}  # the one used last comes last
        # Host arrays whose contents lie on the device, each until one of these engines runs through host memory.
        self._writers = {
            "encoded": (encoder, decoder),
            "pixels": (encoder, learner),
            "text": (decoder,),
            "maps": (learner,),
            "num_samples": (learner,),
        }
        self._there: dict[str, tuple[Any, int]] = {}
        with device.current():
            self._load_kernels()
        decoder.share("patch_features", encoder.buffers["patch_features"])
        if "pixels" in learner.buffers:
            learner.share("pixels", encoder.buffers["pixels"])

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has run on the device, in the order of the first runs."""
        return tuple(self._steps.values())

    def encode(self, pixels: np.ndarray) -> Encoded:
        """See ``Stages.encode``. On the device patch features last until the next call."""
        self._lifetime.check()
        for name in ("encoded", "pixels", "maps"):
            self._there.pop(name, None)
        batch = check_inputs(self._manifest.components["encoder"].inputs, {"pixels": pixels})
        if batch > self._max_batch:
            return super().encode(pixels)
        with self._device.current():
            self._encoder.buffers["pixels"].upload(pixels, self.stream)
            self._run_network("encode", self._encoder, batch)
            embeddings = self._download(self._encoder.buffers["image_embedding"], batch)
        self._encoder.keep_kernels(batch)
        encoded = ResidentEncoded(embeddings, self._download_features)
        self._put("encoded", encoded)
        self._put("pixels", pixels)
        return encoded

    def localise(self, encoded: Encoded, reference: Reference) -> Localised:
        """See ``Stages.localise``."""
        self._lifetime.check()
        self._there.pop("maps", None)
        bank = reference.bank
        if not self._is_there("encoded", encoded) or (bank is not None and len(bank.prepared) > 1):
            return super().localise(encoded, reference)
        batch = len(encoded.image_embeddings)
        matches = maps = None
        with self._device.current():
            if bank is None:
                self._localise_zero_shot(reference.text_features, batch)
            else:
                prepared = self._localise_few_shot(bank, batch)
                match = prepared.match
                scaled = None if match.scaled is None else get(self._driver, match.scaled)
                matches = Matches(get(self._driver, match.distance), get(self._driver, match.nearest), scaled)
                maps = None if prepared.maps is None else get(self._driver, prepared.maps)
            prompt_maps = self._download(self._learner.buffers["anomaly_map"], batch)
        if bank is None:
            self._decoder.keep_kernels(batch)
        self._put("maps", prompt_maps)
        return Localised(prompt_maps if maps is None else maps, prompt_maps, matches)

    def prompt(self, prompt_maps: np.ndarray, pixels: np.ndarray, reference: Reference) -> np.ndarray:
        """See ``Stages.prompt``."""
        self._lifetime.check()
        reads_pixels = "pixels" in self._learner.buffers
        if not self._is_there("maps", prompt_maps) or (reads_pixels and not self._is_there("pixels", pixels)):
            return super().prompt(prompt_maps, pixels, reference)
        batch = len(prompt_maps)
        num_samples = 0 if reference.bank is None else reference.bank.num_samples
        with self._device.current():
            buffer = self._learner.buffers.get("num_samples")
            if buffer is not None:
                self._upload_once("num_samples", np.full_like(buffer.host, num_samples), buffer)
            self._run_network("prompt", self._learner, batch)
            found = self._download(self._learner.buffers["prompt_embeddings"], batch)
        self._learner.keep_kernels(batch)
        return found

    def close(self) -> None:
        """See ``Stages.close``."""
        if not self._lifetime.end():
            return
        try:
            with self._device.current():
                for step in self.steps:
                    step.close()
        finally:
            self._steps.clear()
            self._banks.clear()
            self._there.clear()
            super().close()

    def _load_kernels(self) -> None:
        """Load each file of kernels that the stages use, so that a machine that cannot is known now.

        Raises:
            RuntimeError: one does not load.
        """
        features = first_images(self._encoder.buffers["patch_features"], 1)
        _, taps, _, width = features.shape
        row = Bank(np.zeros((taps, 1, width), np.float16), np.ones((taps, 1), np.float32))
        Match(self._driver, DeviceBank.of(self._driver, row), features.shape, features.dtype)
        self._make_localise(1)

    def _make_localise(self, batch: int) -> Callable[[], object]:
        logits = first_images(self._decoder.buffers["patch_logits"], batch)
        anomaly_map = first_images(self._learner.buffers["anomaly_map"], batch)
        stage = Localise(
            self._driver, logits.shape, anomaly_map.shape[-1], dtype=logits.dtype, out=anomaly_map
        )
        return lambda: stage(logits)

    def _localise_zero_shot(self, text_features: np.ndarray, batch: int) -> None:
        self._upload_once("text", text_features, self._decoder.buffers["text_features"])
        key = "zero-shot", batch
        if key not in self._steps:
            localise = self._make_localise(batch)

            def enqueue() -> None:
                self._decoder.enqueue(batch, self.stream)
                localise()

            self._steps[key] = self._make_step(enqueue, self._decoder)
        self._steps[key].run()

    def _localise_few_shot(self, bank: MemoryBank, batch: int) -> PreparedBank:
        key = id(bank), batch
        if key in self._banks:
            self._banks[key] = self._banks.pop(key)
        else:
            while len(self._banks) >= MAX_PREPARED_BANKS:
                self._forget_bank(next(iter(self._banks)))
            self._prepare_bank(key, bank, batch)
        self._steps["few-shot", key].run()
        return self._banks[key]

    def _prepare_bank(self, key: tuple[int, int], bank: MemoryBank, batch: int) -> None:
        features = first_images(self._encoder.buffers["patch_features"], batch)
        learner_map = first_images(self._learner.buffers["anomaly_map"], batch)
        same = (known.match.bank for known in self._banks.values() if known.bank is bank)  # at another batch
        device_bank = next(same, None) or DeviceBank.of(self._driver, bank.prepared[0])
        gains = None if bank.gains is None else bank.gains[0]
        match = Match(self._driver, device_bank, features.shape, features.dtype, gains=gains)
        size = learner_map.shape[-1]
        reads_raw = match.scaled is None or self._manifest.map_units == "raw"
        taught = match.distance if reads_raw else match.scaled
        upsamples = [(Upsample(self._driver, taught.shape, size, out=learner_map), taught)]
        maps = None
        if match.scaled is not None and reads_raw:
            shown = Upsample(self._driver, match.scaled.shape, size)
            upsamples.append((shown, match.scaled))
            maps = shown.out

        def enqueue() -> None:
            match(features)
            for upsample, distances in upsamples:
                upsample(distances)

        self._banks[key] = PreparedBank(bank, match, maps)
        self._steps["few-shot", key] = self._make_step(enqueue)

    def _forget_bank(self, key: tuple[int, int]) -> None:
        """Its graph holds addresses of its buffers: both go."""
        self._steps.pop(("few-shot", key)).close()
        del self._banks[key]

    def _run_network(self, name: str, engine: TensorRtEngine, batch: int) -> None:
        key = name, batch
        if key not in self._steps:
            self._steps[key] = self._make_step(lambda: engine.enqueue(batch, self.stream), engine)
        self._steps[key].run()

    def _make_step(self, enqueue: Callable[[], object], engine: TensorRtEngine | None = None) -> Step:
        """``engine``: whose context the work runs in."""
        if engine is None:
            return Step(enqueue, self.stream, self._make_graph)
        return Step(enqueue, self.stream, self._make_graph, lambda: engine.num_reshapes)

    def _put(self, name: str, what: Any) -> None:
        """Note that the contents of a host array lie on the device."""
        self._there[name] = what, self._num_runs(name)

    def _is_there(self, name: str, what: Any) -> bool:
        found, num_runs = self._there.get(name, (None, 0))
        return found is what and num_runs == self._num_runs(name)

    def _num_runs(self, name: str) -> int:
        return sum(engine.num_runs for engine in self._writers[name])

    def _upload_once(self, name: str, array: np.ndarray, buffer: Buffer) -> None:
        """Upload a small array, unless an equal one lies there."""
        found, num_runs = self._there.get(name, (None, 0))
        if num_runs != self._num_runs(name) or not np.array_equal(found, array):
            buffer.upload(array, self.stream)
            self._put(name, array.copy())

    def _download(self, buffer: Buffer, batch: int) -> np.ndarray:
        found = buffer.download((batch, *buffer.host.shape[1:]), self.stream)
        self.stream.synchronize()
        return found.copy()

    def _download_features(self, encoded: ResidentEncoded) -> np.ndarray:
        self._lifetime.check()
        if not self._is_there("encoded", encoded):
            raise RuntimeError(
                "the encoder has run again since, and its patch features were overwritten on the GPU: read them before"
            )
        with self._device.current():
            return self._download(self._encoder.buffers["patch_features"], len(encoded.image_embeddings))


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
