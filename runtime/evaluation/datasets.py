"""Labelled image sets on disk: the MVTec-AD layout and the VisA layout (its split table ``1cls.csv``).

MVTec-AD:  ROOT/<category>/train/good/*  test/<good or defect>/*  ground_truth/<defect>/<name>_mask.*
VisA:      ROOT/split_csv/1cls.csv with the columns object,split,label,image,mask (paths relative to ROOT);
           columns separated by commas or semicolons

Hidden files and folders are skipped.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..common.errors import ConfigError
from ..vision.image_files import MASK_FOLDER
from ..vision.images import is_image

VISA_TABLE = Path("split_csv") / "1cls.csv"
VISA_COLUMNS = {"object", "split", "label", "image", "mask"}


@dataclass(frozen=True)
class Sample:
    """One test image. ``mask`` is None for a normal image, and for an anomalous one without a mask."""

    image: Path
    kind: str  # "good", or the defect's name
    mask: Path | None = None

    @property
    def anomalous(self) -> bool:
        return self.kind != "good"


@dataclass(frozen=True)
class Category:
    """One product: its normal training images, and its test images."""

    name: str
    normals: tuple[Path, ...]
    tests: tuple[Sample, ...]


def find_categories(folder: Path) -> list[Category]:
    """The categories in a folder, which is one category or contains several, in either layout.

    Raises:
        ConfigError: the folder does not exist, or has neither layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give one in MVTec-AD or VisA layout")
    found = _visa(folder) or _mvtec(folder)
    if not found:
        raise ConfigError(
            f"{folder} is in neither layout: MVTec-AD has train/good and test/* in each category, "
            f"VisA has {VISA_TABLE.as_posix()}"
        )
    return found


def list_images(folder: Path) -> tuple[Path, ...]:
    """The image files directly in a folder, sorted by name; empty where the folder does not exist."""
    return tuple(filter(is_image, _visible(folder)))


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted by name; empty where the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _mvtec(folder: Path) -> list[Category]:
    roots = [folder] if (folder / "test").is_dir() else _visible(folder)
    found = [_mvtec_category(root) for root in roots if (root / "test").is_dir()]
    return [category for category in found if category.tests]


def _mvtec_category(root: Path) -> Category:
    tests = [
        Sample(image, kind.name, masks.get(f"{image.stem}_mask") or masks.get(image.stem))
        for kind in _visible(root / "test")
        for masks in ({path.stem: path for path in list_images(root / MASK_FOLDER / kind.name)},)
        for image in list_images(kind)
    ]
    return Category(root.resolve().name, list_images(root / "train" / "good"), tuple(tests))


def _visa(folder: Path) -> list[Category]:
    """VisA's root, or one of its category folders (the table is then one level up)."""
    folder = folder.resolve()
    for root, wanted in ((folder, None), (folder.parent, folder.name)):
        if (root / VISA_TABLE).is_file():
            rows = _visa_rows(root / VISA_TABLE)
            names = [name for name in dict.fromkeys(row["object"] for row in rows) if wanted in (None, name)]
            return [_visa_category(root, name, rows) for name in names]
    return []


def _visa_rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            delimiter = ";" if ";" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            rows = [{name: row[name] or "" for name in VISA_COLUMNS & row.keys()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table} is not a readable CSV table ({error}): copy it again") from error
    if missing := VISA_COLUMNS - set(reader.fieldnames or ()):
        raise ConfigError(f"{table} lacks the column(s) {', '.join(sorted(missing))}: copy it again")
    return rows


def _visa_category(root: Path, name: str, rows: list[dict[str, str]]) -> Category:
    normals, tests = [], []
    for row in rows:
        if row["object"] != name:
            continue
        image = _inside(root, row["image"])
        if row["split"] == "train":
            normals.append(image)
        elif row["label"] == "normal":
            tests.append(Sample(image, "good"))
        else:
            tests.append(Sample(image, row["label"], _inside(root, row["mask"]) if row["mask"] else None))
    return Category(name, tuple(normals), tuple(tests))


def _inside(root: Path, relative: str) -> Path:
    """The absolute form of a path in the table.

    Raises:
        ConfigError: the path is outside the root.
    """
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"{root / VISA_TABLE} names {relative!r}, which is outside {root}: correct the path"
        )
    return root / path
