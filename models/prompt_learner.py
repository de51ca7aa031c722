"""AnomalyGPT's prompt learner: anomaly map → 18 prompt embeddings for the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.bundles.bundle import MapUnits
from .evidence import NUM_FIGURES, evidence
from .look import LOOKS, LookNet, probabilities

NUM_BASE_PROMPTS = 9
NUM_PROMPTS = 18
LOOK_WIDTH = 32
HIGHEST = 1.5  # of a compressed map: about 19 units of normal variation


@dataclass(frozen=True)
class PromptLearnerConfig:
    """Dimensions of a prompt learner.

    Attributes:
        channels: of the five 3×3 convolutions.
        llm_width: width of the language model.
        evidence_width: hidden width of a small network that reads the features of ``evidence``; 0: without it, as in
            the original, which reads only the map.
        look_channels: channels of a ``LookNet`` that reads the picture where the map is raised; None: without it, as
            in the original.
        map_units: of the few-shot maps: the original's distances, or multiples of the normal variation, which the
            learner compresses first (``compress``), zero-shot maps too.
    """

    channels: tuple[int, int, int, int, int] = (4, 16, 64, 256, 1024)
    llm_width: int = 4096
    evidence_width: int = 0
    look_channels: tuple[int, int, int] | None = None
    map_units: MapUnits = "raw"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the learner's inputs, in the order of its arguments."""
        count = ("num_samples",) if self.evidence_width else ()
        picture = ("pixels",) if self.look_channels else ()
        return ("anomaly_map", *count, *picture)


class PromptLearner(nn.Module):
    """Nine learned rows, then nine rows that a CNN computes from the map (names as in the original)."""

    def __init__(self, config: PromptLearnerConfig) -> None:
        super().__init__()
        self.config = config
        self.base_prompts = nn.Parameter(torch.randn(NUM_BASE_PROMPTS, config.llm_width))
        layers: list[nn.Module] = []
        inputs = 1
        for outputs in config.channels:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = outputs
        self.meta_net = nn.Sequential(*layers, nn.Conv2d(inputs, config.llm_width, 5))
        if config.evidence_width:
            self.evidence_net = reader(NUM_FIGURES, config.evidence_width, config.llm_width)
        if config.look_channels:
            self.look_net = LookNet(config.look_channels)
            self.look_words = reader(len(LOOKS), LOOK_WIDTH, config.llm_width)

    def forward(
        self, anomaly_map: Tensor, num_samples: Tensor | None = None, pixels: Tensor | None = None
    ) -> Tensor:
        """Prompt embeddings for the language model.

        Args:
            anomaly_map: float [B, 224, 224], 0..1; a few-shot map in units of normal variation: 0 and above.
            num_samples: float [B], number of normal samples behind the map; only for a learner with
                ``evidence_width``.
            pixels: float [B, 3, S, S], normalised, S a multiple of 224; only for a learner with ``look_channels``.

        Returns:
            float [B, 18, D]; row 9 + k depends on cell (k // 3, k % 3) of the map, row 0 on the evidence, and rows 0
            to 8 on the picture: the language model did not learn to use the picture's information in a single row.

        Raises:
            ValueError: the given inputs are not ``config.inputs``.
        """
        given = {"anomaly_map": anomaly_map, "num_samples": num_samples, "pixels": pixels}
        names = tuple(name for name, tensor in given.items() if tensor is not None)
        if names != self.config.inputs:
            raise ValueError(f"this prompt learner reads {self.config.inputs}, not {names}")
        if self.config.map_units == "normal variation":
            anomaly_map = compress(anomaly_map)
        figures = None if num_samples is None else evidence(anomaly_map, num_samples)
        looks = None if pixels is None else self.look_net(shrink(pixels, anomaly_map.shape[-1]), anomaly_map)
        return self.read(anomaly_map, figures, looks)

    def read(self, anomaly_map: Tensor, figures: Tensor | None, looks: Tensor | None = None) -> Tensor:
        """Like ``forward``, from a map that is already compressed if the learner compresses it, and from results of
        ``evidence`` [B, NUM_FIGURES] and ``look_net`` [B, len(LOOKS)], or None for a learner without them."""
        batch = anomaly_map.shape[0]
        cells = self.meta_net(anomaly_map[:, None]).flatten(2).transpose(1, 2)
        base = self.base_prompts.expand(batch, -1, -1)
        if looks is not None:
            base = base + self.look_words(probabilities(looks))[:, None]
        if figures is not None:
            base = torch.cat([base[:, :1] + self.evidence_net(figures)[:, None], base[:, 1:]], dim=1)
        return torch.cat([base, cells], dim=1)


def compress(anomaly_map: Tensor) -> Tensor:
    """A map in units of normal variation, or a zero-shot map → 0..``HIGHEST``; 1.0 becomes 0.35, 6.4 becomes 1."""
    return (torch.log1p(anomaly_map.clamp(min=0)) / 2).clamp(max=HIGHEST)


def shrink(pixels: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, S, S] averaged down to a side of ``size``, a divisor of S."""
    return pixels if pixels.shape[-1] == size else F.avg_pool2d(pixels, pixels.shape[-1] // size)


def reader(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two linear layers that compute an offset of prompt embeddings from a few features."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))
