"""AnomalyGPT's image decoder: compares patch features with text features of "normal" and "abnormal", which gives the
zero-shot anomaly map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_SCALE = 100.0


class ImageDecoder(nn.Module):
    """One linear layer per tap, named as in the original (``fc.0`` … ``fc.3``)."""

    def __init__(self, width: int, embed_dim: int, taps: int = 4) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, embed_dim) for _ in range(taps))

    def patch_logits(self, patch_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, T, P, V] × [2, E] (rows: normal, abnormal; unit norm) → logits [B, T, P, 2]."""
        projected = torch.stack([fc(patch_features[:, tap]) for tap, fc in enumerate(self.fc)], dim=1)
        return LOGIT_SCALE * F.normalize(projected, dim=-1) @ text_features.T

    def forward(self, patch_features: Tensor, text_features: Tensor, image_size: int = 224) -> Tensor:
        """Zero-shot anomaly map.

        Args:
            patch_features: float [B, T, grid², V], not normalised.
            text_features: float [2, E], unit norm, row 0 normal and row 1 abnormal.
            image_size: side of the map in pixels.

        Returns:
            float [B, image_size, image_size] in 0..1, 1 = anomalous. The logits are upsampled first, then softmax is
            applied, then the mean over the taps taken, as in the original.
        """
        logits = self.patch_logits(patch_features, text_features)
        batch, taps, patches, _ = logits.shape
        grid = int(patches**0.5)
        planes = logits.permute(0, 1, 3, 2).reshape(batch * taps, 2, grid, grid)
        planes = F.interpolate(planes, size=(image_size, image_size), mode="bilinear", align_corners=True)
        abnormal = planes.softmax(dim=1)[:, 1]
        return abnormal.view(batch, taps, image_size, image_size).mean(dim=1)
