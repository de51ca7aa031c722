"""AnomalyGPT's prompt learner: anomaly map → 18 prompt embeddings for the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_BASE_PROMPTS = 9
NUM_PROMPTS = 18


@dataclass(frozen=True)
class PromptLearnerConfig:
    """Channel widths of the five 3×3 convolutions, and the language model's width."""

    channels: tuple[int, int, int, int, int] = (4, 16, 64, 256, 1024)
    llm_width: int = 4096


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

    def forward(self, anomaly_map: Tensor) -> Tensor:
        """[B, 224, 224] in 0..1 → [B, 18, D]; row 9 + k sees cell (k // 3, k % 3) of the map."""
        batch = anomaly_map.shape[0]
        cells = self.meta_net(anomaly_map[:, None]).flatten(2).transpose(1, 2)
        return torch.cat([self.base_prompts.expand(batch, -1, -1), cells], dim=1)
