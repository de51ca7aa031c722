"""The vision pipeline: views, preprocess, encode, localise, prompt. Each stage is a public method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol

import numpy as np

from ...kernels import preprocess
from ..bundles.bundle import Bundle
from ..common.lifetime import Lifetime
from .batches import Progress
from .engines import Engine, open_networks
from .images import check_frame
from .resident_stages import open_resident_stages
from .stages import Encoded, Localised, Reference, Stages
from .views import Layout, View

CACHE_BYTES = 256 << 20


class ViewSettings(Protocol):
    """The views of a product's frames, and how each is fitted to the encoder's input."""

    @property
    def layout(self) -> Layout: ...

    @property
    def resize(self) -> Literal["crop", "stretch"]: ...


class VisionPipeline:
    """Computes anomaly maps and prompt embeddings from frames. Not thread-safe.

    Attributes:
        bundle: the bundle whose networks it runs.
        engine: name of the engine that runs them.
        threads: the most CPU threads for engines and kernels.
    """

    def __init__(self, bundle: Bundle, engine: str, stages: Stages, threads: int) -> None:
        self.bundle = bundle
        self.engine = engine
        self.threads = threads
        self._stages = stages
        self._cache: EncoderCache | None = None
        self._lifetime = Lifetime("the vision pipeline")

    @classmethod
    def open(cls, bundle: Bundle, engine: str, threads: int) -> VisionPipeline:
        """Open the bundle's networks with one engine.

        Raises:
            BundleError: a file's inputs or outputs differ from the manifest.
            ConfigError: the engine does not start on this machine.
        """
        networks = open_networks(bundle, engine, threads)
        with ExitStack() as stack:  # stages that fail to open free the networks
            for network in networks.values():
                stack.callback(network.close)
            stages = open_resident_stages(bundle, networks, threads) or Stages(bundle, networks, threads)
            stack.pop_all()
        return cls(bundle, engine, stages, threads)

    @property
    def networks(self) -> dict[str, Engine]:
        """Encoder, decoder and prompt learner by name."""
        return self._stages.networks

    def views(self, frame: np.ndarray, settings: ViewSettings) -> tuple[View, ...]:
        """The views of a frame, uint8 [H, W, 3] BGR.

        Raises:
            ImageError: it is not a frame, or its size differs from that of the product's regions or tiles.
        """
        return settings.layout.views(check_frame(frame).shape[:2])

    def preprocess(self, frame: np.ndarray, views: Sequence[View], settings: ViewSettings) -> np.ndarray:
        """Views of a frame → the encoder's input, float32 [views, 3, S, S]."""
        wanted = self.bundle.manifest.preprocess
        boxes = [view.box for view in views]
        return preprocess(
            frame, wanted.size, settings.resize, wanted.mean, wanted.std, boxes=boxes, threads=self.threads
        )

    def encode(self, pixels: np.ndarray) -> Encoded:
        """float32 [views, 3, S, S] → image embeddings and patch features.

        Raises:
            ClosedError: the pipeline was closed, or opened before a fork.
        """
        self._lifetime.check()
        if self._cache is None:
            return self._stages.encode(pixels)
        return self._cache.get(pixels, self._stages.encode)

    def encode_frame(self, frame: np.ndarray, settings: ViewSettings) -> Encoded:
        """``views``, ``preprocess`` and ``encode`` in one call."""
        return self.encode(self.preprocess(frame, self.views(frame, settings), settings))

    def localise(self, encoded: Encoded, reference: Reference) -> Localised:
        """Anomaly maps, float32 [views, M, M], higher where more anomalous, and with a memory bank the nearest normal
        patches."""
        self._lifetime.check()
        return self._stages.localise(encoded, reference)

    def prompt(self, prompt_maps: np.ndarray, pixels: np.ndarray, reference: Reference) -> np.ndarray:
        """Maps as in ``Localised.prompt_maps``, and the encoder's input for the same views → prompt embeddings,
        float32 [views, num_prompts, D]."""
        self._lifetime.check()
        return self._stages.prompt(prompt_maps, pixels, reference)

    def watch(self, progress: Progress | None) -> None:
        """Set what is called after each batch of views of a frame that has several batches (many tiles)."""
        self._stages.progress = progress

    @contextmanager
    def encoder_cache(self, max_bytes: int = CACHE_BYTES) -> Iterator[None]:
        """Within this context, encoder outputs are cached (at most ``max_bytes``) and reused for equal pixels."""
        before, self._cache = self._cache, EncoderCache(max_bytes)
        try:
            yield
        finally:
            self._cache = before

    def close(self) -> None:
        """Free the networks; harmless when called twice."""
        if self._lifetime.end():
            self._stages.close()


class EncoderCache:
    """A cache of encoder outputs by the digest of their input, limited in bytes.

    When it is full, the newest entry is replaced. So repeated passes over the same images find the first ones, and
    repeated use of one image finds that image.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._entries: dict[bytes, Encoded] = {}

    def get(self, pixels: np.ndarray, encode: Callable[[np.ndarray], Encoded]) -> Encoded:
        """The output for these pixels, from the cache or computed by ``encode``."""
        key = hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
        found = self._entries.get(key)
        if found is None:
            made = encode(pixels)
            found = Encoded(
                made.image_embeddings, made.patch_features
            )  # engines return new arrays every time
            self._keep(key, found)
        return found

    def _keep(self, key: bytes, encoded: Encoded) -> None:
        size = size_of(encoded)
        while self._entries and self.num_bytes + size > self._max_bytes:
            self.num_bytes -= size_of(self._entries.popitem()[1])
        if size <= self._max_bytes:
            self._entries[key] = encoded
            self.num_bytes += size


def size_of(encoded: Encoded) -> int:
    """Bytes of both arrays."""
    return encoded.image_embeddings.nbytes + encoded.patch_features.nbytes
