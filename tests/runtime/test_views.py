"""Regions and tiles with a small bundle: geometry, recipes, inspection, records and overlays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels import Box, normalise, project, split_grid
from anomalygpt_edge.runtime.bundles.bundle import read_manifest, seal
from anomalygpt_edge.runtime.cameras import Frame
from anomalygpt_edge.runtime.common.errors import ConfigError, ImageError, RecipeError
from anomalygpt_edge.runtime.common.places import PLACES
from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.evaluation.trace import trace_inspection
from anomalygpt_edge.runtime.inspection.assemble import add_maps, see_frame
from anomalygpt_edge.runtime.inspection.decide import Decision, decide, decide_views
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.outputs.overlay import draw_overlay
from anomalygpt_edge.runtime.outputs.records import Identity, make_record
from anomalygpt_edge.runtime.recipes.recipe import OperatingPoint, Recipe, load_recipe, save_recipe
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank, load_bank
from anomalygpt_edge.runtime.vision.regions import Region, find_regions_of_views, name_places
from anomalygpt_edge.runtime.vision.stages import Localised
from anomalygpt_edge.runtime.vision.views import (
    FrameSize,
    Layout,
    RegionOfInterest,
    Tiles,
    View,
    parse_region,
    parse_tiles,
    tiles_to_cover,
    unseen_share,
)

SIZE = FrameSize(width=160, height=120)
TILES = Tiles(rows=2, columns=3, overlap=0.2)
REGIONS = (
    RegionOfInterest("left screw", 0, 10, 60, 50),
    RegionOfInterest("label", 70, 40, 64, 48, 30.0),
)
STAGES = ["preprocess", "encode", "localise", "prompt", "judge", "decide"]


def frame(seed: int = 0, height: int = 120, width: int = 160) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def recipes(inspector: Inspector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe with tiles and one with regions, from two good parts each."""
    folder = tmp_path_factory.mktemp("recipes")
    inspector.use(None)
    for name, layout in (("tiles", {"tiles": TILES}), ("regions", {"regions": REGIONS})):
        enroll(inspector, [frame(1), frame(2)], folder / f"{name}.toml", name=name, **layout)
    return {name: folder / f"{name}.toml" for name in ("tiles", "regions")}


# -- geometry ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.9))
def test_a_grid_covers_every_pixel_with_tiles_of_one_size(height, width, rows, columns, overlap) -> None:
    if rows > height or columns > width:
        with pytest.raises(ValueError, match="split_grid"):
            split_grid(height, width, rows, columns, overlap)
        return
    boxes = split_grid(height, width, rows, columns, overlap)
    assert len(boxes) == rows * columns
    assert len({(box.width, box.height) for box in boxes}) == 1
    covered = np.zeros((height, width), bool)
    for x, y, w, h, _ in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        covered[y : y + h, x : x + w] = True
    assert covered.all()
    tile_width, tile_height = boxes[0][2:4]
    if columns > 1:
        assert boxes[1].x - boxes[0].x <= tile_width * (1 - overlap) + 1
    if rows > 1:
        assert boxes[columns].y - boxes[0].y <= tile_height * (1 - overlap) + 1


def test_tiles_are_square_where_the_frame_allows_it() -> None:
    assert {(box.width, box.height) for box in split_grid(1080, 1920, 3, 3)} == {(640, 640)}
    assert {(box.width, box.height) for box in split_grid(256, 4096, 1, 4)} == {(1024, 256)}
    assert len(set(split_grid(500, 500, 4, 1))) == 4


@pytest.mark.parametrize(
    ("text", "tiles"),
    [("3x4", Tiles(rows=3, columns=4, overlap=0.1)), (" 448 ", Tiles(side=448, overlap=0.1))],
)
def test_tiles_are_read_from_the_command_line(text: str, tiles: Tiles) -> None:
    assert parse_tiles(text, 0.1) == tiles


@pytest.mark.parametrize("text", ["", "3y4", "0x3", "3x", "-3", "1000x1", "3x3x3", "99999999"])
def test_invalid_tiles_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tiles"):
        parse_tiles(text, 0.0)


def test_regions_are_read_from_the_command_line() -> None:
    assert parse_region("a = b=1,2,3,4.5") == RegionOfInterest("a = b", 1, 2, 3, 4.5)
    assert parse_region("x=1,2,3,4,-30").box == Box(1, 2, 3, 4, -30)


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=1,2,3,4", "a=1,2,3", "a=1,2,3,x", "a=1,2,3,nan", "a=1,2,3,4,400"]
)
def test_an_invalid_region_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--region"):
        parse_region(text)


def whole(width: int, height: int) -> tuple[View, ...]:
    return Layout().views((height, width))


@pytest.mark.parametrize(
    ("views", "size", "resize", "share"),
    [
        (whole(640, 480), (480, 640), "crop", 0.25),
        (whole(640, 480), (480, 640), "stretch", 0),
        (whole(4000, 200), (200, 4000), "crop", 0.95),
        (whole(200, 4000), (4000, 200), "crop", 0.95),
        (whole(500, 500), (500, 500), "crop", 0),
        ((View("a", Box(0, 0, 50, 100)), View("b", Box(25, 0, 50, 100))), (100, 100), "stretch", 0.25),
        ((View("a", Box(0, 0, 100, 50)),), (100, 100), "crop", 0.75),
        ((View("a", Box(10, 40, 80, 20, 90)),), (100, 100), "stretch", 0.84),
    ],
)
def test_the_share_of_the_frame_that_is_not_inspected(views, size, resize, share) -> None:
    assert unseen_share(views, size, resize) == pytest.approx(share, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 400), st.sampled_from(["crop", "stretch"]),
    st.lists(
        st.tuples(*[st.integers(0, 399)] * 2, st.integers(1, 400), st.integers(1, 400), st.sampled_from([0.0, 30.0])),
        min_size=1, max_size=4,
    ),
)  # fmt: skip
def test_the_unseen_share_is_that_of_the_pixels_without_a_map(height, width, resize, boxes) -> None:
    views = []
    for x, y, w, h, angle in boxes:
        x, y = x % width, y % height
        w, h = min(w, width - x), min(h, height - y)
        views.append(View(f"view {len(views)}", Box(x, y, w, h, angle)))
    maps = np.zeros((len(views), 448, 448), np.float32)
    mapped = project(maps, [view.box for view in views], resize, (height, width), outside=np.nan)
    perimeters = sum(2 * (view.box.width + view.box.height) for view in views)
    allowed = 1.5 * perimeters / (height * width)  # the map's square is truncated to a whole pixel, as in the original
    assert abs(unseen_share(tuple(views), (height, width), resize) - np.isnan(mapped).mean()) <= allowed


@given(st.integers(20, 4000), st.integers(20, 4000), st.floats(0, 0.5))
def test_the_tiles_that_are_proposed_cover_the_frame_with_squares(height, width, overlap) -> None:
    try:
        tiles = parse_tiles(tiles_to_cover((height, width), overlap), overlap)
        boxes = split_grid(height, width, tiles.rows, tiles.columns, overlap)
    except (ConfigError, ValueError):
        assert max(height, width) > 50 * min(height, width)
        return
    if max(height, width) >= 1.3 * min(height, width):
        assert {(box.width, box.height) for box in boxes} == {(min(height, width),) * 2}


def test_large_and_tiled_frames_are_counted_as_a_whole() -> None:
    views = Layout(frame=FrameSize(width=8000, height=2000), tiles=Tiles(side=448, overlap=0.2)).views((2000, 8000))
    assert unseen_share(views, (2000, 8000), "stretch") == 0
    assert unseen_share(whole(8000, 2000), (2000, 8000), "crop") == pytest.approx(0.75, abs=1e-3)


# -- recipes -----------------------------------------------------------------------------------------------------------

REGION = st.builds(
    RegionOfInterest,
    name=st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=20),
    x=st.integers(0, 60), y=st.integers(0, 60), width=st.integers(1, 60), height=st.integers(1, 60),
    angle=st.sampled_from([0.0, 12.5, 90.0]),
)  # fmt: skip
LAYOUTS = st.one_of(
    st.just({}),
    st.builds(
        lambda rows, columns, overlap: {"tiles": Tiles(rows=rows, columns=columns, overlap=overlap)},
        st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.9),
    ),
    st.builds(lambda side: {"tiles": Tiles(side=side)}, st.integers(20, 400)),
    st.lists(REGION, min_size=1, max_size=4, unique_by=lambda region: region.name).map(
        lambda regions: {"regions": tuple(regions)}
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_a_recipe_with_views_is_read_back(tmp_path_factory: pytest.TempPathFactory, layout: dict) -> None:
    recipe = Recipe(name="part", frame=SIZE if layout else None, **layout)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    views = recipe.layout.views((SIZE.height, SIZE.width))
    assert len({view.name for view in views}) == len(views) == recipe.layout.num_views


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[tiles]\nrows = 2\ncolumns = 2", "size of the frames"),
        ("[frame]\nwidth = 9\nheight = 9", "size of the frames"),
        ("[frame]\nwidth = 9\nheight = 9\n[tiles]\nrows = 2", "rows and columns or a side"),
        ("[frame]\nwidth = 9\nheight = 9\n[tiles]\nrows = 2\ncolumns = 2\nside = 4", "or a side"),
        ("[frame]\nwidth = 9\nheight = 9\n[tiles]\nside = 4\noverlap = 1.0", "overlap"),
        ("[frame]\nwidth = 9000\nheight = 9000\n[tiles]\nside = 4", "make them larger"),
        ("[frame]\nwidth = 9\nheight = 9\n[[regions]]\nname='a'\nx=5\ny=5\nwidth=5\nheight=5", "'a'.* 9 x 9"),
        ("[frame]\nwidth = 9\nheight = 9\n[[regions]]\nname='a'\nx=5\ny=5\nwidth=5", "height"),
        (
            "[frame]\nwidth = 9\nheight = 9\n"
            + "[[regions]]\nname='a'\nx=0\ny=0\nwidth=5\nheight=5\n" * 2,
            "same name",
        ),
    ],
)  # fmt: skip
def test_a_recipe_with_invalid_views_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "r.toml").write_text(f"name = 'a'\n{text}\n")
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(tmp_path / "r.toml")


def test_a_bank_of_other_views_is_refused(inspector: Inspector, recipes: dict[str, Path]) -> None:
    tiles, regions = (load_recipe(path) for path in recipes.values())
    with pytest.raises(RecipeError, match="enroll again"):
        load_bank(tiles.memory_bank, recipes["tiles"].parent, inspector.bundle, regions.layout)
    with pytest.raises(RecipeError, match="enroll again"):
        load_bank(regions.memory_bank, recipes["regions"].parent, inspector.bundle, tiles.layout)
    inspector.use(recipes["regions"])
    bank = inspector.product.bank
    inspector.use(None)
    with pytest.raises(RecipeError, match="other regions"):
        inspector.use(bank)


# -- inspection --------------------------------------------------------------------------------------------------------


def only_region(bank: MemoryBank, index: int) -> MemoryBank:
    """The bank of one region alone."""
    one = slice(index, index + 1)
    variation = msgspec.structs.replace(bank.variation, levels=bank.variation.levels[one])
    origins = None if bank.origins is None else bank.origins[one]
    return replace(bank, features=bank.features[one], units=bank.units[one], origins=origins, variation=variation)


@pytest.mark.parametrize("kind", ["tiles", "regions"])
def test_every_view_is_judged_like_a_frame_of_its_own(
    inspector: Inspector, recipes: dict[str, Path], kind: str
) -> None:
    """Each view's map, p(anomaly) and sentence equal those of an inspection of its box alone."""
    inspector.use(recipes[kind])
    product = inspector.product
    verdict = inspector.inspect(frame())
    assert list(verdict.timings_ms) == STAGES
    assert len(verdict.views) == len(product.layout.views((120, 160)))
    for index, view in enumerate(verdict.views):
        if view.box.angle:
            continue  # it cannot be cropped from the frame
        x, y, width, height = (int(value) for value in view.box[:4])
        bank = product.bank
        own = bank if len(bank.features) == 1 else only_region(bank, index)
        inspector.use(replace(product, bank=own, layout=Layout()))
        alone = inspector.inspect(frame()[y : y + height, x : x + width])
        np.testing.assert_allclose(verdict.maps[index], alone.anomaly_map, atol=1e-5)
        assert view.p_anomaly == pytest.approx(alone.p_anomaly, abs=1e-3)
        assert (view.sentence, view.status) == (alone.sentence, alone.status)
    inspector.use(product)
    assert verdict.status is Status.FAIL
    assert verdict.view in {view.name for view in verdict.views}
    assert verdict.p_anomaly == max(view.p_anomaly for view in verdict.views)
    assert verdict.score == max(view.score for view in verdict.views)
    assert verdict.reason.startswith(verdict.view)


def test_a_normal_sample_is_normal_in_every_view(inspector: Inspector, recipes: dict[str, Path]) -> None:
    for kind in recipes:
        inspector.use(recipes[kind])
        assert inspector.inspect(frame(2)).peak == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", ["whole", "tiles", "regions"])
@pytest.mark.parametrize("max_patches", [None, 300])
def test_nearest_normal_is_the_nearest_patch_of_the_samples(
    inspector: Inspector, recipes: dict[str, Path], kind: str, max_patches: int | None
) -> None:
    """Against direct arithmetic with the samples' features, with and without a coreset."""
    inspector.use(recipes[kind] if kind != "whole" else None)
    normals = [frame(1), frame(2), frame(3)]
    bank = inspector.make_bank(normals, max_patches=max_patches)
    inspector.use(bank)
    verdict = inspector.inspect(frame(7))
    names = [view.name for view in verdict.views] or [""]
    deciding = names.index(verdict.view)

    def taps(image: np.ndarray) -> np.ndarray:
        return normalise(inspector.vision.encode_frame(image, inspector.product).patch_features)

    query, known = (
        taps(frame(7))[deciding],
        np.stack([taps(image) for image in normals]),
    )  # [K, views, T, P, V]
    if kind == "regions":
        known = known[:, deciding : deciding + 1]
    known = known.swapaxes(1, 2).swapaxes(0, 1).reshape(4, -1, 32)  # [T, samples × views × patches, V]
    rows = (
        [slice(None)] * 4
        if bank.origins is None
        else list(bank.origins[deciding if kind == "regions" else 0])
    )
    similarity = [query[tap] @ known[tap][rows[tap]].T for tap in range(4)]
    worst = int(np.mean([each.max(axis=1) for each in similarity], axis=0).argmin())
    best = [np.arange(known.shape[1])[rows[tap]][similarity[tap][worst].argmax()] for tap in range(4)]
    votes = [best.count(number) for number in best]
    number = next(one for one, count in zip(best[::-1], votes[::-1], strict=True) if count == max(votes))
    number, patch = divmod(int(number), 256)
    sample, view = (number, deciding) if kind == "regions" else divmod(number, len(names))
    nearest = verdict.nearest_normal
    assert (nearest.sample, nearest.view, nearest.patch) == (sample + 1, names[view], divmod(patch, 16))
    assert verdict.to_record()["nearest_normal"]["sample"] == sample + 1
    inspector.use(None)
    assert inspector.inspect(frame(7)).nearest_normal is None, "zero-shot has no normal samples"


def test_tiles_share_their_patches_and_regions_do_not(inspector: Inspector, recipes: dict[str, Path]) -> None:
    shifted = frame(2)[:, ::-1][:, :, ::-1].copy()
    shifted[10:60, 70:130] = frame(2)[10:60, 0:60]  # normal only in the region of the left screw
    inspector.use(recipes["tiles"])
    patches = inspector.product.bank.features.shape
    assert (patches[0], patches[2]) == (1, 2 * 6 * 256)
    inspector.use(recipes["regions"])
    patches = inspector.product.bank.features.shape
    assert (patches[0], patches[2]) == (2, 2 * 256)
    assert inspector.inspect(shifted).views[0].peak > 0.01


@pytest.mark.parametrize("kind", ["tiles", "regions"])
def test_a_frame_of_another_size_is_no_result_with_both_sizes_in_the_reason(
    inspector: Inspector, recipes: dict[str, Path], kind: str
) -> None:
    inspector.use(recipes[kind])
    verdict = inspector.inspect(frame(0, 121, 160))
    assert verdict.status is Status.NO_RESULT
    assert "160 x 121" in verdict.reason
    assert "160 x 120" in verdict.reason
    assert kind in verdict.reason
    with pytest.raises(ImageError, match="160 x 120"):
        inspector.make_bank([frame(0, 121, 160)])
    with pytest.raises(ImageError, match="160 x 120"):
        inspector.ask(frame(0, 121, 160), "What is it?")


def test_enrolment_refuses_views_that_do_not_fit(inspector: Inspector, tmp_path: Path) -> None:
    inspector.use(None)
    with pytest.raises(ConfigError, match=r"'screw'.*160 x 120"):
        enroll(
            inspector,
            [frame()],
            tmp_path / "r.toml",
            name="r",
            regions=[RegionOfInterest("screw", 150, 0, 20, 20)],
        )
    with pytest.raises(ConfigError, match="leave one out"):
        enroll(inspector, [frame()], tmp_path / "r.toml", name="r", tiles=TILES, regions=REGIONS)
    with pytest.raises(ImageError, match="160 x 120"):
        enroll(inspector, [frame(), frame(0, 90, 160)], tmp_path / "r.toml", name="r", tiles=TILES)
    assert list(tmp_path.iterdir()) == []


def test_the_record_contains_every_view(inspector: Inspector, recipes: dict[str, Path]) -> None:
    inspector.use(recipes["regions"])
    verdict = inspector.inspect(frame())
    part = Frame("1", "camera", frame(), product="cap")
    record = make_record(1, part, verdict, 1.0, "cap", Identity("nano", "0" * 64))
    stored = msgspec.json.decode(msgspec.json.encode(record))
    assert [view["name"] for view in stored["views"]] == ["left screw", "label"]
    assert stored["views"][1]["box"] == [70, 40, 64, 48, 30]
    assert {view["status"] for view in stored["views"]} == {"FAIL"}
    assert stored["view"] == verdict.view
    for x, y, width, height in (region["box"] for region in stored["regions"]):
        assert 0 <= x <= x + width <= 160
        assert 0 <= y <= y + height <= 120
    draw_overlay(frame(), verdict)


def test_the_map_in_the_frame_combines_all_views(inspector: Inspector, recipes: dict[str, Path]) -> None:
    inspector.use(recipes["tiles"])
    verdict = inspector.inspect(frame())
    whole = verdict.map_in_frame(outside=np.nan)
    assert whole.shape == (120, 160)
    assert np.isfinite(whole).all()
    assert whole.max() <= verdict.peak + 1e-6
    assert verdict.map_in_frame(size=(30, 40)).shape == (30, 40)
    inspector.use(recipes["regions"])
    framed = inspector.inspect(frame()).map_in_frame(outside=-1)
    assert (framed[:9] == -1).all()
    assert (framed[12:58, 2:58] >= 0).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 4), st.integers(60, 400), st.integers(60, 400), st.floats(0, 0.5), st.data()
)  # fmt: skip
def test_a_blob_across_several_tiles_is_one_region(rows, columns, height, width, overlap, data) -> None:
    boxes = split_grid(height, width, rows, columns, overlap)
    x, y = data.draw(st.integers(0, width - 30)), data.draw(st.integers(0, height - 30))
    truth = np.zeros((height, width), np.float32)
    truth[y : y + 30, x : x + 30] = 1
    maps = np.stack([stretch(truth, box) for box in boxes])
    views = [View(f"tile {index}", box) for index, box in enumerate(boxes)]
    regions = find_regions_of_views(maps, views, 0.5, (height, width), "stretch")
    assert len(regions) == 1
    for found, expected in zip(regions[0].box, (x, y, 30, 30), strict=True):
        assert abs(found - expected) <= 3
    assert abs(regions[0].area_px - 900) <= 180


SOME_LAYOUTS = st.one_of(
    st.builds(
        lambda rows, columns, overlap: Layout(frame=SIZE, tiles=Tiles(rows=rows, columns=columns, overlap=overlap)),
        st.integers(1, 4), st.integers(1, 4), st.floats(0, 0.9),
    ),
    st.lists(
        st.builds(
            lambda index, x, y, width, height, angle: RegionOfInterest(f"r{index}", x, y, width, height, angle),
            st.integers(0, 999), st.integers(0, 100), st.integers(0, 60), st.integers(1, 60), st.integers(1, 60),
            st.sampled_from([0.0, 30.0, 90.0]),
        ),
        min_size=1, max_size=3, unique_by=lambda region: region.name,
    ).map(lambda regions: Layout(frame=SIZE, regions=tuple(regions))),
    st.just(Layout()),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    SOME_LAYOUTS,
    st.sampled_from(["crop", "stretch"]),
    st.none() | st.floats(0.01, 1),
    st.integers(0, 12),
    st.floats(0, 0.3),
    st.integers(0, 9999),
)
def test_a_rejected_part_always_has_a_region(layout, resize, level, num_specks, background, seed) -> None:
    """Also where the map has only specks, or where the blended map stays below the level that a view's map reaches."""
    rng = np.random.default_rng(seed)
    views = layout.views((120, 160))
    maps = np.full((len(views), 224, 224), background, np.float32)
    for _ in range(num_specks):
        row, column, side = rng.integers(0, 224), rng.integers(0, 224), rng.integers(1, 5)
        maps[rng.integers(len(views)), row : row + side, column : column + side] = rng.random()
    product = SimpleNamespace(layout=layout, resize=resize)
    seen = see_frame(views, Localised(maps, maps, None), product, level, (120, 160), 1)
    regions = seen.shown(seen.regions, Status.FAIL)
    assert regions
    assert {region.view for region in regions} <= {view.name for view in views}
    assert all(seen.shown(view.regions, Status.FAIL) for view in seen.views)
    for region in regions:
        x, y, width, height = region.box
        assert 0 <= x < x + width <= 160
        assert 0 <= y < y + height <= 120
        assert region.place in PLACES
        assert region.peak <= maps.max() + 1e-6


def test_a_view_smaller_than_a_pixel_of_the_frames_map_has_a_region() -> None:
    views = [View("mark", Box(7003, 4003, 1, 1)), View("edge", Box(0, 5999, 1, 1))]
    maps = np.stack([np.full((56, 56), value, np.float32) for value in (0.9, 0.1)])
    (region,) = find_regions_of_views(maps, views, 0.5, (6000, 8000), "stretch")
    assert (region.view, region.place, region.box) == ("mark", "center", (7003, 4003, 1, 1))
    assert region.peak == pytest.approx(0.9)


def test_a_region_is_named_in_the_view_whose_sentence_is_shown() -> None:
    """A defect in the overlap of two tiles is at the right of the first and at the left of the second."""
    views = [View("first", Box(0, 0, 100, 100)), View("second", Box(60, 0, 100, 100))]
    (region,) = (Region((82, 45, 10, 10), "center", 100.0, 0.9),)
    assert [
        (found.view, found.place)
        for first in (None, 0, 1)
        for found in name_places([region], views, "stretch", first)
    ] == [("second", "left"), ("first", "right"), ("second", "left")]
    far = Region((5, 5, 10, 10), "center", 100.0, 0.9)
    (found,) = name_places([far], views, "stretch", 1)
    assert (found.view, found.place) == ("first", "top left"), "the second view does not show it"


@pytest.mark.parametrize("angle", [0.0, 90.0])
def test_the_deciding_view_has_a_region_where_others_are_higher(angle: float) -> None:
    """The second region fails by its answer although the map of the first one is higher."""
    boxes = (Box(0, 0, 60, 60), Box(90, 50, 60, 60, angle))
    regions = tuple(RegionOfInterest(name, *box) for name, box in zip(("a", "b"), boxes, strict=True))
    product = SimpleNamespace(layout=Layout(frame=SIZE, regions=regions), resize="stretch", limit=None)
    maps = np.full((2, 60, 60), 0.1, np.float32)
    maps[0, 20:40, 20:40] = 0.9
    maps[1, 5:15, 40:55] = 0.3
    seen = see_frame(product.layout.views((120, 160)), Localised(maps, maps, None), product, 0.5, (120, 160), 1)
    verdict = Verdict(status=Status.FAIL, reason="", frame=SIZE, resize="stretch")
    shown = add_maps(verdict, seen, Decision(Status.FAIL, "", deciding=1), product).regions
    assert [(region.view, region.place) for region in shown] == [("a", "center"), ("b", "top right")]
    assert shown[1].box == ((130, 55, 15, 10) if angle == 0 else (135, 90, 10, 15))
    passed = add_maps(verdict, seen, Decision(Status.PASS, "", deciding=1), product).regions
    assert [region.view for region in passed] == ["a"]


def test_places_in_views_that_are_turned_or_cropped() -> None:
    turned = [View("label", Box(50, 50, 100, 100, 90.0))]
    (found,) = name_places([Region((130, 60, 10, 10), "center", 100.0, 0.9)], turned, "stretch")
    assert found.place == "top left", "clockwise by 90 degrees: the box's top is at the frame's right"
    wide = [View("wide", Box(0, 0, 300, 100))]
    (found,) = name_places([Region((180, 40, 10, 10), "center", 100.0, 0.9)], wide, "crop")
    assert found.place == "right"


def stretch(image: np.ndarray, box: Box, size: int = 224) -> np.ndarray:
    """A box of a frame as a map of ``size`` × ``size`` pixels, nearest neighbour."""
    rows = int(box.y) + (np.arange(size) + 0.5) * box.height / size
    columns = int(box.x) + (np.arange(size) + 0.5) * box.width / size
    return np.ascontiguousarray(image[rows.astype(int)[:, None], columns.astype(int)])


# -- the verdict of several views --------------------------------------------------------------------------------------

ANSWERS = st.lists(
    st.builds(
        lambda affirmative, p: SimpleNamespace(affirmative=affirmative, p_anomaly=p, text="Hm."),
        st.sampled_from([True, False, None]),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=9,
)
WORDS = SimpleNamespace(affirmative="Yes", negative="No")


POINTS = st.none() | st.builds(
    lambda p: OperatingPoint(false_reject_rate=0.1, num_normals=9, p_anomaly=p, score=0.5), st.floats(0, 1)
)


@given(ANSWERS, POINTS)
def test_fail_outranks_no_result_and_no_result_outranks_pass(answers, point) -> None:
    names = [f"tile {index}" for index in range(len(answers))]
    found = decide_views(names, answers, WORDS, point)
    deciding = found.deciding
    alone = [decide(answer, WORDS, point).status for answer in answers]
    assert list(found.statuses) == alone
    worst = next(each for each in (Status.FAIL, Status.NO_RESULT, Status.PASS) if each in alone)
    assert found.status is alone[deciding] is worst
    alike = [answer.p_anomaly for answer, status in zip(answers, alone, strict=True) if status is worst]
    assert answers[deciding].p_anomaly == max(alike)
    assert found.reason.startswith(f"{names[deciding]}: ")


def test_a_part_with_an_unclear_view_is_no_result(tiny_bundle: Path, tmp_path: Path) -> None:
    """Every tile's answer is neither yes nor no."""
    folder = tmp_path / "altered"
    shutil.copytree(tiny_bundle, folder)
    manifest = read_manifest(folder)
    words = msgspec.structs.replace(manifest.prompt, affirmative="there", negative="image", answers=None)
    seal(folder, msgspec.structs.replace(manifest, prompt=words))
    with Inspector.open(folder, Recipe(name="a", frame=SIZE, tiles=TILES), threads=1) as inspector:
        verdict = inspector.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "neither" in verdict.reason
    assert len(verdict.views) == 6


def test_a_failing_stage_is_no_result(
    inspector: Inspector, recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector.use(recipes["tiles"])
    engine = inspector.vision.networks["encoder"]

    class OneViewPoisoned:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            outputs = engine.run(**inputs)
            outputs["patch_features"] = outputs["patch_features"].copy()
            outputs["patch_features"][4] = np.nan
            return outputs

    monkeypatch.setitem(inspector.vision.networks, "encoder", OneViewPoisoned())
    verdict = inspector.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "finite" in verdict.reason


def test_questions_are_about_the_view_with_the_highest_map_score(
    inspector: Inspector, recipes: dict[str, Path]
) -> None:
    inspector.use(recipes["tiles"])
    highest = max(inspector.inspect(frame()).views, key=lambda view: view.score)
    assert inspector.dialogue(frame()).view == highest.name
    assert inspector.ask(frame(), "").text == "Yes, at the top left."
    with pytest.raises(ConfigError, match="whole frames"):
        trace_inspection(inspector, frame())
