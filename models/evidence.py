"""What a map alone does not tell: how many normal samples it comes from, and what is to be seen where it is high.

AnomalyGPT's prompt learner reads the anomaly map, which has no sign: dark and bright look the same in it. These few
figures are computed beside the map, weighted by it, and go into one of the learner's rows. They are too few to learn
products by heart, as convolutions over the picture do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 7  # pixels: half a patch
SHARPNESS = (4.0, 16.0, 32.0)  # exponents: from all that is raised to the peak alone
NEAR, WIDE = 5, 9  # cells around one that it is compared with
SHOTS = (0.5, 1.5)  # limits between no, one and several normal samples
EPSILON = 1e-6
THINNEST = 1e-4  # variance, of half a map's side: under it is rounding
NUM_FIGURES = len(SHARPNESS) * 9 + 3 + len(SHOTS)


def evidence(anomaly_map: Tensor, pixels: Tensor, num_samples: Tensor) -> Tensor:
    """The figures.

    Args:
        anomaly_map: float [B, S, S], 0..1.
        pixels: float [B, 3, S, S], what the encoder was given.
        num_samples: float [B], normal samples that the map comes from; 0 for a zero-shot map.

    Returns:
        float [B, NUM_FIGURES], of order one: how the brightness differs from its surroundings, how rough it is and
        how long and wide what is raised is, each for every sharpness; three levels of the map; the number of samples.
    """
    cells = F.avg_pool2d(anomaly_map[:, None], CELL)
    brightness = pixels.mean(dim=1, keepdim=True)
    level = F.avg_pool2d(brightness, CELL)
    brightest, darkest = F.max_pool2d(brightness, CELL), -F.max_pool2d(-brightness, CELL)
    near, wide = _mean_around(level, NEAR), _mean_around(level, WIDE)
    rough = (_mean_around(level * level, WIDE) - wide * wide).clamp(min=0).add(EPSILON).sqrt()
    looks = torch.cat(
        [level - near, level - wide, brightest - wide, darkest - wide, rough, (level - wide) / (rough + 0.1)],
        dim=1,
    ).flatten(2)  # [B, 6, cells]
    raised = cells.flatten(1).clamp(min=0)
    count = raised.shape[1]
    upper = raised.topk(count - count // 2, dim=1).values  # the higher half, highest first
    highest = upper[:, :1]
    side = cells.shape[-1]
    steps = torch.linspace(-1, 1, side, device=cells.device, dtype=cells.dtype)
    down, right = steps.repeat_interleave(side), steps.repeat(side)
    figures = []
    for sharpness in SHARPNESS:
        weight = ((raised + EPSILON) / (highest + EPSILON)) ** sharpness  # 1 at the peak, and all over a flat map
        weight = weight / weight.sum(dim=1, keepdim=True)
        figures.append((looks * weight[:, None]).sum(dim=2))
        figures.append(_extent(weight, down, right))
    levels = torch.stack([upper[:, 0], upper[:, :5].mean(dim=1), upper[:, -1]], dim=1)
    shots = torch.stack([(num_samples > limit).to(levels.dtype) for limit in SHOTS], dim=1)
    return torch.cat([*figures, 4 * levels, shots], dim=1)


def _mean_around(plane: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(plane, side, 1, side // 2, count_include_pad=False)


def _extent(weight: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Weights [B, cells] → standard deviations along the long and the short axis, and their ratio, [B, 3]."""
    y, x = (weight * down).sum(1, keepdim=True), (weight * right).sum(1, keepdim=True)
    yy = (weight * (down - y) ** 2).sum(1)
    xx = (weight * (right - x) ** 2).sum(1)
    xy = (weight * (down - y) * (right - x)).sum(1)
    mean, half = (xx + yy) / 2, (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    long, short = ((mean + sign * half).clamp(min=0).add(THINNEST).sqrt() for sign in (1, -1))
    return torch.stack([4 * long, 4 * short, short / (long + 1e-2)], dim=1)
