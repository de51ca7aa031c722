"""The network definitions: shapes, and the identities that the exported forms rely on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from anomalygpt_edge.models.anomalygpt import few_shot_distance, upsample_map
from anomalygpt_edge.models.image_decoder import ImageDecoder
from anomalygpt_edge.models.imagebind import VisionEncoder, fold_video_kernel
from anomalygpt_edge.models.llama import Llama, LlamaConfig
from anomalygpt_edge.models.nano.config import nano_config
from anomalygpt_edge.models.prompt_learner import PromptLearner, PromptLearnerConfig
from anomalygpt_edge.models.prompts import answer, place_name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_folded_kernel_equals_the_video_convolution_of_a_repeated_frame() -> None:
    weight = torch.randn(8, 3, 2, 14, 14)
    image = torch.randn(2, 3, 28, 28)
    video = image[:, :, None].expand(-1, -1, 2, -1, -1)
    expected = F.conv3d(video, weight, stride=(2, 14, 14))[:, :, 0]
    assert torch.allclose(F.conv2d(image, fold_video_kernel(weight), stride=14), expected, atol=1e-4)


def test_encoder_taps_are_the_residual_stream_without_cls() -> None:
    encoder = VisionEncoder(replace(nano_config().vision, neighbourhood=0.0, shifts=1)).eval()
    streams: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: streams.append(output))
    embedding, taps = encoder(torch.randn(2, 3, 224, 224))
    assert taps.shape == (2, 4, 256, 128)
    assert torch.equal(taps, torch.stack([stream[:, 1:] for stream in streams], dim=1))
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_taps_are_mixed_with_their_neighbours_as_the_configuration_says() -> None:
    config = replace(nano_config().vision, shifts=1)
    plain = VisionEncoder(replace(config, neighbourhood=0.0)).eval()
    mixed, averaged = (VisionEncoder(replace(config, neighbourhood=share)).eval() for share in (0.4, 1.0))
    for encoder in (mixed, averaged):
        encoder.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 224, 224)
    own, mean = plain(image)[1], averaged(image)[1]
    grid = own.unflatten(2, (16, 16))
    assert torch.allclose(mean[0, 0, 0], grid[0, 0, :2, :2].mean(dim=(0, 1)), atol=1e-5)  # a corner has four
    assert torch.allclose(mean[0, 3, 5 * 16 + 7], grid[0, 3, 4:7, 6:9].mean(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(mixed(image)[1], 0.6 * own + 0.4 * mean, atol=1e-5)


@pytest.mark.parametrize(("shifts", "stride", "grid"), [(2, 7, 31), (7, 2, 106)])
def test_overlapping_patches_are_those_of_the_image_moved(shifts: int, stride: int, grid: int) -> None:
    config = replace(nano_config().vision, neighbourhood=0.0, shifts=1)
    once = VisionEncoder(config).eval()
    often = VisionEncoder(replace(config, shifts=shifts)).eval()
    often.load_state_dict(once.state_dict())
    pixels = torch.randn(2, 3, 224, 224)
    down, right = stride, stride * (shifts - 1)
    moved = F.pad(pixels, (0, right, 0, down), mode="reflect")[:, :, down:, right:]
    with torch.no_grad():
        embedding, taps = often(pixels)
        expected, plain = once(pixels)
        _, apart = once(moved)
    planes = taps.unflatten(2, (grid, grid))
    assert torch.allclose(embedding, expected, atol=1e-6)
    assert torch.allclose(planes[:, :, ::shifts, ::shifts].flatten(2, 3), plain, atol=1e-5)
    kept = apart.unflatten(2, (16, 16))[:, :, :15, :15]  # the last ones reach beyond the image
    assert torch.allclose(planes[:, :, 1::shifts, shifts - 1 :: shifts], kept, atol=1e-5)


def test_neighbours_of_overlapping_patches_are_as_far_away() -> None:
    config = nano_config().vision
    plain = VisionEncoder(replace(config, neighbourhood=0.0)).eval()
    averaged = VisionEncoder(replace(config, neighbourhood=1.0)).eval()
    averaged.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        own, mean = (encoder(image)[1].unflatten(2, (31, 31)) for encoder in (plain, averaged))
    assert torch.allclose(mean[0, 2, 9, 12], own[0, 2, 7:12, 10:15].mean(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(mean[0, 1, 0, 30], own[0, 1, :3, 28:].mean(dim=(0, 1)), atol=1e-5)


def test_few_shot_distance_equals_the_broadcast_cosine_of_the_original() -> None:
    query, bank = torch.randn(1, 4, 16, 8), torch.randn(1, 4, 40, 8)
    pairwise = F.cosine_similarity(query[:, :, :, None], bank[:, :, None], dim=-1)
    expected = 1 - pairwise.amax(dim=-1).mean(dim=1)
    assert torch.allclose(few_shot_distance(query, bank), expected, atol=1e-6)


def test_a_patch_that_is_in_the_bank_has_no_distance() -> None:
    query = torch.randn(1, 4, 16, 8)
    assert few_shot_distance(query, torch.cat([torch.randn(1, 4, 3, 8), query * 2], dim=2)).abs().max() < 1e-6


def test_upsampling_keeps_the_corners() -> None:
    patches = torch.rand(1, 256)
    upsampled = upsample_map(patches)[0]
    assert upsampled[0, 0] == patches[0, 0]
    assert torch.isclose(upsampled[-1, -1], patches[0, -1])


def test_zero_shot_map_is_high_where_patches_look_abnormal() -> None:
    decoder = ImageDecoder(8, 8)
    for fc in decoder.fc:
        fc.weight.data = torch.eye(8)
        fc.bias.data.zero_()
    text = F.normalize(torch.eye(8)[:2], dim=-1)
    taps = torch.zeros(1, 4, 256, 8)
    taps[..., 0] = 1.0
    taps[:, :, 100] = torch.eye(8)[1]
    anomaly_map = decoder(taps, text)[0]
    row, column = divmod(int(anomaly_map.argmax()), 224)
    assert (round(row * 15 / 223), round(column * 15 / 223)) == divmod(100, 16)
    assert anomaly_map.max() > 0.9
    assert anomaly_map[0, 0] < 0.1


def test_prompt_rows_read_their_own_cell_of_the_map() -> None:
    learner = PromptLearner(
        replace(nano_config().prompt_learner, evidence_width=0, look_channels=None)
    ).eval()
    flat = torch.zeros(1, 224, 224)
    marked = flat.clone()
    marked[0, 214:, 214:] = 1.0  # beyond what the first cell sees
    change = (learner(marked) - learner(flat)).abs().sum(dim=-1)[0]
    assert torch.equal(change[:9], torch.zeros(9))
    assert change[9 + 8] > 0
    assert change[9 + 0] == 0


def test_evidence_changes_the_first_prompt_row_alone() -> None:
    learner = PromptLearner(PromptLearnerConfig((4, 8, 8, 16, 16), llm_width=32, evidence_width=8)).eval()
    anomaly_map = torch.rand(1, 224, 224)
    change = (learner(anomaly_map, torch.ones(1)) - learner(anomaly_map, torch.zeros(1))).abs().sum(dim=-1)[0]
    assert change[0] > 0
    assert torch.equal(change[1:], torch.zeros(17))


@pytest.mark.parametrize("evidence_width", [8, 0])
def test_the_picture_changes_the_learned_rows_alone(evidence_width: int) -> None:
    config = PromptLearnerConfig((4, 8, 8, 16, 16), 32, evidence_width, look_channels=(4, 4, 4))
    learner, anomaly_map, pixels = (
        PromptLearner(config).eval(),
        torch.rand(1, 224, 224),
        torch.randn(1, 3, 224, 224),
    )
    count = torch.ones(1) if evidence_width else None
    change = (learner(anomaly_map, count, pixels) - learner(anomaly_map, count, -pixels)).abs().sum(dim=-1)[0]
    assert change.nonzero().flatten().tolist() == list(range(9))


def test_a_prompt_learner_takes_what_it_reads() -> None:
    anomaly_map, none, pixels = torch.zeros(1, 224, 224), torch.zeros(1), torch.zeros(1, 3, 224, 224)
    channels = (1, 1, 1, 1, 1)
    plain = PromptLearner(PromptLearnerConfig(channels, llm_width=4))
    with pytest.raises(ValueError, match=r"reads \('anomaly_map',\), not \('anomaly_map', 'num_samples'\)"):
        plain(anomaly_map, none)
    learner = PromptLearner(PromptLearnerConfig(channels, llm_width=4, evidence_width=2))
    with pytest.raises(ValueError, match=r"reads \('anomaly_map', 'num_samples'\), not \('anomaly_map',\)"):
        learner(anomaly_map)
    looking = PromptLearner(PromptLearnerConfig(channels, llm_width=4, look_channels=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"reads \('anomaly_map', 'pixels'\), not"):
        looking(anomaly_map, none, pixels)


def test_llama_is_causal() -> None:
    llama = Llama(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )
    inputs = torch.randn(1, 7, 32)
    changed = inputs.clone()
    changed[:, 5:] += 1
    assert torch.allclose(llama(inputs)[:, :5], llama(changed)[:, :5], atol=1e-5)
    assert not torch.allclose(llama(inputs)[:, 5:], llama(changed)[:, 5:], atol=1e-3)


@pytest.mark.parametrize(
    ("row", "column", "name"),
    [
        (0.0, 0.0, "top left"),
        (1 / 3, 1 / 3, "top left"),
        (0.5, 0.5, "center"),
        (0.34, 1.0, "right"),
        (1, 0.5, "bottom"),
    ],
)
def test_place_names(row: float, column: float, name: str) -> None:
    assert place_name(row, column) == name


def test_answers_are_the_originals() -> None:
    assert answer([]) == "No, there is no anomaly in the image."
    assert answer(["top"]) == "Yes, there is an anomaly in the image, at the top of the image."
    assert (
        answer(["top", "left", "top"])
        == "Yes, there are 3 anomalies in the image, they are at the top and left of the image."
    )
