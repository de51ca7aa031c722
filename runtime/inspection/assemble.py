"""What the stages found about a frame, put together: the language model's input, and the verdict."""

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
from ..vision.regions import Region, find_regions, find_regions_of_views, half_way_level
from ..vision.stages import Encoded, Matches
from ..vision.views import FrameSize, View
from .budget import Rung
from .decide import Decision
from .product import Product
from .verdict import NearestNormal, Status, Verdict, ViewResult


@dataclass(frozen=True, eq=False)
class SeenView:
    """One view and what its map shows.

    Attributes:
        anomaly_map: float32 [S, S].
        score: mean of the highest 1 % of the map.
        peak: maximum of the map.
        regions: in the pixels and places of the view's box: from the bundle's region level on, or from half way to the
            peak of a map that does not reach it, so that a part that fails can show where.
    """

    view: View
    anomaly_map: np.ndarray
    score: float
    peak: float
    regions: tuple[Region, ...]


@dataclass(frozen=True, eq=False)
class SeenFrame:
    """A frame as its maps show it.

    Attributes:
        maps: float32 [views, S, S].
        matches: with a memory bank, the nearest normal patches.
        regions: in frame pixels.
        level: the bundle's region level; None when none was chosen at training.
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
        """Those that reach the bundle's region level, if there is one."""
        return tuple(region for region in regions if self.level is None or region.peak >= self.level)

    def shown(self, regions: tuple[Region, ...], status: Status | None) -> tuple[Region, ...]:
        """All regions of a part that fails; of others those that reach the bundle's region level."""
        if status is Status.FAIL:
            return regions
        return () if self.level is None else self.at_level(regions)


@dataclass
class Findings:
    """What an inspection has found so far. A part whose inspection breaks off keeps what was found before."""

    frame: FrameSize | None
    seen: SeenFrame | None = None
    answers: list[Answer] = field(default_factory=list)
    decision: Decision | None = None
    rung: Rung = "none"


def see_frame(
    views: Sequence[View],
    maps: np.ndarray,
    matches: Matches | None,
    product: Product,
    level: float | None,
    frame_size: tuple[int, int],
    threads: int,
) -> SeenFrame:
    """Scores and regions of the maps of a frame.

    Args:
        maps: float32 [views, S, S].
        level: the bundle's region level, in the map's values.
        frame_size: (height, width) in pixels.

    Raises:
        ValueError: a map has a value that is not finite.
    """
    seen = tuple(see_view(view, each, product, level) for view, each in zip(views, maps, strict=True))
    if product.layout.is_whole:
        regions = seen[0].regions
    else:
        highest = summarise(max(seen, key=lambda view: view.peak).anomaly_map)
        boxes = [view.box for view in views]
        frame_level = half_way_level(highest, level)
        regions = find_regions_of_views(maps, boxes, frame_level, frame_size, product.resize, threads)
    return SeenFrame(seen, maps, matches, regions, level)


def see_view(view: View, anomaly_map: np.ndarray, product: Product, level: float | None) -> SeenView:
    """Score and regions of one view's map, float32 [S, S].

    Raises:
        ValueError: the map has a value that is not finite.
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
    """How a view's map ranks the nine places, from which answers are drafted."""
    peaks = (
        cell_peaks(view.anomaly_map, 3).ravel().tolist()
    )  # the cells that ``place_name`` names, to a pixel
    order = sorted(range(len(PLACES)), key=lambda cell: -peaks[cell])
    places = tuple(region.place for region in seen.at_level(view.regions))
    return MapReading(view.score, tuple(PLACES[cell] for cell in order), places)


def assemble_verdict(
    found: Findings, product: Product, grid: int, timings_ms: dict[str, float], costs_ms: dict[str, float]
) -> Verdict:
    """The verdict about a frame from what was found, as far as the inspection came; without a decision, NO_RESULT.

    Args:
        grid: patches per side of a view.
    """
    decision = found.decision or Decision(Status.NO_RESULT, "the inspection came to no decision")
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
    """The verdict with the maps, scores and regions. A NO_RESULT that no answer led to shows no regions."""
    deciding = seen.highest if decision.deciding is None else decision.deciding
    shows_regions = decision.status is not Status.NO_RESULT or decision.is_of_answers
    views = () if product.layout.is_whole else seen.views
    return msgspec.structs.replace(
        verdict,
        maps=seen.maps,
        deciding=deciding,
        score=max(view.score for view in seen.views),
        peak=max(view.peak for view in seen.views),
        view=seen.views[deciding].view.name,
        regions=seen.shown(seen.regions, decision.status) if shows_regions else (),
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


def add_answers(
    verdict: Verdict,
    seen: SeenFrame,
    answers: Sequence[Answer],
    decision: Decision,
    product: Product,
    grid: int,
) -> Verdict:
    """The verdict with the language model's answers, one a view."""
    deciding = verdict.deciding
    answer, view = answers[deciding], seen.views[deciding]
    rejected = decision.status is Status.FAIL
    return msgspec.structs.replace(
        verdict,
        p_anomaly=answer.p_anomaly,
        sentence=whole_sentence(answer),
        agreement=places_agree(answer.text, view.regions) if answer.affirmative else None,
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
    """The normal patch that the most anomalous patch of a view was compared with; None without a bank."""
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
    """Whether the sentence names the place of some region; None when it names no place."""
    places = named_places(sentence)
    return any(region.place in places for region in regions) if places else None


def whole_sentence(answer: Answer) -> str:
    """The answer; "" for one that a deadline cut short."""
    return answer.text if answer.complete else ""
