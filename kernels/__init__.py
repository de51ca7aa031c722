"""The hot loops around the networks: pixels in, features matched, maps out.

Every operation has a NumPy reference (``reference/``) and compiled kernels with the same results, chosen at run
time (``choice``): ``available()`` lists what runs here, ``AGPT_KERNELS`` forces one.
"""

from .choice import active, available, using
from .geometry import Box, Window, resize_window, split_grid, tile_grid
from .maps import Component, Summary, cell_peaks, components, localise, project, summarise, upsample
from .matching import Bank, coreset, match, most_like, normalise, prepare_bank
from .pixels import FORMATS, PixelFormat, frame_size, preprocess
from .prompts import INJECTED, pack_prompt

__all__ = [
    "FORMATS",
    "INJECTED",
    "Bank",
    "Box",
    "Component",
    "PixelFormat",
    "Summary",
    "Window",
    "active",
    "available",
    "cell_peaks",
    "components",
    "coreset",
    "frame_size",
    "localise",
    "match",
    "most_like",
    "normalise",
    "pack_prompt",
    "prepare_bank",
    "preprocess",
    "project",
    "resize_window",
    "split_grid",
    "summarise",
    "tile_grid",
    "upsample",
    "using",
]
