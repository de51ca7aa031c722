"""The complete model: vision tower, image decoder, prompt learner, projection, language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_decoder import ImageDecoder
from .imagebind import VisionConfig
from .llama import Llama, LlamaConfig
from .prompt_learner import PromptLearner, PromptLearnerConfig


class VisionTower(Protocol):
    """Dimensions and input of a vision encoder: ImageBind's, or another with the same outputs.

    Attributes:
        image_size: S, side of the input in pixels.
        width: V, channels of a patch feature.
        tap_layers: the layers that patch features are taken from.
        grid: patches per side.
        embed_dim: E, width of the image embedding.
        shifts: grid positions per patch size and side; 1 if patches do not overlap.
        map_size: M, side of anomaly maps in pixels.
        tap_weights: of each tap's distances in maps in units of normal variation; empty: equal.
        pixel_mean, pixel_std: of the input, RGB in 0..1.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def tap_layers(self) -> tuple[int, ...]: ...
    @property
    def grid(self) -> int: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def shifts(self) -> int: ...
    @property
    def map_size(self) -> int: ...
    @property
    def tap_weights(self) -> tuple[float, ...]: ...
    @property
    def pixel_mean(self) -> tuple[float, ...]: ...
    @property
    def pixel_std(self) -> tuple[float, ...]: ...

    def new_encoder(self) -> nn.Module:
        """The network, with random weights: pixels [B, 3, S, S] → unit-norm embedding [B, E] and patch features
        [B, T, grid², V]."""
        ...


@dataclass(frozen=True)
class AnomalyGPTConfig:
    """Dimensions of a model: the defaults are those of the 7B original; nano has the same parts with smaller ones."""

    vision: VisionTower = field(default_factory=VisionConfig)
    prompt_learner: PromptLearnerConfig = field(default_factory=PromptLearnerConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)


class AnomalyGPT(nn.Module):
    def __init__(self, config: AnomalyGPTConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.encoder = vision.new_encoder()
        self.image_decoder = ImageDecoder(vision.width, vision.embed_dim, len(vision.tap_layers))
        self.prompt_learner = PromptLearner(config.prompt_learner)
        self.llama_proj = nn.Linear(vision.embed_dim, config.llama.hidden_size)
        self.llama = Llama(config.llama)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float [B, 3, S, S] → image embedding projected to the language model's width [B, D], and patch features of
        the tapped layers [B, T, P, V]."""
        embedding, patch_features = self.encoder(pixels)
        return self.llama_proj(embedding), patch_features


def few_shot_distance(patch_features: Tensor, bank: Tensor) -> Tensor:
    """1 − the largest cosine similarity of each query patch with any normal patch, averaged over the taps.

    Args:
        patch_features: float [B, T, P, V], features of the queries, not normalised.
        bank: float [B, T, N, V], features of each query's normal samples, concatenated and not normalised.

    Returns:
        float [B, P].
    """
    similarity = F.normalize(patch_features, dim=-1) @ F.normalize(bank, dim=-1).transpose(-1, -2)
    return 1 - similarity.amax(dim=-1).mean(dim=1)


def upsample_map(patch_map: Tensor, image_size: int = 224) -> Tensor:
    """[B, grid²] → [B, S, S], bilinear with aligned corners, as in the original."""
    grid = int(patch_map.shape[-1] ** 0.5)
    planes = patch_map.view(-1, 1, grid, grid)
    return F.interpolate(planes, size=(image_size, image_size), mode="bilinear", align_corners=True)[:, 0]


def assemble_prompt(
    llama: Llama, pieces: tuple[Tensor, Tensor, Tensor], image_embedding: Tensor, prompt_embeddings: Tensor
) -> Tensor:
    """The prompt's input embeddings [B, L, D]: pieces[0], image embedding, pieces[1], 18 prompt embeddings, pieces[2].

    Args:
        llama: looks up the token embeddings.
        pieces: int64 token ids [L0], [L1] (shared by the batch; the first starts with BOS) and [B, L2].
        image_embedding: float [B, D].
        prompt_embeddings: float [B, 18, D].
    """
    batch = image_embedding.shape[0]
    before, middle = (llama.embed(piece).expand(batch, -1, -1) for piece in pieces[:2])
    after = llama.embed(pieces[2])
    return torch.cat([before, image_embedding[:, None], middle, prompt_embeddings, after], dim=1)
