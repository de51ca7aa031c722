"""Combines the results of the stages into the language model's input and into the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ...kernels import cell_peaks, summarise
from ..common.places import PLACES, named_places, place_name
from ..language.answer import Answer, MapReading, Part
from ..vision.memory_bank import MemoryBank
from ..vision.regions import (
    MAX_REGIONS,
    Region,
    find_regions,
    find_regions_of_views,
    half_way_level,
    name_places,
    region_in_frame,
)
from ..vision.stages import Encoded, Localised, Matches
from ..vision.views import FrameSize, View, unseen_share
from .budget import Rung
from .decide import Decision, overrule
from .product import Product
from .verdict import NearestNormal, Status, Verdict, ViewResult


@dataclass(frozen=True, eq=False)
class SeenView:
    """The results of one view's anomaly map.

    Attributes:
        anomaly_map: float32 [S, S].
        score: mean of the highest 1 % of the map.
        peak: maximum of the map.
        view: the view.
        regions: its regions, with boxes and places relative to the view's box. Their level is the bundle's region
            level, or ``half_way_level`` if the map does not reach it, so that a failing part always has regions.
    """

    view: View
    anomaly_map: np.ndarray
    score: float
    peak: float
    regions: tuple[Region, ...]


@dataclass(frozen=True, eq=False)
class SeenFrame:
    """The results of all anomaly maps of a frame.

    Attributes:
        views: the results of each view.
        maps: float32 [views, S, S].
        matches: the nearest normal patches; None without a memory bank.
        regions: the regions in frame coordinates, with places in the view that shows each best.
        level: the bundle's region level; None if none was chosen at training.
    """

    views: tuple[SeenView, ...]
    maps: np.ndarray
    matches: Matches | None
    regions: tuple[Region, ...]
    level: float | None

    @property
    def highest(self) -> int:
        """Index of the view with the highest score."""
        return max(range(len(self.views)), key=lambda index: self.views[index].score)

    def at_level(self, regions: tuple[Region, ...]) -> tuple[Region, ...]:
        """The regions that reach the bundle's region level; all if there is no level."""
        return tuple(region for region in regions if self.level is None or region.peak >= self.level)

    def shown(self, regions: tuple[Region, ...], status: Status | None) -> tuple[Region, ...]:
        """The regions to report: all for FAIL, otherwise those that reach the bundle's region level."""
        if status is Status.FAIL:
            return regions
        return () if self.level is None else self.at_level(regions)


@dataclass
class Findings:
    """The results of an inspection so far; if it breaks off, the verdict is made from them."""

    frame: FrameSize | None
    seen: SeenFrame | None = None
    parts: list[Part] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    decision: Decision | None = None
    rung: Rung = "none"


def see_frame(
    views: Sequence[View],
    localised: Localised,
    product: Product,
    level: float | None,
    frame_size: tuple[int, int],
    threads: int,
) -> SeenFrame:
    """Scores and regions of a frame's maps.

    Args:
        views: the frame's views.
        localised: the maps of the views.
        product: the product.
        level: the bundle's region level, in the map's values; None if it has none.
        frame_size: (height, width) in pixels.
        threads: the most CPU threads to use.

    Raises:
        ValueError: a map contains a value that is not finite.
    """
    maps = localised.maps
    seen = tuple(see_view(view, each, product, level) for view, each in zip(views, maps, strict=True))
    if product.layout.is_whole:
        regions = seen[0].regions
    else:
        regions = find_regions_of_views(maps, views, level, frame_size, product.resize, threads)
    return SeenFrame(seen, maps, localised.matches, regions, level)


def see_view(view: View, anomaly_map: np.ndarray, product: Product, level: float | None) -> SeenView:
    """Score and regions of one view's map, float32 [S, S].

    Raises:
        ValueError: the map contains a value that is not finite.
    """
    figures = summarise(anomaly_map)
    if not math.isfinite(figures.peak):
        raise ValueError("the anomaly map is not finite")
    box_size = int(view.box.height), int(view.box.width)
    regions = find_regions(anomaly_map, half_way_level(figures, level), box_size, product.resize)
    return SeenView(view, anomaly_map, figures.top_mean, figures.peak, regions)


def make_parts(
    encoded: Encoded, prompt_embeddings: np.ndarray, seen: SeenFrame, product: Product
) -> list[Part]:
    """The language model's input for each view, with the product's question."""
    return [
        Part(image, prompt, product.question, read_map(view, seen), view.view.name)
        for image, prompt, view in zip(encoded.image_embeddings, prompt_embeddings, seen.views, strict=True)
    ]


def read_map(view: SeenView, seen: SeenFrame) -> MapReading:
    """Summary of a view's map, from which answers are drafted."""
    peaks = cell_peaks(view.anomaly_map, 3).ravel().tolist()  # of the 3 x 3 cells that ``place_name`` names
    order = sorted(range(len(PLACES)), key=lambda cell: -peaks[cell])
    places = tuple(region.place for region in seen.at_level(view.regions))
    return MapReading(view.score, tuple(PLACES[cell] for cell in order), places)


def overrule_by_map(
    decision: Decision, seen: SeenFrame, answers: Sequence[Answer], product: Product
) -> Decision:
    """The decision by the answers, unless the map overrules it (``decide.overrule``)."""
    if product.limit is None or product.decide == "answer":
        return decision
    index = seen.highest
    view = seen.views[index]
    place = view.regions[0].place if view.regions else "an unknown place"
    if view.view.name:
        place = f"{view.view.name}, {place}"
    return overrule(decision, view.score, product.limit, place, index, answers[index].text)


def assemble_verdict(
    found: Findings, product: Product, grid: int, timings_ms: dict[str, float], costs_ms: dict[str, float]
) -> Verdict:
    """The verdict from the results of an inspection, which may be incomplete; NO_RESULT without a decision.

    Args:
        found: the results.
        product: the product.
        grid: patches per side of a view.
        timings_ms: duration of each stage in ms.
        costs_ms: expected duration of each stage in ms.
    """
    decision = found.decision or Decision(Status.NO_RESULT, "the inspection ended without a decision")
    verdict = Verdict(
        status=decision.status,
        reason=decision.reason,
        decided_by=decision.decided_by,
        contradiction=decision.contradiction,
        rung=found.rung,
        timings_ms=timings_ms,
        costs_ms=costs_ms,
        frame=found.frame,
        resize=product.resize,
    )
    if found.seen is not None:
        verdict = add_maps(verdict, found.seen, decision, product)
        if decision.is_of_answers:
            verdict = add_answers(verdict, found.seen, found.answers, decision, product, grid)
    return verdict


def add_maps(verdict: Verdict, seen: SeenFrame, decision: Decision, product: Product) -> Verdict:
    """Add maps, scores and regions to a verdict; NO_RESULT without answers gets no regions."""
    deciding = seen.highest if decision.deciding is None else decision.deciding
    shows_regions = decision.status is not Status.NO_RESULT or decision.is_of_answers
    views = () if product.layout.is_whole else seen.views
    frame = verdict.frame
    shown = tuple(each.view for each in seen.views)
    regions = seen.shown(seen.regions, decision.status) if shows_regions else ()
    if views:  # the deciding view's sentence and regions refer to the same image
        regions = name_places(regions, shown, product.resize, deciding)
        if decision.status is Status.FAIL and frame:
            regions = with_deciding(regions, seen.views[deciding], (frame.height, frame.width))
    return msgspec.structs.replace(
        verdict,
        maps=seen.maps,
        deciding=deciding,
        score=max(view.score for view in seen.views),
        limit=product.limit,
        peak=max(view.peak for view in seen.views),
        view=seen.views[deciding].view.name,
        regions=regions,
        unseen=round(unseen_share(shown, (frame.height, frame.width), product.resize), 4) if frame else None,
        views=tuple(
            ViewResult(
                name=each.view.name,
                box=each.view.box,
                score=each.score,
                peak=each.peak,
                regions=seen.at_level(each.regions),
            )
            for each in views
        ),
    )


def with_deciding(
    regions: tuple[Region, ...], view: SeenView, frame_size: tuple[int, int]
) -> tuple[Region, ...]:
    """The regions of a frame, highest peak first, with the highest one of the deciding view if it had none.

    The regions are those of the blended map of all views, and the view that decides may have a lower map than others.
    """
    if any(region.view == view.view.name for region in regions):
        return regions
    own = region_in_frame(view.regions[0], view.view, frame_size)
    return tuple(sorted((*regions[: MAX_REGIONS - 1], own), key=lambda region: -region.peak))


def add_answers(
    verdict: Verdict,
    seen: SeenFrame,
    answers: Sequence[Answer],
    decision: Decision,
    product: Product,
    grid: int,
) -> Verdict:
    """Add the language model's answers, one for each view, to a verdict."""
    deciding = verdict.deciding
    answer, view = answers[deciding], seen.views[deciding]
    rejected = decision.status is Status.FAIL
    return msgspec.structs.replace(
        verdict,
        p_anomaly=answer.p_anomaly,
        sentence=whole_sentence(answer),
        agreement=places_agree(answer.text, seen.at_level(view.regions)) if answer.affirmative else None,
        nearest_normal=nearest_normal(seen, deciding, product.bank, grid) if rejected else None,
        views=tuple(
            msgspec.structs.replace(
                result,
                status=status,
                p_anomaly=each.p_anomaly,
                sentence=whole_sentence(each),
                regions=seen.shown(view.regions, status),
            )
            for result, view, each, status in zip(
                verdict.views, seen.views, answers, decision.statuses, strict=False
            )
        ),
    )


def nearest_normal(seen: SeenFrame, index: int, bank: MemoryBank | None, grid: int) -> NearestNormal | None:
    """The normal patch nearest to the most anomalous patch of a view; None without a memory bank."""
    if seen.matches is None or bank is None:
        return None
    worst = int(seen.matches.distance[index].argmax())
    number = bank.nearest_normal(index, seen.matches.nearest[index, :, worst])
    number, patch = divmod(number, grid**2)
    is_shared = len(bank.features) == 1
    sample, view = divmod(number, len(seen.views)) if is_shared else (number, index)
    row, column = divmod(patch, grid)
    place = place_name((row + 0.5) / grid, (column + 0.5) / grid)
    return NearestNormal(sample + 1, seen.views[view].view.name, place, (row, column))


def places_agree(sentence: str, regions: tuple[Region, ...]) -> bool | None:
    """Whether the sentence names the place of every region and no other; None if it names no place."""
    places = set(named_places(sentence))
    return places == {region.place for region in regions} if places else None


def whole_sentence(answer: Answer) -> str:
    """The answer's text; "" if the deadline cut it short."""
    return answer.text if answer.complete else ""
