"""ImageBind's text tower, for any dimensions: encodes sentences to unit-norm embeddings.

It is used only at export, to compute two vectors for each class, and is not part of a bundle.
Source: ImageBind (Girdhar et al., CVPR 2023), whose text tower is OpenCLIP's ViT-H/14.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .imagebind import LAYER_NORM_EPS, Block


@dataclass(frozen=True)
class TextConfig:
    """Dimensions of the text tower; the defaults are ImageBind-Huge's."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    embed_dim: int = 1024


class TextEncoder(nn.Module):
    """Encodes CLIP token ids to unit-norm sentence embeddings.

    The original also multiplies by a logit scale. It is omitted here: as a common factor of all sentences, it cancels
    when the mean of an ensemble is normalised.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, causal=True) for _ in range(config.depth)
        )
        self.head_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, config.embed_dim, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode tokenised sentences.

        Args:
            token_ids: int64 [B, L] from ``ClipTokenizer``, padded with 0, L at most ``context_length``.

        Returns:
            float [B, E], unit norm.
        """
        end = token_ids.argmax(dim=-1)  # the end-of-text token has the largest id
        # The tower is causal, so the padding behind the longest sentence has no effect and is cut off.
        token_ids = token_ids[:, : int(end.max()) + 1]
        x = self.token_embedding(token_ids) + self.pos_embed[:, : token_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        sentence = x[torch.arange(len(x), device=x.device), end]
        return F.normalize(self.head(self.head_norm(sentence)), dim=-1)


def ensemble_features(encoder: TextEncoder, normal: Tensor, abnormal: Tensor) -> Tensor:
    """Text features of a class: the normalised mean embeddings of its "normal" and its "abnormal" sentences.

    Args:
        encoder: the text tower.
        normal, abnormal: int64 [N, L] and [M, L], tokenised sentences.

    Returns:
        float [2, E], unit norm: row 0 normal, row 1 abnormal.
    """
    embeddings = encoder(torch.cat([normal, abnormal]))
    means = [group.mean(dim=0) for group in embeddings.split([len(normal), len(abnormal)])]
    return F.normalize(torch.stack(means), dim=-1)
