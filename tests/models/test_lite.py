"""lite's encoder: the backbone against a reference network, the folding of its weights, the projections."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalygpt_edge.export.checkpoints import open_checkpoints
from anomalygpt_edge.models.lite import backbone as backbone_module
from anomalygpt_edge.models.lite import train as train_module
from anomalygpt_edge.models.lite import train_vision as train_vision_module
from anomalygpt_edge.models.lite.backbone import (
    BATCH_NORM_EPS,
    BLOCK_WIDTHS,
    NUM_BLOCKS,
    Backbone,
    SameConv,
    fold_into,
    load_pretrained,
)
from anomalygpt_edge.models.lite.encoder import LiteEncoder, LiteVisionConfig
from anomalygpt_edge.models.lite.evaluate import (
    SOFTNESS,
    Matched,
    Trial,
    Units,
    balanced_accuracy,
    describer,
    figures,
    match,
    scores,
    try_draw,
)
from anomalygpt_edge.models.lite.features import Extractor, pixels_of
from anomalygpt_edge.models.lite.groups import (
    GROUP,
    NORMALS,
    Pool,
    build_pool,
    cell_coverage,
    draw_group,
    load_pool,
)
from anomalygpt_edge.models.lite.save import load_encoder, save_encoder
from anomalygpt_edge.models.lite.sets import LabelledSet, augment, encode_family, load_set
from anomalygpt_edge.models.lite.train_vision import (
    Matching,
    Recipe,
    defective_patches,
    few_shot_loss,
    start_projections,
    train_vision,
)
from anomalygpt_edge.models.nano.config import LanguageRecipe
from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.synthetic.data import validation_families

TINY = LiteVisionConfig(
    image_size=64, tap_blocks=(1, 2, 4), grid=16, width=16, embed_dim=8, tap_weights=(2.0, 1.0, 1.0)
)
LANGUAGE = LanguageRecipe(
    look_steps=2, language_steps=2, language_batch=4, warmup_steps=1, log_every=1, evaluate_every=2
)
RECIPE = Recipe(
    pool_groups=10,
    steps=4,
    groups_per_step=2,
    warmup_steps=1,
    log_every=1,
    save_every=2,
    decoder_steps=2,
    gallery_groups=4,
    validation_families=1,
    language=LANGUAGE,
    vision=TINY,
)

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


@pytest.fixture(scope="module")
def encoder() -> LiteEncoder:
    ours = LiteEncoder(TINY).eval()
    fold_into(ours.backbone, chance_state())
    return ours


@pytest.fixture(scope="module")
def extractor(encoder: LiteEncoder) -> Extractor:
    return Extractor(encoder.backbone, TINY.tap_blocks, TINY.image_size)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, encoder: LiteEncoder, extractor: Extractor) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    build_pool(folder, RECIPE.seed, RECIPE.pool_groups, extractor, TINY.grid)
    with pytest.raises(ValueError, match="another recipe"):
        build_pool(folder, RECIPE.seed + 1, RECIPE.pool_groups, extractor, TINY.grid)
    return load_pool(folder, RECIPE.pool_groups, encoder)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, extractor: Extractor) -> LabelledSet:
    path = tmp_path_factory.mktemp("sets") / "product.npz"
    encode_family(validation_families(1)[0], extractor, path, coarse=True, num_queries=2)
    return load_set(path, TINY.tap_blocks)


def test_encoder_gives_unit_embedding_and_patches_of_every_tap(encoder: LiteEncoder) -> None:
    with torch.no_grad():
        embedding, patches = encoder(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, 8)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert patches.shape == (2, 3, 256, 16)
    torch.testing.assert_close(patches[..., -1], encoder.constants[None, :, None].expand(2, 3, 256))


def test_an_even_tap_stays_even_up_to_the_border(encoder: LiteEncoder) -> None:
    """The mean at the border is over fewer patches, not over zeros."""
    for side in (32, 16, 8):
        gathered = encoder.gather(torch.full((1, 2, side, side), 3.0))
        torch.testing.assert_close(gathered, torch.full((1, 256, 2), 3.0))


def test_features_that_were_kept_give_what_the_encoder_gives(encoder: LiteEncoder, extractor: Extractor) -> None:
    images = draw_group(1, 0, 64).pixels[:2]
    with torch.no_grad():
        _, expected = encoder(torch.from_numpy(pixels_of(images)))
    torch.testing.assert_close(describer(encoder)(extractor(images)), expected, atol=0.02, rtol=0.01)


def test_a_group_depends_on_its_number_alone() -> None:
    first, again, other = (draw_group(1, index, 64) for index in (3, 3, 4))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.pixels.shape == (GROUP, 64, 64, 3)
    assert not np.array_equal(first.pixels, other.pixels)
    assert [bool(mask.any()) for mask in first.masks] == [False] * NORMALS + [True, True, False]


def test_coverage_is_the_share_of_each_cell() -> None:
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :2, :4] = True
    mask[0, 4, 4] = True
    np.testing.assert_allclose(cell_coverage(mask, 4)[0].reshape(4, 4)[[0, 2], [1, 2]], [1.0, 0.25])


def test_projections_start_centred_and_of_unit_length(pool: Pool, encoder: LiteEncoder) -> None:
    gathered = [torch.from_numpy(column) for column in pool.gathered]
    start_projections(encoder, gathered)
    with torch.no_grad():
        vectors = encoder.project([tap.float() for tap in gathered])[..., :-1]
    torch.testing.assert_close(vectors.norm(dim=-1).mean(dim=(0, 2)), torch.ones(3), atol=0.02, rtol=0)
    assert vectors.mean(dim=(0, 2)).abs().max() < 0.02


def test_matching_finds_the_nearest_of_the_bank_alone() -> None:
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(2, GROUP, 2, 5, 6), dim=-1)
    found = Matching(vectors).distance(5, [1, 3])
    bank = torch.cat([vectors[:, 1], vectors[:, 3]], dim=2)
    torch.testing.assert_close(found, 1 - (vectors[:, 5] @ bank.transpose(-1, -2)).amax(dim=-1))


def test_loss_falls_where_defects_stand_out() -> None:
    torch.manual_seed(0)
    normal = torch.randn(1, 1, 1, 25, 8).expand(2, GROUP, 1, 25, 8)
    vectors = normal + 0.05 * torch.randn(2, GROUP, 1, 25, 8)
    coverage = torch.zeros(2, GROUP, 25)
    coverage[:, NORMALS, 3] = 1.0
    raised = vectors.clone()
    raised[:, NORMALS, :, 3] = torch.randn(8)
    torch.manual_seed(1)
    hidden = few_shot_loss(vectors, coverage, RECIPE)
    torch.manual_seed(1)
    assert few_shot_loss(raised, coverage, RECIPE) < hidden / 2


def test_the_patch_that_holds_most_of_a_small_defect_counts() -> None:
    coverage = torch.tensor([[0.0, 0.01, 0.03], [0.0, 0.0, 0.0], [0.5, 0.04, 0.07]])
    expected = torch.tensor([[False, False, True], [False, False, False], [True, False, True]])
    assert torch.equal(defective_patches(coverage), expected)


def test_interrupted_training_ends_where_uninterrupted_does(
    tmp_path: Path, pool: Pool, encoder: LiteEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = few_shot_loss, itertools.count(1)

    def dying(*args: object) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    expected = {k: v.clone() for k, v in train_vision(RECIPE, encoder, pool, tmp_path / "whole").state_dict().items()}
    monkeypatch.setattr(train_vision_module, "few_shot_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        train_vision(RECIPE, encoder, pool, tmp_path / "parts")
    monkeypatch.setattr(train_vision_module, "few_shot_loss", loss)
    resumed = train_vision(RECIPE, encoder, pool, tmp_path / "parts").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, msg=name)


def test_training_moves_half_of_the_way(tmp_path: Path, pool: Pool, encoder: LiteEncoder) -> None:
    """Of ``kept_share`` = 1 the start is left, of 0.5 half of what 0 changes."""
    weights = []
    for kept in (1.0, 0.5, 0.0):
        (tmp_path / str(kept)).mkdir()
        recipe = dataclasses.replace(RECIPE, kept_share=kept)
        trained = train_vision(recipe, encoder, pool, tmp_path / str(kept))
        weights.append(trained.projections[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, encoder: LiteEncoder) -> None:
    path = tmp_path / "vision.safetensors"
    save_encoder(encoder, path)
    again = load_encoder(path)
    assert again.config == TINY
    for name, tensor in encoder.state_dict().items():
        kept = tensor.half().float() if name.startswith("backbone.") else tensor
        assert torch.equal(again.state_dict()[name], kept), name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a checkpoint"):
        load_encoder(path)


def test_augmented_versions_are_the_same_part() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:40, 24:44] = 200
    versions = augment(image)
    assert versions.shape == (8, 64, 64, 3)
    for version in versions:
        assert not np.array_equal(version, image)
        assert np.corrcoef(version.ravel(), image.ravel())[0, 1] > 0.8


def test_figures_of_a_set(family: LabelledSet, encoder: LiteEncoder) -> None:
    records = list(figures([family], encoder, (1, 3), num_draws=2))
    assert [(record["set"], record["normals"]) for record in records] == [
        ("product", 1), ("product", 3), ("mean", 1), ("mean", 3),
    ]  # fmt: skip
    for record in records:
        assert 0 <= record["image_auroc"] <= 1
        assert 0 <= record["pixel_auroc"] <= 1
    assert records[2]["image_auroc"] == records[0]["image_auroc"]
    assert 0.5 <= records[3]["balanced_accuracy"] <= 1


def test_a_normal_left_out_scores_about_one(family: LabelledSet, encoder: LiteEncoder) -> None:
    """The unit of a map is what the normals score among themselves, and an odd one hardly raises it."""
    matched = match(family, encoder, 4, 1)
    order = matched.draws[0]

    def among(matched: Matched) -> np.ndarray:
        units = Units(matched, order)
        rows = [units._patches(matched.normals[n], matched.normal_nearest[n], leave_out=n) for n in order]
        return scores(units._maps(np.stack(rows))) / units.level

    found = among(matched)
    assert found.min() <= 1 <= found.max()
    assert ((found**SOFTNESS).mean()) == pytest.approx(1.0, rel=1e-4)
    one = Units(matched, order[:1])
    versions = np.einsum("atp,t->ap", matched.versions[order[0]] / one._units, [0.5, 0.25, 0.25])
    assert scores(one._maps(versions)).mean() / one.level == pytest.approx(1.0, rel=1e-5)
    assert np.isfinite(try_draw(family, one).scores).all()


def test_local_units_quiet_what_varies_among_normals(family: LabelledSet, encoder: LiteEncoder) -> None:
    matched = match(family, encoder, 3, 1)
    plain, local = (Units(matched, matched.draws[0], share) for share in (0.0, 1.0))
    loud = plain._units.mean() < local._units  # places where the normals differ more than in the mean
    assert 0 < loud.mean() < 1
    assert np.ptp(plain._units, axis=(0, 2)).max() == 0


def test_one_limit_is_chosen_by_the_other_sets() -> None:
    defective = np.array([False, False, True, True])

    def trial(*scores: float) -> list[Trial]:
        return [Trial(np.array(scores, np.float32), defective, 1.0, 1.0)]

    apart = balanced_accuracy([trial(1, 1.1, 2, 3), trial(0.9, 1.2, 1.9, 4)])
    assert apart == [1.0, 1.0]
    foreign = balanced_accuracy([trial(1, 1.1, 2, 3), trial(10, 11, 20, 30)])
    assert foreign == [0.5, 0.5]


def test_whole_recipe_writes_a_checkpoint_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: LiteEncoder
) -> None:
    """From generated groups to a checkpoint that can be exported, and figures on folders of images, without the
    pretrained package."""
    monkeypatch.setattr(train_vision_module, "load_pretrained", lambda backbone: fold_into(backbone, chance_state()))
    checkpoint = tmp_path / "checkpoint"
    recipe = dataclasses.replace(RECIPE, vision=dataclasses.replace(TINY, image_size=448, grid=28))
    train_module.train(recipe, tmp_path / "run", checkpoint)
    with pytest.raises(SystemExit, match="another recipe"):
        train_module.train(dataclasses.replace(recipe, seed=9), tmp_path / "run", checkpoint)
    names = ("vision.safetensors", "vicuna", "pandagpt.safetensors", "anomalygpt.safetensors", "text_features.npz")
    opened = open_checkpoints(*(checkpoint / name for name in names))
    assert opened.config.vision == recipe.vision
    assert opened.config.prompt_learner.map_units == "normal variation"
    assert "few_shot_accuracy" in (tmp_path / "run" / "language.jsonl").read_text()
    group = draw_group(1, 0, 448)
    for index in range(NORMALS):
        write(tmp_path / "data" / "product" / "train" / "good" / f"{index}.png", group.pixels[index])
    write(tmp_path / "data" / "product" / "test" / "good" / "0.png", group.pixels[-1])
    write(tmp_path / "data" / "product" / "test" / "defect" / "0.png", group.pixels[NORMALS])
    mask = group.masks[NORMALS].astype(np.uint8) * 255
    write(tmp_path / "data" / "product" / "ground_truth" / "defect" / "0_mask.png", mask)
    train_module.evaluate(checkpoint, tmp_path / "run", tmp_path / "data", (1, 3))
    logged = (tmp_path / "run" / "figures.jsonl").read_text()
    assert logged.count("balanced_product") == 2
    assert logged.count('"normals": 0') == 2
    assert "few_shot" in (tmp_path / "run" / "vision.jsonl").read_text()


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_every_tap_has_a_weight() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 taps"):
        LiteVisionConfig(tap_blocks=(4, 7, 10), tap_weights=(1.0, 1.0))
