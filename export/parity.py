"""Parity check before publishing: the bundle against the torch reference, stage by stage, on sample images.

Both sides run completely, each on its own intermediate results, as on a device. The first stage over its tolerance
shows where the export went wrong. The tolerances of the networks are in ``tolerances.py``, those of the answers below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..kernels import localise, match, preprocess, upsample
from ..runtime.bundles.bundle import Bundle, Manifest
from ..runtime.common.errors import AgptError
from ..runtime.language.model import LanguageModel
from ..runtime.vision.engines import learner_inputs, open_engine
from .reference import Reference
from .samples import draw_part, draw_poster, draw_texture
from .tolerances import TOLERANCES, Tolerance, error_of

MAX_ANSWER_TOKENS = 16
NUM_SAMPLES = 2


class ParityError(AgptError):
    """The exported files do not compute what the checkpoints define."""


MERGE = "the language model was merged wrongly (LoRA left out, applied twice, or from another PandaGPT)"
VISION = "the encoder's graph does not belong to these checkpoints"
# The usual cause when this stage is the first to fail.
CAUSES = {
    "image_embedding": VISION,
    "patch_features": VISION,
    "zero_shot_map": "the decoder's graph or the text features do not belong to these checkpoints",
    "few_shot_distance": "the matching kernel is broken on this machine",
    "few_shot_map": "the upsampling kernel is broken on this machine",
    "prompt_embeddings": "the prompt learner's graph does not belong to these checkpoints",
}
# Largest error of the first answer logits, relative to the largest logit. A greedy token may differ from the
# reference's only where the reference's own logits are this close to a tie. The limits of quantised models are 1.5
# times the errors measured on the golden checkpoints (7B's width, random weights: the worst case, as no logit stands
# out): 0.037, 0.089, 0.17, 0.32, 0.36. They only detect a broken quantiser; a wrong merge already fails in float16.
ANSWER_LIMITS = {"f16": 1e-2, "q8_0": 0.06, "q6_k": 0.14, "q5_k_m": 0.26, "q4_k_m": 0.48, "q4_0": 0.55}
# Added to these limits for the networks' precision, which changes the image and prompt embeddings. Measured, f16's
# own 2.2e-3 included: fp16 1.1e-3 (seed 21, see tolerances.py), int8 1.4e-2 (golden checkpoints).
NETWORK_ANSWER_LIMITS = {"fp32": 0.0, "fp16": 5e-3, "int8": 0.04}


@dataclass(frozen=True)
class Case:
    """One inspection: a frame and its normal samples (none: zero-shot), uint8 BGR [H, W, 3] each."""

    frame: np.ndarray
    normals: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class StageResult:
    stage: str
    error: float
    limit: float
    kind: str
    cause: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Answers:
    """The bundle's answer to each case: logits of the first token, float32 [vocab], and greedy token ids."""

    first_logits: list[np.ndarray]
    token_ids: list[tuple[int, ...]]


Stages = dict[str, list[np.ndarray]]
Advance = Callable[[], None]


def no_progress() -> None:
    """Ignore progress."""


class Parity:
    """Runs the cases once on both sides; converted networks and language models can be checked again.

    ``advance`` is called once per case and side, and once per layer of the reference's language model: 2 · cases
    times by the constructor, cases times by ``of``, cases + layers times by ``answers``.
    """

    def __init__(
        self,
        reference: Reference,
        folder: Path,
        manifest: Manifest,
        cases: Sequence[Case],
        advance: Advance = no_progress,
    ) -> None:
        self._reference = reference
        self._folder = folder
        self._manifest = manifest
        self._cases = cases
        self._precision = "fp32"
        self.bundle = self._run_bundle(Bundle(folder, manifest), advance)
        self.expected = self._run_reference(advance)

    def of(self, manifest: Manifest, precision: str, advance: Advance = no_progress) -> Parity:
        """The same cases with other graphs from the same folder; the reference's results are reused."""
        other = copy.copy(self)
        other._manifest, other._precision = manifest, precision
        other.bundle = other._run_bundle(Bundle(self._folder, manifest), advance)
        return other

    def networks(self) -> list[StageResult]:
        """Results of every stage before the language model."""
        label = "" if self._precision == "fp32" else f" {self._precision}"
        return [
            compare(stage + label, self.expected[stage], self.bundle[stage], tolerance, CAUSES[stage])
            for stage, tolerance in TOLERANCES[self._precision].items()
            if stage in self.expected
        ]

    def answers(
        self,
        gguf: Path,
        precision: str,
        threads: int,
        max_tokens: int = MAX_ANSWER_TOKENS,
        advance: Advance = no_progress,
    ) -> list[StageResult]:
        """Results for the first-token logits and the greedy tokens of a GGUF file, given the bundle's embeddings.

        Args:
            gguf: the language model.
            precision: of the language model.
            threads: of llama.cpp.
            max_tokens: answer tokens to compare.
            advance: called after each case, and after each layer of the reference's language model.
        """
        answers = self._ask(gguf, threads, max_tokens, advance)
        expected = self._reference_logits(answers.token_ids, advance)
        limit = ANSWER_LIMITS[precision] + NETWORK_ANSWER_LIMITS[self._precision]
        label = precision if self._precision == "fp32" else f"{self._precision} + {precision}"
        first = compare(
            f"answer_logits {label}",
            [logits[0] for logits in expected],
            answers.first_logits,
            Tolerance("relative", limit),
            MERGE,
        )
        gap = max(greedy_gap(logits, ids) for logits, ids in zip(expected, answers.token_ids, strict=True))
        return [first, StageResult(f"answer_tokens {label}", gap, limit, "relative", MERGE)]

    def _pixels(self, frame: np.ndarray) -> np.ndarray:
        """uint8 BGR [H, W, 3] → float32 [1, 3, S, S]; both sides use the same kernel."""
        spec = self._manifest.preprocess
        return preprocess(frame, spec.size, spec.resize, spec.mean, spec.std)

    def _run_bundle(self, bundle: Bundle, advance: Advance) -> Stages:
        manifest = bundle.manifest
        engines = {
            name: open_engine(bundle.component_file(name), manifest.components[name])
            for name in ("encoder", "decoder", "prompt_learner")
        }
        text_features = bundle.text_features()
        stages: Stages = {}
        for case in self._cases:
            pixels = self._pixels(case.frame)
            encoded = engines["encoder"].run(pixels=pixels)
            features = encoded["patch_features"]
            add(stages, image_embedding=encoded["image_embedding"], patch_features=features)
            if case.normals:
                known = np.concatenate([self._pixels(normal) for normal in case.normals])
                normal = engines["encoder"].run(pixels=known)["patch_features"]
                bank = np.concatenate(normal, axis=1)
                distance = match(features, bank)
                anomaly_map = upsample(distance, manifest.vision.map_size)
                add(stages, few_shot_distance=distance, few_shot_map=anomaly_map)
            else:
                run = engines["decoder"].run(patch_features=features, text_features=text_features)
                anomaly_map = localise(run["patch_logits"], manifest.vision.map_size)
                add(stages, zero_shot_map=anomaly_map)
            learner = manifest.components["prompt_learner"]
            inputs = learner_inputs(learner, anomaly_map, len(case.normals), pixels)
            add(stages, **engines["prompt_learner"].run(**inputs))
            advance()
        return stages

    def _run_reference(self, advance: Advance) -> Stages:
        reference = self._reference
        text = reference.checkpoints.text_features[self._manifest.default_class]
        stages: Stages = {}
        for case in self._cases:
            pixels = torch.from_numpy(self._pixels(case.frame))
            embedding, features = reference.encode(pixels)
            add(stages, image_embedding=embedding, patch_features=features)
            if case.normals:
                known = np.concatenate([self._pixels(normal) for normal in case.normals])
                _, normal = reference.encode(torch.from_numpy(known))
                bank = normal.transpose(0, 1).flatten(1, 2)[None]
                distance, anomaly_map = reference.few_shot_map(features, bank)
                add(stages, few_shot_distance=distance, few_shot_map=anomaly_map)
            else:
                anomaly_map = reference.zero_shot_map(features, torch.from_numpy(text))
                add(stages, zero_shot_map=anomaly_map)
            prompts = reference.prompt_embeddings(anomaly_map, len(case.normals), pixels)
            add(stages, prompt_embeddings=prompts)
            advance()
        return stages

    def _ask(self, gguf: Path, threads: int, max_tokens: int, advance: Advance) -> Answers:
        manifest = self._manifest
        model = LanguageModel.open(gguf, manifest.prompt, manifest.language, threads, drafting=False)
        answers = []
        try:
            for embedding, prompts in zip(
                self.bundle["image_embedding"], self.bundle["prompt_embeddings"], strict=True
            ):
                answers.append(model.answer(embedding[0], prompts[0], max_tokens=max_tokens))
                advance()
        finally:
            model.close()
        return Answers([a.first_token_logits for a in answers], [a.token_ids for a in answers])

    def _reference_logits(self, answers: Sequence[tuple[int, ...]], advance: Advance) -> list[np.ndarray]:
        """The reference's logits float32 [n, vocab] of each case, teacher-forced on the bundle's n answer tokens.

        One pass over the language model's layers computes all cases and all tokens.
        """
        prompts = [
            self._reference_prompt(torch.from_numpy(embedding[0]), torch.from_numpy(prompts[0]), ids[:-1])
            for embedding, prompts, ids in zip(
                self.expected["image_embedding"], self.expected["prompt_embeddings"], answers, strict=True
            )
        ]
        counts = [len(ids) for ids in answers]
        return [logits.numpy() for logits in self._reference.logits(prompts, counts, advance)]

    def _reference_prompt(self, embedding: Tensor, prompts: Tensor, answer: Sequence[int]) -> Tensor:
        """Input embeddings float32 [L, D] of a complete prompt and the answer so far."""
        reference, layout = self._reference, self._manifest.prompt
        before = reference.embed(reference.token_ids(layout.before_image, bos=True))
        after = reference.embed(reference.token_ids(layout.after_image))
        question = reference.embed(reference.token_ids(layout.question + layout.assistant))
        return torch.cat([before, embedding[None], after, prompts, question, reference.embed(answer)])


def add(stages: Stages, **results: np.ndarray | Tensor) -> None:
    """Append one case's results to their stages."""
    for stage, value in results.items():
        stages.setdefault(stage, []).append(np.asarray(value, np.float32))


def compare(
    stage: str, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], tolerance: Tolerance, cause: str
) -> StageResult:
    """The largest error over the cases; it is infinite for a different shape or a value that is not finite."""
    errors = [error_of(a, b, tolerance.kind) for a, b in zip(expected, actual, strict=True)]
    return StageResult(stage, max(errors), tolerance.limit, tolerance.kind, cause)


def greedy_gap(logits: np.ndarray, token_ids: Sequence[int]) -> float:
    """How far the bundle's greedy tokens are from the reference's; 0 when all are equal.

    Args:
        logits: the reference's, float32 [n, vocab], given the same tokens before.
        token_ids: the bundle's n greedy tokens.

    Returns:
        The largest drop from the reference's best logit to the chosen token's, over the largest logit.
    """
    chosen = logits[np.arange(len(token_ids)), list(token_ids)]
    return float((logits.max(axis=1) - chosen).max() / np.abs(logits).max())


def require(results: Sequence[StageResult]) -> None:
    """Check that all results are within their tolerances.

    Raises:
        ParityError: one is not; names the first stage that failed and the usual cause.
    """
    for result in results:
        if not result.passed:
            raise ParityError(
                f"the bundle does not compute what the checkpoints define: {result.stage} has a {result.kind} "
                f"error of {result.error:.2g}, allowed is {result.limit:.2g}; the usual cause: {result.cause}; "
                "nothing was published (--allow-parity-failure publishes it and records the failure)"
            )


def summary(results: Sequence[StageResult], num_cases: int) -> dict[str, object]:
    """The parity record of the manifest."""
    stages = {
        result.stage: {"error": rounded(result.error), "limit": result.limit, "kind": result.kind}
        for result in results
    }
    return {"passed": all(result.passed for result in results), "cases": num_cases, "stages": stages}


def rounded(error: float) -> float | str:
    """The error to three digits; "not finite" for infinity and NaN, which JSON cannot express."""
    return float(f"{error:.3g}") if math.isfinite(error) else "not finite"


def sample_cases() -> list[Case]:
    """Two generated parts, one of them scratched, each zero-shot and with a normal sample; and, zero-shot, two images
    that show no part."""
    normal = draw_part(seed=0, scratched=False)
    frames = [draw_part(seed=1 + i, scratched=bool(i % 2)) for i in range(NUM_SAMPLES)]
    others = [*frames, draw_texture(seed=0), draw_poster(seed=0)]
    return [Case(frame) for frame in others] + [Case(frame, (normal,)) for frame in frames]
