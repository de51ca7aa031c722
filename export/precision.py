"""Converts the float32 networks to fp16 or int8, ONNX to ONNX, without torch.

Each precision has one function (``export_float16``, ``to_int8``) that reads a float32 graph, writes another beside it
and returns its description. How much of a network becomes int8 is decided on samples, images that are not used for
calibration, run through all three networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..kernels import localise, match, upsample
from ..runtime.bundles.bundle import NETWORKS, Bundle, Component, Manifest
from ..runtime.common.machine import default_threads
from ..runtime.vision.engines import Engine, learner_inputs, open_engine
from .float16 import export_float16
from .progress import OnProgress, ignore_progress
from .quantize import to_int8
from .tolerances import TOLERANCES, error_of

# The networks that int8 changes, and each one's share of the work, for the progress; the decoder stays float32. At full
# size the encoder takes 325 GFLOP per image. The prompt learner is converted for its 107 million weights, which every
# answer reads once; the decoder has only 5 million.
INT8_NETWORKS = {"encoder": 0.9, "prompt_learner": 0.1}
# Share of a tolerance's limit that the samples may use, as other images may be worse.
SHARE_OF_LIMIT = 0.5
NUM_NORMALS = {"zero_shot_map": 0, "few_shot_map": 1}  # normal samples behind each of a sample's maps
NUM_QUICK = 2  # samples that layers are ordered by: a part and an image without one

Stages = dict[str, np.ndarray]


def convert(
    folder: Path,
    manifest: Manifest,
    precision: str,
    calibration: Sequence[np.ndarray],
    samples: Sequence[np.ndarray],
    on_progress: OnProgress = ignore_progress,
) -> dict[str, Component]:
    """Write the networks of ``precision`` beside the float32 ones.

    Args:
        folder: contains the files of ``manifest``.
        manifest: lists the float32 networks.
        precision: "fp16" or "int8".
        calibration: calibration images, float32 [1, 3, S, S] each.
        samples: other images that int8 is checked on, float32 [1, 3, S, S] each.
        on_progress: called with the share of the work that is done, 0 to 1.

    Returns:
        All components after the conversion, including the language model.
    """
    components = dict(manifest.components)
    if precision == "fp16":
        for name in NETWORKS:
            source = folder / components[name].file
            components[name] = export_float16(source, source.with_name(f"{name}.fp16.onnx"))
        return components
    reference = Samples(Bundle(folder, manifest), samples)
    batches = {
        "encoder": [{"pixels": pixels} for pixels in calibration],
        "prompt_learner": [
            learner_inputs(components["prompt_learner"], stages[kind], count, pixels)
            for kind, count in NUM_NORMALS.items()
            for stages, pixels in zip(reference.expected, samples, strict=True)
        ],
    }
    done = 0.0
    for name, work in INT8_NETWORKS.items():
        source = folder / components[name].file
        target = source.with_name(f"{name}.int8.onnx")
        trial = SamplesTrial(reference, name)
        watch = partial(report_part, on_progress, done, work)
        components[name] = to_int8(source, target, batches[name], trial, watch)
        done += work
    return components


def report_part(on_progress: OnProgress, start: float, size: float, share: float) -> None:
    """Report the progress of a part of the work that begins at ``start`` and has this size (both shares of 1)."""
    on_progress(start + size * share)


class Samples:
    """Results of the float32 networks on a few images, and the errors of converted networks against them."""

    def __init__(self, bundle: Bundle, pixels: Sequence[np.ndarray]) -> None:
        self._bundle = bundle
        self._pixels = pixels
        self._text = bundle.text_features()
        components = bundle.manifest.components
        self._learner = components["prompt_learner"]
        encoded = self._encode(
            self.open(components["encoder"])
        )  # the engine takes 3 GB at full size, freed here
        self._behind = {name: self.open(components[name]) for name in NETWORKS if name != "encoder"}
        self.expected = self._localise(encoded, self._behind)

    def errors(self, name: str, engine: Engine, count: int | None = None) -> np.ndarray:
        """Errors of the first ``count`` samples with an engine in place of the float32 network ``name``, float [S]:
        the largest of all stages, each divided by its int8 limit."""
        if name == "encoder":
            found = self._localise(self._encode(engine, count), self._behind)
        else:
            found = self._localise(self.expected[:count], {**self._behind, name: engine})
        return np.array(
            [
                max(
                    error_of(expected[stage], actual[stage], tolerance.kind) / tolerance.limit
                    for stage, tolerance in TOLERANCES["int8"].items()
                )
                for expected, actual in zip(self.expected, found, strict=False)
            ]
        )

    def open(self, component: Component) -> Engine:
        """An engine on the CPU, where the limits have to hold."""
        return open_engine(self._bundle.folder / component.file, component, default_threads())

    def _encode(self, encoder: Engine, count: int | None = None) -> list[Stages]:
        return [encoder.run(pixels=pixels) for pixels in self._pixels[:count]]

    def _localise(self, encoded: Sequence[Stages], engines: Mapping[str, Engine]) -> list[Stages]:
        """Both maps and the prompt embeddings of every sample. The first sample is the normal sample of the others,
        the second that of the first."""
        size = self._bundle.manifest.vision.map_size
        features = [stages["patch_features"] for stages in encoded]
        normals = [features[1], *features[:1] * (len(features) - 1)]
        found = []
        # not strict: ``encoded`` may contain the first samples only
        for stages, normal, pixels in zip(encoded, normals, self._pixels, strict=False):
            patches = stages["patch_features"]
            decoded = engines["decoder"].run(patch_features=patches, text_features=self._text)
            zero_shot = localise(decoded["patch_logits"], size)
            few_shot = upsample(match(patches, normal[0]), size)
            maps = {"zero_shot_map": zero_shot, "few_shot_map": few_shot}
            inputs = [
                learner_inputs(self._learner, maps[kind], count, pixels)
                for kind, count in NUM_NORMALS.items()
            ]
            prompts = [engines["prompt_learner"].run(**each) for each in inputs]
            rows = np.concatenate([each["prompt_embeddings"] for each in prompts])
            found.append({**stages, **maps, "prompt_embeddings": rows})
        return found


@dataclass(frozen=True)
class SamplesTrial:
    """Measures how much of one network can become int8; see ``passes.Trial``."""

    samples: Samples
    name: str
    limit: float = SHARE_OF_LIMIT

    def open(self, component: Component) -> Engine:
        return self.samples.open(component)

    def errors(self, engine: Engine, quick: bool = False) -> np.ndarray:
        return self.samples.errors(self.name, engine, NUM_QUICK if quick else None)


def remove_originals(folder: Path, before: dict[str, Component], after: dict[str, Component]) -> None:
    """Delete the files of components that were converted."""
    for file in {c.file for c in before.values()} - {c.file for c in after.values()}:
        for path in (folder / file, folder / f"{file}.data"):
            path.unlink(missing_ok=True)
