"""anomalygpt-edge: a runtime that inspects parts on a production line with AnomalyGPT.

``import anomalygpt_edge as agpt`` provides the public names below; each is imported when it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime's Linux builds report usage over the network unless this is set before their first import. Every import
# of anomalygpt_edge runs this file first, and child processes inherit the variable.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Public name -> the module of anomalygpt_edge.runtime that defines it.
PUBLIC = {
    "AgptError": "common.errors",
    "Answer": "language.answer",
    "Bundle": "bundles.bundle",
    "BundleError": "common.errors",
    "CameraError": "common.errors",
    "ClosedError": "common.errors",
    "ConfigError": "common.errors",
    "Dialogue": "language.dialogue",
    "ImageError": "common.errors",
    "Inspector": "inspection.inspector",
    "LanguageModel": "language.model",
    "MemoryBank": "vision.memory_bank",
    "NearestNormal": "inspection.verdict",
    "Product": "inspection.product",
    "Recipe": "recipes.recipe",
    "RecipeError": "common.errors",
    "Record": "outputs.records",
    "Region": "vision.regions",
    "Result": "inspection.verdict",
    "Status": "inspection.verdict",
    "Verdict": "inspection.verdict",
    "ViewResult": "inspection.verdict",
    "VisionPipeline": "vision.pipeline",
    "enroll": "enrolment.enroll",
    "load_recipe": "recipes.recipe",
    "open_bundle": "bundles.bundle",
    "read_image": "vision.images",
    "save_recipe": "recipes.recipe",
}

__all__ = list(PUBLIC)

if TYPE_CHECKING:
    from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle
    from anomalygpt_edge.runtime.common.errors import (
        AgptError,
        BundleError,
        CameraError,
        ClosedError,
        ConfigError,
        ImageError,
        RecipeError,
    )
    from anomalygpt_edge.runtime.enrolment.enroll import enroll
    from anomalygpt_edge.runtime.inspection.inspector import Inspector
    from anomalygpt_edge.runtime.inspection.product import Product
    from anomalygpt_edge.runtime.inspection.verdict import NearestNormal, Result, Status, Verdict, ViewResult
    from anomalygpt_edge.runtime.language.answer import Answer
    from anomalygpt_edge.runtime.language.dialogue import Dialogue
    from anomalygpt_edge.runtime.language.model import LanguageModel
    from anomalygpt_edge.runtime.outputs.records import Record
    from anomalygpt_edge.runtime.recipes.recipe import Recipe, load_recipe, save_recipe
    from anomalygpt_edge.runtime.vision.images import read_image
    from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
    from anomalygpt_edge.runtime.vision.pipeline import VisionPipeline
    from anomalygpt_edge.runtime.vision.regions import Region


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'anomalygpt_edge' has no attribute {name!r}")
    value = getattr(import_module(f"anomalygpt_edge.runtime.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
