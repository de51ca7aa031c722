"""Converts checkpoints to a bundle: check, export, compare, publish. The bundle is published completely or not at all.

The stages, in order: open and check the checkpoints; text features; networks to ONNX; language model to GGUF;
parity with the torch reference; convert to the requested precisions and compare again; seal and rename. Finished
files are kept after an interruption; the comparison is always repeated on the files that are published.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from ..models.clip_tokens import ClipTokenizer, open_tokenizer
from ..runtime.bundles.bundle import (
    NETWORKS,
    TEXT_FEATURES_FILE,
    Bundle,
    Component,
    Manifest,
    Plan,
    digest_file,
    publish,
    seal,
)
from .calibration import calibration_images, calibration_pixels, sample_pixels
from .checkpoint_report import llm_share
from .checkpoints import Checkpoints, open_checkpoints
from .description import GGUF_FILE, choose_classes, describe, read_about
from .gguf_llm import quantise, write_gguf
from .onnx_graphs import export_graph, graphs
from .options import ExportOptions
from .parity import MAX_ANSWER_TOKENS, Parity, StageResult, require, sample_cases, summary
from .precision import convert, remove_originals
from .progress import SHARES, Step, Steps
from .reference import Reference
from .report import Report
from .resume import FinishedStages
from .staging import check_disk, check_memory, staging
from .tensorrt_plan import build_plans, check_can_build, compare_plans, merge
from .text_features import read_text_features, save_text_features
from .text_tower import add_text_features

F16_FILE = "llm.f16.gguf"  # source of a quantised model; removed before publishing
NoneType = type(None)


def export_bundle(options: ExportOptions, console: Console | None = None) -> Report:
    """Export, compare, publish.

    Args:
        options: checkpoints, target and settings.
        console: shows progress; None: silent.

    Raises:
        CheckpointError: a checkpoint is damaged, incomplete, or does not fit the others.
        ParityError: the result does not compute what the checkpoints define; nothing was published.
        ConfigError: a class has no text features, an engine cannot build here, or the bundle cannot be written.
    """
    start = time.monotonic()
    with Steps(console or Console(quiet=True)) as steps:
        with steps.step("Check the checkpoints"):
            checkpoints = open_checkpoints(
                options.imagebind, options.vicuna, options.pandagpt, options.anomalygpt, options.text_features
            )
            about = read_about(options.about, checkpoints)
            classes = choose_classes(options, about, checkpoints)
            tokenizer = open_tokenizer() if checkpoints.text else None
            check_memory(options, checkpoints)
            check_disk(options, checkpoints)
            for plans in options.plans:
                check_can_build(plans)
            images = calibration_images(options.calibration)
        files = source_files(options, images)
        with steps.step("Digest the checkpoints", total=total_bytes(files.values())) as step:
            sources = {name: digest_file(path, step.add).sha256 for name, path in files.items()}
        with staging(options, sources=sources, about=about, classes=classes) as finished:
            folder = finished.folder
            with steps.step("Text features", total=len(classes)) as step:
                checkpoints = settle_text_features(checkpoints, tokenizer, classes, finished, step)
            reference = Reference(checkpoints)
            with steps.step("Networks to ONNX", total=3) as step:
                components = finished.run(
                    "networks", partial(export_networks, reference, folder, step), dict[str, Component]
                )
            manifest = describe(options, about, classes, checkpoints, components)
            num_tensors = 3 + 9 * checkpoints.config.llama.num_hidden_layers
            with steps.step("Language model to GGUF", total=num_tensors) as step:
                whole = folder / (GGUF_FILE if options.llm_quant == "f16" else F16_FILE)
                merge = partial(write_gguf, checkpoints.llama, whole, about.name, step.advance)
                finished.run("language model", merge, NoneType)
            shipped, results = check_parity(reference, whole, manifest, images, options, steps, finished)
            shipped = add_plans(shipped, options, steps, finished)
            with steps.step("Seal and publish"):
                if options.llm_quant != "f16":
                    whole.unlink()
                remove_originals(folder, manifest.components, shipped.components)
                figures = summary(results, len(sample_cases()))
                manifest = seal(folder, msgspec.structs.replace(shipped, parity=figures, sources=sources))
                if options.plans:
                    bundle = Bundle(folder, manifest)
                    manifest = seal(
                        folder, compare_plans(bundle, options.plans, options.allow_parity_failure)
                    )
                publish(folder, options.out)
    return Report(options.out, manifest, results, time.monotonic() - start)


def settle_text_features(
    checkpoints: Checkpoints,
    tokenizer: ClipTokenizer | None,
    classes: list[str],
    finished: FinishedStages,
    step: Step,
) -> Checkpoints:
    """The checkpoints with the bundle's text features, which come from a file or from the text tower."""

    def make() -> None:
        known = checkpoints
        if tokenizer:
            known = add_text_features(checkpoints, tokenizer, classes, step.advance)
        save_text_features(known.text_features, classes, finished.folder)

    finished.run("text features", make, NoneType)
    features = read_text_features(finished.folder / TEXT_FEATURES_FILE, checkpoints.config.vision.embed_dim)
    return replace(checkpoints, text_features=features)


def check_parity(
    reference: Reference,
    whole: Path,
    manifest: Manifest,
    images: list[Path],
    options: ExportOptions,
    steps: Steps,
    finished: FinishedStages,
) -> tuple[Manifest, list[StageResult]]:
    """Compare in float32 and float16 first, where quantisation cannot hide a wrong merge, then convert the files to
    the requested precisions and compare again.

    Args:
        reference: the torch reference.
        whole: the language model in float16.
        manifest: lists the networks in float32.
        images: the user's normal images for calibration.
        options: precisions and what to do on failure.
        steps: progress.
        finished: stages and their folder.

    Returns:
        The manifest with the networks to publish, and the results of every comparison.

    Raises:
        ParityError: a stage is over its tolerance, unless ``options`` allow it.
    """
    threads = torch.get_num_threads()  # one setting for all: OMP_NUM_THREADS or the number of cores
    folder, precision, cases = finished.folder, options.precision, sample_cases()
    num_answer_steps = len(cases) + manifest.language.layers
    check = (lambda results: None) if options.allow_parity_failure else require
    with steps.step("Parity with the checkpoints", total=2 * len(cases) + num_answer_steps) as step:
        parity = Parity(reference, folder, manifest, cases, step.advance)
        tokens = num_tokens(whole, options)
        results = parity.networks() + parity.answers(whole, "f16", threads, tokens, step.advance)
        check(results)
    gguf = whole
    if precision != "fp32":
        with steps.step(f"Networks to {precision}", total=SHARES) as step:
            pixels, samples = (
                list(choose(images, manifest.preprocess)) for choose in (calibration_pixels, sample_pixels)
            )
            change = partial(convert, folder, manifest, precision, pixels, samples, step.set_share)
            components = finished.run(f"networks {precision}", change, dict[str, Component])
            manifest = msgspec.structs.replace(manifest, components=components)
        with steps.step("Parity as converted", total=len(cases)) as step:
            parity = parity.of(manifest, precision, step.advance)
            results += parity.networks()
            check(results)
    if options.llm_quant != "f16":
        gguf = folder / GGUF_FILE
        size = round(whole.stat().st_size * llm_share(options.llm_quant))
        with steps.step(f"Language model to {options.llm_quant}", total=size) as step:
            shrink = partial(quantise, whole, gguf, options.llm_quant, threads, step.set_completed)
            finished.run("quantised language model", shrink, NoneType)
    if precision != "fp32" or gguf != whole:
        with steps.step("Answers as published", total=num_answer_steps) as step:
            tokens = num_tokens(gguf, options)
            results += parity.answers(gguf, options.llm_quant, threads, tokens, step.advance)
            check(results)
    return manifest, results


def add_plans(manifest: Manifest, options: ExportOptions, steps: Steps, finished: FinishedStages) -> Manifest:
    """The manifest with the plans of every requested engine, built from the graphs to publish."""
    for plans in options.plans:
        with steps.step(f"Plans for {plans.engine}", total=len(NETWORKS)) as step:
            build = partial(build_plans, finished.folder, manifest.components, plans, step.advance)
            manifest = merge(manifest, finished.run(f"plans {plans.engine}", build, dict[str, Plan]))
    return manifest


def num_tokens(gguf: Path, options: ExportOptions) -> int:
    """Number of answer tokens to compare: 1 for a file that does not fit in memory, as it is read from the disk again
    for every token."""
    fits = options.max_memory is None or gguf.stat().st_size < options.max_memory / 2
    return MAX_ANSWER_TOKENS if fits else 1


def export_networks(reference: Reference, folder: Path, step: Step) -> dict[str, Component]:
    components = {}
    for graph in graphs(reference.model):
        components[graph.name] = export_graph(graph, folder)
        step.advance()
    return components


def total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def source_files(options: ExportOptions, images: list[Path]) -> dict[str, Path]:
    """``role/file name`` → path of every input file of the export."""
    files = {
        "imagebind": [options.imagebind],
        "vicuna": sorted(path for path in options.vicuna.iterdir() if path.is_file()),
        "pandagpt": [options.pandagpt],
        "anomalygpt": [options.anomalygpt],
        "text_features": [options.text_features] if options.text_features else [],
        "calibration": images,
    }
    return {f"{role}/{path.name}": path for role, paths in files.items() for path in paths}
