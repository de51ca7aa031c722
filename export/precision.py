"""Networks of one precision from those of another, ONNX to ONNX, without torch.

One small function a precision (``export_float16``, ``to_int8``): it reads a float32 graph, writes another beside it,
and describes what it wrote. How much of a network becomes int8 is found on samples, images that calibration has not
seen, through all three networks.
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
from .progress import Reach, nowhere
from .quantize import to_int8
from .tolerances import TOLERANCES, error_of

# What int8 changes, and which part of the work it is; the rest stays float32. At full size the encoder takes 325 GFLOP
# an image. The prompt learner is changed for its weights: 107 million, of which an answer needs every one once. The
# decoder has 5.
INT8_NETWORKS = {"encoder": 0.9, "prompt_learner": 0.1}
# Of a limit: what the samples may take of it, as other images may be worse.
SHARE_OF_LIMIT = 0.5
NUM_NORMALS = {"zero_shot_map": 0, "few_shot_map": 1}  # of each sample's maps
NUM_QUICK = 2  # samples by which layers are ordered: a part and what is unlike one

Stages = dict[str, np.ndarray]


def convert(
    folder: Path,
    manifest: Manifest,
    precision: str,
    calibration: Sequence[np.ndarray],
    samples: Sequence[np.ndarray],
    reach: Reach = nowhere,
) -> dict[str, Component]:
    """Write the networks of ``precision`` beside the float32 ones.

    Args:
        folder: holds the files of ``manifest``.
        manifest: its networks are float32.
        calibration: float32 [1, 3, S, S] each.
        samples: the same, of other images, on which int8 has to hold.
        reach: told which share of the work is done, 0 to 1.

    Returns:
        All components, the language model among them, as they are now.
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
        watch = partial(reach_part, reach, done, work)
        components[name] = to_int8(source, target, batches[name], trial, watch)
        done += work
    return components


def reach_part(reach: Reach, start: float, size: float, share: float) -> None:
    """Of a part of the work that begins at ``start``, so much is done."""
    reach(start + size * share)


class Samples:
    """What the float32 networks make of a few images, and whether others of the same folder come close enough."""

    def __init__(self, bundle: Bundle, pixels: Sequence[np.ndarray]) -> None:
        self._bundle = bundle
        self._pixels = pixels
        self._text = bundle.text_features()
        components = bundle.manifest.components
        self._learner = components["prompt_learner"]
        encoded = self._encode(self.open(components["encoder"]))  # at full size 3 GB, freed again
        self._behind = {name: self.open(components[name]) for name in NETWORKS if name != "encoder"}
        self.expected = self._localise(encoded, self._behind)

    def errors(self, name: str, engine: Engine, count: int | None = None) -> np.ndarray:
        """With an engine in place of the float32 network, of the first ``count`` samples: the largest of any stage,
        over its limit in int8."""
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
        """On the CPU, where it has to hold."""
        return open_engine(self._bundle.folder / component.file, component, default_threads())

    def _encode(self, encoder: Engine, count: int | None = None) -> list[Stages]:
        return [encoder.run(pixels=pixels) for pixels in self._pixels[:count]]

    def _localise(self, encoded: Sequence[Stages], engines: Mapping[str, Engine]) -> list[Stages]:
        """Both maps of every sample and its prompts; the first sample is the others' normal part, the second its."""
        size = self._bundle.manifest.preprocess.size
        features = [stages["patch_features"] for stages in encoded]
        normals = [features[1], *features[:1] * (len(features) - 1)]
        found = []
        for stages, normal, pixels in zip(
            encoded, normals, self._pixels, strict=False
        ):  # of the first samples, maybe
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
    """What decides how much of one network becomes int8; see ``passes.Trial``."""

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
