"""TensorRT's plans: the package that reads them, and whether a plan may be loaded on this machine.

A plan is native code, so loading it means running it. Therefore all checks use the manifest, and the plan's digest has
been compared with it, before TensorRT reads the plan.
"""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...bundles.bundle import NETWORKS, Bundle, Plan, rebuild_command, rebuild_hint
from ...common.errors import BundleError, ConfigError
from ...common.install import how_to_install
from .gpu import Gpu

# Engine → the package that builds and runs its plans. TensorRT-RTX has the API of TensorRT under another name.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
VERSION_COMPATIBLE = "version_compatible"  # runs with later releases of the same major version
HARDWARE_COMPATIBLE = "hardware_compatible"  # runs on GPUs of the same or a later architecture, from 8.0 on
AHEAD_OF_TIME = "ahead_of_time"  # built for compute capabilities instead of for one GPU model
NUM_RELEASE_PARTS = 3  # the fourth number of a version ("10.3.0.30") is the build
AMPERE = (8, 0)


def this_platform() -> str:
    """Operating system and processor, for example "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def is_installed(engine: str) -> bool:
    return find_spec(PACKAGES[engine]) is not None


def open_api(engine: str) -> Any:
    """The engine's Python package.

    Raises:
        ConfigError: the package is not installed or does not load.
    """
    try:
        return import_module(PACKAGES[engine])
    except (ImportError, OSError) as error:
        raise ConfigError(f"{PRODUCTS[engine]} does not load ({error}): {how_to_get(engine)}") from error


def how_to_get(engine: str) -> str:
    if engine == "tensorrt":
        return f"install JetPack's python3-libnvinfer, or {how_to_install(engine)}"
    return how_to_install(engine)


def missing_plans(bundle: Bundle, engine: str) -> str:
    """The message for a bundle without a plan for each network; "" if it has them all."""
    missing = [name for name in NETWORKS if bundle.plan(name, engine) is None]
    if not missing:
        return ""
    return f"the bundle has no {PRODUCTS[engine]} plan of the {missing[0]}: {rebuild_command(bundle.folder, engine)}"


def misfit(bundle: Bundle, name: str, plan: Plan, gpu: Gpu, version: str) -> str:
    """Why a network's plan must not be loaded on this machine, in one sentence; "" if it may be loaded.

    Args:
        bundle: the bundle of the plan.
        name: the network.
        plan: its plan.
        gpu: this machine's GPU.
        version: version of the TensorRT that would load the plan.
    """
    reason = (
        "its graph was changed afterwards"
        if plan.graph_sha256 != bundle.graph_sha256(name)
        else f"this is {PRODUCTS[plan.engine]} {version}"
        if not runs_with(plan, version)
        else f"this is {gpu.name}, compute capability {gpu.compute_capability}"
        if not runs_on(plan, gpu)
        else f"this is {this_platform()}"
        if plan.platform != this_platform()
        else ""
    )
    if not reason:
        return ""
    command = rebuild_command(bundle.folder, plan.engine)
    return f"{plan.file} was built for {plan.built_for}, but {reason}; build it on this machine: {command}"


def runs_with(plan: Plan, version: str) -> bool:
    """Whether a TensorRT version can load a plan: the same release, or for a version-compatible plan a later one of the
    same major version."""
    built, here = release(plan.version), release(version)
    if VERSION_COMPATIBLE in plan.flags:
        return built[:1] == here[:1] and built <= here
    return built == here


def runs_on(plan: Plan, gpu: Gpu) -> bool:
    """Whether a plan was built for this GPU: for its model, or where the plan allows it for its compute capability."""
    if HARDWARE_COMPATIBLE in plan.flags and not gpu.integrated:
        oldest = min(map(capability, plan.compute_capabilities))
        return capability(gpu.compute_capability) >= max(oldest, AMPERE)
    fits = gpu.compute_capability in plan.compute_capabilities
    return fits and (AHEAD_OF_TIME in plan.flags or plan.gpu == gpu.name)


def inspect_plan(bundle: Bundle, name: str, plan: Plan) -> None:
    """Check a plan without a GPU and without loading it; its digest must have been checked before.

    Raises:
        BundleError: it was built from another graph, or TensorRT reports its header as malformed.
    """
    if plan.graph_sha256 != bundle.graph_sha256(name):
        raise BundleError(f"{plan.file} was built from another graph: {rebuild_hint(bundle.folder, plan)}")
    if not is_installed(plan.engine):
        return
    api = open_api(plan.engine)
    if not runs_with(plan, api.__version__) or not hasattr(api.Runtime, "get_engine_validity"):
        return  # the header's format depends on the release; TensorRT 10.3 cannot check it
    runtime = api.Runtime(make_log(api))
    with open(bundle.folder / plan.file, "rb") as file:
        header = file.read(runtime.engine_header_size)
    _, diagnostics = runtime.get_engine_validity(header)
    if diagnostics & int(api.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise BundleError(
            f"{plan.file} is not a {PRODUCTS[plan.engine]} plan: {rebuild_hint(bundle.folder, plan)}"
        )


def release(version: str) -> tuple[int, ...]:
    """The release of a version: "10.3.0.30" → (10, 3, 0)."""
    return tuple(int(part) for part in version.split(".")[:NUM_RELEASE_PARTS] if part.isdigit())


def capability(text: str) -> tuple[int, ...]:
    """A compute capability as numbers: "8.9" → (8, 9)."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def make_log(api: Any) -> Any:
    """A TensorRT logger that keeps the errors for messages instead of printing the log."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def first_error(self) -> str:
            """The first line of the first error; later errors are its consequences."""
            return self.errors[0].split("\n", 1)[0][:300] if self.errors else "no reason was given"

    return Log()
