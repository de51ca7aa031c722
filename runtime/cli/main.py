"""The command ``agpt``. Heavy imports happen inside the commands, so that ``agpt --help`` answers at once."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.errors import AgptError, ConfigError, Interrupted
from ..common.printable import printable

if TYPE_CHECKING:
    from .doctor import Finding

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="agpt",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Bundle folder; the nano model that ships when left out.")
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="Product recipe made by agpt enroll.")]
ClassOption = Annotated[
    str | None, typer.Option("--class", help="What the part is, one of the bundle's class names.")
]
NormalOption = Annotated[
    list[Path] | None,
    typer.Option("--normal", help="Image of a good part, or a folder of them; may be given several times."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; all cores when left out.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="What runs the networks: tensorrt, tensorrt-rtx, onnxruntime-tensorrt, onnxruntime-cuda or "
        "onnxruntime (CPU); auto takes the best that this machine can run.",
    ),
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        "--tiles",
        help="Look at tiles of the frame at their own resolution, so that small defects survive: ROWSxCOLUMNS "
        "like 3x3, or a tile's side in pixels like 448.",
    ),
]
DEFAULT_OVERLAP = 0.2
OverlapOption = Annotated[
    float, typer.Option(min=0.0, max=0.9, help="Share of a tile that the next one shows too.")
]
OverlayChoice = Annotated[
    str, typer.Option("--overlays", help="Which parts get a picture: all, reject or none.")
]


def main() -> None:
    """Entry point: a user's mistake is one sentence on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter shows "?"
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        if (
            status == EXIT_INTERRUPTED
        ):  # typer's word for a KeyboardInterrupt; its earlier versions raise Abort
            _complain("interrupted", status)
    except Interrupted as stop:
        status = _complain(str(stop), EXIT_INTERRUPTED)
    except AgptError as error:
        status = _complain(str(error), EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        status = _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (agpt run | head): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        status = _complain(f"cannot use {error.filename} ({error.strerror}): check it", EXIT_BAD_INPUT)
    except Exception as error:
        # The command line's own errors (unknown option, missing value); their module moved between releases.
        if not hasattr(error, "format_message"):
            raise
        status = _complain(error.format_message() or "see agpt --help", EXIT_BAD_INPUT)
    sys.exit(status if isinstance(status, int) else 0)


def _complain(sentence: str, status: int) -> int:
    print(f"agpt: {printable(sentence)}", file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"agpt {version('anomalygpt-edge')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Inspect parts with AnomalyGPT: a verdict sentence and an anomaly map for every frame."""


@app.command()
def run(
    source: Annotated[
        str, typer.Option(help="demo, a folder of images, an image, a video file, or a camera's number.")
    ] = "demo",
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for records.jsonl and overlays/.")] = None,
    overlays: OverlayChoice = "all",
    parts: Annotated[int | None, typer.Option(min=1, help="Stop after so many parts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="What passes on the demo line.")] = 0,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
    budget_ms: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Milliseconds for each part; what does not fit is left out, the sentence first."
        ),
    ] = None,
) -> None:
    """Inspect what a source delivers: a live table, records, overlays, and a summary."""
    from .run import RunOptions, run_line

    run_line(
        RunOptions(
            source=source,
            bundle=bundle,
            recipe=recipe,
            normals=tuple(normal or ()),
            class_name=class_name,
            out=out,
            overlays=overlays,
            parts=parts,
            seed=seed,
            threads=threads,
            engine=engine,
            budget_ms=budget_ms,
        )
    )


@app.command()
def enroll(
    name: Annotated[str, typer.Option(help="The product's name.")],
    normal: Annotated[list[Path], typer.Option(help="Image of a good part, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Recipe file to write; its memory bank goes beside it.")],
    bundle: BundleOption = None,
    class_name: ClassOption = None,
    description: Annotated[str, typer.Option(help="What a good part looks like, in a sentence.")] = "",
    storage: Annotated[str, typer.Option(help="Memory bank: float32, float16 or int8.")] = "float32",
    max_patches: Annotated[
        int | None, typer.Option(min=1, help="Memory bank: keep only so many patches of each layer.")
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="Memory bank: augment the normal samples: moved (by half a patch), turned (by 90, 180 and 270 "
            "degrees), both or none; the bundle's own when left out. The bank stays as large."
        ),
    ] = None,
    false_reject_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of good parts that may be rejected: p(anomaly) decides at an operating point for it, not the "
            "sentence. 0.01 takes 99 good parts at least.",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            help="Other good parts, or a folder of them, to choose the operating point on; each --normal against "
            "the rest when left out."
        ),
    ] = None,
    without_verdict: Annotated[
        str,
        typer.Option(
            help="What a part is for whose answer the deadline leaves no time: no_result, or what the map says at "
            "its operating point (map)."
        ),
    ] = "no_result",
    tiles: TilesOption = None,
    overlap: OverlapOption = DEFAULT_OVERLAP,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="Look at this box of the frame only, NAME=x,y,width,height or with an angle behind, in pixels and "
            "degrees clockwise; may be given several times."
        ),
    ] = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Make a product's recipe from pictures of good parts."""
    from ..enrolment.enroll import enroll as make_recipe
    from ..enrolment.operating_point import rate_limit
    from ..inspection.inspector import Inspector
    from ..vision.images import read_image
    from ..vision.views import parse_region, parse_tiles
    from .run import image_paths

    grid = parse_tiles(tiles, overlap) if tiles is not None else None
    regions = [parse_region(text) for text in region or ()]
    frames = [read_image(path) for path in image_paths(normal)]
    others = [read_image(path) for path in image_paths(held_out)] if held_out else []
    with Inspector.open(bundle, class_name=class_name, threads=threads, engine=engine) as inspector:
        recipe = make_recipe(
            inspector,
            frames,
            out,
            name=name,
            class_name=class_name,
            description=description,
            storage=storage,  # type: ignore[arg-type]  # checked there
            max_patches=max_patches,
            false_reject_rate=false_reject_rate,
            held_out=others,
            without_verdict=without_verdict,  # type: ignore[arg-type]  # checked there
            tiles=grid,
            regions=regions,
            augmentation=augmentation,  # type: ignore[arg-type]  # checked there
        )
    print(f"{out}: recipe {name!r} from {len(frames)} good parts; use it with --recipe {out}")
    if point := recipe.operating_point:
        limit = rate_limit(point.false_reject_rate, point.num_normals)
        print(
            f"FAIL above p(anomaly) {point.p_anomaly:.6g}, chosen on {point.num_normals} good parts: on average over "
            f"such choices at most {point.false_reject_rate:.1%} of good parts are rejected; after this one, at most "
            f"{limit:.1%} (with 95 % confidence)"
        )


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="The image.")],
    question: Annotated[
        str | None,
        typer.Argument(
            help='What to ask, for example "Is there a crack?"; left out, one question a line is read.'
        ),
    ] = None,
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Ask about an image: one question, or a dialogue, a line a question, until the input ends."""
    from ..vision.images import read_image
    from .ask import answer_lines
    from .run import open_inspector

    if question is not None and not question.strip():
        raise ConfigError("the question is empty: ask something")
    frame = read_image(image)
    with open_inspector(bundle, recipe, tuple(normal or ()), class_name, threads, engine) as inspector:
        dialogue = inspector.dialogue(frame)
        if dialogue.view:
            print(f"about {printable(dialogue.view)}, where the map is highest", file=sys.stderr)
        answer_lines(dialogue, sys.stdin if question is None else [question])


@app.command()
def trace(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    image: Annotated[Path, typer.Argument(help="The image.")],
    out: Annotated[Path, typer.Option(help="npz file to write.")],
    normal: NormalOption = None,
    class_name: ClassOption = None,
    resize: Annotated[
        str | None,
        typer.Option(help="How the image becomes square: crop or stretch; the bundle's if left out."),
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask; the bundle's own question if left out.")] = "",
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Write every intermediate result of one inspection, to compare with another program."""
    from ..evaluation.trace import TraceOptions, trace_image

    options = TraceOptions(bundle, image, tuple(normal or ()), class_name, resize, question, threads, engine)
    trace_image(options, out)


@app.command("eval")
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    folder: Annotated[Path, typer.Argument(help="One category or many, in MVTec-AD or VisA layout.")],
    shots: Annotated[str, typer.Option(help="Numbers of normal samples, 0 for zero-shot.")] = "0,1,2,4",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file too.")] = None,
    class_name: ClassOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Which normal samples are taken.")] = 0,
    tiles: TilesOption = None,
    overlap: OverlapOption = DEFAULT_OVERLAP,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Measure a bundle on labelled images: image and pixel AUROC, verdict accuracy."""
    from ..evaluation.evaluate import evaluate_folder, parse_shots, print_table, write_json
    from ..vision.views import parse_tiles

    grid = parse_tiles(tiles, overlap) if tiles is not None else None
    results = evaluate_folder(bundle, folder, parse_shots(shots), class_name, seed, threads, engine, grid)
    print_table(results)
    if json is not None:
        write_json(results, json)


@app.command(
    "export",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def export(context: typer.Context) -> None:
    """Turn checkpoints into a bundle (needs the extra "export"; agpt export --help)."""
    from ...export.__main__ import export_command

    export_command(context.args)


@app.command()
def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder; the one that ships when left out.")
    ] = None,
    engine: EngineOption = "auto",
) -> None:
    """Check a bundle: every file's digest, then one inspection on this machine."""
    from .doctor import verify_bundle

    verify_bundle(bundle, engine)


@app.command()
def doctor(
    checkpoints: Annotated[
        tuple[Path, Path, Path, Path] | None,
        typer.Option(metavar="IMAGEBIND VICUNA PANDAGPT ANOMALYGPT", help="Check these before an export."),
    ] = None,
) -> None:
    """Say what this machine can run, what is missing, and how to get it; or what a set of checkpoints is."""
    from .doctor import print_report

    if not print_report(survey(checkpoints) if checkpoints else None):
        raise typer.Exit(1)


def survey(checkpoints: tuple[Path, Path, Path, Path]) -> list[Finding]:
    """Findings about the four checkpoints (needs the extra "export")."""
    try:
        from ...export.checkpoint_report import report_checkpoints as examine
    except ImportError as error:
        raise ConfigError(
            f"looking into checkpoints needs a package that is not installed ({error.name}): "
            "pip install 'anomalygpt-edge[export]'"
        ) from error
    return examine(*checkpoints)


if __name__ == "__main__":
    main()
