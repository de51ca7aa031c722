"""ImageBind's vision tower (ViT-H/14) with AnomalyGPT's four taps, for any dimensions (text tower: text_tower.py).

Source: ImageBind (Girdhar et al., CVPR 2023) and AnomalyGPT (Gu et al., AAAI 2024). The original repeats the
image as two video frames and applies a Conv3d with kernel (2, 14, 14); both frames are equal, so a Conv2d with
the kernel summed over time computes the same (see ``fold_video_kernel``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig:
    """Dimensions of the vision tower; the defaults are ImageBind-Huge's."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp_width: int = 5120
    embed_dim: int = 1024
    # zero-based: the residual stream after blocks 8, 16, 24, 32
    tap_layers: tuple[int, ...] = (7, 15, 23, 31)
    # weight of the mean over a patch's neighbourhood (3 × 3 patch widths) in its features, against the patch itself
    # (PatchCore's locally aware patch features, Roth et al., CVPR 2022); the original uses 0
    neighbourhood: float = 0.0
    # encodings of the image per direction, each shifted by patch_size / shifts pixels: with overlapping patches, a
    # detail smaller than a patch lies completely in one of them; the original uses 1
    shifts: int = 1

    tap_weights: ClassVar[tuple[float, ...]] = ()  # equal
    pixel_mean: ClassVar[tuple[float, ...]] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's and ImageBind's, RGB
    pixel_std: ClassVar[tuple[float, ...]] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def map_size(self) -> int:
        """Side of anomaly maps in pixels."""
        return self.image_size

    @property
    def tokens(self) -> int:
        """Patches per side that do not overlap: the patch tokens per side of one encoding."""
        return self.image_size // self.patch_size

    @property
    def stride(self) -> int:
        """Pixels between neighbouring patches."""
        return self.patch_size // self.shifts

    @property
    def grid(self) -> int:
        """Patches per side of a tap."""
        return (self.tokens - 1) * self.shifts + 1

    def new_encoder(self) -> VisionEncoder:
        """The network, with random weights."""
        return VisionEncoder(self)


class Attention(nn.Module):
    """Multi-head self-attention with ImageBind's parameter names (packed q, k, v rows).

    The text tower's is causal: its mask has -inf above the diagonal.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, causal: bool = False) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads, causal)
        self.norm_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class VisionEncoder(nn.Module):
    """Encodes pixels to the unit-norm image embedding and the patch features of the tapped layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, tokens = config.width, config.tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens * tokens + 1, width))
        self.pre_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.head_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised pixels.

        Args:
            pixels: float [B, 3, S, S].

        Returns:
            The unit-norm image embedding [B, E] and the patch features [B, taps, grid², V]: the residual stream
            after each tapped block, without the CLS row and not normalised, as in the original. Depending on the
            configuration, patches overlap and are mixed with their neighbours.
        """
        config = self.config
        if config.shifts == 1:
            embedding, taps = self._encode(pixels)
            return embedding, self._with_neighbours(taps)
        batch, size = pixels.shape[0], config.image_size
        steps = range(0, config.patch_size, config.stride)
        beyond = config.patch_size - config.stride  # padding; patches that reach into it are dropped
        padded = F.pad(pixels, (0, beyond, 0, beyond), mode="reflect")
        moved = torch.cat([padded[:, :, y : y + size, x : x + size] for y in steps for x in steps])
        embedding, taps = self._encode(moved)
        # [shifts, shifts, B, T, tokens, tokens, V] → [B, T, tokens · shifts, tokens · shifts, V]
        planes = taps.unflatten(2, (config.tokens, config.tokens))
        planes = planes.unflatten(0, (config.shifts, config.shifts, -1)).permute(2, 3, 4, 0, 5, 1, 6)
        planes = planes.flatten(2, 3).flatten(3, 4)[:, :, : config.grid, : config.grid]
        return embedding[:batch], self._with_neighbours(planes.flatten(2, 3))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One encoding without overlap: [B, 3, S, S] → [B, E] and [B, T, tokens², V]."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.pre_norm(x)
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.config.tap_layers:
                taps.append(x[:, 1:])
        embedding = F.normalize(self.head(self.head_norm(x[:, 0])), dim=-1)
        return embedding, torch.stack(taps, dim=1)

    def _with_neighbours(self, taps: Tensor) -> Tensor:
        """[B, T, grid², V] → [B, T, grid², V], each patch mixed with the mean over its neighbourhood, which is smaller
        at the edge."""
        share, grid = self.config.neighbourhood, self.config.grid
        if not share:
            return taps
        side = 2 * self.config.shifts + 1
        planes = taps.transpose(2, 3).unflatten(3, (grid, grid)).flatten(0, 1)
        mean = F.avg_pool2d(planes, side, stride=1, padding=side // 2, count_include_pad=False)
        mixed = (1 - share) * planes + share * mean
        return mixed.flatten(2).transpose(1, 2).unflatten(0, taps.shape[:2])


def fold_video_kernel(weight: Tensor) -> Tensor:
    """Conv3d patch kernel [V, 3, 2, p, p] → equivalent Conv2d kernel [V, 3, p, p] for a repeated frame."""
    return weight.sum(dim=2)
