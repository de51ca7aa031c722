"""Comparison of an engine's results with those of onnxruntime on the CPU, for which export has verified the bundle."""

from __future__ import annotations

import numpy as np

from ....kernels import localise
from ...bundles.bundle import Bundle
from ...common.errors import BundleError
from . import Engine, learner_inputs, open_networks

REFERENCE = "onnxruntime"
NUM_SAMPLES = 2
# Name of each stage in the manifest's parity report, and the output that it compares.
STAGES = (
    ("image_embedding", "image_embedding"),
    ("patch_features", "patch_features"),
    ("zero_shot_map", "anomaly_map"),
    ("prompt_embeddings", "prompt_embeddings"),
)


def compare_with_cpu(
    bundle: Bundle, engine: str, networks: dict[str, Engine]
) -> list[tuple[str, float, float]]:
    """Compare all stages and return (stage, error, limit) of each; empty if the engine is onnxruntime on the CPU.

    Each engine runs on its own intermediate results. The limits are those of the manifest's parity report.

    Raises:
        BundleError: a stage's error is over its limit.
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
                f"{engine} computes other results for this bundle: {stage} differs by {error:.2g} "
                f"({tolerance['kind']}) from onnxruntime on the CPU, over the limit of {tolerance['limit']:.2g}; "
                f"build its plans again, or use --engine {REFERENCE}"
            )
        results.append((stage, error, tolerance["limit"]))
    return results


def run_chain(
    bundle: Bundle, networks: dict[str, Engine], pixels: np.ndarray, text_features: np.ndarray
) -> dict[str, np.ndarray]:
    """All networks' outputs and the zero-shot map, from float32 pixels [B, 3, S, S] and text features [2, E]."""
    results = networks["encoder"].run(pixels=pixels)
    features = results["patch_features"]
    results |= networks["decoder"].run(patch_features=features, text_features=text_features)
    results["anomaly_map"] = localise(results["patch_logits"], bundle.manifest.vision.map_size)
    learner = bundle.manifest.components["prompt_learner"]
    inputs = learner_inputs(learner, results["anomaly_map"], 0, pixels)
    return results | networks["prompt_learner"].run(**inputs)


def sample_pixels(bundle: Bundle) -> np.ndarray:
    """Coarse and fine noise from a fixed seed, float32 [2, 3, S, S]."""
    size = bundle.manifest.preprocess.size
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(NUM_SAMPLES, 3, 7, 7)).repeat(-(-size // 7), 2).repeat(-(-size // 7), 3)
    return (coarse[..., :size, :size] + rng.normal(size=(NUM_SAMPLES, 3, size, size))).astype(np.float32)


def published_tolerance(bundle: Bundle, stage: str) -> dict:
    """The tolerance of a stage in the manifest's parity report, for the encoder's precision if there is one.

    Raises:
        BundleError: the report lacks the stage.
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
    """The error by kind: "absolute" or "relative" largest difference (relative to the largest value), or
    "decorrelation", 1 − correlation; infinite if a value is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    if kind == "decorrelation":
        return 1 - float(np.corrcoef(expected.ravel(), found.ravel())[0, 1])
    error = float(np.abs(expected - found).max())
    return error / float(np.abs(expected).max()) if kind == "relative" else error
