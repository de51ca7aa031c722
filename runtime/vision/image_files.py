"""Which image files of a folder are taken: one rule for the source of a run, good parts and calibration images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ImageError
from .images import SUFFIXES, is_image

MASK_FOLDER = "ground_truth"  # of a labelled set in MVTec-AD's layout
RECORDS_FILE, OVERLAY_FOLDER = "records.jsonl", "overlays"  # what a run writes into its --out folder


@dataclass(frozen=True)
class FoundImages:
    """The images under a folder, in natural order, and how many other files there are, by what they are."""

    paths: tuple[Path, ...]
    left_out: Counter[str]

    def remark(self) -> str:
        """ "6 files left out: 3 GIF, 2 hidden, 1 TXT"; "" when none is."""
        total = self.left_out.total()
        if not total:
            return ""
        kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        return f"{total} {'file' if total == 1 else 'files'} left out: {listed}"


def find_images(folder: Path, out: Path | None = None) -> FoundImages:
    """The images under a folder, at any depth.

    Hidden files and folders are left out, and so are masks (``ground_truth``), the overlays of a run (beside its
    ``records.jsonl``) and everything in ``out``. Links to folders are not followed.

    Args:
        folder: to look into.
        out: the run's own output folder.
    """
    out = None if out is None else out.resolve()
    own = [] if out is None else [out / OVERLAY_FOLDER]
    if out is not None and folder.resolve() != out and not folder.resolve().is_relative_to(out):
        own.append(out)
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    reasons: dict[str, str] = {}  # of folders that are left out with all they hold

    def unreadable(error: OSError) -> None:
        left_out["in folders that cannot be read"] += 1

    for name, folders, files in os.walk(folder, onerror=unreadable):
        reason = reasons.pop(name, "")
        for inner in folders:
            path = Path(name, inner)
            if path.is_symlink():
                left_out["linked folders"] += 1
            elif why := reason or _why_folder(path, files, own):
                reasons[str(path)] = why
        for file in files:
            path = Path(name, file)
            if why := reason or _why_file(path):
                left_out[why] += 1
            else:
                found.append(path)
    return FoundImages(tuple(sorted(found, key=natural_order)), left_out)


def _why_folder(path: Path, beside: list[str], own: list[Path]) -> str:
    """Why a folder is left out; "" when it is not."""
    if path.name.startswith("."):
        return "hidden"
    if path.name == MASK_FOLDER:
        return "masks"
    if (path.name == OVERLAY_FOLDER and RECORDS_FILE in beside) or (own and path.resolve() in own):
        return "written by a run"
    return ""


def _why_file(path: Path) -> str:
    """Why a file is no image to take; "" when it is one."""
    if path.name.startswith("."):
        return "hidden"
    if is_image(path):
        return ""
    if path.suffix.lower() in SUFFIXES:
        return "not regular files"  # a link to nothing, a device
    return path.suffix[1:].upper() or "without suffix"


def natural_order(path: Path) -> tuple[list[list[int | str]], Path]:
    """A key that sorts 2 before 10; names that it takes for the same follow their characters."""
    parts = (*path.parent.parts, path.stem, path.suffix)
    return [[_number_or_text(piece) for piece in re.split(r"(\d+)", part.casefold())] for part in parts], path


def _number_or_text(piece: str) -> int | str:
    return int(piece) if piece.isdecimal() else piece


def image_paths(paths: Iterable[Path], tell: Callable[[str], None] = lambda remark: None) -> list[Path]:
    """Image files, folders among them replaced by the images under them.

    Args:
        paths: files and folders.
        tell: hears, for each folder, which files were left out.

    Raises:
        ImageError: a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = find_images(path)
        if remark := inside.remark():
            tell(f"{path}: {remark}")
        if not inside.paths:
            raise ImageError(f"{path} holds no image: put pictures of good parts in")
        found += inside.paths
    return found
