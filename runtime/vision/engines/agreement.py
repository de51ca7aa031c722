"""An engine against onnxruntime on the CPU, where every bundle's graphs are proven: same input, same result."""

from __future__ import annotations

import numpy as np

from ....kernels import localise
from ...bundles.bundle import Bundle
from ...common.errors import BundleError
from . import Engine, learner_inputs, open_networks

REFERENCE = "onnxruntime"
NUM_SAMPLES = 2
# Stage as the manifest's parity report names it, and the output that it is read from.
STAGES = (
    ("image_embedding", "image_embedding"),
    ("patch_features", "patch_features"),
    ("zero_shot_map", "anomaly_map"),
    ("prompt_embeddings", "prompt_embeddings"),
)


def compare_with_cpu(
    bundle: Bundle, engine: str, networks: dict[str, Engine]
) -> list[tuple[str, float, float]]:
    """Stage, error and limit of every stage; nothing when the engine is the CPU's.

    Each side runs on its own intermediate results. The limits are those the bundle was published by.

    Raises:
        BundleError: a stage is over its limit.
    """
    if engine == REFERENCE:
        return []
    pixels = sample_pixels(bundle)
    text = bundle.text_features()
    found = run_chain(bundle, networks, pixels, text)
    expected = run_chain(bundle, open_networks(bundle, REFERENCE), pixels, text)
    results = []
    for stage, output in STAGES:
        tolerance = published_tolerance(bundle, stage)
        error = difference(expected[output], found[output], tolerance["kind"])
        if not error <= tolerance["limit"]:
            raise BundleError(
                f"{engine} does not compute what this bundle says: {stage} is {error:.2g} {tolerance['kind']} from "
                f"onnxruntime on the CPU, allowed is {tolerance['limit']:.2g}; build its plans again, or use "
                f"--engine {REFERENCE}"
            )
        results.append((stage, error, tolerance["limit"]))
    return results


def run_chain(
    bundle: Bundle, networks: dict[str, Engine], pixels: np.ndarray, text_features: np.ndarray
) -> dict[str, np.ndarray]:
    """Zero-shot: pixels [B, 3, S, S] and text features [2, E] → every network's outputs, and the map."""
    results = networks["encoder"].run(pixels=pixels)
    features = results["patch_features"]
    results |= networks["decoder"].run(patch_features=features, text_features=text_features)
    results["anomaly_map"] = localise(results["patch_logits"], pixels.shape[-1])
    learner = bundle.manifest.components["prompt_learner"]
    inputs = learner_inputs(learner, results["anomaly_map"], 0, pixels)
    return results | networks["prompt_learner"].run(**inputs)


def sample_pixels(bundle: Bundle) -> np.ndarray:
    """Noise of every scale, always the same: float32 [2, 3, S, S]."""
    size = bundle.manifest.preprocess.size
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(NUM_SAMPLES, 3, 7, 7)).repeat(-(-size // 7), 2).repeat(-(-size // 7), 3)
    return (coarse[..., :size, :size] + rng.normal(size=(NUM_SAMPLES, 3, size, size))).astype(np.float32)


def published_tolerance(bundle: Bundle, stage: str) -> dict:
    """The tolerance of a stage in the manifest's parity report, that of the encoder's precision if it has one.

    Raises:
        BundleError: the report does not have the stage.
    """
    stages = bundle.manifest.parity.get("stages", {})
    precision = bundle.manifest.components["encoder"].precision
    tolerance = stages.get(f"{stage} {precision}") or stages.get(stage)
    if tolerance is None:
        raise BundleError(
            f"{bundle.folder} was published without a comparison of {stage}: re-run agpt export"
        )
    return tolerance


def difference(expected: np.ndarray, found: np.ndarray, kind: str) -> float:
    """Largest difference, ``relative`` to the largest value or ``absolute``; or 1 − correlation."""
    if not np.isfinite(found).all():
        return float("inf")
    if kind == "decorrelation":
        return 1 - float(np.corrcoef(expected.ravel(), found.ravel())[0, 1])
    error = float(np.abs(expected - found).max())
    return error / float(np.abs(expected).max()) if kind == "relative" else error
