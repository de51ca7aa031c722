"""Enrolment: normal samples of a product become a recipe with its memory bank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

from ..bundles.bundle import Augmentation
from ..common.errors import ConfigError, RecipeError
from ..inspection.inspector import Inspector
from ..inspection.verdict import Verdict
from ..recipes.recipe import Recipe, WithoutVerdict, save_recipe
from ..vision.images import check_frame
from ..vision.memory_bank import Storage
from ..vision.views import RegionOfInterest, Tiles, make_layout
from .operating_point import check_rate, choose_operating_point

MAX_GROUPS = 20  # good parts are judged against the others in so many groups; one by one when there are fewer


def enroll(
    inspector: Inspector,
    normals: Sequence[np.ndarray],
    out: Path | str,
    *,
    name: str,
    class_name: str | None = None,
    description: str = "",
    question: str = "",
    storage: Storage = "float32",
    max_patches: int | None = None,
    false_reject_rate: float | None = None,
    held_out: Sequence[np.ndarray] = (),
    without_verdict: WithoutVerdict = "no_result",
    tiles: Tiles | None = None,
    regions: Sequence[RegionOfInterest] = (),
    augmentation: Augmentation | None = None,
) -> Recipe:
    """Write ``out`` (TOML) and the memory bank beside it (``<stem>.bank.npz``).

    Args:
        inspector: its bundle's encoder makes the features.
        normals: frames of good parts, uint8 [H, W, 3] BGR.
        out: the recipe's path; both files are replaced whole.
        name: the product's name.
        class_name: one of the bundle's classes; its default when None.
        description: what a good part looks like, put before the question as the original's scripts do.
        question: asked of every part; the bundle's own when "".
        storage: of the memory bank: float16 halves its memory, int8 quarters it.
        max_patches: of the memory bank, in each tap and of each region; all when None.
        false_reject_rate: of good parts, for which the operating point of p(anomaly) is chosen; the greedy answer
            decides when None.
        held_out: other good parts to choose it on; each of ``normals`` against the rest when there are none.
        without_verdict: "map": where there is no time for an answer the map's operating point decides.
        tiles: look at tiles of the frame, which share the memory bank.
        regions: look at these boxes of the frame, which have a memory bank each.
        augmentation: of the normal samples in the memory bank: see ``augment``; the bundle's own when None.

    Returns:
        The recipe as written; ``inspector.use(out)`` takes it.

    Raises:
        ImageError, RecipeError, ConfigError: a frame, the class name, a region or the folder cannot be used; too few
            good parts for the rate.
    """
    if without_verdict not in get_args(WithoutVerdict):
        raise ConfigError(f"--without-verdict must be no_result or map, not {without_verdict!r}")
    if false_reject_rate is not None:
        check_rate(false_reject_rate, len(held_out or normals))
    elif held_out or without_verdict == "map":
        raise ConfigError("there is no rate to choose an operating point for: give --false-reject-rate too")
    out = Path(out)
    if not normals:
        raise RecipeError("there is no normal image: give at least one")
    layout = make_layout(tiles, tuple(regions), check_frame(normals[0]).shape[:2])
    recipe = Recipe(
        name=name,
        class_name=class_name,
        description=description,
        question=question,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        frame=layout.frame,
        tiles=layout.tiles,
        regions=layout.regions,
    )
    before = inspector.product
    inspector.use(recipe)
    try:
        with inspector.vision.encoder_cache():
            bank = inspector.make_bank(
                normals,
                storage,
                max_patches,
                augmentation,
                track=lambda frames: track(frames, "good parts", console=Console(stderr=True)),
            )
            point = None
            if false_reject_rate is not None:
                inspector.use(bank)
                verdicts = _judge(inspector, normals, held_out, storage, max_patches, augmentation)
                point = choose_operating_point(verdicts, false_reject_rate)
    finally:
        inspector.use(before)
    record = bank.save(out.with_name(f"{out.stem}.bank.npz"))
    recipe = msgspec.structs.replace(
        recipe, memory_bank=record, operating_point=point, without_verdict=without_verdict
    )
    save_recipe(recipe, out)
    return recipe


def _judge(
    inspector: Inspector,
    normals: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    storage: Storage,
    max_patches: int | None,
    augmentation: Augmentation | None,
) -> list[Verdict]:
    """Verdicts about good parts, none of which is in the bank that it is compared with."""
    console = Console(stderr=True)
    if held_out:
        return [inspector.inspect(frame) for frame in track(held_out, "good parts", console=console)]
    verdicts = []
    num_groups = min(MAX_GROUPS, len(normals))
    for group in track(range(num_groups), "each good part against the others", console=console):
        others = [frame for i, frame in enumerate(normals) if i % num_groups != group]
        inspector.use(inspector.make_bank(others, storage, max_patches, augmentation))
        verdicts += [inspector.inspect(frame) for frame in normals[group::num_groups]]
    return verdicts
