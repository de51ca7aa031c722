"""Sampling of tokens by temperature, top-k and top-p, applied in the same order as in AnomalyGPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..common.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of transformers' ``generate``; AnomalyGPT uses its default top-k of 50.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: number of most likely tokens to sample from.
        top_p: of these, only the most likely tokens whose probabilities reach this sum are kept, at least one.
        seed: seed of the random generator; equal seeds give equal tokens.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 1 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"sampling with temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}: the "
                "temperature must be above 0, top-k at least 1, top-p above 0 and at most 1"
            )


def make_sampler(sampling: Sampling) -> Callable[[np.ndarray], int]:
    """A function that samples a token from logits, float32 [vocab]."""
    rng = np.random.default_rng(sampling.seed)

    def draw(logits: np.ndarray) -> int:
        tokens = np.argsort(-logits, kind="stable")[: sampling.top_k]
        scaled = logits[tokens].astype(np.float64) / sampling.temperature
        mass = np.exp(scaled - scaled[0])
        mass /= mass.sum()
        count = int(np.searchsorted(np.cumsum(mass), sampling.top_p)) + 1
        kept = mass[:count] / mass[:count].sum()
        return int(tokens[rng.choice(len(kept), p=kept)])

    return draw
