"""``agpt enroll``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DEFAULT_OVERLAP,
    BundleOption,
    ClassOption,
    EngineOption,
    OverlapOption,
    ThreadsOption,
    TilesOption,
    path,
)


def enroll(
    name: Annotated[str, typer.Option(help="The product's name.")],
    normal: Annotated[
        list[Path],
        typer.Option(
            parser=path,
            metavar="PATH",
            help="Image of a good part, or a folder of such images and its subfolders. May be given several times.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(parser=path, help="Recipe file to write; the memory bank is written beside it.")
    ],
    bundle: BundleOption = None,
    class_name: ClassOption = None,
    description: Annotated[str, typer.Option(help="One sentence on what a good part looks like.")] = "",
    storage: Annotated[
        str, typer.Option(help="Data type of the memory bank: float32, float16 or int8.")
    ] = "float32",
    max_patches: Annotated[
        int | None, typer.Option(min=1, help="Largest number of patches per layer in the memory bank.")
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="Augmentation of the normal samples in the memory bank: moved (by half a patch), turned (by 90, 180 "
            "and 270 degrees), both or none. Default: the bundle's. The size of the bank does not change."
        ),
    ] = None,
    false_reject_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of good parts that may be rejected, for example 0.01, which needs at least 99 good parts. An "
            "operating point (a limit of p(anomaly)) is chosen for it and decides the verdict instead of the answer.",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            parser=path,
            metavar="PATH",
            help="Other good parts, or a folder of them, for choosing the operating point. Default: each --normal "
            "image is compared with the others.",
        ),
    ] = None,
    without_verdict: Annotated[
        str,
        typer.Option(
            help="Status of a part when its deadline leaves no time for the answer: no_result, or map (the anomaly map "
            "decides at its own operating point)."
        ),
    ] = "no_result",
    tiles: TilesOption = None,
    overlap: OverlapOption = DEFAULT_OVERLAP,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="Inspect only this region of the frame: NAME=x,y,width,height or NAME=x,y,width,height,angle, in "
            "pixels and degrees clockwise. May be given several times."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="How the frame is fitted to the square that the model sees: crop (the centre square; the rest is not "
            "inspected) or stretch (everything, distorted). Required without --tiles and --region where crop would "
            "leave out more than a tenth of the frame. Default: the bundle's; stretch for tiles and regions."
        ),
    ] = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Create a product's recipe from images of good parts."""
    from ..common.terminal import tell
    from ..enrolment.enroll import check_folder, check_options
    from ..enrolment.enroll import enroll as make_recipe
    from ..enrolment.operating_point import rate_limit
    from ..enrolment.samples import check_unseen, identical_samples, largest_unseen, read_samples
    from ..inspection.inspector import Inspector
    from ..vision.image_files import image_paths
    from ..vision.views import describe_seen, describe_share, make_layout, parse_region, parse_tiles

    check_options(name, storage, max_patches, augmentation, without_verdict, resize)
    check_folder(out)
    grid = parse_tiles(tiles, overlap) if tiles is not None else None
    regions = [parse_region(text) for text in region or ()]
    samples = read_samples(image_paths(normal, tell))
    others = read_samples(image_paths(held_out, tell)) if held_out else []
    for name_of_copy, name_of_first in identical_samples(samples):
        tell(f"{name_of_copy} is identical to {name_of_first}: it adds nothing to the memory bank")
    layout = make_layout(grid, tuple(regions), samples[0].pixels.shape[:2])
    with Inspector.open(bundle, class_name=class_name, threads=threads, engine=engine) as inspector:
        fitted = inspector.bundle.manifest.preprocess.resize if layout.is_whole else "stretch"
        if resize is None:
            check_unseen(samples, layout, fitted, overlap)
        recipe = make_recipe(
            inspector,
            samples,
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
            resize=resize,  # type: ignore[arg-type]  # checked there
        )
    print(f"{out}: recipe {name!r} from {len(samples)} good parts; use it with --recipe {out}")
    unseen, _ = largest_unseen(samples, layout, recipe.resize or fitted)
    if unseen:
        print(f"not inspected: {describe_share(unseen)} of the frame, outside {describe_seen(layout)}")
    if point := recipe.operating_point:
        limit = rate_limit(point.false_reject_rate, point.num_normals)
        print(
            f"operating point: FAIL above p(anomaly) {point.p_anomaly:.6g}, chosen on {point.num_normals} good parts; "
            f"false-reject rate: at most {point.false_reject_rate:.1%} on average over such choices, and at most "
            f"{limit:.1%} for this one with 95 % confidence"
        )
