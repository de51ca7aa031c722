"""Checkpoints to a bundle: check, export, compare, publish. The bundle is whole or absent.

The stages, in order: open and check the checkpoints; text features; networks to ONNX; language model to GGUF;
parity with the torch reference; convert to the precisions asked for and compare again; seal and rename. Finished
files outlive an interruption; the comparison is made again on whatever is published.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..models import prompts
from ..models.clip_tokens import ClipTokenizer, open_tokenizer
from ..models.prompt_learner import NUM_PROMPTS
from ..runtime.bundle import (
    NETWORKS,
    TEXT_FEATURES_FILE,
    AnswerForms,
    Bundle,
    Component,
    Language,
    Manifest,
    Plan,
    Preprocess,
    PromptLayout,
    RegionLevel,
    Vision,
    digest_file,
    publish,
    seal,
)
from ..runtime.errors import AgptError, ConfigError
from .calibration import calibration_images, calibration_pixels, unlike_pixels
from .checkpoints import SIZES, Checkpoints, open_checkpoints, read_text_features
from .gguf_llm import quantise, write_gguf
from .journal import Journal
from .onnx_graphs import export_graph, graphs
from .options import ExportOptions
from .parity import MAX_ANSWER_TOKENS, Parity, StageResult, require, sample_cases, summary
from .precision import convert, remove_originals
from .reference import Reference
from .survey import llm_share, needs_of
from .tensor_files import CheckpointError, read_json
from .tensorrt_plan import build_plans, check_can_build, merge, prove_plans
from .text_features import add_text_features

PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's and ImageBind's, RGB
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]
GGUF_FILE = "llm.gguf"
WHOLE_FILE = "llm.f16.gguf"  # what is quantised, and then removed
GB = 1e9
NoneType = type(None)
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "gguf", "llama-cpp-python", "numpy")
ORIGINAL_NOTICES = (
    "Weights derived from ImageBind, LLaMA/Vicuna, PandaGPT and AnomalyGPT: their licences forbid commercial "
    "use; read them before passing this bundle on.",
)


@dataclass(frozen=True)
class Report:
    """What was published, and how equal it is to the checkpoints."""

    bundle: Path
    manifest: Manifest
    parity: list[StageResult]
    seconds: float


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's own words about itself (``model.json``)."""

    name: str
    notices: list[str]
    region_level: RegionLevel = RegionLevel()
    classes: list[str] = []


class Steps:
    """Progress, one line a stage, with the time left inside the long ones."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    @contextmanager
    def step(self, description: str, total: int = 1) -> Iterator[Step]:
        task = self._progress.add_task(description, total=total)
        yield Step(self._progress, task)
        self._progress.update(task, completed=total)

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()


@dataclass(frozen=True)
class Step:
    progress: Progress
    task: TaskID

    def advance(self, _what: str = "") -> None:
        self.progress.advance(self.task)

    def add(self, amount: int) -> None:
        self.progress.advance(self.task, amount)

    def reach(self, amount: int) -> None:
        self.progress.update(self.task, completed=amount)


def export_bundle(options: ExportOptions, console: Console | None = None) -> Report:
    """Export, prove, publish.

    Args:
        options: checkpoints, where to, and how.
        console: where progress goes; None is silent.

    Raises:
        CheckpointError: a checkpoint is damaged, incomplete, or does not fit the others.
        ParityError: the result does not compute what the checkpoints say; nothing was published.
        ConfigError: a class has no text features, or the bundle cannot be written.
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
        with staging(options, sources=sources, about=about, classes=classes) as journal:
            folder = journal.folder
            with steps.step("Text features", total=len(classes)) as step:
                checkpoints = settle_text_features(checkpoints, tokenizer, classes, journal, step)
            reference = Reference(checkpoints)
            with steps.step("Networks to ONNX", total=3) as step:
                components = journal.run(
                    "networks", partial(export_networks, reference, folder, step), dict[str, Component]
                )
            manifest = describe(options, about, classes, checkpoints, components)
            num_tensors = 3 + 9 * checkpoints.config.llama.num_hidden_layers
            with steps.step("Language model to GGUF", total=num_tensors) as step:
                whole = folder / (GGUF_FILE if options.llm_quant == "f16" else WHOLE_FILE)
                merge = partial(write_gguf, checkpoints.llama, whole, about.name, step.advance)
                journal.run("language model", merge, NoneType)
            shipped, results = prove(reference, whole, manifest, images, options, steps, journal)
            shipped = add_plans(shipped, options, steps, journal)
            with steps.step("Seal and publish"):
                if options.llm_quant != "f16":
                    whole.unlink()
                remove_originals(folder, manifest.components, shipped.components)
                figures = summary(results, len(sample_cases()))
                manifest = seal(folder, msgspec.structs.replace(shipped, parity=figures, sources=sources))
                if options.plans:
                    bundle = Bundle(folder, manifest)
                    manifest = seal(folder, prove_plans(bundle, options.plans, options.allow_parity_failure))
                publish(folder, options.out)
    return Report(options.out, manifest, results, time.monotonic() - start)


def settle_text_features(
    checkpoints: Checkpoints,
    tokenizer: ClipTokenizer | None,
    classes: list[str],
    journal: Journal,
    step: Step,
) -> Checkpoints:
    """The checkpoints with the text features that the bundle gets, from their file or the text tower."""

    def make() -> None:
        known = checkpoints
        if tokenizer:
            known = add_text_features(checkpoints, tokenizer, classes, step.advance)
        save_text_features(known, classes, journal.folder)

    journal.run("text features", make, NoneType)
    features = read_text_features(journal.folder / TEXT_FEATURES_FILE, checkpoints.config.vision.embed_dim)
    return replace(checkpoints, text_features=features)


def prove(
    reference: Reference,
    whole: Path,
    manifest: Manifest,
    images: list[Path],
    options: ExportOptions,
    steps: Steps,
    journal: Journal,
) -> tuple[Manifest, list[StageResult]]:
    """Compare in float32 and float16 first, where a wrong merge cannot hide behind quantisation, then as shipped.

    Args:
        whole: the language model in float16.
        manifest: of the networks in float32.
        images: the user's normal samples for calibration.

    Returns:
        The manifest with the networks as shipped, and the results of every comparison.
    """
    threads = torch.get_num_threads()  # one setting for all: OMP_NUM_THREADS or the cores
    folder, precision, cases = journal.folder, options.precision, sample_cases()
    asking = len(cases) + manifest.language.layers  # steps of comparing answers
    check = (lambda results: None) if options.allow_parity_failure else require
    with steps.step("Parity with the checkpoints", total=2 * len(cases) + asking) as step:
        parity = Parity(reference, folder, manifest, cases, step.advance)
        tokens = num_tokens(whole, options)
        results = parity.networks() + parity.answers(whole, "f16", threads, tokens, step.advance)
        check(results)
    gguf = whole
    if precision != "fp32":
        with steps.step(f"Networks to {precision}, and compare again", total=1 + len(cases)) as step:
            pixels = list(calibration_pixels(images, manifest.preprocess))
            change = partial(convert, folder, manifest, precision, pixels, unlike_pixels(manifest.preprocess))
            components = journal.run(f"networks {precision}", change, dict[str, Component])
            step.advance()
            manifest = msgspec.structs.replace(manifest, components=components)
            parity = parity.of(manifest, precision, step.advance)
            results += parity.networks()
            check(results)
    if options.llm_quant != "f16":
        gguf = folder / GGUF_FILE
        size = round(whole.stat().st_size * llm_share(options.llm_quant))
        with steps.step(f"Language model to {options.llm_quant}", total=size) as step:
            shrink = partial(quantise, whole, gguf, options.llm_quant, threads, step.reach)
            journal.run("quantised language model", shrink, NoneType)
    if precision != "fp32" or gguf != whole:
        with steps.step("Answers as published", total=asking) as step:
            tokens = num_tokens(gguf, options)
            results += parity.answers(gguf, options.llm_quant, threads, tokens, step.advance)
            check(results)
    return manifest, results


def add_plans(manifest: Manifest, options: ExportOptions, steps: Steps, journal: Journal) -> Manifest:
    """The manifest with the plans of every engine that was asked for, built from the graphs as they ship."""
    for plans in options.plans:
        with steps.step(f"Plans for {plans.engine}", total=len(NETWORKS)) as step:
            build = partial(build_plans, journal.folder, manifest.components, plans, step.advance)
            manifest = merge(manifest, journal.run(f"plans {plans.engine}", build, dict[str, Plan]))
    return manifest


def num_tokens(gguf: Path, options: ExportOptions) -> int:
    """Answer tokens to compare: a file that memory cannot hold is read from the disk again for every token."""
    fits = options.max_memory is None or gguf.stat().st_size < options.max_memory / 2
    return MAX_ANSWER_TOKENS if fits else 1


def check_memory(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """Refuse before the long work what would not fit.

    Raises:
        ConfigError: the export takes more memory than ``--max-memory`` allows.
    """
    needed = needs_of(checkpoints.config).memory
    if options.max_memory is not None and needed > options.max_memory:
        raise ConfigError(
            f"exporting these checkpoints takes about {needed / GB:.1f} GB of memory and --max-memory allows "
            f"{options.max_memory / GB:.1f} GB: allow more, or export on another machine and copy the bundle"
        )


def check_disk(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """The same for the disk; what an interrupted run has left is counted as there.

    Raises:
        ConfigError: the files of this export would not fit beside the target.
    """
    folder = staging_folder(options)
    needed = needs_of(checkpoints.config).disk(options.llm_quant, options.precision)
    there = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    disk = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free + there:
        raise ConfigError(
            f"exporting these checkpoints takes about {(needed - there) / GB:.1f} GB of disk and {disk} has "
            f"{free / GB:.1f} GB free: free some, or give --out on a larger disk"
        )


def staging_folder(options: ExportOptions) -> Path:
    out = options.out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second export out of a staging folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another export has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another export is writing {folder}: wait for it to end, or choose another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(options: ExportOptions, **inputs: object) -> Iterator[Journal]:
    """A hidden folder beside the target, so that publishing is a rename, with the journal of what is finished.

    It outlives an interruption and a full disk, and the same command goes on from it. A result that is wrong is
    removed.

    Raises:
        ConfigError: nothing can be written there, or the disk is full.
        KeyboardInterrupt: with the words for the user.
    """
    folder = staging_folder(options)
    chosen = {
        "precision": options.precision,
        "llm_quant": options.llm_quant,
        "engines": options.engines,
        "plans": msgspec.to_builtins(options.plans),
    }
    try:
        with alone(folder):
            journal = Journal(folder, {**inputs, **chosen, "tools": tool_versions()})
            try:
                yield journal
            except AgptError:
                journal.discard()
                raise
            except KeyboardInterrupt as stop:
                if not journal.stages:
                    raise
                words = "interrupted: the same command goes on from the last finished stage"
                raise KeyboardInterrupt(words) from stop
            finally:
                journal.close()
    except OSError as error:
        why = error.strerror or f"a file was not written whole: {error}"  # NumPy's has no number
        raise ConfigError(
            f"could not write the bundle at {options.out} ({why}): free space and run the same command again, "
            "which goes on from the last finished stage, or choose another --out"
        ) from error


def read_about(path: Path | None, checkpoints: Checkpoints) -> About:
    """The model's name and notices: from its sidecar, or the original's."""
    if path is None:
        size = SIZES.get(checkpoints.config.llama.hidden_size)
        return About(f"anomalygpt-{size.lower()}" if size else "anomalygpt", list(ORIGINAL_NOTICES))
    try:
        return msgspec.convert(read_json(path), About)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{path} does not describe a model ({error}): fix or leave out --about"
        ) from error


def choose_classes(options: ExportOptions, about: About, checkpoints: Checkpoints) -> list[str]:
    """Those asked for, else the model's own, else all that have text features, else the original's."""
    known = checkpoints.text_features
    chosen = list(options.classes or about.classes or known or prompts.ENSEMBLE_CLASSES)
    unknown = [name for name in chosen if name not in known]
    if unknown and checkpoints.text is None:
        raise ConfigError(
            f"class {unknown[0]!r} has no text features in {options.text_features}: "
            f"choose among {', '.join(known)}"
        )
    return list(dict.fromkeys(chosen))


def export_networks(reference: Reference, folder: Path, step: Step) -> dict[str, Component]:
    components = {}
    for graph in graphs(reference.model):
        components[graph.name] = export_graph(graph, folder)
        step.advance()
    return components


def save_text_features(checkpoints: Checkpoints, classes: list[str], folder: Path) -> None:
    arrays = {name: checkpoints.text_features[name] for name in classes}
    np.savez(folder / TEXT_FEATURES_FILE, **arrays)  # type: ignore[arg-type]


def describe(
    options: ExportOptions,
    about: About,
    classes: list[str],
    checkpoints: Checkpoints,
    components: dict[str, Component],
) -> Manifest:
    """The manifest without digests and parity figures."""
    vision, llama = checkpoints.config.vision, checkpoints.config.llama
    return Manifest(
        name=about.name,
        notices=about.notices,
        preprocess=Preprocess(vision.image_size, options.resize, PIXEL_MEAN, PIXEL_STD),
        vision=Vision(vision.width, list(vision.tap_layers), vision.grid, vision.embed_dim),
        language=Language(
            llama.hidden_size, llama.vocab_size, llama.num_hidden_layers, llama.max_position_embeddings
        ),
        classes=classes,
        default_class="object" if "object" in classes else classes[0],
        region_level=about.region_level,
        prompt=prompt_layout(),
        components={**components, "language_model": Component(GGUF_FILE, options.llm_quant)},
        tools=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """What the bundle was made with."""
    return {name: importlib.metadata.version(name) for name in TOOLS}


def prompt_layout() -> PromptLayout:
    """The original's prompt, piece by piece."""
    return PromptLayout(
        before_image=prompts.PIECE_BEFORE_IMAGE,
        after_image=prompts.PIECE_AFTER_IMAGE,
        num_prompts=NUM_PROMPTS,
        assistant=prompts.PIECE_ASSISTANT,
        question=prompts.DEFAULT_QUESTION,
        affirmative=prompts.AFFIRMATIVE,
        negative=prompts.NEGATIVE,
        stop_piece=prompts.STOP_PIECE,
        turn_end=prompts.STOP_STRING,
        answers=AnswerForms(
            none=[prompts.ANSWER_NONE],
            one=[prompts.ANSWER_ONE],
            several=[prompts.ANSWER_SEVERAL],
            places=list(prompts.PLACES),
        ),
    )


def total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def source_files(options: ExportOptions, images: list[Path]) -> dict[str, Path]:
    """Role and file name → path, of every file that goes into the bundle."""
    files = {
        "imagebind": [options.imagebind],
        "vicuna": sorted(path for path in options.vicuna.iterdir() if path.is_file()),
        "pandagpt": [options.pandagpt],
        "anomalygpt": [options.anomalygpt],
        "text_features": [options.text_features] if options.text_features else [],
        "calibration": images,
    }
    return {f"{role}/{path.name}": path for role, paths in files.items() for path in paths}


def print_report(report: Report, console: Console) -> None:
    """Sizes, precisions, parity, and what the bundle needs to run."""
    manifest = report.manifest
    files = Table("file", "precision", "MB", title=f"{report.bundle}: {manifest.name}")
    precision = {component.file: component.precision for component in manifest.components.values()}
    precision |= {plan.file: plan.built_for for plans in manifest.plans.values() for plan in plans}
    for name, record in manifest.files.items():
        files.add_row(name, precision.get(name, ""), f"{record.bytes / 1e6:.1f}")
    stages = Table("stage", "error", "allowed", "", title="Parity with the checkpoints")
    for result in report.parity:
        error = f"{result.error:.1e}" if math.isfinite(result.error) else "not finite"
        verdict = "ok" if result.passed else "[red]FAILED"
        stages.add_row(result.stage, f"{error} {result.kind}", f"{result.limit:.0e}", verdict)
    total = sum(record.bytes for record in manifest.files.values())
    console.print(files, stages)
    for engine, figures in manifest.parity.get("engines", {}).items():
        if not figures["compared"]:
            console.print(
                f"plans for {engine} were not compared: {figures['reason']}; agpt verify does, on the device"
            )
    engines = " or ".join(
        ["onnxruntime", *dict.fromkeys(plan.engine for plans in manifest.plans.values() for plan in plans)]
    )
    for line in (
        f"{total / 1e6:.0f} MB in {report.seconds:.0f} s; classes: {', '.join(manifest.classes)}",
        f"needs {engines}, llama-cpp-python, NumPy and OpenCV, no torch, and memory for all of it: "
        f"more than {total / GB:.1f} GB",
        f"try it: agpt run --bundle {report.bundle}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
