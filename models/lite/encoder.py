"""The encoder of ``lite``: an EfficientNet-Lite0 cut off behind its last tap, and a learned projection of each tap.

What comes out is AnomalyGPT's: an image embedding and patch features of several taps, matched by the largest cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import BLOCK_WIDTHS, PIXEL_MEAN, PIXEL_SCALE, Backbone


@dataclass(frozen=True)
class LiteVisionConfig:
    """Dimensions of the encoder.

    Attributes:
        image_size: side of the input in pixels, a multiple of 32.
        tap_blocks: zero-based block numbers, ascending; the backbone ends with the last.
        grid: patches a side of every tap: larger taps are averaged, smaller ones enlarged bilinearly.
        neighbourhood: side of the window that each tap is averaged over, 1 for none; at the border it holds fewer.
        width: V, channels of a patch feature; the last one is constant.
        embed_dim: E, of the image embedding.
        tap_weights: of each tap's distances in a map.
        map_size: M, side of anomaly maps in pixels.
    """

    shifts: ClassVar[int] = 1  # patches do not overlap
    pixel_mean: ClassVar[tuple[float, ...]] = (PIXEL_MEAN / 255,) * 3
    pixel_std: ClassVar[tuple[float, ...]] = (PIXEL_SCALE / 255,) * 3

    image_size: int = 448
    tap_blocks: tuple[int, ...] = (4, 7, 10, 14)
    grid: int = 28
    neighbourhood: int = 3
    width: int = 64
    embed_dim: int = 64
    tap_weights: tuple[float, ...] = (2.0, 1.0, 1.0, 1.0)
    map_size: int = 224

    def __post_init__(self) -> None:
        if len(self.tap_weights) != len(self.tap_blocks):
            raise ValueError(f"{len(self.tap_weights)} weights for {len(self.tap_blocks)} taps")

    @property
    def tap_widths(self) -> tuple[int, ...]:
        """Channels of each tap before its projection."""
        return tuple(BLOCK_WIDTHS[block] for block in self.tap_blocks)

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """The blocks that patch features are taken from."""
        return self.tap_blocks

    def new_encoder(self) -> LiteEncoder:
        """The network, with random weights."""
        return LiteEncoder(self)


class LiteEncoder(nn.Module):
    """Pixels to the unit-norm image embedding and the projected patch features.

    The constant channel bounds the angle between two patches: the cosine then grows with their Euclidean distance, and
    a patch with little in it is not matched by its direction alone.
    """

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.tap_blocks[-1] + 1)
        self.projections = nn.ModuleList(nn.Linear(width, config.width - 1) for width in config.tap_widths)
        self.constants = nn.Parameter(torch.ones(len(config.tap_blocks)))
        self.head = nn.Linear(config.tap_widths[-1], config.embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels.

        Args:
            pixels: float [B, 3, S, S], RGB, (0..255 − 127) / 128.

        Returns:
            The unit-norm image embedding [B, E] and the patch features [B, T, grid², V].
        """
        taps = self.backbone(pixels, self.config.tap_blocks)
        embedding = self.embed(taps[-1])
        return embedding, self.project([self.gather(tap) for tap in taps])

    def gather(self, tap: Tensor) -> Tensor:
        """Average over the neighbourhood and bring to the grid: [B, C, side, side] → [B, grid², C]."""
        config = self.config
        if config.neighbourhood > 1:
            side = config.neighbourhood
            tap = F.avg_pool2d(tap, side, stride=1, padding=side // 2, count_include_pad=False)
        if tap.shape[-1] > config.grid:
            tap = F.avg_pool2d(tap, tap.shape[-1] // config.grid)
        elif tap.shape[-1] < config.grid:
            size = (config.grid, config.grid)
            tap = F.interpolate(tap, size=size, mode="bilinear", align_corners=False)
        return tap.flatten(2).transpose(1, 2)

    def project(self, gathered: list[Tensor]) -> Tensor:
        """[B, grid², C] of each tap → [B, T, grid², V]."""
        rows = []
        for index, (tap, projection) in enumerate(zip(gathered, self.projections, strict=True)):
            projected = projection(tap)
            constant = self.constants[index].expand(*projected.shape[:-1], 1)
            rows.append(torch.cat([projected, constant], dim=-1))
        return torch.stack(rows, dim=1)

    def embed(self, last_tap: Tensor) -> Tensor:
        """[B, C, side, side] → unit norm [B, E]."""
        return F.normalize(self.head(last_tap.mean(dim=(2, 3))), dim=-1)
