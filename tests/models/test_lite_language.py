"""lite's second half: zero-shot maps, maps in units of normal variation, and what the prompt learner makes of them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anomalygpt_edge.models.anomalygpt import AnomalyGPT, upsample_map
from anomalygpt_edge.models.evidence import evidence
from anomalygpt_edge.models.lite import gallery as gallery_module
from anomalygpt_edge.models.lite import train_decoder as train_decoder_module
from anomalygpt_edge.models.lite.encoder import LiteEncoder, LiteVisionConfig
from anomalygpt_edge.models.lite.features import Extractor
from anomalygpt_edge.models.lite.gallery import (
    ENTRIES,
    Describer,
    encode_gallery,
    encode_validation,
    load_encoded,
    load_gallery,
    load_validation,
    maps_of,
)
from anomalygpt_edge.models.lite.groups import GROUP, NORMALS, QUERIES, Group, Pool, draw_group, turn_defects
from anomalygpt_edge.models.lite.train_decoder import ZeroShot, train_decoder
from anomalygpt_edge.models.lite.train_language import lite_config, load_start
from anomalygpt_edge.models.lite.train_vision import Recipe
from anomalygpt_edge.models.look import LookNet
from anomalygpt_edge.models.nano.dialogues import line_seen, look_answer
from anomalygpt_edge.models.nano.train_language import calibration_error
from anomalygpt_edge.models.prompt_learner import HIGHEST, PromptLearner, PromptLearnerConfig, compress
from anomalygpt_edge.runtime.synthetic.defects import Defect

TINY = LiteVisionConfig(
    image_size=448, tap_blocks=(1, 2), grid=28, width=8, embed_dim=8, tap_weights=(2.0, 1.0)
)


@pytest.fixture(scope="module")
def describe() -> Describer:
    torch.manual_seed(0)
    encoder = LiteEncoder(TINY).eval()
    zero_shot = ZeroShot(TINY).requires_grad_(False)
    extractor = Extractor(encoder.backbone, TINY.tap_blocks, TINY.image_size)
    return Describer(encoder, extractor, zero_shot.decoder, zero_shot.text_features()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, describe: Describer) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    encode_gallery(folder, 1, range(2), describe)
    return folder


def test_a_gallery_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch, describe: Describer) -> None:
    monkeypatch.setattr(gallery_module, "draw_group", lambda *_: pytest.fail("was encoded before"))
    encode_gallery(folder, 1, range(2), describe)
    gallery, contrasts = load_gallery(folder, range(2))
    assert len(gallery.kinds) == len(contrasts) == 2 * ENTRIES
    assert [bool(d) for d in gallery.defects[:ENTRIES]] == [True, True, False, False]
    shown = gallery.maps(np.arange(ENTRIES), 1)
    expected = compress(upsample_map(torch.from_numpy(gallery.few_shot[:ENTRIES, 1].astype(np.float32))))
    torch.testing.assert_close(shown, expected)


def test_the_last_normal_sample_is_a_query_of_the_others(describe: Describer) -> None:
    group = draw_group(1, 0, TINY.image_size)
    found = describe(group)
    order = [0, 1, 2, 4, 5, 6, 3]  # the last normal sample behind three others
    rows = group.pixels[order]
    defects = [group.defects[index] for index in order]
    fewer = describe(Group(rows, group.masks[order], defects, group.kind), num_normals=NORMALS - 1)
    np.testing.assert_allclose(found.few_shot[-1], fewer.few_shot[QUERIES], rtol=1e-4)
    np.testing.assert_allclose(found.few_shot[:QUERIES, 0], fewer.few_shot[:QUERIES, 0], rtol=1e-4)


def test_validation_families_have_the_maps_of_all_sources(tmp_path: Path, describe: Describer) -> None:
    paths = encode_validation(tmp_path, describe, 1, num_queries=1)
    torch.manual_seed(0)
    look = LookNet((2, 2, 2)).eval()
    (family,) = load_validation(paths, look)
    assert list(family.sources) == ["one_shot", "few_shot", "zero_shot"]
    assert family.defective.tolist() == [False, True]
    arrays = maps_of(load_encoded(paths[0]))
    for source, (name, count) in enumerate((("one_shot", 1), ("few_shot", NORMALS), ("zero_shot", 0))):
        seen = family.sources[name]
        expected = evidence(seen.maps, torch.full((2,), float(count)))
        np.testing.assert_allclose(seen.figures, expected, atol=0.02)
        np.testing.assert_array_equal(seen.figures, arrays["figures"][:2, source])


def test_interrupted_zero_shot_training_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defective patches differ in one channel, which few steps find."""
    rng = np.random.default_rng(0)
    coverage = (rng.random((4 * GROUP, TINY.grid**2)) < 0.1).astype(np.float16)
    features = rng.normal(0, 1, (4 * GROUP, 2, TINY.grid**2, TINY.width)).astype(np.float16)
    features[..., 0] += 4 * coverage[:, None]
    pool = Pool([], np.zeros((0, 0), np.float32), coverage, np.array(["disc"] * 4))
    recipe = Recipe(decoder_steps=60, decoder_log_every=20, groups_per_step=2, vision=TINY)
    encoder, loss, calls = LiteEncoder(TINY), train_decoder_module.zero_shot_loss, itertools.count(1)

    def dying(*args: torch.Tensor) -> torch.Tensor:
        if next(calls) == 30:
            raise KeyboardInterrupt
        return loss(*args)

    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    model = train_decoder(recipe, encoder, features, pool, tmp_path / "whole")
    monkeypatch.setattr(train_decoder_module, "zero_shot_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        train_decoder(recipe, encoder, features, pool, tmp_path / "parts")
    monkeypatch.setattr(train_decoder_module, "zero_shot_loss", loss)
    resumed = train_decoder(recipe, encoder, features, pool, tmp_path / "parts")
    torch.testing.assert_close(resumed.text, model.text)
    with torch.no_grad():
        logits = model.decoder.patch_logits(torch.from_numpy(features).float(), model.text_features()[0])
    margin = (logits[..., 1] - logits[..., 0]).mean(dim=1)
    defective = torch.from_numpy(coverage > 0)
    assert margin[defective].mean() > margin[~defective].mean() + 2


def test_a_learner_in_units_compresses_maps_and_averages_pixels() -> None:
    torch.manual_seed(0)
    raw = PromptLearner(PromptLearnerConfig((2, 2, 2, 2, 2), 8, 4, (2, 2, 2))).eval()
    units = PromptLearner(dataclasses.replace(raw.config, map_units="normal variation")).eval()
    units.load_state_dict(raw.state_dict())
    maps, pixels, count = torch.rand(2, 224, 224) * 30, torch.randn(2, 3, 448, 448), torch.ones(2)
    with torch.no_grad():
        found = units(maps, count, pixels)
        expected = raw(compress(maps), count, F.avg_pool2d(pixels, 2))
    torch.testing.assert_close(found, expected)
    assert compress(maps).max() == HIGHEST
    assert not torch.allclose(found, raw(maps, count, F.avg_pool2d(pixels, 2)))


def test_the_start_is_nano_s_language() -> None:
    config = lite_config(TINY, 1024)
    assert config.prompt_learner.map_units == "normal variation"
    model = AnomalyGPT(config)
    before = model.llama.lm_head.weight.detach().clone()
    load_start(model)
    assert not torch.equal(model.llama.lm_head.weight, before)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_defects_stay_in_place(turns: int) -> None:
    plane = np.zeros((10, 10))
    plane[1, 7] = 1
    (turned,) = turn_defects([Defect("hole", (0.15, 0.75), 0.01)], turns)
    row, column = (int(np.floor(10 * position)) for position in turned.center)
    assert np.rot90(plane, turns)[row, column] == 1


def test_defects_of_a_group_lie_where_its_masks_show_them() -> None:
    for index in range(6):
        group = draw_group(1, index, 64)
        for mask, defects in zip(group.masks, group.defects, strict=True):
            if len(defects) == 1:
                row, column = np.argwhere(mask).mean(axis=0) / 64
                assert abs(row - defects[0].center[0]) < 0.15
                assert abs(column - defects[0].center[1]) < 0.15


def test_a_mark_is_what_the_picture_does_not_tell() -> None:
    scratch = [Defect("scratch", (0.5, 0.5), 0.02, 0.2, -0.2)]
    assert look_answer(scratch, "neither", False) == "It looks like a mark."
    assert look_answer(scratch, "darker", False) == "It looks like a dark mark."
    assert look_answer(scratch, "neither", True) == "It looks like a line."
    assert line_seen(torch.tensor([0.0, 0.0, 0.0, 0.1]))
    assert not line_seen(torch.tensor([5.0, 0.0, 0.0, -0.1]))


def test_calibration_error_is_the_gap_in_each_bin() -> None:
    p, truth = np.array([0.9, 0.9, 0.1, 0.1]), np.array([True, False, False, False])
    assert calibration_error(p, truth) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
