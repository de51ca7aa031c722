"""The training recipe: deterministic from its seed, and the same whether interrupted or not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from safetensors import safe_open

from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.models.evidence import NUM_FIGURES
from anomalygpt_edge.models.look import LOOKS, LookNet
from anomalygpt_edge.models.nano import initial, train_language, train_vision
from anomalygpt_edge.models.nano import train as train_module
from anomalygpt_edge.models.nano.config import LLM_WIDTH, Recipe, nano_config
from anomalygpt_edge.models.nano.dialogues import (
    CANNOT_KNOW,
    CONFIDENCE_ANSWERS,
    NOTHING,
    dialogue,
    look_answer,
    places,
    shade_answer,
    shade_of,
    shade_seen,
    size_answer,
)
from anomalygpt_edge.models.nano.gallery import (
    ARRAYS,
    ENTRIES,
    SHARES,
    Confidence,
    Gallery,
    build_gallery,
    make_bank,
    map_statistics,
    region_level,
)
from anomalygpt_edge.models.nano.initial import (
    load_language_start,
    load_start,
    save_language_start,
    save_start,
)
from anomalygpt_edge.models.nano.pool import NORMALS, Pool, build_pool, draw_group
from anomalygpt_edge.models.nano.save import save_checkpoint, vision_metadata, vision_tensors
from anomalygpt_edge.models.nano.tokenizer import load_tokenizer, train_tokenizer
from anomalygpt_edge.models.nano.train import train
from anomalygpt_edge.models.nano.train_look import contrasts_of, look_at, train_look, vary
from anomalygpt_edge.models.prompts import STOP_PIECE, answer
from anomalygpt_edge.runtime.synthetic.data import mirror_defects, normalise
from anomalygpt_edge.runtime.synthetic.defects import Defect
from anomalygpt_edge.runtime.vision.augment import augment
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank

TINY = Recipe(
    pool_groups=2,
    vision_steps=4,
    warmup_steps=1,  # so that the cosine is on the way too
    groups_per_step=1,
    gallery_groups=4,
    look_steps=2,
    language_steps=4,
    language_batch=4,
    log_every=1,
    evaluate_every=2,
)


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures logged while training are not what is tested here: two families do."""
    for module, name in ((train_vision, "evaluate_vision"), (train_module, "encode_validation")):
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _whole=whole: _whole(*args, num_families=2, num_queries=1)
        )


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    build_pool(folder, TINY.seed, TINY.pool_groups)
    return Pool(folder, TINY.pool_groups)


def _weights(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([v.numpy().ravel() for v in state.values()])


def dies_at_the_fourth_call(loss: Callable) -> Callable:
    calls = itertools.count(1)

    def dying(*args: object) -> object:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    return dying


def test_interrupted_vision_training_ends_where_uninterrupted_does(
    tmp_path: Path, monkeypatch, groups: Pool
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = train_vision.train_vision(TINY, whole, "cpu", groups)
    loss = train_vision.vision_loss
    monkeypatch.setattr(train_vision, "vision_loss", dies_at_the_fourth_call(loss))
    with pytest.raises(KeyboardInterrupt):
        train_vision.train_vision(TINY, parts, "cpu", groups)
    monkeypatch.setattr(train_vision, "vision_loss", loss)
    resumed = train_vision.train_vision(TINY, parts, "cpu", groups)
    assert np.allclose(_weights(resumed.state_dict()), _weights(expected.state_dict()), atol=1e-6)


@pytest.mark.parametrize("start", [True, False])
def test_whole_recipe_writes_a_checkpoint_and_curves(tmp_path: Path, start: bool) -> None:
    """From the weights of the runs before, and from constructed ones."""
    recipe = dataclasses.replace(TINY, start=start)
    train(recipe, tmp_path / "run", tmp_path / "checkpoint", "cpu", 1)
    assert (tmp_path / "checkpoint" / "imagebind.safetensors").exists()
    assert "one_shot_pixel" in (tmp_path / "run" / "vision.jsonl").read_text()
    assert "one_shot_accuracy" in (tmp_path / "run" / "language.jsonl").read_text()
    with pytest.raises(SystemExit, match="another recipe"):
        train(dataclasses.replace(recipe, seed=99), tmp_path / "run", tmp_path / "checkpoint", "cpu", 1)


def test_the_same_weights_are_the_same_files(tmp_path: Path, vocabulary: train_language.Vocabulary) -> None:
    torch.manual_seed(0)
    model = AnomalyGPT(nano_config(vocabulary.tokenizer.vocab_size()))
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.tokenizer.serialized_model_proto())
    features = {"object": np.eye(2, 64, dtype=np.float32)}
    for folder in ("one", "other"):
        save_checkpoint(model, tmp_path / "tokenizer.model", features, {"few_shot": 0.3}, tmp_path / folder)
    files = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 10
    for path in files:
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes(), (
            path
        )
    vision = tmp_path / "one" / "imagebind.safetensors"
    with safe_open(vision, "pt") as file:  # read as before, though its header was written again
        assert file.metadata() == vision_metadata(model.encoder)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = vision_tensors(model.encoder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    header = vision.read_bytes()[8:]
    places = [header.index(f'"{name}"'.encode()) for name in sorted(vision_metadata(model.encoder))]
    assert places == sorted(places)  # two files alone could be alike by chance


def test_the_shipped_weights_are_of_this_recipe() -> None:
    shipped = json.loads((Path(train_module.__file__).parent / "training" / "recipe.json").read_text())
    assert shipped == json.loads(json.dumps(dataclasses.asdict(Recipe())))


def test_every_choice_of_the_recipe_is_an_option(tmp_path: Path, monkeypatch) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(train_module, "train", lambda recipe, *rest: asked.append(recipe))
    train_module.main(
        ["--run", str(tmp_path), "--no-start", "--no-ranking", "--seed", "7", "--augmentation", "none"]
    )
    assert asked == [Recipe(start=False, ranking=False, seed=7, augmentation="none")]


def test_the_loss_teaches_matching(groups: Pool) -> None:
    """A few steps on one batch must lower its loss."""
    torch.manual_seed(0)
    model = train_vision.NanoVision(TINY)
    batch = train_vision.Batches(TINY, groups)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss, parts = train_vision.vision_loss(model, batch, TINY)
        losses.append(parts["few_shot"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_only_answers_are_learned(vocabulary) -> None:
    asked = [("Is this part defective?", answer(["top"])), ("Where is it?", "At the top of the image.")]
    ids, labels = vocabulary.turns(asked)
    learned = [i for i, label in zip(ids, labels, strict=True) if label != train_language.IGNORE]
    text = vocabulary.tokenizer.decode(learned)
    assert text.startswith("Yes, there is an anomaly")
    assert "Where" not in text
    assert learned.count(vocabulary.stop) == 2
    assert vocabulary.tokenizer.id_to_piece(vocabulary.stop) == STOP_PIECE


def test_a_shade_is_one_token(vocabulary) -> None:
    pieces = [vocabulary.tokenizer.id_to_piece(i) for i in vocabulary.shades]
    assert pieces == ["▁dark", "▁bright", "▁darker", "▁brighter"]


def test_gallery_survives_the_disk(tmp_path: Path, groups: Pool) -> None:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    gallery = build_gallery(vision.encoder, vision.decoder, vision.text_features()[0].detach(), groups)
    gallery.save(tmp_path / "gallery.npz")
    loaded = Gallery.load(tmp_path / "gallery.npz")
    assert np.array_equal(loaded.few_shot, gallery.few_shot)
    assert loaded.defects == gallery.defects
    assert len(loaded.kinds) == 2 * ENTRIES


def test_a_gallery_is_the_same_from_several_processes(groups: Pool) -> None:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    made = [
        build_gallery(
            vision.encoder, vision.decoder, vision.text_features()[0].detach(), groups, workers=workers
        )
        for workers in (1, 2)
    ]
    for name in ARRAYS:
        np.testing.assert_allclose(*(getattr(each, name).astype(np.float32) for each in made), atol=1e-3)
    assert made[0].defects == made[1].defects
    assert made[0].kinds == made[1].kinds


def test_what_pictures_say_is_taught_once_and_kept(tmp_path: Path, maps, groups: Pool) -> None:
    def taught(folder: Path) -> LookNet:
        torch.manual_seed(0)
        return train_look(TINY, LookNet((2, 2, 2)), maps.gallery, contrasts, folder, "cpu")

    contrasts = partial(contrasts_of, groups)

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = taught(tmp_path / "a")
    assert np.allclose(_weights(first.state_dict()), _weights(taught(tmp_path / "b").state_dict()), atol=1e-6)
    again = train_look(TINY, LookNet((2, 2, 2)), maps.gallery, contrasts, tmp_path / "a", "cpu")
    assert np.array_equal(_weights(first.state_dict()), _weights(again.state_dict()))
    looks = look_at(first, maps.gallery, contrasts)
    assert looks.shape == (len(maps.gallery.kinds), len(SHARES), len(LOOKS))
    with torch.no_grad():  # the entry's own picture under its own map, as the runtime looks at it
        picture = torch.from_numpy(normalise(groups[1].pixels[NORMALS + 1 : NORMALS + 2]))
        shown = maps.seen(np.array([ENTRIES + 1]), "few").maps
        np.testing.assert_allclose(looks[ENTRIES + 1, 1], first(picture, shown)[0].numpy(), atol=2e-3)


def test_a_negative_swaps_dark_and_bright() -> None:
    contrasts, shade = torch.rand(3, 1, 8, 8), torch.arange(3)
    seen = set()
    for seed in range(12):
        shown, maps, truth = vary(contrasts, contrasts, shade, default_rng(seed))
        negative = bool((shown < 0).any())
        assert torch.equal(-shown if negative else shown, maps)  # moved alike
        assert truth.tolist() == ([1, 0, 2] if negative else [0, 1, 2])
        seen.add(negative)
    assert seen == {True, False}


def test_the_gallery_s_banks_are_the_runtime_s(groups: Pool) -> None:
    vision = train_vision.NanoVision(TINY)
    load_start(vision, train_vision.CLASSES)
    encoder = vision.eval().encoder
    encoder.config = nano_config().vision
    distinct = encoder.config.tokens**2
    for augmentation in ("none", "turned"):
        made = augment(normalise(groups[0].pixels[:2]), augmentation, encoder.config.grid)
        with torch.no_grad():
            known = [encoder(torch.from_numpy(pixels))[1] for pixels, _ in made]
        samples = [np.concatenate([taps[i : i + 1].numpy() for taps in known], axis=2) for i in range(2)]
        shown = np.concatenate([patches for _, patches in made])
        expected = MemoryBank.from_features(samples, "", shown=shown, distinct=distinct).features[0]
        np.testing.assert_allclose(make_bank(known, distinct).numpy(), expected, atol=1e-5)


def test_a_region_starts_where_peaks_tell_good_from_defective() -> None:
    maps = np.zeros((40, 2, 256), np.float16)
    maps[:, 0, 7] = np.concatenate([np.linspace(0.1, 0.2, 20), np.linspace(0.25, 0.4, 20)])
    defect = Defect("stain", (0.5, 0.5), 0.01, 0.1, 0.1)
    gallery = Gallery(
        np.zeros((40, 64)),
        maps,
        np.zeros((40, 4, 256)),
        np.zeros((40, 3, NUM_FIGURES)),
        [[]] * 20 + [[defect]] * 20,
        ["disc"] * 40,
    )
    assert 0.2 < region_level(gallery) <= 0.26


def test_mirrored_maps_and_places_agree() -> None:
    defects = draw_group(1, 1).defects[NORMALS]
    mirrored = mirror_defects(defects, True, False)
    assert {
        p.replace("left", "x").replace("right", "left").replace("x", "right") for p in places(defects)
    } == set(places(mirrored))


def test_every_dialogue_has_a_grounded_answer() -> None:
    rng = default_rng(0)
    for index in range(30):
        group = draw_group(2, index)
        defects = group.defects[NORMALS + index % 3]
        shade = LOOKS[index % 3]
        for question, reply in dialogue(rng, defects, group.kind, CONFIDENCE_ANSWERS[0], shade):
            assert question.endswith(("?", "."))
            if "than what is around" in reply:
                assert shade in reply
            if reply.startswith(("Yes", "No,")):
                assert reply == answer(places(defects))
            if not defects:
                assert reply in (answer([]), NOTHING, CONFIDENCE_ANSWERS[0], CANNOT_KNOW) or "photo" in reply


@pytest.mark.parametrize(
    ("defect", "size", "look"),
    [
        (Defect("scratch", (0.5, 0.5), 0.004, 0.2, -0.2), "small", "a line."),
        (Defect("scratch", (0.5, 0.5), 0.002, 0.2, -0.2), "small", "a spot."),  # shorter than a patch
        (Defect("stain", (0.5, 0.5), 0.008, 0.1, 0.1), "small", "a spot."),
        (Defect("missing", (0.5, 0.5), 0.02, 0.1, 0.0), "medium", "an area."),
        (Defect("cut_paste", (0.5, 0.5), 0.05, 0.1, 0.01), "large", "an area."),
    ],
)
def test_size_and_look_follow_the_defect(defect: Defect, size: str, look: str) -> None:
    assert f"It is {size}" in size_answer([defect])
    assert look_answer([defect], "neither") == f"It looks like {look}"


def test_a_shade_is_named_where_it_is_recognised() -> None:
    hole = Defect("hole", (0.5, 0.5), 0.008, 0.1, -0.1)
    assert look_answer([hole], "darker") == "It looks like a dark spot."
    assert shade_answer([hole], "brighter") == "It is brighter than what is around it."
    assert shade_answer([hole], "neither") == CANNOT_KNOW
    assert look_answer([], "darker") == shade_answer([], "darker") == NOTHING


@pytest.mark.parametrize(
    ("shade", "name"), [(-0.1, "darker"), (0.07, "brighter"), (0.05, "neither"), (0, "neither")]
)
def test_what_changes_in_both_directions_has_no_shade(shade: float, name: str) -> None:
    assert shade_of(Defect("dent", (0.5, 0.5), 0.01, 0.1, shade)) == name


def test_a_shade_is_seen_from_a_probability_on() -> None:
    """Of the three shades; a line is something else."""
    assert shade_seen(torch.tensor([1.2, 0.0, 0.0, 0.0])) == "darker"  # p = .62
    assert shade_seen(torch.tensor([0.0, 1.2, 0.0, 9.0])) == "brighter"
    assert shade_seen(torch.tensor([1.0, 0.0, 0.0, 0.0])) == "neither"  # p = .58
    assert shade_seen(torch.tensor([0.0, 0.0, 5.0, 0.0])) == "neither"


def test_rare_looks_are_drawn_more_often_but_not_as_often_as_common_ones() -> None:
    spot, line = Defect("stain", (0.5, 0.5), 0.001, 0.1, 0.1), Defect("crack", (0.5, 0.5), 0.01, 0.1, -0.1)
    odds = train_language.look_odds([[spot]] * 9 + [[line]] + [[spot]] * 4, ["neither"] * 10 + ["darker"] * 4)
    assert odds.sum() == pytest.approx(1)
    assert odds[9] == pytest.approx(3 * odds[0])
    assert odds[13] == pytest.approx(1.5 * odds[0])  # a dark spot


def test_confidence_follows_how_well_maps_tell_good_from_defective() -> None:
    rng = default_rng(0)
    good, bad = (rng.uniform(0, 1, (200, 256)) * rng.uniform(0.2, 0.4, (200, 1)) for _ in range(2))
    bad[:, :3] += rng.uniform(0, 0.3, (200, 1))
    confidence = Confidence(map_statistics(np.concatenate([good, bad])), np.arange(400) >= 200)
    clear, doubtful = (np.concatenate([[top] * 3, good[0, 3:]]) for top in (0.8, 0.38))
    assert confidence.sentence(clear) == CONFIDENCE_ANSWERS[0]
    assert confidence.sentence(doubtful) in CONFIDENCE_ANSWERS[1:]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> train_language.Vocabulary:
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(file)
    return train_language.Vocabulary(load_tokenizer(file))


@pytest.fixture(scope="module")
def maps(groups: Pool) -> train_language.Maps:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    gallery = build_gallery(vision.encoder, vision.decoder, vision.text_features()[0].detach(), groups)
    return shown_maps(gallery)


def shown_maps(gallery: Gallery) -> train_language.Maps:
    """Maps with logits of 0 from the picture network."""
    return train_language.Maps(gallery, np.zeros((len(gallery.kinds), len(SHARES), len(LOOKS)), np.float32))


def test_interrupted_language_training_ends_where_uninterrupted_does(
    maps, vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    vision.encoder.config = nano_config().vision
    shown = train_language.encode_validation(vision, LookNet((2, 2, 2)), num_families=2, num_queries=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()

    def train_in(folder: Path) -> np.ndarray:
        torch.manual_seed(1)
        model = AnomalyGPT(nano_config(vocabulary.tokenizer.vocab_size()))
        trained = train_language.train_language(TINY, model, shown, maps, vocabulary, folder, "cpu")
        return _weights(trained.state_dict())

    expected = train_in(whole)
    loss = train_language.language_loss
    monkeypatch.setattr(train_language, "language_loss", dies_at_the_fourth_call(loss))
    with pytest.raises(KeyboardInterrupt):
        train_in(parts)
    monkeypatch.setattr(train_language, "language_loss", loss)
    assert np.allclose(train_in(parts), expected, atol=1e-6)


def even(parts: np.ndarray) -> np.ndarray:
    return np.full(len(parts), 1 / len(parts))


def test_calibration_lowers_the_loss_and_changes_no_answer(maps, vocabulary) -> None:
    torch.manual_seed(0)
    model = AnomalyGPT(nano_config(vocabulary.tokenizer.vocab_size())).eval()
    with torch.no_grad():
        model.llama.lm_head.weight *= 30  # far too sure of itself
    parts = np.arange(len(maps.gallery.kinds))
    seen = maps.seen(parts, "one")
    before = train_language.generate(model, vocabulary, seen, "Where is it?", max_tokens=3)
    temperature = train_language.calibrate(model, vocabulary, maps, parts)
    after = train_language.generate(model, vocabulary, seen, "Where is it?", max_tokens=3)
    assert temperature > 1
    assert before[0] == after[0]
    assert ((after[1] - 0.5).abs() <= (before[1] - 0.5).abs() + 1e-6).all()


def test_the_zero_shot_map_is_the_decoder_s(groups: Pool) -> None:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    text = vision.text_features()[0].detach()
    maps = shown_maps(build_gallery(vision.encoder, vision.decoder, text, groups))
    with torch.no_grad():
        expected = vision.decoder(
            vision.encoder(torch.from_numpy(normalise(groups[0].pixels[NORMALS:])))[1], text
        )
    shown = maps.seen(np.arange(ENTRIES), "zero").maps
    np.testing.assert_allclose(shown.numpy(), expected.numpy(), atol=2e-3)  # margins are kept in float16


def test_mirrored_parts_keep_their_truths_in_place(maps, vocabulary) -> None:
    """A batch's map and truths are of one part, mirrored alike."""
    parts = np.arange(len(maps.gallery.kinds))
    bad = parts[maps.defective]
    shown = {source: maps.seen(bad, source).maps for source in maps.SOURCES}
    for seed in range(20):
        batch = train_language.draw_batch(maps, bad, bad, even(bad), vocabulary, default_rng(seed), 2, 1)
        for drawn, truths in zip(batch.seen.maps, batch.truths, strict=True):
            candidates = []
            for row, index in enumerate(bad.tolist()):
                for left_right, up_down in itertools.product((False, True), repeat=2):
                    flips = [axis for axis, on in ((-2, up_down), (-1, left_right)) if on]
                    defects = mirror_defects(maps.gallery.defects[index], left_right, up_down)
                    for source in maps.SOURCES:
                        correlation = np.corrcoef(shown[source][row].flip(flips).flatten(), drawn.flatten())[
                            0, 1
                        ]
                        candidates.append((correlation, train_language.cell_truths(defects)))
            np.testing.assert_array_equal(max(candidates, key=lambda c: c[0])[1], truths.numpy())


def test_a_cell_tells_what_its_defect_is() -> None:
    truths = train_language.cell_truths(
        [Defect("scratch", (0.1, 0.9), 0.02, 0.2, -0.2), Defect("missing", (0.5, 0.5), 0.005, 0.2, 0.19)]
    )
    named = [dict(zip(train_language.CELL_TRUTHS, row, strict=True)) for row in truths]
    assert [k for k, v in named[2].items() if v] == ["defect", "line", "over 1 percent"]
    assert [k for k, v in named[4].items() if v] == ["defect"]
    assert truths.sum() == 4


def test_the_prompt_embeddings_learn_what_is_in_the_cells(maps, vocabulary) -> None:
    torch.manual_seed(0)
    model = AnomalyGPT(nano_config(vocabulary.tokenizer.vocab_size()))
    head = train_language.CellHead(LLM_WIDTH)
    optimizer = torch.optim.AdamW([*model.prompt_learner.parameters(), *head.parameters()], lr=1e-3)
    parts = np.arange(len(maps.gallery.kinds))
    batch = train_language.draw_batch(maps, parts, parts, even(parts), vocabulary, default_rng(0), 4, 1)
    losses = []
    for _ in range(12):
        loss, figures = train_language.language_loss(model, vocabulary, head, batch)
        losses.append(figures["cells"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_start_is_what_was_saved_class_by_class(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    saved, started = train_vision.NanoVision(TINY), train_vision.NanoVision(TINY)
    fewer = train_vision.CLASSES[:-1]
    with torch.no_grad():
        saved.text.data = saved.text.data[:-1]
    save_start(saved, fewer, tmp_path / "start.safetensors")
    monkeypatch.setattr(initial, "START", tmp_path / "start.safetensors")
    load_start(started, train_vision.CLASSES)
    a, b = saved.encoder.blocks[0].mlp.fc1.weight, started.encoder.blocks[0].mlp.fc1.weight
    assert torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(saved.text_features(), started.text_features()[:-1], atol=1e-3)
    assert torch.allclose(started.text_features()[-1], started.text_features()[0])  # a new class: as "object"


def test_language_start_keeps_the_rows_of_known_pieces(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    saved, started = AnomalyGPT(nano_config(8)), AnomalyGPT(nano_config(8))
    save_language_start(saved, list("abcdefgh"), tmp_path / "start_language.safetensors")
    monkeypatch.setattr(initial, "LANGUAGE_START", tmp_path / "start_language.safetensors")
    fresh = started.llama.lm_head.weight[0].clone()
    load_language_start(started, list("xhgfedcb"))
    assert torch.equal(started.llama.lm_head.weight[0], fresh)  # "x" is new
    assert torch.allclose(started.llama.lm_head.weight[1], saved.llama.lm_head.weight[7], atol=1e-3)
    assert torch.allclose(started.prompt_learner.base_prompts, saved.prompt_learner.base_prompts, atol=2e-3)
