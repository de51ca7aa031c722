"""A product ready to be inspected: its recipe with every file read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..bundles.bundle import Bundle
from ..common.errors import RecipeError
from ..recipes.recipe import OperatingPoint, Recipe, WithoutVerdict, load_recipe
from ..vision.memory_bank import MemoryBank, load_bank
from ..vision.views import WHOLE, Layout


@dataclass(frozen=True, eq=False)
class Product:
    """What the frames of one product are compared with and asked; cheap to switch to.

    Attributes:
        name: the recipe's.
        text_features: float32 [2, E]: the zero-shot reference, used when there is no bank.
        bank: normal samples: with a bank the few-shot map replaces the zero-shot one, as in the original.
        question: with the description in front.
        resize: how frames, or views of them, are fitted to the encoder.
        operating_point: limits of p(anomaly) and map score; None: the greedy answer decides.
        without_verdict: the status of a part when there was no time for an answer.
        layout: the views of a frame: the whole of it, regions or tiles.
    """

    name: str
    text_features: np.ndarray
    bank: MemoryBank | None
    question: str
    resize: Literal["crop", "stretch"]
    operating_point: OperatingPoint | None = None
    without_verdict: WithoutVerdict = "no_result"
    layout: Layout = WHOLE


def prepare_product(
    bundle: Bundle, recipe: Path | str | Recipe | None = None, class_name: str | None = None
) -> Product:
    """A recipe with everything it names read and checked.

    Args:
        recipe: a path where the recipe has a memory bank beside it; None: no recipe, zero-shot.
        class_name: overrides the recipe's.

    Raises:
        RecipeError: the recipe or its memory bank cannot be used.
        ConfigError: the bundle does not know the class.
    """
    folder = None
    if isinstance(recipe, (Path, str)):
        folder = Path(recipe).parent
        recipe = load_recipe(recipe)
    recipe = recipe or Recipe(name=class_name or bundle.manifest.default_class)
    bank = None
    if recipe.memory_bank is not None:
        if folder is None:
            raise RecipeError(f"recipe {recipe.name!r} has a memory bank beside it: give the recipe's path")
        bank = load_bank(recipe.memory_bank, folder, bundle, recipe.layout)
    question = recipe.question or bundle.manifest.prompt.question
    return Product(
        name=recipe.name,
        text_features=bundle.text_features(class_name or recipe.class_name),
        bank=bank,
        question=f"{recipe.description} {question}".strip(),
        resize=recipe.resize or (bundle.manifest.preprocess.resize if recipe.layout.is_whole else "stretch"),
        operating_point=recipe.operating_point,
        without_verdict=recipe.without_verdict,
        layout=recipe.layout,
    )
