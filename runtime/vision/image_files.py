"""Selects the image files of a folder, by one rule for the source of a run, good parts and calibration images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ImageError
from .images import SUFFIXES, is_image

MASK_FOLDER = "ground_truth"  # masks of a labelled data set in MVTec-AD layout
RECORDS_FILE, OVERLAY_FOLDER = "records.jsonl", "overlays"  # written to a run's --out folder


@dataclass(frozen=True)
class FoundImages:
    """The images under a folder in natural order, and the numbers of other files by the reason they were left out."""

    paths: tuple[Path, ...]
    left_out: Counter[str]

    def remark(self) -> str:
        """ "6 files left out: 3 GIF, 2 hidden, 1 TXT"; "" when none was left out."""
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
        folder: the folder to search.
        out: the run's own output folder.
    """
    out = None if out is None else out.resolve()
    own = [] if out is None else [out / OVERLAY_FOLDER]
    if out is not None and folder.resolve() != out and not folder.resolve().is_relative_to(out):
        own.append(out)
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    reasons: dict[str, str] = {}  # folder that is left out with its contents -> reason

    def unreadable(error: OSError) -> None:
        left_out["in folders that cannot be read"] += 1

    for name, folders, files in os.walk(folder, onerror=unreadable):
        reason = reasons.pop(name, "")
        for inner in folders:
            path = Path(name, inner)
            if path.is_symlink():
                left_out["linked folders"] += 1
            elif why := reason or _folder_exclusion(path, files, own):
                reasons[str(path)] = why
        for file in files:
            path = Path(name, file)
            if why := reason or _file_exclusion(path):
                left_out[why] += 1
            else:
                found.append(path)
    return FoundImages(tuple(sorted(found, key=natural_order)), left_out)


def _folder_exclusion(path: Path, beside: list[str], own: list[Path]) -> str:
    """The reason for leaving a folder out; "" when it is searched."""
    if path.name.startswith("."):
        return "hidden"
    if path.name == MASK_FOLDER:
        return "masks"
    if (path.name == OVERLAY_FOLDER and RECORDS_FILE in beside) or (own and path.resolve() in own):
        return "written by a run"
    return ""


def _file_exclusion(path: Path) -> str:
    """The reason for leaving a file out; "" when it is selected."""
    if path.name.startswith("."):
        return "hidden"
    if is_image(path):
        return ""
    if path.suffix.lower() in SUFFIXES:
        return "not regular files"  # a broken link, a device
    return path.suffix[1:].upper() or "without suffix"


def natural_order(path: Path) -> tuple[list[list[int | str]], Path]:
    """A sort key that puts 2 before 10; the path itself orders names that are otherwise equal (01 and 1)."""
    parts = (*path.parent.parts, path.stem, path.suffix)
    return [[_number_or_text(piece) for piece in re.split(r"(\d+)", part.casefold())] for part in parts], path


def _number_or_text(piece: str) -> int | str:
    return int(piece) if piece.isdecimal() else piece


def image_paths(paths: Iterable[Path], tell: Callable[[str], None] = lambda remark: None) -> list[Path]:
    """The given image files, with each folder replaced by the images under it.

    Args:
        paths: files and folders.
        tell: called for each folder with a remark on the files that were left out.

    Raises:
        ImageError: a folder contains no image.
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
            raise ImageError(f"{path} contains no image: add images of good parts")
        found += inside.paths
    return found
