"""AnomalyGPT's prompt learner: anomaly map → 18 prompt embeddings for the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .evidence import NUM_FIGURES, evidence

NUM_BASE_PROMPTS = 9
NUM_PROMPTS = 18


@dataclass(frozen=True)
class PromptLearnerConfig:
    """Channel widths of the five 3×3 convolutions, and the language model's width.

    The original's reads the map alone; one with an ``evidence_width`` has a second, small network of that width that
    reads what ``evidence`` says of the whole map and of the normal samples behind it.
    """

    channels: tuple[int, int, int, int, int] = (4, 16, 64, 256, 1024)
    llm_width: int = 4096
    evidence_width: int = 0


class PromptLearner(nn.Module):
    """Nine learned rows, then nine rows read off the map by a CNN (names as in the original)."""

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
            self.evidence_net = nn.Sequential(
                nn.Linear(NUM_FIGURES, config.evidence_width),
                nn.ReLU(),
                nn.Linear(config.evidence_width, config.llm_width),
            )

    def forward(self, anomaly_map: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Prompt embeddings for the language model.

        Args:
            anomaly_map: float [B, 224, 224], 0..1.
            num_samples: float [B], normal samples behind the map; only of a learner that reads evidence.

        Returns:
            float [B, 18, D]; row 9 + k sees cell (k // 3, k % 3) of the map, row 0 what the evidence says.

        Raises:
            ValueError: the number of samples is missing, or given to a learner that reads the map alone.
        """
        if (num_samples is not None) != (self.config.evidence_width > 0):
            wanted = "the map and the number of normal samples" if self.config.evidence_width else "the map alone"
            raise ValueError(f"this prompt learner reads {wanted}")
        return self.read(anomaly_map, None if num_samples is None else evidence(anomaly_map, num_samples))

    def read(self, anomaly_map: Tensor, figures: Tensor | None) -> Tensor:
        """The same, of what ``evidence`` found before: [B, NUM_FIGURES], or None."""
        batch = anomaly_map.shape[0]
        cells = self.meta_net(anomaly_map[:, None]).flatten(2).transpose(1, 2)
        base = self.base_prompts.expand(batch, -1, -1)
        if figures is not None:
            told = self.evidence_net(figures)
            base = torch.cat([base[:, :1] + told[:, None], base[:, 1:]], dim=1)
        return torch.cat([base, cells], dim=1)
