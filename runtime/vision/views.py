"""The views of a frame: the whole frame, regions of interest, or tiles, which show small defects larger."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from ...kernels import Box, split_grid, tile_grid
from ...kernels.geometry import box_to_frame, check_box
from ...kernels.types import MAX_SIDE
from ..bundles.bundle import Name, Schema
from ..common.errors import ConfigError, ImageError
from ..common.schema_errors import describe_error

MAX_VIEWS = 256  # per frame; each view passes the networks
MAX_MASK_PIXELS = 1 << 20  # of the mask on which the inspected share of a frame is counted
Resize = Literal["crop", "stretch"]
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Pixels = Annotated[float, Meta(ge=-MAX_SIDE, le=MAX_SIDE)]


class FrameSize(Schema, frozen=True):
    """Size in pixels of the frames that the regions or tiles are for."""

    width: Side
    height: Side


class RegionOfInterest(Schema, frozen=True, omit_defaults=True):
    """A box of the frame that is inspected on its own, in frame pixels; for its geometry see ``kernels.Box``."""

    name: Name
    x: Pixels
    y: Pixels
    width: Pixels
    height: Pixels
    angle: Annotated[float, Meta(ge=-360, le=360)] = 0.0  # degrees clockwise about the centre

    @property
    def box(self) -> Box:
        return Box(self.x, self.y, self.width, self.height, self.angle)


class Tiles(Schema, frozen=True, omit_defaults=True):
    """Tiles over the whole frame: a grid of ``rows`` × ``columns``, or square tiles of ``side`` pixels."""

    rows: Annotated[int, Meta(ge=1, le=MAX_VIEWS)] | None = None
    columns: Annotated[int, Meta(ge=1, le=MAX_VIEWS)] | None = None
    side: Side | None = None
    overlap: Annotated[float, Meta(ge=0, le=0.9)] = 0.0  # least share of a tile that the next one also shows

    def __post_init__(self) -> None:
        grid = self.rows is not None and self.columns is not None
        if grid == (self.side is not None) or (self.rows is None) != (self.columns is None):
            raise ValueError("tiles have either rows and columns or a side")


class View(NamedTuple):
    """One box of a frame, which passes the networks on its own."""

    name: str  # of the region or tile; "" for the whole frame
    box: Box


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The views of a product's frames: regions, tiles, or neither.

    Attributes:
        frame: the size that frames must have; None for any size.
        tiles: the tiles; they share one memory bank, because they may show the same things.
        regions: the regions of interest; each has its own memory bank.
    """

    frame: FrameSize | None = None
    tiles: Tiles | None = None
    regions: tuple[RegionOfInterest, ...] = ()

    def __post_init__(self) -> None:
        if self.tiles and self.regions:
            raise ValueError("there are either regions or tiles, not both: leave one out")
        names = [region.name for region in self.regions]
        if len(set(names)) < len(names):
            raise ValueError("two regions have the same name: give each its own")
        if self.frame:
            self.views((self.frame.height, self.frame.width))

    @property
    def is_whole(self) -> bool:
        """Whether frames of any size are inspected as a whole."""
        return self.tiles is None and not self.regions

    @property
    def num_views(self) -> int:
        """Number of views of a frame; 1 if it depends on the frame's size."""
        return len(self.views((self.frame.height, self.frame.width))) if self.frame else 1

    def views(self, frame_size: tuple[int, int]) -> tuple[View, ...]:
        """The views of a frame of (height, width) pixels.

        Raises:
            ImageError: the layout is for frames of another size.
            ValueError: a region is not inside the frame, or there are too many tiles.
        """
        height, width = frame_size
        if self.frame and (self.frame.height, self.frame.width) != (height, width):
            raise ImageError(
                f"the frame has {width} x {height} pixels, but the recipe's {'tiles' if self.tiles else 'regions'} "
                f"are for {self.frame.width} x {self.frame.height}: set the camera, or run agpt enroll again"
            )
        return _views(self, height, width)


WHOLE = Layout()


@lru_cache(maxsize=64)
def _views(layout: Layout, height: int, width: int) -> tuple[View, ...]:
    if layout.regions:
        return tuple(View(region.name, _checked_box(region, height, width)) for region in layout.regions)
    if layout.tiles is None:
        return (View("", Box(0, 0, width, height)),)
    tiles = layout.tiles
    if tiles.side is not None:
        if (width // tiles.side) * (height // tiles.side) > MAX_VIEWS:
            raise ValueError(f"tiles of {tiles.side} pixels would be over {MAX_VIEWS}: make them larger")
        boxes = tile_grid(height, width, tiles.side, tiles.overlap)
    else:
        boxes = split_grid(height, width, tiles.rows or 1, tiles.columns or 1, tiles.overlap)
    if len(boxes) > MAX_VIEWS:
        raise ValueError(f"there are {len(boxes)} tiles, more than {MAX_VIEWS}: make them larger")
    num_columns = sum(box.y == boxes[0].y for box in boxes)
    return tuple(View(_tile_name(index, num_columns), box) for index, box in enumerate(boxes))


def _checked_box(region: RegionOfInterest, height: int, width: int) -> Box:
    try:
        return check_box(region.box, height, width)
    except ValueError as error:
        raise ValueError(f"region {region.name!r}: {error}") from error


def _tile_name(index: int, num_columns: int) -> str:
    return f"row {index // num_columns + 1} column {index % num_columns + 1}"


@lru_cache(maxsize=64)
def unseen_share(views: tuple[View, ...], frame_size: tuple[int, int], resize: Resize) -> float:
    """Share of a frame that no view shows, 0..1: outside the regions or tiles, and outside the centre square of each
    view that is cropped.

    Args:
        views: the views.
        frame_size: (height, width) of the frame in pixels.
        resize: how each view is fitted to the encoder's square input.

    Returns:
        The share, exact for upright boxes in frames of up to a megapixel, otherwise to about 0.001.
    """
    height, width = frame_size
    scale = min(1.0, math.sqrt(MAX_MASK_PIXELS / (height * width)))
    seen = np.zeros((max(1, round(scale * height)), max(1, round(scale * width))), bool)
    rows, columns = seen.shape
    for _, box in views:
        xx, xy, x0, yx, yy, y0 = box_to_frame(box)
        side = min(box.width, box.height) if resize == "crop" else None
        seen_width, seen_height = (side, side) if side else (box.width, box.height)
        left, top = (box.width - seen_width) / 2, (box.height - seen_height) / 2
        across, down = (left, left + seen_width), (top, top + seen_height)
        corners_x = [(xx * u + xy * v + x0) * columns / width for u in across for v in down]
        corners_y = [(yx * u + yy * v + y0) * rows / height for u in across for v in down]
        part = (
            slice(max(0, math.floor(min(corners_y))), max(0, math.ceil(max(corners_y)))),
            slice(max(0, math.floor(min(corners_x))), max(0, math.ceil(max(corners_x)))),
        )
        y, x = np.ogrid[part[0], part[1]]
        x = (x[:, : columns - part[1].start] + 0.5) * width / columns - x0
        y = (y[: rows - part[0].start] + 0.5) * height / rows - y0
        u, v = xx * x + yx * y, xy * x + yy * y  # the inverse of a rotation is its transpose
        seen[part] |= (u >= across[0]) & (u <= across[1]) & (v >= down[0]) & (v <= down[1])
    return 1 - int(np.count_nonzero(seen)) / seen.size


def describe_share(share: float) -> str:
    """A share, 0..1, as a percentage that is 0 or 100 only if the share is."""
    percent = 100 * share
    if percent in (0, 100):
        return f"{percent:.0f} %"
    return f"{min(max(percent, 0.1), 99.9):.{0 if 1 <= percent <= 99 else 1}f} %"


def describe_seen(layout: Layout) -> str:
    """What a layout inspects of a frame, for messages about the rest."""
    return "the regions" if layout.regions else "the tiles" if layout.tiles else "the centre square"


def tiles_to_cover(frame_size: tuple[int, int], overlap: float) -> str:
    """The grid of square tiles, "ROWSxCOLUMNS", that covers a frame of (height, width) pixels with fewest tiles."""
    short, long = sorted(frame_size)
    count = math.ceil((long - short) / (short * (1 - overlap))) + 1
    return f"1x{count}" if frame_size[1] >= frame_size[0] else f"{count}x1"


def parse_tiles(text: str, overlap: float) -> Tiles:
    """Parse ``--tiles``: "3x4" → 3 rows and 4 columns; "448" → tiles of 448 pixels.

    Raises:
        ConfigError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if not found:
        raise ConfigError(f"--tiles {text!r} is neither ROWSxCOLUMNS like 3x3 nor a side in pixels like 448")
    first, second = found.groups()
    values = {"side": int(first)} if second is None else {"rows": int(first), "columns": int(second)}
    try:
        return msgspec.convert({**values, "overlap": overlap}, Tiles)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--tiles {text!r} --overlap {overlap} are not tiles ({describe_error(error)}): correct them"
        ) from error


def describe_tiles(tiles: Tiles) -> str:
    """Description of the tiles as on the command line, with the overlap."""
    size = f"of {tiles.side} pixels" if tiles.side is not None else f"{tiles.rows}x{tiles.columns}"
    return f"{size}, overlap {tiles.overlap:g}"


def parse_region(text: str) -> RegionOfInterest:
    """Parse ``--region``: "NAME=x,y,width,height" or "NAME=x,y,width,height,angle" (frame pixels, degrees clockwise).

    Raises:
        ConfigError: the text has another form.
    """
    name, _, numbers = text.rpartition("=")
    wanted = "NAME=x,y,width,height or NAME=x,y,width,height,angle"
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError as error:
        raise ConfigError(f"--region {text!r} is not {wanted}: {numbers!r} are not numbers") from error
    if len(values) not in (4, 5):
        raise ConfigError(f"--region {text!r} is not {wanted}: it has {len(values)} numbers")
    fields = dict(zip(("x", "y", "width", "height", "angle"), values, strict=False))
    try:
        return msgspec.convert({"name": name.strip(), **fields}, RegionOfInterest)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--region {text!r} is not {wanted}: {describe_error(error)}") from error


def make_layout(
    tiles: Tiles | None, regions: tuple[RegionOfInterest, ...], frame_size: tuple[int, int]
) -> Layout:
    """The layout for frames of (height, width) pixels.

    Raises:
        ConfigError: there are both tiles and regions, two regions have the same name, a region is not inside the
            frame, or there are too many tiles.
    """
    if not tiles and not regions:
        return WHOLE
    height, width = frame_size
    if tiles is not None and tiles.side is not None and tiles.side > max(height, width):
        raise ConfigError(
            f"--tiles {tiles.side} is larger than the frame of {width} x {height} pixels: leave --tiles out, or give a "
            "smaller side"
        )
    try:
        return Layout(frame=FrameSize(width=width, height=height), tiles=tiles, regions=regions)
    except ValueError as error:
        raise ConfigError(f"--tiles or --region: {error}") from error
