"""Drawing tokens instead of taking the likeliest: temperature, top-k, top-p, in the original's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..common.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """As transformers' ``generate`` takes them; the original's implicit top-k is 50.

    Attributes:
        temperature: above 0; the logits are divided by it.
        top_k: only the likeliest so many tokens are drawn from.
        top_p: and of these the fewest that hold this probability together, at least one.
        seed: the same seed draws the same tokens.
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
    """A function from logits float32 [vocab] to a token."""
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
