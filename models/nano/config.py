"""Dimensions of the nano model and settings of its training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...runtime.bundles.bundle import Augmentation
from ..anomalygpt import AnomalyGPTConfig
from ..imagebind import VisionConfig
from ..llama import LlamaConfig
from ..prompt_learner import PromptLearnerConfig

LLM_WIDTH = 128
VOCAB_SIZE = 1024
NANO_VISION = VisionConfig(
    width=128,
    depth=4,
    heads=2,
    mlp_width=512,
    embed_dim=64,
    tap_layers=(0, 1, 2, 3),
    neighbourhood=0.6,
    shifts=2,
)


def nano_config(vocab_size: int = VOCAB_SIZE) -> AnomalyGPTConfig:
    """AnomalyGPT's topology at nano size."""
    return AnomalyGPTConfig(
        vision=NANO_VISION,
        prompt_learner=PromptLearnerConfig(
            channels=(4, 16, 32, 64, 128), llm_width=LLM_WIDTH, evidence_width=64, look_channels=(12, 16, 24)
        ),
        llama=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=LLM_WIDTH,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
        ),
    )


@dataclass(frozen=True)
class LanguageRecipe:
    """Settings of the second half: prompt learner, projection and language model, on maps of the frozen encoder."""

    seed: int = 26
    look_steps: int = 2500  # of the network that reads the picture, 24 parts each
    language_steps: int = 1000
    language_batch: int = 24  # maps
    dialogues: int = 2  # per map
    language_lr: float = 3e-4
    warmup_steps: int = 40
    ema: float = 0.998
    log_every: int = 20
    evaluate_every: int = 500


@dataclass(frozen=True)
class Recipe(LanguageRecipe):
    """Settings of one training run.

    The shipped weights were trained with these defaults; ``training/ablation.md`` has the measurements behind them.
    """

    # encoder and language model start from training/start*.safetensors, not from constructed weights
    start: bool = True
    pool_groups: int = 4000  # six parts each
    calm_share: float = 0.5  # share of the groups from lines with little variation from shot to shot
    # first half: encoder, image decoder and text features
    vision_steps: int = 3200
    groups_per_step: int = 4
    vision_lr: float = 1.5e-4
    zero_shot_gradient: float = 0.1  # share of the zero-shot loss's gradient that reaches the encoder
    # second half
    augmentation: Augmentation = (
        "none"  # of the normal samples in the memory banks, in training and at run time
    )
    gallery_groups: int = 2000
    # choices that the ablation switches off
    ranking: bool = True  # pairwise ranking losses in addition to the cross-entropy
    weigh_small: bool = True  # weight patches of small defects up
    recolour: bool = True  # draw colours, gamma, gain and negative at random for each group
    many_normals: bool = True  # match with all three normal samples too, not only with one
    anchored: bool = True  # a constant channel in the tokens (constructed weights only)
    # without the overlapping patches of the shipped model: they take four times as long and improve no weights
    vision: VisionConfig = field(
        default_factory=lambda: replace(NANO_VISION, shifts=1, neighbourhood=0.4)
    )
