"""Enrolment: normal samples of a product become a recipe with its memory bank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np

from .inspector import Inspector
from .memory_bank import Storage
from .recipe import Recipe, save_recipe


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
        max_patches: of the memory bank, in each tap; all when None.

    Returns:
        The recipe as written; ``inspector.use(out)`` takes it.

    Raises:
        ImageError, RecipeError, ConfigError: a frame, the class name or the folder cannot be used.
    """
    out = Path(out)
    recipe = Recipe(
        name=name,
        class_name=class_name,
        description=description,
        question=question,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    before = inspector.product
    inspector.use(recipe)
    try:
        bank = inspector.make_bank(normals, storage, max_patches)
    finally:
        inspector.use(before)
    record = bank.save(out.with_name(f"{out.stem}.bank.npz"))
    recipe = msgspec.structs.replace(recipe, memory_bank=record)
    save_recipe(recipe, out)
    return recipe
