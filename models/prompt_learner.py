"""AnomalyGPT's prompt learner: anomaly map → 18 prompt embeddings for the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BASE_PROMPTS = 9
NUM_PROMPTS = 18


@dataclass(frozen=True)
class PromptLearnerConfig:
    """Channel widths of the five 3×3 convolutions, and the language model's width.

    The original's reads the map alone, which does not tell dark from bright: one that ``reads_image`` has the image
    beside it.
    """

    channels: tuple[int, int, int, int, int] = (4, 16, 64, 256, 1024)
    llm_width: int = 4096
    reads_image: bool = False

    @property
    def input_channels(self) -> int:
        """Of the first convolution: the map, and red, green and blue where the image is read."""
        return 4 if self.reads_image else 1


def contrast_where_anomalous(anomaly_map: Tensor, pixels: Tensor) -> Tensor:
    """How much brighter or darker than its surroundings the image is, in the measure in which the map is high there.

    Not the image itself: a learner that sees all of it learns training's products by heart, and judges others worse.

    Args:
        anomaly_map: float [B, 1, S, S], 0..1.
        pixels: float [B, 3, S, S].

    Returns:
        float [B, 3, S, S]: pixels less the mean of some 42 × 42 of them, times the map over its largest value.
    """
    patch, size = 14, pixels.shape[-2:]
    patches = functional.avg_pool2d(pixels, patch)
    blurred = functional.avg_pool2d(patches, 3, stride=1, padding=1, count_include_pad=False)
    surroundings = functional.interpolate(blurred, size=size, mode="bilinear", align_corners=False)
    peak = anomaly_map.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    return (pixels - surroundings) * (anomaly_map / peak)


class PromptLearner(nn.Module):
    """Nine learned rows, then nine rows read off the map, and the image if asked, by a CNN (names as in the
    original)."""

    def __init__(self, config: PromptLearnerConfig) -> None:
        super().__init__()
        self.config = config
        self.base_prompts = nn.Parameter(torch.randn(NUM_BASE_PROMPTS, config.llm_width))
        layers: list[nn.Module] = []
        inputs = config.input_channels
        for outputs in config.channels:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = outputs
        self.meta_net = nn.Sequential(*layers, nn.Conv2d(inputs, config.llm_width, 5))

    def forward(self, anomaly_map: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Prompt embeddings for the language model.

        Args:
            anomaly_map: float [B, 224, 224], 0..1.
            pixels: float [B, 3, 224, 224], what the encoder was given; only of a learner that reads the image.

        Returns:
            float [B, 18, D]; row 9 + k sees cell (k // 3, k % 3) of the map.

        Raises:
            ValueError: pixels are missing, or given to a learner that reads the map alone.
        """
        if (pixels is not None) != self.config.reads_image:
            wanted = "the map and the image" if self.config.reads_image else "the map alone"
            raise ValueError(f"this prompt learner reads {wanted}")
        batch = anomaly_map.shape[0]
        seen = anomaly_map[:, None]
        if pixels is not None:
            seen = torch.cat([seen, contrast_where_anomalous(seen, pixels)], dim=1)
        cells = self.meta_net(seen).flatten(2).transpose(1, 2)
        return torch.cat([self.base_prompts.expand(batch, -1, -1), cells], dim=1)
