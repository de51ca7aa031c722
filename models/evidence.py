"""Global features of an anomaly map: length and width of its raised area, levels, and number of normal samples.

AnomalyGPT's prompt learner reads the anomaly map cell by cell. These few features describe the whole map and are added
to one of the learner's rows: one compact peak is a defect more often than raised edges all over the part, and the same
level means less with one normal sample than with four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 7  # pixels
SHARPNESS = (4.0, 16.0, 32.0)  # exponents that weight the map: from the whole raised area to the peak alone
SHOTS = (0.5, 1.5)  # limits between no, one and several normal samples
EPSILON = 1e-6
THINNEST = 1e-4  # added variance, in half map sides squared: smaller variances are rounding errors
NUM_FIGURES = len(SHARPNESS) * 3 + 3 + len(SHOTS)


def evidence(anomaly_map: Tensor, num_samples: Tensor) -> Tensor:
    """Features of an anomaly map.

    Args:
        anomaly_map: float [B, S, S], 0..1.
        num_samples: float [B], number of normal samples behind the map; 0 for a zero-shot map.

    Returns:
        float [B, NUM_FIGURES], of order one: length, width and their ratio of the raised area, for every sharpness;
        peak, mean of the highest five cells and median of the map; whether there is at least one normal sample, and
        more than one.
    """
    cells = F.avg_pool2d(anomaly_map[:, None], CELL)
    raised = cells.flatten(1).clamp(min=0)
    count = raised.shape[1]
    upper = raised.topk(count - count // 2, dim=1).values  # the higher half, highest first
    highest = upper[:, :1]
    side = cells.shape[-1]
    steps = torch.linspace(-1, 1, side, device=cells.device, dtype=cells.dtype)
    down, right = steps.repeat_interleave(side), steps.repeat(side)
    figures = []
    for sharpness in SHARPNESS:
        weight = (
            (raised + EPSILON) / (highest + EPSILON)
        ) ** sharpness  # 1 at the peak, and all over a flat map
        figures.append(_extent(weight / weight.sum(dim=1, keepdim=True), down, right))
    levels = torch.stack([upper[:, 0], upper[:, :5].mean(dim=1), upper[:, -1]], dim=1)
    shots = torch.stack([(num_samples > limit).to(levels.dtype) for limit in SHOTS], dim=1)
    return torch.cat([*figures, 4 * levels, shots], dim=1)


def _extent(weight: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Weights [B, cells] → standard deviations along the long and the short axis, and their ratio, [B, 3]."""
    y, x = (weight * down).sum(1, keepdim=True), (weight * right).sum(1, keepdim=True)
    yy = (weight * (down - y) ** 2).sum(1)
    xx = (weight * (right - x) ** 2).sum(1)
    xy = (weight * (down - y) * (right - x)).sum(1)
    mean, half = (xx + yy) / 2, (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    long, short = ((mean + sign * half).clamp(min=0).add(THINNEST).sqrt() for sign in (1, -1))
    return torch.stack([4 * long, 4 * short, short / (long + 1e-2)], dim=1)
