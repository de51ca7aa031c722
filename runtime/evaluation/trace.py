"""``agpt trace``: the results of each stage of a bundle for one image, in one npz file.

Compare these arrays (see ``trace_inspection``) to find the first stage in which two implementations differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..common.errors import ConfigError
from ..common.terminal import tell
from ..inspection.inspector import Inspector
from ..vision.engines import AUTO
from ..vision.image_files import image_paths
from ..vision.images import read_image

RESIZE_MODES = ("crop", "stretch")


@dataclass(frozen=True)
class TraceOptions:
    """The options of ``agpt trace``; see its help."""

    bundle: Path
    image: Path
    normals: tuple[Path, ...] = ()
    class_name: str | None = None
    resize: str | None = None
    question: str = ""
    threads: int | None = None
    engine: str = AUTO

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize not in RESIZE_MODES:
            raise ConfigError(f"--resize {self.resize!r} is not known: choose {' or '.join(RESIZE_MODES)}")


def trace_image(options: TraceOptions, out: Path) -> None:
    """Trace one image and write the arrays to ``out`` by rename, so that no partial file remains.

    Raises:
        AgptError: the bundle, an image or an option cannot be used.
        OSError: ``out`` cannot be written.
    """
    frame = read_image(options.image)
    normals = [read_image(path) for path in image_paths(options.normals, tell)]
    with Inspector.open(
        options.bundle, class_name=options.class_name, threads=options.threads, engine=options.engine
    ) as inspector:
        arrays = trace_frame(inspector, frame, normals, options.resize, options.question)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with open(partial, "wb") as file:  # a path would get ".npz" appended
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def trace_frame(
    inspector: Inspector,
    frame: np.ndarray,
    normals: list[np.ndarray],
    resize: str | None = None,
    question: str = "",
) -> dict[str, np.ndarray]:
    """Trace a frame with the inspector's product, which changes if ``resize`` or ``normals`` are given.

    Args:
        inspector: the inspector.
        frame: uint8 [H, W, 3] BGR.
        normals: normal frames for a memory bank; they are resized like the frame.
        resize: "crop" or "stretch"; None for the product's.
        question: the question; "" for the product's.

    Returns:
        As ``trace_inspection``.
    """
    product = replace(inspector.product, resize=resize or inspector.product.resize)  # type: ignore[arg-type]
    inspector.use(product)
    if normals:
        inspector.use(inspector.make_bank(normals))
    return trace_inspection(inspector, frame, question)


def trace_inspection(
    inspector: Inspector, frame: np.ndarray, question: str = "", max_tokens: int = 16
) -> dict[str, np.ndarray]:
    """The intermediate results of an inspection.

    Args:
        inspector: the inspector.
        frame: uint8 [H, W, 3] BGR.
        question: the question; "" for the product's.
        max_tokens: maximum number of tokens of the answer.

    Returns:
        float32 ``pixels`` [1, 3, S, S], ``image_embedding`` [D], ``patch_features`` [T, P, V] (raw taps without
        CLS), ``text_features`` [2, E], ``anomaly_map`` [S, S], ``prompt_embeddings`` [num_prompts, D] and
        ``answer_logits`` [vocab] at the last prompt position; int32 ``prompt_token_ids`` [L], -1 where an
        embedding is injected, and the greedy ``answer_token_ids``, including the stop token.

    Raises:
        ImageError: it is not a frame.
        ConfigError: the question is too long, or the product has regions or tiles.
    """
    vision, language, product = inspector.vision, inspector.language, inspector.product
    if not product.layout.is_whole:
        raise ConfigError("only whole frames can be traced: use a recipe without regions or tiles")
    question = question or product.question
    pixels = vision.preprocess(frame, vision.views(frame, product), product)
    encoded = vision.encode(pixels)
    patch_features = encoded.patch_features
    localised = vision.localise(encoded, product)
    prompts = vision.prompt(localised.prompt_maps, pixels, product)
    answer = language.answer(encoded.image_embeddings[0], prompts[0], question, max_tokens)
    return {
        "pixels": pixels,
        "image_embedding": encoded.image_embeddings[0],
        "patch_features": patch_features[0],
        "text_features": product.text_features,
        "anomaly_map": localised.prompt_maps[0],
        "prompt_embeddings": prompts[0],
        "prompt_token_ids": np.asarray(language.prompt.token_ids(question), np.int32),
        "answer_logits": answer.first_token_logits,
        "answer_token_ids": np.asarray(answer.token_ids, np.int32),
    }
