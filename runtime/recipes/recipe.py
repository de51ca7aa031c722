"""Recipes: a product's name, question, regions or tiles, memory bank and operating point, as a TOML file."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tomli_w
from msgspec import Meta

from ..bundles.bundle import Name
from ..common.errors import RecipeError
from ..common.files import write_whole
from ..common.places import PLACES
from ..common.schema_errors import describe_error
from ..vision.frame_check import FrameCheck
from ..vision.memory_bank import MemoryBankRecord
from ..vision.views import FrameSize, Layout, RegionOfInterest, Tiles

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA_VERSION = 1
MAX_RECIPE_BYTES = 1 << 20
MAX_FALSE_REJECT_RATE = 0.5

# Text from the operator that goes into the prompt; its length is limited so that the prompt fits into the context.
PromptText = Annotated[str, Meta(max_length=500)]
WithoutVerdict = Literal["no_result", "map"]
Decide = Literal["answer and map", "answer"]


class OperatingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits above which a part is rejected, instead of by the greedy answer.

    Attributes:
        false_reject_rate: share of good parts that may be rejected, for which the limits were chosen.
        num_normals: number of good parts that they were chosen on.
        p_anomaly: limit of p(anomaly).
        score: limit of the map score, for parts that the map decides.
    """

    false_reject_rate: Annotated[float, Meta(gt=0, le=MAX_FALSE_REJECT_RATE)]
    num_normals: Annotated[int, Meta(ge=1)]
    p_anomaly: Annotated[float, Meta(ge=0, le=1)]
    score: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"the operating point's score is {self.score}")


class SeverityRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A grade of defects, for example "critical" from 4 square millimetres on.

    Attributes:
        name: of the grade.
        min_area_px: smallest area of a region in square pixels of the frame; None: any.
        min_area_mm2: the same in square millimetres; needs ``mm_per_pixel``.
        places: places where the rule holds ("top left"); empty: everywhere.
    """

    name: Name
    min_area_px: Annotated[float, Meta(ge=0)] | None = None
    min_area_mm2: Annotated[float, Meta(ge=0)] | None = None
    places: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [place for place in self.places if place not in PLACES]:
            raise ValueError(f"{unknown[0]!r} is not a place: choose among {', '.join(PLACES)}")


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The settings of a product; None or "" means the bundle's default.

    With ``tiles`` or ``regions``, ``frame`` is the size that frames must have; without them frames of any size are
    inspected as a whole.
    """

    name: Name
    schema_version: int = SCHEMA_VERSION
    class_name: Name | None = None
    description: PromptText = ""
    question: PromptText = ""
    resize: Literal["crop", "stretch"] | None = None
    memory_bank: MemoryBankRecord | None = None
    frame_check: FrameCheck | None = None  # None: frames are only checked for showing anything at all
    operating_point: OperatingPoint | None = None  # None: the greedy answer decides
    # "answer and map": a part whose map score is over the memory bank's limit does not pass, whatever is answered;
    # "answer": the answer alone decides, as in the original
    decide: Decide = "answer and map"
    without_verdict: WithoutVerdict = "no_result"  # status of a part without time for an answer
    created: str = ""
    frame: FrameSize | None = None
    tiles: Tiles | None = None
    regions: tuple[RegionOfInterest, ...] = ()
    mm_per_pixel: Annotated[float, Meta(gt=0)] | None = None  # of the frame; sizes are also stated in millimetres
    severity: tuple[SeverityRule, ...] = ()  # the first rule that a region meets is its grade: the worst comes first

    @property
    def layout(self) -> Layout:
        """The views of a frame that are inspected."""
        return Layout(frame=self.frame, tiles=self.tiles, regions=self.regions)

    def __post_init__(self) -> None:
        if (self.frame is None) != self.layout.is_whole:
            raise ValueError("[frame] (the size of the frames) and tiles or regions require each other")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema version {self.schema_version}, but this program reads {SCHEMA_VERSION}")
        if self.without_verdict == "map" and self.operating_point is None:
            raise ValueError("there is no operating_point, which without_verdict = 'map' requires")
        if self.mm_per_pixel is None and any(rule.min_area_mm2 is not None for rule in self.severity):
            raise ValueError("a severity rule has min_area_mm2, which requires mm_per_pixel")


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe from TOML; unknown keys are errors.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or is not a valid recipe.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} is over {MAX_RECIPE_BYTES >> 20} MiB: it is not a recipe")
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8-sig")), Recipe)
    except OSError as error:
        raise RecipeError(f"no recipe at {path} ({error.strerror}): make one with agpt enroll") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not TOML ({error}): correct it or run agpt enroll again") from error
    except msgspec.ValidationError as error:
        problem = describe_error(error)
        raise RecipeError(
            f"{path} is not a recipe ({problem}): correct it or run agpt enroll again"
        ) from error


def save_recipe(recipe: Recipe, path: Path | str) -> None:
    """Write a recipe as TOML by rename, so that an interruption leaves the old file."""
    path = Path(path)
    text = tomli_w.dumps({"schema_version": recipe.schema_version, **msgspec.to_builtins(recipe)})
    write_whole(path, text.encode())
