"""``agpt run``: sets up the line from the options, runs it and prints a summary."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..bundles.bundle import MANIFEST_FILE, Bundle, digest_file
from ..cameras import Camera, Frame, open_camera
from ..common.errors import ConfigError, Interrupted, UnjudgedError
from ..common.terminal import tell
from ..outputs.display import open_display
from ..outputs.overlay import OverlayFolder
from ..outputs.records import Identity, RecordFile
from ..vision.engines import AUTO
from ..vision.image_files import image_paths
from ..vision.images import read_image
from .line import Line

if TYPE_CHECKING:
    from ..inspection.inspector import Inspector, Product

OVERLAY_CHOICES = ("all", "reject", "none")
DEMO_SHOTS = 4  # normal samples of each product of the demo line


@dataclass(frozen=True)
class RunOptions:
    """The options of ``agpt run``; see its help."""

    source: str = "demo"
    bundle: Path | None = None
    recipe: Path | None = None
    normals: tuple[Path, ...] = ()
    class_name: str | None = None
    out: Path | None = None
    overlays: str = "all"
    parts: int | None = None
    seed: int = 0
    threads: int | None = None
    engine: str = AUTO
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        if self.overlays not in OVERLAY_CHOICES:
            raise ConfigError(
                f"--overlays {self.overlays!r} is not known: choose one of {', '.join(OVERLAY_CHOICES)}"
            )
        if self.recipe is not None and self.normals:
            raise ConfigError("--recipe already contains good parts: leave out --normal, or enroll again")


def open_inspector(
    bundle: Path | None,
    recipe: Path | None,
    normals: tuple[Path, ...],
    class_name: str | None,
    threads: int | None,
    engine: str = AUTO,
) -> Inspector:
    """Open an inspector as a command line's options describe it."""
    from ..inspection.inspector import Inspector

    frames = [read_image(path) for path in image_paths(normals, tell)]
    return Inspector.open(
        bundle, recipe, normals=frames or None, class_name=class_name, threads=threads, engine=engine
    )


def summary(line: Line, options: RunOptions) -> list[str]:
    """The summary lines printed at the end of a run."""
    tally = line.tally
    written = (
        f"records and overlays are in {options.out}"
        if options.out
        else "the results were not saved: give --out DIR to save them"
    )
    missing = line.num_overlays_missing
    return [
        text
        for text in (
            tally.counts(),
            tally.catches(),
            "; ".join(filter(None, (tally.latency() and f"latency {tally.latency()}", tally.pace()))),
            written,
            f"{missing} overlays are missing; reason for the last one: {line.overlay_failure}"
            if missing
            else "",
        )
        if text
    ]


def run_line(options: RunOptions) -> None:
    """Inspect until the source ends, then print the summary.

    Raises:
        AgptError: an option is wrong, a file is bad, records cannot be written, the camera was lost, or no part
            got a verdict.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    with ExitStack() as opened:
        # The source and the output folder are checked first, as the model takes seconds to load.
        camera = opened.enter_context(
            closing(open_camera(options.source, num_parts=options.parts, seed=options.seed, out=options.out))
        )
        if camera.remark:
            tell(f"{camera.name}: {camera.remark}")
        records = opened.enter_context(closing(RecordFile(options.out))) if options.out else None
        overlays = (
            OverlayFolder(options.out / "overlays") if options.out and options.overlays != "none" else None
        )
        with Console(stderr=True).status("loading the model and the good parts"):  # shown on a terminal only
            inspector = opened.enter_context(
                open_inspector(
                    options.bundle,
                    options.recipe,
                    options.normals,
                    options.class_name,
                    options.threads,
                    options.engine,
                )
            )
            choose_recipe = _recipe_chooser(inspector, options)
        manifest = inspector.bundle.manifest
        line = Line(
            camera,
            inspector,
            open_display(
                f"agpt run: {camera.name}, bundle {manifest.name}", total=num_expected(camera, options)
            ),
            identify(inspector.bundle),
            choose_recipe=choose_recipe,
            records=records,
            overlays=overlays,
            rejects_only=options.overlays == "reject",
            max_parts=options.parts,
            budget_ms=options.budget_ms,
        )
        inspector.watch(line.progress)
        line.run()
    print("\n".join(summary(line, options)))
    if line.lost:
        raise line.lost
    num_parts = line.tally.num_parts
    if line.stopped_by is not None:
        name = signal.Signals(line.stopped_by).name
        raise Interrupted(f"stopped by {name} after {num_parts} parts", line.stopped_by)
    if not num_parts:
        raise UnjudgedError(f"nothing was inspected: {options.source} delivered no frame; check the source")
    if line.tally.unjudged:
        raise UnjudgedError(
            f"all {num_parts} parts are NO_RESULT: "
            + (f"the reasons are in {options.out}" if options.out else "give --out DIR to keep the reasons")
        )


def num_expected(camera: Camera, options: RunOptions) -> int | None:
    """Number of parts to expect; None where it is unknown."""
    known = [count for count in (camera.num_frames, options.parts) if count is not None]
    return min(known, default=None)


def identify(bundle: Bundle) -> Identity:
    """The bundle's name and digest, for records."""
    digest = digest_file(bundle.folder / MANIFEST_FILE).sha256
    return Identity(bundle=bundle.manifest.name, bundle_sha256=digest)


def _recipe_chooser(inspector: Inspector, options: RunOptions) -> Callable[[Frame], str]:
    """A function that prepares the inspector for a frame's product and returns its recipe's name.

    A run has one recipe, except on the demo line, where each of several products has its own memory bank.
    """
    if options.source != "demo" or options.recipe is not None or options.normals:
        return lambda frame: inspector.product.name
    products = enroll_demo_products(inspector)

    def choose(frame: Frame) -> str:
        inspector.use(products[frame.product])
        return frame.product

    return choose


def enroll_demo_products(inspector: Inspector, shots: int = DEMO_SHOTS) -> dict[str, Product]:
    """The demo line's products by name, each with a memory bank of ``shots`` normal samples."""
    from ..cameras.demo import PRODUCTS, normal_samples

    plain = inspector.product
    products = {}
    for name in PRODUCTS:
        bank = inspector.make_bank(normal_samples(name, shots))
        products[name] = replace(plain, name=name, bank=bank)
        inspector.use(products[name])
    return products
