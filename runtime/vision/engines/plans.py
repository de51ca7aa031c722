"""TensorRT's plans: which package reads them, and whether one may be loaded on this machine.

A plan is native code: loading one equals running it. So everything here is decided from the manifest, whose digest
of the plan has been checked, before TensorRT sees a byte.
"""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...bundles.bundle import NETWORKS, Bundle, Plan, rebuild_command, rebuild_hint
from ...common.errors import BundleError, ConfigError
from .gpu import Gpu

# Engine → the package that builds and runs its plans. TensorRT-RTX's API is TensorRT's under another name.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
VERSION_COMPATIBLE = "version_compatible"  # runs with later TensorRTs of the same major version
HARDWARE_COMPATIBLE = (
    "hardware_compatible"  # runs on every GPU of the same or, from 8.0 on, a later architecture
)
AHEAD_OF_TIME = "ahead_of_time"  # built for compute capabilities, not on and for one GPU
NUM_RELEASE_PARTS = 3  # of a version, "10.3.0.30"; the fourth is the build
AMPERE = (8, 0)


def this_platform() -> str:
    """ "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def is_installed(engine: str) -> bool:
    return find_spec(PACKAGES[engine]) is not None


def open_api(engine: str) -> Any:
    """The engine's Python package.

    Raises:
        ConfigError: not installed, or it does not load.
    """
    try:
        return import_module(PACKAGES[engine])
    except (ImportError, OSError) as error:
        raise ConfigError(f"{PRODUCTS[engine]} does not load ({error}): {how_to_get(engine)}") from error


def how_to_get(engine: str) -> str:
    if engine == "tensorrt":
        return "install JetPack's python3-libnvinfer, or pip install 'anomalygpt-edge[tensorrt]'"
    return "pip install 'anomalygpt-edge[tensorrt-rtx]'"


def missing_plans(bundle: Bundle, engine: str) -> str:
    """The sentence for a bundle that does not have a plan of each network; "" when it has."""
    missing = [name for name in NETWORKS if bundle.plan(name, engine) is None]
    if not missing:
        return ""
    return f"the bundle has no {PRODUCTS[engine]} plan of the {missing[0]}: {rebuild_command(bundle.folder, engine)}"


def misfit(bundle: Bundle, name: str, plan: Plan, gpu: Gpu, version: str) -> str:
    """Why a network's plan must not be loaded on this machine, in one sentence; "" when it may.

    Args:
        version: of the TensorRT that would load it.
    """
    reason = (
        "its graph was changed since"
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
    return f"{plan.file} was built for {plan.built_for}, and {reason}; build it on this machine: {command}"


def runs_with(plan: Plan, version: str) -> bool:
    """Whether a plan's TensorRT is this one: the same release, or a later one of the major version if it may be."""
    built, here = release(plan.version), release(version)
    if VERSION_COMPATIBLE in plan.flags:
        return built[:1] == here[:1] and built <= here
    return built == here


def runs_on(plan: Plan, gpu: Gpu) -> bool:
    """Whether a plan was built for this GPU: its model, or its compute capability where that is enough."""
    if HARDWARE_COMPATIBLE in plan.flags and not gpu.integrated:
        oldest = min(map(capability, plan.compute_capabilities))
        return capability(gpu.compute_capability) >= max(oldest, AMPERE)
    fits = gpu.compute_capability in plan.compute_capabilities
    return fits and (AHEAD_OF_TIME in plan.flags or plan.gpu == gpu.name)


def inspect_plan(bundle: Bundle, name: str, plan: Plan) -> None:
    """Look at a plan as far as that goes without a GPU and without loading it; its digest has been checked.

    Raises:
        BundleError: built from another graph, or its header is not one of this TensorRT's.
    """
    if plan.graph_sha256 != bundle.graph_sha256(name):
        raise BundleError(f"{plan.file} was built from another graph: {rebuild_hint(bundle.folder, plan)}")
    if not is_installed(plan.engine):
        return
    api = open_api(plan.engine)
    if not runs_with(plan, api.__version__) or not hasattr(api.Runtime, "get_engine_validity"):
        return  # another release reads other headers; TensorRT 10.3 cannot tell
    runtime = api.Runtime(make_log(api))
    with open(bundle.folder / plan.file, "rb") as file:
        header = file.read(runtime.engine_header_size)
    _, diagnostics = runtime.get_engine_validity(header)
    if diagnostics & int(api.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise BundleError(
            f"{plan.file} is no plan of {PRODUCTS[plan.engine]}: {rebuild_hint(bundle.folder, plan)}"
        )


def release(version: str) -> tuple[int, ...]:
    """ "10.3.0.30" → (10, 3, 0)."""
    return tuple(int(part) for part in version.split(".")[:NUM_RELEASE_PARTS] if part.isdigit())


def capability(text: str) -> tuple[int, ...]:
    """ "8.9" → (8, 9)."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def make_log(api: Any) -> Any:
    """A TensorRT logger that keeps the errors, for one sentence, instead of printing everything."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def first_error(self) -> str:
            """The first error's first line: what came later are its consequences."""
            return self.errors[0].split("\n", 1)[0][:300] if self.errors else "it does not say why"

    return Log()
