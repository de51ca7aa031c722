"""The text tower against torch's own attention with ImageBind's mask, over all 77 positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalygpt_edge.models.text_tower import TextConfig, TextEncoder, ensemble_features

CONFIG = TextConfig(vocab_size=60, context_length=77, width=32, depth=3, heads=4, mlp_width=48, embed_dim=16)
END = 59


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(2)
    encoder = TextEncoder(CONFIG)
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder.eval().requires_grad_(False)


def sentences(*lengths: int) -> Tensor:
    """Random sentences of these lengths, the end included, padded with 0."""
    ids = torch.zeros(len(lengths), CONFIG.context_length, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = torch.randint(1, END, (length - 1,))
        row[length - 1] = END
    return ids


def original(encoder: TextEncoder, ids: Tensor) -> Tensor:
    """As the original computes it: mask, all positions, pooling where the largest id is."""
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu_(1)
    x = encoder.token_embedding.weight[ids] + encoder.pos_embed
    for block in encoder.blocks:
        attention = nn.MultiheadAttention(CONFIG.width, CONFIG.heads, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        y = block.norm_1(x)
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + block.mlp(block.norm_2(x))
    x = x[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return F.normalize(encoder.head(encoder.head_norm(x)), dim=-1)


def test_same_as_the_original_over_all_positions(encoder):
    ids = sentences(8, 3, 14, 77)
    assert torch.allclose(encoder(ids), original(encoder, ids), atol=1e-5)


def test_cut_to_the_longest_sentence_is_exact(encoder):
    ids = sentences(5, 9)
    seen = []
    handle = encoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape))
    cut = encoder(ids)
    handle.remove()
    assert seen == [(2, 9, CONFIG.width)]
    assert torch.allclose(cut, original(encoder, ids), atol=1e-5)


def test_text_without_end_is_read_at_its_largest_id(encoder):
    ids = torch.randint(1, END - 1, (1, CONFIG.context_length))
    ids[0, 20] = ids[0, 30] = END - 1  # the first of two counts
    assert torch.allclose(encoder(ids), original(encoder, ids), atol=1e-5)
    changed = ids.clone()
    changed[0, 21:] = 1
    assert torch.allclose(encoder(changed), encoder(ids), atol=1e-5)


def test_ensemble_is_the_normalised_mean(encoder):
    """The original multiplies by a logit scale before the mean; it cancels."""
    normal, abnormal = sentences(6, 7, 8), sentences(5, 9)
    features = ensemble_features(encoder, normal, abnormal)
    for row, ids in zip(features, (normal, abnormal), strict=True):
        mean = (93.7 * original(encoder, ids)).mean(dim=0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-2)
