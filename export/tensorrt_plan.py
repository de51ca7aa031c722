"""TensorRT's plans from a bundle's ONNX graphs alone: no checkpoints, no torch, on the device itself.

One builder for TensorRT (10.3 to 11, on the GPU it builds for) and TensorRT-RTX (ahead of time, without a GPU): their
Python APIs are the same. Networks are strongly typed: the precision is in the graph. Each plan is built in a process
of its own, which gives its gigabytes back and may crash without taking the export with it.
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
# What TensorRT-RTX builds for without being told: GeForce RTX 30, 40 and 50.
AHEAD_CAPABILITIES = ("8.6", "8.9", "12.0")
DEFAULT_MAX_BATCH = 4
REFUSED = 3  # exit status of a build that ends with a sentence

Advance = Callable[[], None]


@dataclass(frozen=True)
class PlanOptions:
    """What plans are built for; checked when built.

    Attributes:
        capabilities: compute capabilities for TensorRT-RTX; this machine's GPU, or the usual ones, when empty.
        max_batch: the largest batch; larger ones run in parts.
        version_compatible: for later TensorRTs of the same major version too (TensorRT only).
        hardware_compatible: for other GPUs from compute capability 8.0 on too (TensorRT only, not on Jetson).

    Raises:
        ConfigError: an option that this engine does not have.
    """

    engine: str
    capabilities: tuple[str, ...] = ()
    max_batch: int = DEFAULT_MAX_BATCH
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"--max-batch {self.max_batch} is no batch: give 1 or more")
        if self.engine == "tensorrt" and self.capabilities:
            raise ConfigError(
                "--compute-capability serves tensorrt-rtx: tensorrt builds for the GPU it runs on; leave it out, or "
                "use --hardware-compatible"
            )
        if self.engine == "tensorrt-rtx" and (self.version_compatible or self.hardware_compatible):
            raise ConfigError(
                "--version-compatible and --hardware-compatible serve tensorrt: for tensorrt-rtx name every "
                "--compute-capability, and build again with each release"
            )


def rebuild(
    folder: Path, options: Sequence[PlanOptions], advance: Advance, allow_failure: bool = False
) -> Manifest:
    """Give a bundle the plans of these engines, from its graphs; it is replaced whole or not at all.

    Plans of other engines stay as they are; plans in whatever state of these engines go.

    Args:
        advance: called after each plan.
        allow_failure: publish plans that do not compute what the graphs say, marked.

    Raises:
        BundleError: the bundle is not whole, or a plan does not compute what its graph says.
        ConfigError: an engine cannot build here.
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
        manifest = seal(staging, prove_plans(Bundle(staging, manifest), options, allow_failure))
        publish(staging, folder)
    except OSError as error:
        raise ConfigError(
            f"could not write the plans beside {folder} ({error.strerror or error}): free space and try again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def keep_files(bundle: Bundle, folder: Path, staging: Path, replaced: set[str]) -> dict[str, list[Plan]]:
    """Link a bundle's files into the staging folder, with the whole plans of engines that are not built anew.

    Returns:
        Those plans.
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
        except OSError:  # another file system's rules: FAT has no links
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
        ConfigError: the engine cannot build here, or not this graph.
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


def prove_plans(bundle: Bundle, options: Sequence[PlanOptions], allow_failure: bool) -> Manifest:
    """Compare every engine that can run here with the CPU's, and note it in the parity report.

    Raises:
        BundleError: an engine does not compute what the graphs say.
    """
    engines = dict(bundle.manifest.parity.get("engines", {}))
    for option in options:
        obstacle = BACKENDS[option.engine].unavailable_reason(bundle)
        if obstacle:
            engines[option.engine] = {"compared": False, "reason": obstacle.partition(": ")[0]}
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
    """Refuse at once what this machine cannot build.

    Raises:
        ConfigError: the package is not installed, there is no GPU where one is needed, or a compute capability
            that it does not build for.
    """
    api = open_api(options.engine)
    gpu = find_gpu()
    if options.engine == "tensorrt":
        if gpu is None:
            raise ConfigError(f"--engine tensorrt builds on the GPU it builds for: {missing_driver()}")
        if options.hardware_compatible and gpu.integrated:
            raise ConfigError(
                f"--hardware-compatible is not for {gpu.name}: leave it out, and build on each device"
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
    """What a plan is built for: what was asked for, else this machine's GPU, else the usual ones."""
    return options.capabilities or ((gpu.compute_capability,) if gpu else AHEAD_CAPABILITIES)


def describe_plan(name: str, graph: Path, options: PlanOptions, gpu: Gpu | None) -> Plan:
    """The manifest's entry of a plan that is about to be built."""
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
    """``build`` in a process of its own.

    Raises:
        ConfigError: the builder refuses, or it died.
    """
    job = Job(str(graph), component, str(target), options, plan.compute_capabilities)
    command = [sys.executable, "-m", __name__, msgspec.json.encode(job).decode()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == REFUSED:
        raise ConfigError(done.stderr.strip().rsplit("\n", 1)[-1])
    if done.returncode != 0:
        raise ConfigError(
            f"{PRODUCTS[options.engine]} died while it built {target.name} (exit status {done.returncode}), usually "
            "for want of memory: close other programs, or build with a smaller --max-batch"
        )


class Job(msgspec.Struct, frozen=True):
    """What the child process is told."""

    graph: str
    component: Component
    target: str
    options: PlanOptions
    capabilities: list[str]


def main() -> None:
    """The child process: one job, or one sentence."""
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
    """The builder's configuration: shapes, and what the plan is to run on."""
    config = builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # what the graph leaves in float32 is there for a reason
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
