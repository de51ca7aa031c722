"""The vision stages with results in host memory, for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ...kernels import localise, upsample
from ..bundles.bundle import NETWORKS, Bundle
from .batches import Progress, run_in_batches
from .engines import Engine, learner_inputs
from .memory_bank import MemoryBank


class Reference(Protocol):
    """The reference that anomaly maps are computed against.

    Attributes:
        bank: patch features of normal samples, for few-shot maps. None: zero-shot maps against ``text_features``.
        text_features: float32 [2, E], text features of a normal and an abnormal part of the product's class.
    """

    @property
    def bank(self) -> MemoryBank | None: ...

    @property
    def text_features(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """The encoder's output for the views of a frame.

    Attributes:
        image_embeddings: float32 [views, D]; D is the width of the language model.
        patch_features: float32 [views, T, P, V], from T layers (taps).
    """

    image_embeddings: np.ndarray
    patch_features: np.ndarray


class Matches(NamedTuple):
    """The nearest normal patches of each patch."""

    distance: np.ndarray  # float32 [views, P], distance to the nearest normal patch, mean over the layers
    nearest: np.ndarray  # int32 [views, T, P], index of the nearest row of the memory bank in each layer
    scaled: np.ndarray | None  # float32 [views, P], distance in units of normal variation


@dataclass(frozen=True, eq=False)
class Localised:
    """The anomaly maps of the views of a frame.

    Attributes:
        maps: float32 [views, M, M], higher where more anomalous; with a memory bank that has units 1.0 is what good
            parts score.
        prompt_maps: the maps that the prompt learner reads, in the units that it was taught.
        matches: the nearest normal patches; None without a memory bank.
    """

    maps: np.ndarray
    prompt_maps: np.ndarray
    matches: Matches | None


class Stages:
    """Runs encoder, decoder and prompt learner, and the kernels between them.

    Attributes:
        networks: the engine of each of ``NETWORKS``.
        progress: called within a stage that runs in several batches; None: nothing is called.
    """

    def __init__(self, bundle: Bundle, networks: dict[str, Engine], threads: int) -> None:
        """
        Args:
            bundle: the bundle of the networks.
            networks: the engine of each of ``NETWORKS``; ``close`` closes them.
            threads: the most CPU threads for the kernels.
        """
        self._manifest = bundle.manifest
        self._threads = threads
        self.networks = networks
        self.progress: Progress | None = None
        self._stack = ExitStack()
        for name in NETWORKS:
            self._stack.enter_context(closing(networks[name]))

    def encode(self, pixels: np.ndarray) -> Encoded:
        """float32 [views, 3, S, S] → image embeddings and patch features."""
        outputs = self._run("encode", "encoder", {"pixels": pixels})
        return Encoded(outputs["image_embedding"], outputs["patch_features"])

    def localise(self, encoded: Encoded, reference: Reference) -> Localised:
        """Anomaly maps against a memory bank, or without one against text features."""
        size = self._manifest.vision.map_size
        bank = reference.bank
        if bank is None:
            features = {"patch_features": encoded.patch_features}
            text = {"text_features": reference.text_features}
            logits = self._run("localise", "decoder", features, text)["patch_logits"]
            maps = localise(logits, size, threads=self._threads)
            return Localised(maps, maps, None)
        matches = Matches(*bank.match(encoded.patch_features, self._threads))
        distances = matches.distance if matches.scaled is None else matches.scaled
        maps = upsample(distances, size, threads=self._threads)
        if matches.scaled is None or self._manifest.map_units != "raw":
            return Localised(maps, maps, matches)
        return Localised(maps, upsample(matches.distance, size, threads=self._threads), matches)

    def prompt(self, prompt_maps: np.ndarray, pixels: np.ndarray, reference: Reference) -> np.ndarray:
        """Maps as in ``Localised.prompt_maps``, and the encoder's input for the same views → prompt embeddings,
        float32 [views, num_prompts, D]."""
        num_samples = 0 if reference.bank is None else reference.bank.num_samples
        learner = self._manifest.components["prompt_learner"]
        inputs = learner_inputs(learner, prompt_maps, num_samples, pixels)
        return self._run("prompt", "prompt_learner", inputs)["prompt_embeddings"]

    def _run(
        self,
        stage: str,
        network: str,
        views: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """See ``run_in_batches``."""
        return run_in_batches(self.networks[network], views, shared, stage=stage, progress=self.progress)

    def close(self) -> None:
        """Close the engines."""
        self._stack.close()
