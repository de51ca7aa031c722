"""Enrolment: makes a recipe and its memory bank from normal samples of a product."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
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
from ..vision.augment import check_augmentation
from ..vision.memory_bank import MemoryBank, Storage
from ..vision.views import RegionOfInterest, Resize, Tiles, make_layout
from .operating_point import check_rate, choose_operating_point
from .samples import Sample, check_apart, check_sizes, name_samples

MAX_GROUPS = (
    20  # of good parts, each judged against the others (cross-validation); one per part if there are fewer
)


def enroll(
    inspector: Inspector,
    normals: Sequence[np.ndarray | Sample],
    out: Path | str,
    *,
    name: str,
    class_name: str | None = None,
    description: str = "",
    question: str = "",
    storage: Storage = "float32",
    max_patches: int | None = None,
    false_reject_rate: float | None = None,
    held_out: Sequence[np.ndarray | Sample] = (),
    without_verdict: WithoutVerdict = "no_result",
    tiles: Tiles | None = None,
    regions: Sequence[RegionOfInterest] = (),
    augmentation: Augmentation | None = None,
    resize: Resize | None = None,
) -> Recipe:
    """Make a recipe, ``out`` (TOML), and its memory bank in the same folder (``<stem>.bank.npz``).

    Args:
        inspector: its bundle's encoder computes the features.
        normals: frames of good parts, uint8 [H, W, 3] BGR, or samples, which have a name for messages.
        out: the recipe's path. Its folder is created if necessary; existing files are replaced by rename.
        name: the product's name.
        class_name: one of the bundle's classes; its default class when None.
        description: description of a good part, which precedes the question as in AnomalyGPT's scripts.
        question: the question about every part; "" for the bundle's.
        storage: of the memory bank: float16 halves its memory, int8 quarters it.
        max_patches: the most patches of the memory bank in each tap and region; None for no limit.
        false_reject_rate: share of good parts that may be rejected; the operating point is chosen for it. None: there
            is no operating point, and the greedy answer decides.
        held_out: other good parts to choose the operating point on; when empty, ``normals`` are used, each judged
            against others.
        without_verdict: "map": the operating point of the map score decides if there is no time for an answer.
        tiles: inspect tiles of the frame, which share the memory bank.
        regions: inspect these boxes of the frame, each with its own memory bank.
        augmentation: of the normal samples in the memory bank, see ``augment``; None for the bundle's default.
        resize: how frames, or regions and tiles, are fitted to the encoder's square input: "crop" cuts the centre
            square, so that the rest is not inspected (``Verdict.unseen``); "stretch" keeps everything. None: the
            bundle's default for whole frames, "stretch" for regions and tiles.

    Returns:
        The recipe as written; load it with ``inspector.use(out)``.

    Raises:
        ImageError, RecipeError, ConfigError: a frame, an option, a region or the folder cannot be used, a held-out
            image is also in the bank, or there are too few good parts for the rate. All of this is checked before
            the encoder runs.
    """
    out = Path(out)
    known, others = name_samples(normals, "normal image"), name_samples(held_out, "held-out image")
    if not known:
        raise RecipeError("there are no normal images: give at least one")
    check_options(name, storage, max_patches, augmentation, without_verdict, resize)
    check_folder(out)
    if false_reject_rate is not None:
        check_rate(false_reject_rate, len(others or known))
    elif others or without_verdict == "map":
        raise ConfigError("an operating point needs a false-reject rate: give --false-reject-rate too")
    check_apart(known, others)
    layout = make_layout(tiles, tuple(regions), known[0].pixels.shape[:2])
    if not layout.is_whole:
        check_sizes([*known, *others])
    recipe = make_recipe(
        name=name,
        class_name=class_name,
        description=description,
        question=question,
        resize=resize,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        frame=layout.frame,
        tiles=layout.tiles,
        regions=layout.regions,
    )
    before = inspector.product
    inspector.use(recipe)
    settings = BankSettings(storage, max_patches, augmentation)
    try:
        with inspector.vision.encoder_cache():
            bank = settings.build(inspector, known, progress=True)
            check = inspector.learn_check([sample.pixels for sample in known], bank)
            point = None
            if false_reject_rate is not None:
                inspector.use(bank)
                verdicts = judge_good_parts(inspector, known, others, settings)
                point = choose_operating_point(verdicts, false_reject_rate)
    finally:
        inspector.use(before)
    record = bank.save(out.with_name(f"{out.stem}.bank.npz"))
    recipe = msgspec.structs.replace(
        recipe, memory_bank=record, frame_check=check, operating_point=point, without_verdict=without_verdict
    )
    save_recipe(recipe, out)
    return recipe


@dataclass(frozen=True)
class BankSettings:
    """Settings of an enrolment's memory banks; see ``enroll``."""

    storage: Storage
    max_patches: int | None
    augmentation: Augmentation | None

    def build(self, inspector: Inspector, samples: Sequence[Sample], progress: bool = False) -> MemoryBank:
        """Build the memory bank of these samples for the inspector's product, with a progress bar if requested."""
        frames = [sample.pixels for sample in samples]
        watch = partial(track, description="good parts", console=Console(stderr=True)) if progress else iter
        return inspector.make_bank(frames, self.storage, self.max_patches, self.augmentation, track=watch)


def check_options(
    name: str,
    storage: str,
    max_patches: int | None,
    augmentation: str | None,
    without_verdict: str,
    resize: str | None = None,
) -> None:
    """Check the options of ``enroll``.

    Raises:
        ConfigError: an option has an invalid value.
    """
    if not name.strip():
        raise ConfigError("--name is empty: give the product a name")
    if storage not in get_args(Storage):
        raise ConfigError(f"--storage must be one of {', '.join(get_args(Storage))}, not {storage!r}")
    if max_patches is not None and max_patches < 1:
        raise ConfigError(f"--max-patches must be at least 1, not {max_patches}")
    if augmentation is not None:
        check_augmentation(augmentation)
    if without_verdict not in get_args(WithoutVerdict):
        raise ConfigError(f"--without-verdict must be no_result or map, not {without_verdict!r}")
    if resize is not None and resize not in get_args(Resize):
        raise ConfigError(f"--resize must be crop or stretch, not {resize!r}")


def check_folder(out: Path) -> None:
    """Create the recipe's folder and check that files can be written there.

    Raises:
        ConfigError: the folder cannot be created or written, or ``out`` is a folder.
    """
    if out.is_dir():
        raise ConfigError(
            f"{out} is a folder: give --out the name of a recipe file, {out / 'part.toml'} for example"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write into {out.parent} ({error.strerror}): choose another --out"
        ) from error


def make_recipe(**values: object) -> Recipe:
    """Make a recipe from options.

    Raises:
        ConfigError: a value is too long or out of range.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(values), Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"these options do not form a valid recipe ({error}): correct them") from error


def judge_good_parts(
    inspector: Inspector, known: Sequence[Sample], others: Sequence[Sample], settings: BankSettings
) -> list[Verdict]:
    """Verdicts about ``others``, or by cross-validation about ``known``, so that no part is in its own memory bank."""
    console = Console(stderr=True)
    if others:
        return [inspector.inspect(sample.pixels) for sample in track(others, "good parts", console=console)]
    verdicts = []
    num_groups = min(MAX_GROUPS, len(known))
    for group in track(range(num_groups), "each good part against the others", console=console):
        inspector.use(settings.build(inspector, [s for i, s in enumerate(known) if i % num_groups != group]))
        verdicts += [inspector.inspect(sample.pixels) for sample in known[group::num_groups]]
    return verdicts
