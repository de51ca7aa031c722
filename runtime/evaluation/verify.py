"""``agpt verify``: checks that a bundle is complete and works on this machine."""

from __future__ import annotations

import time
from pathlib import Path

from ..bundles.bundle import Bundle, open_bundle
from ..common.errors import BundleError
from ..inspection.inspector import Inspector
from ..inspection.verdict import Status
from ..synthetic.line import render_line
from ..vision.engines import AUTO, BACKENDS
from ..vision.engines.agreement import compare_with_cpu
from ..vision.engines.plans import inspect_plan


def verify_bundle(folder: Path | None, engine: str = AUTO) -> None:
    """Check every digest and every plan, open the bundle and inspect one grey frame with it.

    A plan whose engine this machine cannot run is checked without loading it. If ``engine`` is not onnxruntime on the
    CPU, its results are compared with those of onnxruntime on the CPU, by the tolerances in the manifest.

    Raises:
        BundleError: the bundle is altered or incomplete, or does not work on this machine.
        ConfigError: the engine cannot run here.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    print(f"bundle {manifest.name} at {bundle.folder}")
    for name, record in sorted(manifest.files.items()):
        print(f"  {name:<32} {record.bytes:>14,} bytes  sha256 {record.sha256[:16]}…  ok")
    for component, entry in manifest.components.items():
        print(f"  {component:<32} {entry.precision}")
    _verify_plans(bundle)
    for notice in manifest.notices:
        print(f"  notice: {notice}")
    with Inspector.open(bundle.folder, engine=engine) as inspector:
        started = time.perf_counter()
        verdict = inspector.inspect(next(render_line(1)).frame)
        if verdict.status == Status.NO_RESULT:
            raise BundleError(
                f"{bundle.folder} opens but gives no verdict here ({verdict.reason}): run agpt doctor"
            )
        milliseconds = (time.perf_counter() - started) * 1e3
        print(f"  one inspection by {inspector.engine:<23} {milliseconds:>8.1f} ms     ok")
        for stage, error, limit in compare_with_cpu(bundle, inspector.engine, inspector.vision.networks):
            print(f"  {stage:<32} {error:.1e} from onnxruntime on the CPU, {limit:.0e} allowed  ok")


def _verify_plans(bundle: Bundle) -> None:
    """Check every plan and print whether it can run here.

    Raises:
        BundleError: a plan does not match the manifest.
    """
    for component, plans in bundle.manifest.plans.items():
        for plan in plans:
            inspect_plan(bundle, component, plan)
            reason = BACKENDS[plan.engine].unavailable_reason(bundle)
            state = f"cannot run here: {reason}" if reason else "runs here"
            print(f"  {plan.file:<32} for {plan.built_for}: intact; {state}")
