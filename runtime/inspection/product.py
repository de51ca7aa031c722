"""A product that is ready for inspection: its recipe with all files read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..bundles.bundle import Bundle
from ..common.errors import RecipeError
from ..recipes.recipe import Decide, OperatingPoint, Recipe, SeverityRule, WithoutVerdict, load_recipe
from ..vision.frame_check import FrameCheck
from ..vision.memory_bank import MemoryBank, load_bank
from ..vision.regions import Region
from ..vision.views import WHOLE, Layout


@dataclass(frozen=True, eq=False)
class Product:
    """The reference, question and settings for one product's frames; ``Inspector.use`` switches to it at no cost.

    Attributes:
        name: the recipe's name.
        text_features: float32 [2, E], the reference of zero-shot maps, used without a memory bank.
        bank: the memory bank of normal samples; with it few-shot maps replace zero-shot maps, as in AnomalyGPT.
        check: what frames of the product look like; None: frames are only checked for showing anything at all.
        question: the question, with the description before it.
        resize: how frames or views are fitted to the encoder's input.
        operating_point: limits of p(anomaly) and map score; None: the greedy answer decides.
        decide: whether a high map score overrules the answer.
        without_verdict: the status of a part without time for an answer: NO_RESULT, or by the map.
        layout: the views of a frame: the whole frame, regions or tiles.
        mm_per_pixel: scale of the frame; None: not known.
        severity: grades of defects, the worst first.
    """

    name: str
    text_features: np.ndarray
    bank: MemoryBank | None
    question: str
    resize: Literal["crop", "stretch"]
    check: FrameCheck | None = None
    operating_point: OperatingPoint | None = None
    decide: Decide = "answer and map"
    without_verdict: WithoutVerdict = "no_result"
    layout: Layout = WHOLE
    mm_per_pixel: float | None = None
    severity: tuple[SeverityRule, ...] = ()

    @property
    def limit(self) -> float | None:
        """The map score that few good parts exceed; None without a memory bank that has units of normal variation."""
        return None if self.bank is None or self.bank.variation is None else self.bank.variation.limit


    def severity_of(self, regions: Sequence[Region]) -> str:
        """The grade of a part with these regions: the first rule that one of them meets; "" if none does."""
        for rule in self.severity:
            if any(self._meets(region, rule) for region in regions):
                return rule.name
        return ""

    def _meets(self, region: Region, rule: SeverityRule) -> bool:
        mm2 = region.area_px * (self.mm_per_pixel or 0) ** 2
        return (
            (rule.min_area_px is None or region.area_px >= rule.min_area_px)
            and (rule.min_area_mm2 is None or mm2 >= rule.min_area_mm2)
            and (not rule.places or region.place in rule.places)
        )


def prepare_product(
    bundle: Bundle, recipe: Path | str | Recipe | None = None, class_name: str | None = None
) -> Product:
    """Read and check a recipe and its memory bank.

    Args:
        bundle: the bundle.
        recipe: the recipe, or its path, which is required if it has a memory bank; None for zero-shot without recipe.
        class_name: replaces the recipe's class.

    Raises:
        RecipeError: the recipe or its memory bank cannot be used.
        ConfigError: the bundle does not have the class.
    """
    folder = None
    if isinstance(recipe, (Path, str)):
        folder = Path(recipe).parent
        recipe = load_recipe(recipe)
    recipe = recipe or Recipe(name=class_name or bundle.manifest.default_class)
    bank = None
    if recipe.memory_bank is not None:
        if folder is None:
            raise RecipeError(f"recipe {recipe.name!r} has a memory bank in a file: give the recipe's path")
        bank = load_bank(recipe.memory_bank, folder, bundle, recipe.layout)
    question = recipe.question or bundle.manifest.prompt.question
    return Product(
        name=recipe.name,
        text_features=bundle.text_features(class_name or recipe.class_name),
        bank=bank,
        question=f"{recipe.description} {question}".strip(),
        resize=recipe.resize or (bundle.manifest.preprocess.resize if recipe.layout.is_whole else "stretch"),
        check=recipe.frame_check,
        operating_point=recipe.operating_point,
        decide=recipe.decide,
        without_verdict=recipe.without_verdict,
        layout=recipe.layout,
        mm_per_pixel=recipe.mm_per_pixel,
        severity=recipe.severity,
    )
