"""Builds TensorRT plans from a bundle's ONNX graphs, on the device itself, without checkpoints or torch.

One builder serves TensorRT (10.3 to 11, on the GPU it builds for) and TensorRT-RTX (ahead of time, without a GPU):
their Python APIs are the same. Networks are strongly typed: the precision is in the graph. Each plan is built in a
separate process, which frees its gigabytes when it ends and may crash without ending the export.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.bundles.bundle import (
    NETWORKS,
    Bundle,
    Component,
    Manifest,
    Plan,
    digest_file,
    graph_digest,
    open_bundle,
    publish,
    read_manifest,
    seal,
)
from ..runtime.common.errors import AgptError, ConfigError
from ..runtime.vision.engines import BACKENDS, open_networks
from ..runtime.vision.engines.agreement import compare_with_cpu
from ..runtime.vision.engines.gpu import Gpu, find_gpu, missing_driver
from ..runtime.vision.engines.plans import (
    AHEAD_OF_TIME,
    HARDWARE_COMPATIBLE,
    PRODUCTS,
    VERSION_COMPATIBLE,
    make_log,
    open_api,
    this_platform,
)

PLAN_ENGINES = ("tensorrt", "tensorrt-rtx")
# Default compute capabilities of TensorRT-RTX without a GPU: GeForce RTX 30, 40 and 50.
AHEAD_CAPABILITIES = ("8.6", "8.9", "12.0")
DEFAULT_MAX_BATCH = 4
REFUSED = 3  # exit status of a build that failed with an error message

Advance = Callable[[], None]


@dataclass(frozen=True)
class PlanOptions:
    """Build options of an engine's plans; checked on construction.

    Attributes:
        engine: one of ``PLAN_ENGINES``.
        capabilities: compute capabilities for TensorRT-RTX; empty: this machine's GPU, else ``AHEAD_CAPABILITIES``.
        max_batch: largest batch of the plan; the runtime splits larger ones.
        version_compatible: later TensorRT releases of the same major version can load the plan (TensorRT only).
        hardware_compatible: other GPUs of compute capability 8.0 and later can run the plan (TensorRT only, not on
            Jetson).

    Raises:
        ConfigError: the engine does not support an option.
    """

    engine: str
    capabilities: tuple[str, ...] = ()
    max_batch: int = DEFAULT_MAX_BATCH
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"--max-batch {self.max_batch} is not a batch size: give 1 or more")
        if self.engine == "tensorrt" and self.capabilities:
            raise ConfigError(
                "--compute-capability is for tensorrt-rtx only, as tensorrt builds for the GPU it runs on: leave it "
                "out, or use --hardware-compatible"
            )
        if self.engine == "tensorrt-rtx" and (self.version_compatible or self.hardware_compatible):
            raise ConfigError(
                "--version-compatible and --hardware-compatible are for tensorrt only: for tensorrt-rtx give every "
                "--compute-capability, and build the plans again for each release"
            )


def rebuild(
    folder: Path, options: Sequence[PlanOptions], advance: Advance, allow_failure: bool = False
) -> Manifest:
    """Build the plans of these engines from a bundle's graphs and add them to it; the bundle is replaced completely or
    not at all.

    Undamaged plans of other engines are kept; all earlier plans of these engines are removed.

    Args:
        folder: the bundle.
        options: one entry per engine.
        advance: called after each plan.
        allow_failure: publish plans that fail the comparison with the graphs, and record the failure.

    Returns:
        The manifest of the new bundle.

    Raises:
        BundleError: the bundle is damaged, or a plan does not compute what its graph defines.
        ConfigError: an engine cannot build on this machine, or the plans cannot be written.
    """
    for option in options:
        check_can_build(option)
    bundle = open_bundle(folder, with_plans=False)
    folder = folder.absolute()
    staging = folder.with_name(f".{folder.name}.plans")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        kept = keep_files(bundle, folder, staging, {option.engine for option in options})
        manifest = msgspec.structs.replace(bundle.manifest, plans=kept)
        for option in options:
            manifest = merge(manifest, build_plans(staging, manifest.components, option, advance))
        manifest = seal(staging, manifest)
        manifest = seal(staging, compare_plans(Bundle(staging, manifest), options, allow_failure))
        publish(staging, folder)
    except OSError as error:
        raise ConfigError(
            f"could not write the plans beside {folder} ({error.strerror or error}): free space and try again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def keep_files(bundle: Bundle, folder: Path, staging: Path, replaced: set[str]) -> dict[str, list[Plan]]:
    """Link a bundle's files into the staging folder, with the undamaged plans of all engines but ``replaced``.

    Returns:
        Those plans, by network.
    """
    whole = read_manifest(folder)
    kept: dict[str, list[Plan]] = {}
    for name, plans in whole.plans.items():
        for plan in plans:
            path = folder / plan.file
            is_whole = (
                path.is_file() and not path.is_symlink() and digest_file(path) == whole.files[plan.file]
            )
            if plan.engine not in replaced and is_whole:
                kept.setdefault(name, []).append(plan)
    files = [*bundle.manifest.files, *(plan.file for plans in kept.values() for plan in plans)]
    for name in files:
        try:
            os.link(folder / name, staging / name)
        except OSError:  # some file systems have no hard links, FAT for example
            shutil.copyfile(folder / name, staging / name)
    return kept


def merge(manifest: Manifest, plans: dict[str, Plan]) -> Manifest:
    """The manifest with one more plan of each network."""
    old = manifest.plans
    return msgspec.structs.replace(
        manifest, plans={name: [*old.get(name, []), plan] for name, plan in plans.items()}
    )


def build_plans(
    folder: Path, components: dict[str, Component], options: PlanOptions, advance: Advance
) -> dict[str, Plan]:
    """Build each network's plan into the folder where its graph lies.

    Raises:
        ConfigError: the engine cannot build on this machine, or cannot build this graph.
    """
    check_can_build(options)
    plans = {}
    for name in NETWORKS:
        graph = folder / components[name].file
        plan = describe_plan(name, graph, options, find_gpu())
        build_apart(graph, components[name], folder / plan.file, options, plan)
        plans[name] = plan
        advance()
    return plans


def compare_plans(bundle: Bundle, options: Sequence[PlanOptions], allow_failure: bool) -> Manifest:
    """Compare every engine that can run on this machine with the CPU, and record the results in the parity report.

    Returns:
        The manifest with the results.

    Raises:
        BundleError: an engine does not compute what the graphs define, unless ``allow_failure``.
    """
    engines = dict(bundle.manifest.parity.get("engines", {}))
    for option in options:
        unavailable = BACKENDS[option.engine].unavailable_reason(bundle)
        if unavailable:
            engines[option.engine] = {"compared": False, "reason": unavailable.partition(": ")[0]}
            continue
        networks = open_networks(bundle, option.engine)
        try:
            results = compare_with_cpu(bundle, option.engine, networks)
            stages = {
                stage: {"error": float(f"{error:.3g}"), "limit": limit} for stage, error, limit in results
            }
            engines[option.engine] = {"compared": True, "passed": True, "stages": stages}
        except AgptError as error:
            if not allow_failure:
                raise
            engines[option.engine] = {"compared": True, "passed": False, "reason": str(error)}
        finally:
            for network in networks.values():
                network.close()
    return msgspec.structs.replace(bundle.manifest, parity={**bundle.manifest.parity, "engines": engines})


def check_can_build(options: PlanOptions) -> None:
    """Check before the long work whether this machine can build the plans.

    Raises:
        ConfigError: the package is not installed, a GPU is needed but there is none, or the engine does not build for
            a compute capability.
    """
    api = open_api(options.engine)
    gpu = find_gpu()
    if options.engine == "tensorrt":
        if gpu is None:
            raise ConfigError(f"--engine tensorrt needs the GPU that it builds for: {missing_driver()}")
        if options.hardware_compatible and gpu.integrated:
            raise ConfigError(
                f"--hardware-compatible is not available on {gpu.name}: leave it out, and build on each device"
            )
        return
    known = sorted(
        f"{name[2:-1]}.{name[-1]}" for name in vars(api.ComputeCapability) if name.startswith("SM")
    )
    for capability in capabilities_of(options, gpu):
        if capability not in known:
            raise ConfigError(
                f"{PRODUCTS[options.engine]} {api.__version__} does not build for compute capability {capability}: "
                f"choose among {', '.join(sorted(known, key=float))}"
            )


def capabilities_of(options: PlanOptions, gpu: Gpu | None) -> tuple[str, ...]:
    """Compute capabilities of a plan: those of the options, else of this machine's GPU, else the default ones."""
    return options.capabilities or ((gpu.compute_capability,) if gpu else AHEAD_CAPABILITIES)


def describe_plan(name: str, graph: Path, options: PlanOptions, gpu: Gpu | None) -> Plan:
    """The manifest's entry of a plan to build."""
    ahead = options.engine == "tensorrt-rtx"
    flags = {
        AHEAD_OF_TIME: ahead,
        VERSION_COMPATIBLE: options.version_compatible,
        HARDWARE_COMPATIBLE: options.hardware_compatible,
    }
    paths = [path for path in (graph, graph.with_name(f"{graph.name}.data")) if path.is_file()]
    return Plan(
        file=f"{name}.{options.engine}.plan",
        engine=options.engine,  # type: ignore[arg-type]  # one of PLAN_ENGINES
        version=open_api(options.engine).__version__,
        compute_capabilities=list(capabilities_of(options, gpu)),
        gpu="" if ahead or options.hardware_compatible or gpu is None else gpu.name,
        platform=this_platform(),
        flags=["strongly_typed", *(flag for flag, given in flags.items() if given)],
        max_batch=options.max_batch,
        graph_sha256=graph_digest(graph.name, {path.name: digest_file(path) for path in paths}),
    )


def build_apart(graph: Path, component: Component, target: Path, options: PlanOptions, plan: Plan) -> None:
    """Run ``build`` in a separate process.

    Raises:
        ConfigError: the build failed or crashed.
    """
    job = Job(str(graph), component, str(target), options, plan.compute_capabilities)
    command = [sys.executable, "-m", __name__, msgspec.json.encode(job).decode()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == REFUSED:
        raise ConfigError(done.stderr.strip().rsplit("\n", 1)[-1])
    if done.returncode != 0:
        raise ConfigError(
            f"{PRODUCTS[options.engine]} crashed while building {target.name} (exit status {done.returncode}), usually "
            "because memory ran out: close other programs, or build with a smaller --max-batch"
        )


class Job(msgspec.Struct, frozen=True):
    """The arguments of the child process."""

    graph: str
    component: Component
    target: str
    options: PlanOptions
    capabilities: list[str]


def main() -> None:
    """The child process: runs one job; on failure it prints the error message and exits with ``REFUSED``."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    try:
        build(Path(job.graph), job.component, Path(job.target), job.options, job.capabilities)
    except AgptError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


def build(
    graph: Path, component: Component, target: Path, options: PlanOptions, capabilities: Sequence[str]
) -> None:
    """Build one plan.

    Raises:
        ConfigError: TensorRT cannot read the graph or build from it.
    """
    api = open_api(options.engine)
    product, log = f"{PRODUCTS[options.engine]} {api.__version__}", make_log(api)
    builder = api.Builder(log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ConfigError(
            f"{product} cannot read {graph.name} ({(errors or [log.first_error()])[0]}): use another release"
        )
    config = configure(api, builder, component, options, capabilities)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ConfigError(f"{product} cannot build {target.name} ({log.first_error()}): use another release")
    with open(target, "wb") as file:
        file.write(memoryview(plan))


def configure(
    api: Any, builder: Any, component: Component, options: PlanOptions, capabilities: Sequence[str]
) -> Any:
    """The builder's configuration: shapes, compatibility and compute capabilities."""
    config = builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # operations in float32 need its full precision
    profile = builder.create_optimization_profile()
    for spec in component.inputs:
        if isinstance(spec.shape[0], str):
            rest = tuple(int(axis) for axis in spec.shape[1:])
            profile.set_shape(spec.name, (1, *rest), (1, *rest), (options.max_batch, *rest))
    config.add_optimization_profile(profile)
    if options.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.engine == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(
                getattr(api.ComputeCapability, f"SM{capability.replace('.', '')}"), index
            )
    return config


if __name__ == "__main__":
    main()
