"""Recognises the appearance of a defect in the picture: darker or brighter than its surroundings, and line or not.

The anomaly map has no sign and is coarser than a scratch is wide, so it does not contain this information. This small
network reads the picture where the map is raised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOOKS = ("darker", "brighter", "neither", "line")  # the first three exclude each other
CELL = 2  # side of a cell in pixels; contrast is computed between cells
SURROUNDINGS = (5, 15)  # sides, in cells, of the squares whose mean a cell is compared with
FAINTEST = 0.015  # standard deviation of normalised pixels below which contrast is noise
STRONGEST = 6.0  # contrast is clipped at this many standard deviations
RAISED_FINE, RAISED_COARSE = (
    (8, 16, 32),
    (4, 8, 16),
)  # exponents: from the whole raised area to the peak alone
EPSILON = 1e-6
HIDDEN = 32


class LookNet(nn.Module):
    """Three convolutions over the picture's contrast, their means weighted by the map, and two linear layers.

    Args:
        channels: of the three convolutions.
    """

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = channels
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(len(SURROUNDINGS) + 1, first, 3, padding=1),
                nn.Conv2d(first, second, 3, padding=1),
                nn.Conv2d(second, third, 3, stride=2, padding=1),
            ]
        )
        seen = second * (len(RAISED_FINE) + 1) + third * (len(RAISED_COARSE) + 2)
        self.head = nn.Sequential(nn.Linear(seen, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(LOOKS)))

    def forward(self, pixels: Tensor, anomaly_map: Tensor) -> Tensor:
        """Logits of the appearance where the map is highest.

        Args:
            pixels: float [B, 3, S, S], normalised; S divisible by four.
            anomaly_map: float [B, S, S].

        Returns:
            float [B, len(LOOKS)].
        """
        return self.read(contrast(pixels), raised(anomaly_map))

    def read(self, contrasts: Tensor, raised: Tensor) -> Tensor:
        """Like ``forward``, from the results of ``contrast`` [B, surroundings, S/2, S/2] and ``raised``
        [B, 1, S/2, S/2]."""
        fine = self.convs[0](torch.cat([contrasts, raised**4], dim=1)).relu()
        fine = self.convs[1](fine).relu()
        seen = [*means_where(fine, raised, RAISED_FINE), fine.mean(dim=(2, 3))]
        coarse = self.convs[2](fine).relu()
        raised = F.avg_pool2d(raised, 2)
        seen += [*means_where(coarse, raised, RAISED_COARSE), coarse.mean(dim=(2, 3))]
        seen.append((coarse * raised ** RAISED_COARSE[1]).amax(dim=(2, 3)))
        return self.head(torch.cat(seen, dim=1))


def probabilities(looks: Tensor) -> Tensor:
    """Logits of ``LookNet`` → probabilities [B, len(LOOKS)]: softmax over the three shades, sigmoid for the line."""
    return torch.cat([looks[:, :3].softmax(dim=1), looks[:, 3:].sigmoid()], dim=1)


def contrast(pixels: Tensor) -> Tensor:
    """Difference of each cell's grey level from the mean of its surroundings, in standard deviations, halved:
    [B, 3, S, S] → [B, surroundings, S/2, S/2]."""
    grey = F.avg_pool2d(pixels.mean(dim=1, keepdim=True), CELL)
    found = []
    for side in SURROUNDINGS:
        around = F.avg_pool2d(grey, (side, 1), 1, (side // 2, 0), count_include_pad=False)
        around = F.avg_pool2d(around, (1, side), 1, (0, side // 2), count_include_pad=False)
        difference = grey - around
        deviation = (difference**2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
        found.append((difference / (deviation + FAINTEST)).clamp(-STRONGEST, STRONGEST) / 2)
    return torch.cat(found, dim=1)


def raised(anomaly_map: Tensor) -> Tensor:
    """The map in cells, divided by its peak: [B, S, S] → [B, 1, S/2, S/2]."""
    level = F.avg_pool2d(anomaly_map[:, None], CELL).clamp(min=0) + EPSILON
    return level / level.amax(dim=(2, 3), keepdim=True)


def means_where(features: Tensor, raised: Tensor, exponents: tuple[int, ...]) -> list[Tensor]:
    """Means [B, C] of features [B, C, H, W], weighted by powers of ``raised`` [B, 1, H, W], one per exponent."""
    weights = (raised**exponent for exponent in exponents)
    return [(features * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)) for weight in weights]
