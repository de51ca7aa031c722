"""lite's encoder: the backbone against a reference network, the folding of its weights, the projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalygpt_edge.models.lite import backbone as backbone_module
from anomalygpt_edge.models.lite.backbone import (
    BATCH_NORM_EPS,
    BLOCK_WIDTHS,
    NUM_BLOCKS,
    Backbone,
    SameConv,
    fold_into,
    load_pretrained,
)
from anomalygpt_edge.runtime.common.errors import ConfigError

# Of each block: input channels, output channels, kernel, stride, expansion (Google's description, written out).
TABLE = (
    (32, 16, 3, 1, 1), (16, 24, 3, 2, 6), (24, 24, 3, 1, 6), (24, 40, 5, 2, 6), (40, 40, 5, 1, 6), (40, 80, 3, 2, 6),
    (80, 80, 3, 1, 6), (80, 80, 3, 1, 6), (80, 112, 5, 1, 6), (112, 112, 5, 1, 6), (112, 112, 5, 1, 6),
    (112, 192, 5, 2, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 320, 3, 1, 6),
)  # fmt: skip


def chance_state() -> dict[str, Tensor]:
    """Tensors by the names and of the shapes of the package that holds the pretrained ones."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        state[f"{norm}.weight"] = torch.rand(outputs) + 0.5
        state[f"{norm}.bias"] = torch.randn(outputs) * 0.2
        state[f"{norm}.running_mean"] = torch.randn(outputs) * 0.2
        state[f"{norm}.running_var"] = torch.rand(outputs) + 0.5

    add("_conv_stem", "_bn0", 32, 3, 3)
    for index, (inputs, outputs, kernel, _, expansion) in enumerate(TABLE):
        block, hidden = f"_blocks.{index}", inputs * expansion
        if expansion > 1:
            add(f"{block}._expand_conv", f"{block}._bn0", hidden, inputs, 1)
        add(f"{block}._depthwise_conv", f"{block}._bn1", hidden, 1, kernel)
        add(f"{block}._project_conv", f"{block}._bn2", outputs, hidden, 1)
    return state


def as_published(state: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """Every block's output with the batch normalisation behind its convolution, for sides that halve evenly."""

    def layer(x: Tensor, convolution: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{convolution}.weight"]
        kernel = weight.shape[-1]
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2  # TensorFlow's SAME
        x = F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)
        gain, bias, mean, variance = (
            state[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(x, mean, variance, gain, bias, eps=1e-3)

    x = layer(pixels, "_conv_stem", "_bn0", 2).clamp(0, 6)
    found = []
    for index, (inputs, outputs, _, stride, expansion) in enumerate(TABLE):
        block, kept = f"_blocks.{index}", x
        if expansion > 1:
            x = layer(x, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        x = layer(x, f"{block}._depthwise_conv", f"{block}._bn1", stride, x.shape[1]).clamp(0, 6)
        x = layer(x, f"{block}._project_conv", f"{block}._bn2")
        if stride == 1 and inputs == outputs:
            x = x + kept
        found.append(x)
    return found


def test_every_block_is_as_published() -> None:
    state, ours = chance_state(), Backbone()
    fold_into(ours, state)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = ours(pixels, tuple(range(NUM_BLOCKS)))
    for index, expected in enumerate(as_published(state, pixels)):
        assert found[index].shape[1] == BLOCK_WIDTHS[index]
        torch.testing.assert_close(found[index], expected, atol=1e-4, rtol=1e-3)


def test_the_pretrained_weights_recognise_what_they_were_trained_on() -> None:
    """Means and deviations of a drawn image, measured with the package efficientnet_lite_pytorch 0.1.0."""
    pytest.importorskip(backbone_module.PACKAGE)
    ours = Backbone(15)
    load_pretrained(ours)
    with torch.no_grad():
        taps = ours(known_pixels(), (7, 10, 14))
    means = [tap.mean().item() for tap in taps]
    deviations = [tap.std().item() for tap in taps]
    np.testing.assert_allclose(means, KNOWN_MEANS, atol=2e-4)
    np.testing.assert_allclose(deviations, KNOWN_DEVIATIONS, atol=2e-3)


def known_pixels() -> Tensor:
    """[1, 3, 96, 96]: a plane wave in each channel, as the backbone takes pixels."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    return torch.stack([torch.sin(x * f + y * g) for f, g in ((0.3, 0.1), (0.05, 0.4), (0.15, 0.2))])[None]


KNOWN_MEANS = (-0.19047, 0.36931, 0.23221)
KNOWN_DEVIATIONS = (9.4632, 5.9452, 6.0879)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ConfigError, match=r"anomalygpt-edge\[lite\]"):
        load_pretrained(Backbone(1))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="another network"):
        fold_into(Backbone(2), {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


def test_folding_is_the_batch_normalisation() -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=BATCH_NORM_EPS).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    full = Backbone(1)
    state = {f"_conv_stem.{k}": v for k, v in convolution.state_dict().items()}
    state |= {f"_bn0.{k}": v for k, v in norm.state_dict().items()}
    for part, shape in (("_depthwise_conv", (32, 1, 3, 3)), ("_project_conv", (16, 32, 1, 1))):
        state[f"_blocks.0.{part}.weight"] = torch.randn(shape)
    for bn, width in (("_bn1", 32), ("_bn2", 16)):
        state |= {f"_blocks.0.{bn}.{k}": v for k, v in nn.BatchNorm2d(width).state_dict().items()}
    fold_into(full, state)
    pixels = torch.randn(1, 3, 33, 33)
    with torch.no_grad():  # odd sides: both pad one on every side
        padded = nn.functional.pad(pixels, (1, 1, 1, 1))
        torch.testing.assert_close(full.stem(pixels), norm(convolution(padded)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1), (8, 1, 1)])
def test_same_convolution_keeps_the_size_rule(side: int, kernel: int, stride: int) -> None:
    output = SameConv(2, 4, kernel, stride)(torch.zeros(1, 2, side, side))
    assert output.shape == (1, 4, -(-side // stride), -(-side // stride))
