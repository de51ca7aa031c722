"""The bundle: a self-describing folder that export writes and the runtime opens.

This file defines the schema. ``manifest.json`` lists every other file with its size and sha256. It is also the only
place that holds the model's dimensions, names, prompts and classes.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from ..common.errors import BundleError, ConfigError
from ..common.files import flush
from ..common.schema_errors import describe_error

SCHEMA_VERSION = 4  # 4: sizes of maps, weights of taps, units of maps; 3: "copies" is "augmentation"
MANIFEST_FILE = "manifest.json"
TEXT_FEATURES_FILE = "text_features.npz"
NETWORKS = ("encoder", "decoder", "prompt_learner")  # in the order in which a frame passes them
COMPONENTS = (*NETWORKS, "language_model")
MAX_MANIFEST_BYTES = 4 << 20
HASH_CHUNK_BYTES = 1 << 20
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
FIX = "copy the bundle again or re-run agpt export"

# Augmentation of the normal samples of a memory bank, see ``vision.augment``.
Augmentation = Literal["none", "moved", "turned", "both"]
# Units of the few-shot maps that a prompt learner was taught on: the original's distances, or multiples of what good
# parts differ by (``vision.variation``).
MapUnits = Literal["raw", "normal variation"]

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all manifest types: immutable, and an unknown key is an error instead of being ignored."""


class Preprocess(Schema, frozen=True):
    """Conversion of frames to the encoder's input: resize to ``size``, then ``(x / 255 - mean) / std`` in RGB order."""

    size: Count
    resize: Literal["crop", "stretch"]
    mean: Annotated[list[float], Meta(min_length=3, max_length=3)]
    std: Annotated[list[float], Meta(min_length=3, max_length=3)]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, [*self.mean, *self.std])) or min(self.std) <= 0:
            raise ValueError("preprocess requires finite means and positive standard deviations")


class Vision(Schema, frozen=True):
    """Dimensions of the encoder.

    Attributes:
        width: V, the width of a patch feature.
        tap_layers: the layers that patch features are taken from.
        grid: patches per side.
        embed_dim: E, the width of the text features.
        map_size: M, the side of anomaly maps in pixels.
        shifts: grid positions per patch size and side; 1 if patches do not overlap.
        tap_weights: weight of each tap's distances in maps in units of normal variation; empty: equal weights.
    """

    width: Count
    tap_layers: Annotated[list[int], Meta(min_length=1)]
    grid: Count
    embed_dim: Count
    map_size: Count
    shifts: Count = 1
    tap_weights: list[Annotated[float, Meta(ge=0)]] = []

    def __post_init__(self) -> None:
        if self.tap_weights and len(self.tap_weights) != len(self.tap_layers):
            raise ValueError(f"there are {len(self.tap_weights)} tap_weights for {len(self.tap_layers)} taps")
        if self.tap_weights and not 0 < sum(self.tap_weights) < math.inf:
            raise ValueError("tap_weights have no positive, finite sum")

    @property
    def num_distinct(self) -> int:
        """Number of patches of a view in a grid without overlap."""
        return ((self.grid - 1) // self.shifts + 1) ** 2


class Language(Schema, frozen=True):
    """Dimensions of the language model, which the GGUF's header must match; D is its width."""

    width: Count
    vocab_size: Count
    layers: Count
    context_length: Count


class RegionLevel(Schema, frozen=True):
    """Map value from which on a pixel belongs to a region; None if none was chosen at training.

    Attributes:
        few_shot: in units of normal variation.
        zero_shot: in the decoder's probability.
    """

    few_shot: float | None = None
    zero_shot: float | None = None


class AnswerForms(Schema, frozen=True):
    """Templates of the answers that the model was trained on.

    Attributes:
        none: no anomaly.
        one: one anomaly, with its ``{place}``.
        several: several anomalies, with their ``{count}`` and ``{places}`` ("left, center and right").
        places: all places in reading order.
    """

    none: Annotated[list[Name], Meta(min_length=1)]
    one: Annotated[list[Name], Meta(min_length=1)]
    several: list[Name]
    places: Annotated[list[Name], Meta(min_length=1)]

    def __post_init__(self) -> None:
        needed = [("one", "{place}"), ("several", "{count}"), ("several", "{places}")]
        for forms, field in needed:
            for form in getattr(self, forms):
                if field not in form:
                    raise ValueError(f"answer form {form!r} has no {field}")


class PromptLayout(Schema, frozen=True):
    """The prompt, ``<bos> before_image [image] after_image [num_prompts rows] question+assistant``, and the answers.

    Each piece is tokenised on its own. The token of ``stop_piece`` ends an answer. ``turn_end`` is the text that
    closes a turn ("\\n###"); it is removed from the answer. Answers begin with ``affirmative`` or ``negative``.
    ``answers`` are the expected answers: they speed up decoding, and their first tokens count for p(anomaly).
    """

    before_image: str
    after_image: str
    num_prompts: Count
    assistant: str
    question: Name
    affirmative: Name
    negative: Name
    stop_piece: Name
    turn_end: Name
    answers: AnswerForms | None = None


class TensorSpec(Schema, frozen=True):
    """One tensor of a component. A string in ``shape`` names a dynamic axis, for example "B"."""

    name: Name
    dtype: Name
    shape: list[int | str]


class Component(Schema, frozen=True):
    """One network: its file, its precision ("f32", "f16", "q4_k_m" …), its input and output tensors."""

    file: Name
    precision: Name
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []


class Plan(Schema, frozen=True, kw_only=True):
    """A TensorRT engine built from a component's graph: native code that runs only on the machines it was built for."""

    file: Name
    engine: Literal["tensorrt", "tensorrt-rtx"]
    version: Name  # version of the TensorRT that built it
    compute_capabilities: Annotated[list[Name], Meta(min_length=1)]  # of the GPUs it was built for, "8.9"
    gpu: str = ""  # the GPU model that it is limited to; "" for no limit
    platform: Name  # "linux-x86_64"
    flags: list[Name] = []
    max_batch: Count
    graph_sha256: Sha256  # digest of the graph it was built from

    @property
    def built_for(self) -> str:
        """Description of the machines that it runs on, for messages."""
        gpu = f"{self.gpu}, " if self.gpu else ""
        capabilities = " or ".join(self.compute_capabilities)
        product = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[self.engine]
        return f"{gpu}compute capability {capabilities}, {product} {self.version}, {self.platform}"


class FileRecord(Schema, frozen=True):
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class Manifest(Schema, frozen=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    name: Name
    notices: list[str]
    preprocess: Preprocess
    vision: Vision
    language: Language
    classes: Annotated[list[Name], Meta(min_length=1)]
    default_class: Name
    region_level: RegionLevel
    map_units: MapUnits = "raw"
    augmentation: Augmentation = "none"  # default augmentation of the normal samples in a memory bank
    prompt: PromptLayout
    questions: list[Name] = []  # of the kinds that the model was trained to answer, one of each
    components: dict[str, Component]
    plans: dict[str, list[Plan]] = {}  # by component, at most one for each engine
    files: dict[str, FileRecord] = {}
    parity: dict = {}
    tools: dict[str, str] = {}
    sources: dict[str, str] = {}

    def __post_init__(self) -> None:
        if missing := [name for name in COMPONENTS if name not in self.components]:
            raise ValueError(f"component {missing[0]!r} is missing")
        if self.default_class not in self.classes:
            raise ValueError(f"default_class {self.default_class!r} is not among the classes")
        if unknown := sorted(self.plans.keys() - set(NETWORKS)):
            raise ValueError(f"there are plans for {unknown[0]!r}, which is not a network")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file exists and matches the size and digest in the manifest."""

    folder: Path
    manifest: Manifest

    def component_file(self, component: str) -> Path:
        """Path of a component's file ("encoder", "decoder", "prompt_learner", "language_model")."""
        return self.folder / self.manifest.components[component].file

    def plan(self, component: str, engine: str) -> Plan | None:
        """A component's plan for an engine ("tensorrt", "tensorrt-rtx"); None if there is none."""
        plans = self.manifest.plans.get(component, [])
        return next((plan for plan in plans if plan.engine == engine), None)

    def graph_sha256(self, component: str) -> str:
        """Digest of a component's graph and weights."""
        return graph_digest(self.manifest.components[component].file, self.manifest.files)

    @property
    def encoder_sha256(self) -> str:
        """Digest of the encoder, which identifies the features in a memory bank."""
        return self.graph_sha256("encoder")

    def text_features(self, class_name: str | None = None) -> np.ndarray:
        """Normal (row 0) and abnormal (row 1) text features of a class, float32 [2, E], unit norm.

        Args:
            class_name: one of the manifest's classes; its default class when None.

        Raises:
            ConfigError: the bundle does not have the class.
            BundleError: the file has no features of the class with the shape in the manifest.
        """
        manifest = self.manifest
        class_name = manifest.default_class if class_name is None else class_name
        if class_name not in manifest.classes:
            known = ", ".join(manifest.classes)
            raise ConfigError(f"unknown class name {class_name!r}: choose one of {known}")
        try:
            with np.load(self.folder / TEXT_FEATURES_FILE, allow_pickle=False) as arrays:
                features = np.asarray(arrays[class_name], np.float32)
        except (OSError, ValueError, KeyError) as error:
            raise BundleError(
                f"{TEXT_FEATURES_FILE} has no readable features for {class_name!r}: re-run agpt export"
            ) from error
        if features.shape != (2, manifest.vision.embed_dim) or not np.isfinite(features).all():
            raise BundleError(
                f"{TEXT_FEATURES_FILE}: {class_name!r} is {features.shape}, not finite [2, "
                f"{manifest.vision.embed_dim}]: re-run agpt export"
            )
        return features


def default_bundle() -> Path:
    """Folder of the ``lite`` bundle that ships with the package."""
    return Path(str(resources.files("anomalygpt_edge.models.lite") / "bundle"))


def open_bundle(path: Path | str | None = None, with_plans: bool = True) -> Bundle:
    """Open a bundle folder after checking the digest of every file.

    Args:
        path: the folder; the ``lite`` bundle that ships with the package when None.
        with_plans: False ignores the plans and does not check their files, so that they can be built again.

    Raises:
        BundleError: the folder or its manifest is missing, the manifest is malformed or has another schema version,
            or a file is missing, not listed, altered or not a regular file.
    """
    folder = default_bundle() if path is None else Path(path)
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}: give a folder made by agpt export")
    manifest = read_manifest(folder)
    _check_names(folder, manifest)
    plans = {plan.file: plan for plans in manifest.plans.values() for plan in plans}
    if not with_plans:
        files = {name: record for name, record in manifest.files.items() if name not in plans}
        manifest = msgspec.structs.replace(manifest, plans={}, files=files)
    for name, record in manifest.files.items():
        _check_file(folder / name, record, rebuild_hint(folder, plans[name]) if name in plans else FIX)
    return Bundle(folder, manifest)


def graph_digest(name: str, files: dict[str, FileRecord]) -> str:
    """sha256 of a graph file and its weights; large weights are in a separate file, ``<name>.data``."""
    weights = files.get(f"{name}.data")
    if weights is None:
        return files[name].sha256
    return hashlib.sha256(f"{files[name].sha256} {weights.sha256}".encode()).hexdigest()


def rebuild_hint(folder: Path, plan: Plan) -> str:
    """The machines that a plan was built for, and the command that builds it on this one."""
    return (
        f"it was built for {plan.built_for}; build it on this machine: {rebuild_command(folder, plan.engine)}"
    )


def rebuild_command(folder: Path, engine: str) -> str:
    """The command that builds an engine's plans."""
    return f"agpt export --resume --engine {engine} {folder}"


def read_manifest(folder: Path) -> Manifest:
    """Parse and validate ``manifest.json`` without reading the other files.

    Raises:
        BundleError: the manifest is missing, too large or malformed, or has another schema version.
    """
    path = folder / MANIFEST_FILE
    if not _is_plain_file(path):
        raise BundleError(
            f"{folder} has no {MANIFEST_FILE}: it is not a bundle; give a folder made by agpt export"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} is over {MAX_MANIFEST_BYTES >> 20} MiB, so it is not a bundle's manifest: {FIX}"
        )
    data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, but this program reads {SCHEMA_VERSION}: "
                "re-run agpt export with this version"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path} is malformed ({describe_error(error)}): {FIX}") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is malformed ({error}): {FIX}") from error


def read_plan(folder: Path, manifest: Manifest, plan: Plan) -> bytes:
    """Read a plan and check its digest; the caller must load these bytes, not read the file again.

    Raises:
        BundleError: the file cannot be read or was altered.
    """
    path, record = folder / plan.file, manifest.files[plan.file]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}): {rebuild_hint(folder, plan)}"
        ) from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BundleError(f"{path} was altered: {rebuild_hint(folder, plan)}")
    return data


def digest_file(path: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> FileRecord:
    """Size in bytes and sha256 of a file's content; ``progress`` is called with the number of bytes of each chunk."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    return FileRecord(sha256=digest.hexdigest(), bytes=size)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """List every file of ``folder`` in the manifest, write ``manifest.json``, and flush all files to the disk.

    Returns:
        The manifest as written, with ``files`` filled in.

    Raises:
        BundleError: the result is not a valid bundle, for example because of a link or a missing component.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST_FILE)
    sealed = msgspec.structs.replace(manifest, files={name: digest_file(folder / name) for name in names})
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n")
    for entry in folder.iterdir():
        flush(entry)
    flush(folder)
    return open_bundle(folder).manifest


def publish(staging: Path, target: Path) -> None:
    """Move a sealed bundle to ``target`` by one rename, so that it is complete or absent there.

    An existing bundle at ``target`` is replaced; it stays in place until then. Both folders must be on the same file
    system.

    Raises:
        BundleError: ``target`` exists and is not a bundle.
    """
    if target.exists() and not (target / MANIFEST_FILE).is_file() and any(target.iterdir()):
        raise BundleError(f"{target} exists and is not a bundle: choose another folder or empty it")
    if target.exists():
        _exchange(staging, target)
        shutil.rmtree(staging, ignore_errors=True)  # now the old bundle
    else:
        staging.rename(target)
    flush(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders' names atomically (Linux, renameat2), or by three renames where that is not supported."""
    here = ctypes.c_int(AT_FDCWD)
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2") and not libc.renameat2(here, names[0], here, names[1], RENAME_EXCHANGE):
        return
    aside = other.with_name(f".{other.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


class _Version(msgspec.Struct):
    schema_version: int


def _check_names(folder: Path, manifest: Manifest) -> None:
    """Check that names are plain file names, that all files in use are listed, and that there are no other files.

    Raises:
        BundleError: one of these does not hold.
    """
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST_FILE) or Path(name).name != name or "\\" in name or "\0" in name:
            raise BundleError(f"{folder / MANIFEST_FILE} lists {name!r}, which is not a plain file name")
    plans = [plan.file for plans in manifest.plans.values() for plan in plans]
    needed = [TEXT_FEATURES_FILE, *(component.file for component in manifest.components.values()), *plans]
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST_FILE} does not list {name!r}: re-run agpt export")
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST_FILE}
    if unknown := sorted(present - manifest.files.keys()):
        raise BundleError(f"{folder / unknown[0]} is not part of the bundle: remove it")


def _check_file(path: Path, record: FileRecord, fix: str) -> None:
    """Compare a file's size and digest with its record.

    Raises:
        BundleError: the file is missing, not a regular file, or altered; the message ends with ``fix``.
    """
    if not path.exists():
        raise BundleError(f"{path} is missing: {fix}")
    if not _is_plain_file(path):
        raise BundleError(f"{path} is a link or not a regular file: copy the file itself into the bundle")
    size = path.stat().st_size
    if size != record.bytes:
        raise BundleError(f"{path} was altered: {size} bytes instead of {record.bytes}; {fix}")
    found = digest_file(path).sha256
    if found != record.sha256:
        raise BundleError(f"{path} was altered: sha256 {found[:12]}… instead of {record.sha256[:12]}…; {fix}")


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
