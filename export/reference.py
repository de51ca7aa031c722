"""The reference that a bundle is compared with: the original computation in torch, float32, from the checkpoints.

It shares only the checkpoint readers with the exported files: LoRA is applied beside the base weight instead of
being merged, rotary embedding is Hugging Face's, and tokens come from sentencepiece. The language model is
streamed layer by layer over all prompts, so that a 13B model needs the memory of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.anomalygpt import few_shot_distance, upsample_map
from ..models.llama import DecoderLayer, RMSNorm, rotary_tables
from .checkpoints import Checkpoints, load_model
from .gguf_llm import open_tokenizer
from .keys import module_shapes
from .vicuna import PROJECTIONS, Lora


class LoraLinear(nn.Module):
    """A frozen linear layer with its low-rank update unmerged: x Wᵀ + scaling · (x Aᵀ) Bᵀ."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight, self.a, self.b, self.scaling = weight, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.a), self.b)


class Reference:
    """All stages of the model on the CPU. The caller provides text features and prompt pieces."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.model = load_model(checkpoints, with_llama=False)
        self._source = checkpoints.llama
        self._tokenizer = open_tokenizer(self._source.folder / "tokenizer.model")
        self._embeddings = self._source.tensors["model.embed_tokens.weight"]  # stays in the mapped file

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, S, S] → image embedding [B, D], patch features [B, T, P, V]."""
        return self.model.encode(pixels)

    @torch.inference_mode()
    def zero_shot_map(self, patch_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, T, P, V] and [2, E] → [B, M, M]."""
        return self.model.image_decoder(patch_features, text_features, self.model.config.vision.map_size)

    @torch.inference_mode()
    def few_shot_map(self, patch_features: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, P, V] and the normal samples' [B, T, N, V] → distances [B, P] and map [B, M, M]."""
        distance = few_shot_distance(patch_features, normal)
        return distance, upsample_map(distance, self.model.config.vision.map_size)

    @torch.inference_mode()
    def prompt_embeddings(self, anomaly_map: Tensor, num_samples: int, pixels: Tensor) -> Tensor:
        """Prompt embeddings float32 [B, 18, D].

        Args:
            anomaly_map: float32 [B, S, S].
            num_samples: normal samples behind the map; 0: zero-shot. Used by learners that read evidence.
            pixels: float32 [B, 3, S, S]. Used by learners that read the picture.
        """
        learner = self.model.prompt_learner
        counts = torch.full(anomaly_map.shape[:1], float(num_samples))
        given = {"anomaly_map": anomaly_map, "num_samples": counts, "pixels": pixels}
        return learner(**{name: given[name] for name in learner.config.inputs})

    def token_ids(self, piece: str, bos: bool = False) -> list[int]:
        """Token ids of a piece that is tokenised alone."""
        ids: list[int] = self._tokenizer.encode(piece)
        return [self._tokenizer.bos_id(), *ids] if bos else ids

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Embeddings of token ids: float32 [L, D]."""
        return self._embeddings[torch.tensor(token_ids, dtype=torch.long)].float()

    @torch.inference_mode()
    def logits(
        self, prompts: Sequence[Tensor], counts: Sequence[int], advance: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Logits at the last ``counts[i]`` positions of each prompt.

        Args:
            prompts: float32 [L_i, D], input embeddings.
            counts: number of final positions of each prompt to compute.
            advance: called after each layer.

        Returns:
            float32 [counts[i], vocab] each.
        """
        config = self._source.config
        hidden = [prompt[None] for prompt in prompts]
        for index in range(config.num_hidden_layers):
            layer = self._layer(index)
            hidden = [layer(x, *self._rotary(x.shape[1])) for x in hidden]
            advance()
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.load_state_dict({"weight": self._source.tensors["model.norm.weight"].float()})
        head = self._source.tensors["lm_head.weight"].float()
        return [F.linear(norm(x[0, -count:]), head) for x, count in zip(hidden, counts, strict=True)]

    def _layer(self, index: int) -> DecoderLayer:
        """One decoder layer in float32, LoRA beside its projections."""
        source, prefix = self._source, f"model.layers.{index}."
        with torch.device("meta"):
            layer = DecoderLayer(source.config)
        names = module_shapes(DecoderLayer, source.config)
        layer.load_state_dict({name: source.tensors[prefix + name].float() for name in names}, assign=True)
        if source.lora:
            attach_lora(layer, source.lora, prefix)
        return layer

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        config = self._source.config
        head_dim = config.hidden_size // config.num_attention_heads
        return rotary_tables(torch.arange(length), head_dim, config.rope_theta)


def attach_lora(layer: DecoderLayer, lora: Lora, prefix: str) -> None:
    """Replace the attention projections that have a LoRA update by ``LoraLinear``."""
    for projection in PROJECTIONS:
        update = lora.update(f"{prefix}self_attn.{projection}.weight")
        if update is not None:
            base = getattr(layer.self_attn, projection).weight.detach()
            setattr(layer.self_attn, projection, LoraLinear(base, *update, lora.scaling))
