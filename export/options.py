"""Options of ``agpt export``. Imports nothing heavy: the command line checks them before it imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..runtime.bundles.bundle import MANIFEST_FILE
from ..runtime.common.errors import ConfigError
from .tensorrt_plan import PlanOptions

ENGINES = ("onnx", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")
LLM_PRECISIONS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
RESIZE_MODES = ("crop", "stretch")
MAX_CLASS_LENGTH = 64

Resize = Literal["crop", "stretch"]


@dataclass(frozen=True)
class ExportOptions:
    """Input files, target folder and settings of an export; checked on construction.

    Raises:
        ConfigError: an option is invalid, or the target is a file or a folder that is not a bundle.
    """

    imagebind: Path
    vicuna: Path
    pandagpt: Path
    anomalygpt: Path
    text_features: Path | None  # None: computed with ImageBind's text tower
    out: Path
    about: Path | None = None
    precision: str = "fp32"
    calibration: Path | None = None  # folder of normal images for int8; None: generated images only
    llm_quant: str = "f16"
    engines: tuple[str, ...] = ("onnx",)  # onnx is in every bundle
    plans: tuple[PlanOptions, ...] = ()  # one for each of the engines that needs plans
    classes: tuple[
        str, ...
    ] = ()  # empty: those of model.json, else of the text features, else the original's 30
    resize: Resize = "crop"
    allow_parity_failure: bool = False
    max_memory: int | None = None  # bytes

    @classmethod
    def of_folder(cls, checkpoint: Path, out: Path, **others: Any) -> ExportOptions:
        """Options for a folder that the training of nano or lite wrote; raises like the constructor."""
        return cls(
            imagebind=vision_file(checkpoint),
            vicuna=checkpoint / "vicuna",
            pandagpt=checkpoint / "pandagpt.safetensors",
            anomalygpt=checkpoint / "anomalygpt.safetensors",
            text_features=checkpoint / "text_features.npz",
            about=checkpoint / "model.json",
            out=out,
            **others,
        )

    def __post_init__(self) -> None:
        choose("--precision", self.precision, PRECISIONS)
        choose("--llm-quant", self.llm_quant, LLM_PRECISIONS)
        choose("--resize", self.resize, RESIZE_MODES)
        for engine in self.engines:
            choose("--engine", engine, ENGINES)
        for name in self.classes:
            check_class(name)
        if self.calibration and self.precision != "int8":
            raise ConfigError("--calibration needs --precision int8: add that option, or leave it out")
        check_target(self.out)


def choose(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        ConfigError: it is not.
    """
    if value not in known:
        raise ConfigError(f"{option} {value} is not available: choose {' or '.join(known)}")


def parse_size(text: str) -> int:
    """Bytes of "8G", "512M" or a plain number.

    Raises:
        ConfigError: the text is not a size, or the size is below one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ConfigError(
            f"--max-memory {text} is not a size: give a number with K, M, G or T, for example 8G"
        )
    return size


def check_class(name: str) -> None:
    """Refuse a class name that cannot be put into sentences or name an array in a file.

    Raises:
        ConfigError: it is too long, or contains unprintable characters or slashes.
    """
    if len(name) > MAX_CLASS_LENGTH or not name.isprintable() or set(name) & set("/\\"):
        raise ConfigError(
            f"--classes: {name[:MAX_CLASS_LENGTH]!r} is not a class name: "
            f"give plain words, at most {MAX_CLASS_LENGTH} characters, without / or \\"
        )


def check_target(out: Path) -> None:
    """Refuse a target whose content is not a bundle: only bundles may be replaced.

    Raises:
        ConfigError: the target is a file, or a folder with other content.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder for --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise ConfigError(f"{out} exists and is not a bundle: choose another folder or empty it")


def vision_file(folder: Path) -> Path:
    """The vision encoder of a checkpoint folder: lite's ``vision.safetensors``, or ``imagebind.safetensors``."""
    lite = folder / "vision.safetensors"
    return lite if lite.exists() else folder / "imagebind.safetensors"
