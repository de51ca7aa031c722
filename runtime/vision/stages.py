"""The stages around the networks on the host: each result goes through host memory, whichever engine runs."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ...kernels import localise, upsample
from ..bundles.bundle import NETWORKS, Bundle
from .engines import Engine, learner_inputs
from .memory_bank import MemoryBank


class Reference(Protocol):
    """What anomaly maps are made against.

    Attributes:
        bank: patch features of normal samples: few-shot maps. None: zero-shot maps, against ``text_features``.
        text_features: float32 [2, E]: a normal and an abnormal part of the product's class, in words.
    """

    @property
    def bank(self) -> MemoryBank | None: ...

    @property
    def text_features(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """The encoder's output for the views of a frame.

    Attributes:
        image_embeddings: float32 [views, D], in the width of the language model.
        patch_features: float32 [views, T, P, V] of T layers.
    """

    image_embeddings: np.ndarray
    patch_features: np.ndarray


class Matches(NamedTuple):
    """The normal patches that each patch of each view was compared with."""

    distance: np.ndarray  # float32 [views, P] to the nearest ones, mean over the layers
    nearest: np.ndarray  # int32 [views, T, P], their rows in the memory bank


class Stages:
    """Encoder, decoder and prompt learner with the kernels between them."""

    def __init__(self, bundle: Bundle, networks: dict[str, Engine], threads: int) -> None:
        """
        Args:
            networks: the engines of ``NETWORKS``; closed with this object.
            threads: at most this many CPU threads run the kernels.
        """
        self._manifest = bundle.manifest
        self._threads = threads
        self.networks = networks
        self._stack = ExitStack()
        for name in NETWORKS:
            self._stack.enter_context(closing(networks[name]))

    def encode(self, pixels: np.ndarray) -> Encoded:
        """float32 [views, 3, S, S] → image embeddings and patch features."""
        outputs = self.networks["encoder"].run(pixels=pixels)
        return Encoded(outputs["image_embedding"], outputs["patch_features"])

    def localise(self, encoded: Encoded, reference: Reference) -> tuple[np.ndarray, Matches | None]:
        """→ anomaly maps, float32 [views, S, S], and with a memory bank the nearest normal patches."""
        size = self._manifest.preprocess.size
        if reference.bank is not None:
            distance, nearest = reference.bank.match(encoded.patch_features, self._threads)
            return upsample(distance, size, threads=self._threads), Matches(distance, nearest)
        logits = self.networks["decoder"].run(
            patch_features=encoded.patch_features, text_features=reference.text_features
        )["patch_logits"]
        return localise(logits, size, threads=self._threads), None

    def prompt(self, maps: np.ndarray, pixels: np.ndarray, reference: Reference) -> np.ndarray:
        """Maps, and the encoder's input for the same views → prompt embeddings, float32 [views, num_prompts, D]."""
        num_samples = 0 if reference.bank is None else reference.bank.num_samples
        learner = self._manifest.components["prompt_learner"]
        inputs = learner_inputs(learner, maps, num_samples, pixels)
        return self.networks["prompt_learner"].run(**inputs)["prompt_embeddings"]

    def close(self) -> None:
        """Free what the engines hold."""
        self._stack.close()
