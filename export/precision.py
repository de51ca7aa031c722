"""Networks of one precision from those of another, ONNX to ONNX, without torch.

One small function a precision (``export_float16``, ``to_int8``): it reads a float32 graph, writes another beside it,
and describes what it wrote. How much of a network becomes int8 is found on samples: the calibration images, and drawn
ones that are unlike them, through all three networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..kernels import localise, match, upsample
from ..runtime.bundle import NETWORKS, Bundle, Component, Manifest
from ..runtime.engines import Engine, open_engine
from ..runtime.inspector import default_threads
from .float16 import export_float16
from .quantize import to_int8
from .tolerances import TOLERANCES, error_of

# Which networks a precision changes; the others stay float32. At full size the encoder takes 325 GFLOP an image. The
# prompt learner is changed for its weights: 107 million, of which an answer needs every one once. The decoder has 5.
CONVERTED = {"fp16": NETWORKS, "int8": ("encoder", "prompt_learner")}
NUM_SAMPLES = 6  # of the calibration's, evenly spread
# Of a limit: what the samples may take of it. At 0.8 the worst golden case was at twice the limit.
SHARE_OF_LIMIT = 0.35

Stages = dict[str, np.ndarray]


def convert(
    folder: Path,
    manifest: Manifest,
    precision: str,
    pixels: Sequence[np.ndarray],
    unlike: Sequence[np.ndarray] = (),
) -> dict[str, Component]:
    """Write the networks of ``precision`` beside the float32 ones.

    Args:
        folder: holds the files of ``manifest``.
        manifest: its networks are float32.
        pixels: float32 [1, 3, S, S] each, of normal parts, for calibration.
        unlike: the same, of other images, on which int8 has to hold as well.

    Returns:
        All components, the language model among them, as they are now.
    """
    components = dict(manifest.components)
    if precision == "fp16":
        for name in CONVERTED["fp16"]:
            source = folder / components[name].file
            components[name] = export_float16(source, source.with_name(f"{name}.fp16.onnx"))
        return components
    spread = np.linspace(0, len(pixels) - 1, min(len(pixels), NUM_SAMPLES)).astype(int)
    samples = Samples(Bundle(folder, manifest), [*(pixels[i] for i in spread), *unlike])
    maps = [stages["zero_shot_map"] for stages in samples.expected]
    maps += [stages["few_shot_map"] for stages in samples.expected]
    batches = {
        "encoder": [{"pixels": batch} for batch in pixels],
        "prompt_learner": [{"anomaly_map": batch} for batch in maps],
    }
    for name in CONVERTED["int8"]:
        source = folder / components[name].file
        target = source.with_name(f"{name}.int8.onnx")
        components[name] = to_int8(source, target, batches[name], samples.judge(name))
    return components


class Samples:
    """What the float32 networks make of a few images, and whether others of the same folder come close enough."""

    def __init__(self, bundle: Bundle, pixels: Sequence[np.ndarray]) -> None:
        self._bundle = bundle
        self._pixels = pixels
        self._text = bundle.text_features()
        components = bundle.manifest.components
        encoded = self._encode(self._open(components["encoder"]))  # at full size 3 GB, freed again
        self._behind = {name: self._open(components[name]) for name in NETWORKS if name != "encoder"}
        self.expected = self._localise(encoded, self._behind)

    def judge(self, name: str) -> Callable[[Component], bool]:
        """Accepts a network in place of the float32 one."""
        return lambda component: self.worst(name, component) <= SHARE_OF_LIMIT

    def worst(self, name: str, component: Component) -> float:
        """The largest error of any stage and sample, over its limit in int8."""
        engine = self._open(component)
        if name == "encoder":
            found = self._localise(self._encode(engine), self._behind)
        else:
            found = self._localise(self.expected, {**self._behind, name: engine})
        return max(
            error_of(expected[stage], actual[stage], tolerance.kind) / tolerance.limit
            for stage, tolerance in TOLERANCES["int8"].items()
            for expected, actual in zip(self.expected, found, strict=True)
        )

    def _open(self, component: Component) -> Engine:
        return open_engine(self._bundle.folder / component.file, component, default_threads())

    def _encode(self, encoder: Engine) -> list[Stages]:
        return [encoder.run(pixels=pixels) for pixels in self._pixels]

    def _localise(self, encoded: Sequence[Stages], engines: Mapping[str, Engine]) -> list[Stages]:
        """Both maps of every sample and its prompts; the first sample is the others' normal part, the last one its."""
        size = self._bundle.manifest.preprocess.size
        features = [stages["patch_features"] for stages in encoded]
        normals = [features[-1], *features[:1] * (len(features) - 1)]
        found = []
        for stages, normal in zip(encoded, normals, strict=True):
            patches = stages["patch_features"]
            decoded = engines["decoder"].run(patch_features=patches, text_features=self._text)
            zero_shot = localise(decoded["patch_logits"], size)
            few_shot = upsample(match(patches, normal[0]), size)
            prompts = [engines["prompt_learner"].run(anomaly_map=each) for each in (zero_shot, few_shot)]
            rows = np.concatenate([each["prompt_embeddings"] for each in prompts])
            maps = {"zero_shot_map": zero_shot, "few_shot_map": few_shot}
            found.append({**stages, **maps, "prompt_embeddings": rows})
        return found


def remove_originals(folder: Path, before: dict[str, Component], after: dict[str, Component]) -> None:
    """Delete the files of components that were converted."""
    for file in {c.file for c in before.values()} - {c.file for c in after.values()}:
        for path in (folder / file, folder / f"{file}.data"):
            path.unlink(missing_ok=True)
