"""Initial weights: a filter bank as the encoder's start instead of random weights, and weights of earlier runs.

- Patch embedding: the 14×14 DCT of luma and two opponent colours, low frequencies first, each half-whitened
  (divided by the root of its spread over generated products; fully whitened, fine noise drowns the rest).
- Anchor channels have a large constant value from the position embedding on: LayerNorm becomes nearly linear (it
  preserves contrast), and cosine similarity between tokens behaves like Euclidean distance.
- First MLP: a mixture of x and |x|, the energy that Gabor quadrature measures, insensitive to phase.
- Second and third attention: a Gaussian average over neighbours, computed from sine and cosine position channels
  (like HOG's 3×3 context). All other residual branches start with small weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...runtime.synthetic.data import normalise
from ..imagebind import Block, VisionEncoder
from .pool import NORMALS, draw_group

NUM_ANCHORS = 4
NUM_POSITION = 4  # cos x, sin x, cos y, sin y
ANCHOR = 3.4  # value of the anchor channels after the first LayerNorm; the content channels have CONTENT_STD
CONTENT_STD = 0.28
POSITION_STD = 0.3
LUMA_SHARE = 0.68
WHITENING = 0.5
NEIGHBOUR_WEIGHT = 0.25


def _dct_basis(size: int) -> list[np.ndarray]:
    """Orthonormal 2-D DCT-II basis images, low frequencies first."""
    n = np.arange(size)
    rows = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    order = sorted(
        ((i, j) for i in range(size) for j in range(size)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f)
    )
    return [np.outer(rows[i], rows[j]) for i, j in order]


def _filters(count: int, patch: int) -> Tensor:
    """[count, 3, patch, patch] filters over normalised RGB."""
    basis = _dct_basis(patch)
    num_luma = round(count * LUMA_SHARE)
    num_red = (count - num_luma) // 2
    plan = (
        (np.array([0.299, 0.587, 0.114]), num_luma),
        (np.array([0.7, -0.7, 0.0]), num_red),
        (np.array([0.4, 0.4, -0.8]), count - num_luma - num_red),
    )
    return torch.from_numpy(
        np.stack([color[:, None, None] * basis[k] for color, number in plan for k in range(number)])
    ).float()


@torch.no_grad()
def construct(encoder: VisionEncoder, seed: int, num_groups: int = 40, anchored: bool = True) -> None:
    """Write the constructed weights into ``encoder``.

    Args:
        encoder: on the CPU; changed in place.
        seed: of the generated groups that the whitening statistics come from.
        num_groups: number of these groups.
        anchored: with anchor channels; else these are 0.
    """
    config = encoder.config
    width, grid = config.width, config.tokens
    anchors = slice(0, NUM_ANCHORS)
    position = slice(NUM_ANCHORS, NUM_ANCHORS + NUM_POSITION)
    first = NUM_ANCHORS + NUM_POSITION
    content = torch.arange(first, width)

    filters = _filters(width - first, config.patch_size)
    images = np.concatenate([draw_group(seed + 1, i).pixels[:NORMALS] for i in range(num_groups)])
    responses = torch.nn.functional.conv2d(
        torch.from_numpy(normalise(images)), filters, stride=config.patch_size
    )
    deviation = responses.std(dim=(0, 2, 3))
    filters *= (deviation**-WHITENING / (deviation ** (1 - WHITENING)).mean())[:, None, None, None]
    # the value that LayerNorm divides by; the anchors dominate it
    spread = math.sqrt(
        (NUM_ANCHORS * ANCHOR**2 + len(content) * CONTENT_STD**2 + NUM_POSITION * POSITION_STD**2 / 2) / width
    )
    encoder.patch_embedding.weight.zero_()
    encoder.patch_embedding.weight[first:] = filters * CONTENT_STD

    signs = torch.tensor([1.0, -1.0] * (NUM_ANCHORS // 2))
    angle = torch.arange(grid) * (2 * math.pi / (2 * grid))
    rows, columns = (a.flatten() for a in torch.meshgrid(angle, angle, indexing="ij"))
    encoder.pos_embed.zero_()
    encoder.pos_embed[:, :, anchors] = ANCHOR * signs if anchored else 0.0
    waves = torch.stack([columns.cos(), columns.sin(), rows.cos(), rows.sin()], dim=1)
    encoder.pos_embed[:, 1:, position] = POSITION_STD * waves
    encoder.cls_token.zero_()
    encoder.pre_norm.weight.fill_(spread)

    blocks = [block for block in encoder.blocks if isinstance(block, Block)]
    for block in blocks:
        for branch in (block.attn.out_proj, block.mlp.fc2):
            branch.weight.mul_(0.1)
            branch.bias.zero_()
    _energy(blocks[0], content, spread)
    for block in blocks[1:3]:
        _neighbours(block, content, position, spread, grid)


def _energy(block: Block, content: Tensor, spread: float, linear: float = 0.6, energy: float = 0.8) -> None:
    """x ← linear·x + energy·|x| on the content channels, from pairs GELU(±kx)."""
    sharp, count = 8.0, len(content)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    fc1.weight[: 2 * count].zero_()
    fc1.bias[: 2 * count].zero_()
    fc2.weight[:, : 2 * count].zero_()
    for i, channel in enumerate(content.tolist()):
        for sign, row in ((1.0, i), (-1.0, count + i)):
            fc1.weight[row, channel] = sign * sharp
            fc2.weight[channel, row] = (energy + sign * (linear - 1)) / sharp * spread


def _neighbours(
    block: Block, content: Tensor, position: slice, spread: float, grid: int, sigma: float = 0.9
) -> None:
    """x ← x + NEIGHBOUR_WEIGHT·(average of x over patches with Gaussian weights of ``sigma`` patches) on the content
    channels."""
    attention = block.attn
    width = attention.out_proj.weight.shape[0]
    head_width = width // attention.heads
    step = 2 * math.pi / (2 * grid)
    # cos(step·Δ) ≈ 1 − (step·Δ)²/2, so this logit scale makes softmax a Gaussian of deviation sigma
    sharp = math.sqrt(math.sqrt(head_width)) / (step * sigma) / (POSITION_STD / spread)
    attention.in_proj_weight.zero_()
    attention.in_proj_bias.zero_()
    attention.out_proj.weight.zero_()
    for head in range(attention.heads):
        start = head * head_width
        for i, channel in enumerate(range(position.start, position.stop)):
            attention.in_proj_weight[start + i, channel] = sharp
            attention.in_proj_weight[width + start + i, channel] = sharp
        for i, channel in enumerate(content[head :: attention.heads].tolist()):
            attention.in_proj_weight[2 * width + start + i, channel] = 1.0
            attention.out_proj.weight[channel, start + i] = NEIGHBOUR_WEIGHT * spread


START = Path(__file__).parent / "training" / "start.safetensors"


@torch.no_grad()
def load_start(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Load the weights of an earlier run (``save_start``); text features are matched by class name, and classes that
    the earlier run did not have get those of the first class."""
    with safe_open(START, "pt") as file:
        known = json.loads(file.metadata()["classes"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    encoder = model.get_submodule("encoder")
    assert isinstance(encoder, VisionEncoder)
    taps = [
        str(layer) for layer in encoder.config.tap_layers
    ]  # the start has a decoder layer for every block
    for name, tensor in tensors.items():
        if name.startswith("decoder.fc."):
            layer, _, leaf = name.removeprefix("decoder.fc.").partition(".")
            if layer not in taps:
                continue
            name = f"decoder.fc.{taps.index(layer)}.{leaf}"
        own = model.get_parameter(name)
        if name == "text":
            for row, kind in enumerate(classes):
                own[row] = 8 * F.normalize(tensor[known.index(kind if kind in known else classes[0])], dim=-1)
        else:
            own.copy_(tensor)


def save_start(model: nn.Module, classes: tuple[str, ...], path: Path = START) -> None:
    """Save the weights that a later run can start from, float16."""
    kept = ("encoder.", "decoder.", "text", "threshold", "sharpness")
    tensors = {n: p.detach().half().contiguous() for n, p in model.named_parameters() if n.startswith(kept)}
    save_file(tensors, path, {"classes": json.dumps(list(classes))})


LANGUAGE_START = START.with_name("start_language.safetensors")
BY_PIECE = (
    "llama.model.embed_tokens.weight",
    "llama.lm_head.weight",
)  # a row for each piece of the vocabulary


@torch.no_grad()
def load_language_start(model: nn.Module, pieces: list[str]) -> None:
    """Load the language half of an earlier run (``save_language_start``): prompt learner, projection and layers, and
    the embedding rows of the pieces that both vocabularies have."""
    with safe_open(LANGUAGE_START, "pt") as file:
        known = {piece: row for row, piece in enumerate(json.loads(file.metadata()["pieces"]))}
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    rows = [(own, known[piece]) for own, piece in enumerate(pieces) if piece in known]
    for name, tensor in tensors.items():
        own = model.get_parameter(name)
        if name in BY_PIECE:
            own[[r[0] for r in rows]] = tensor[[r[1] for r in rows]]
        else:
            own.copy_(tensor)


def save_language_start(model: nn.Module, pieces: list[str], path: Path = LANGUAGE_START) -> None:
    """Save the weights of the language half that a later run can start from, float16."""
    kept = ("llama.", "llama_proj.", "prompt_learner.")
    tensors = {n: p.detach().half().contiguous() for n, p in model.named_parameters() if n.startswith(kept)}
    save_file(tensors, path, {"pieces": json.dumps(pieces)})
