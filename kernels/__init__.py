"""The hot loops around the networks: camera pixels to network input, patch features to distances, patches to maps.

Every operation has a NumPy reference (``reference/``) and compiled kernels with the same results (``cpu/``,
``cuda/``). ``choice`` selects one at run time: ``available()`` lists those that run on this machine, the environment
variable ``AGPT_KERNELS`` forces one.

Imports run one way: the implementations import ``types``, ``geometry``, ``sampling`` and ``dequantise``; ``choice``
imports the implementations; the public operations (``maps``, ``matching``, ``pixels``, ``prompts``) import ``choice``.
"""

from .choice import active, available, using
from .geometry import Box, Window, resize_window, split_grid, tile_grid
from .maps import Component, Summary, cell_peaks, components, localise, project, summarise, upsample
from .matching import coreset, match, match_places, match_scaled, nearest_row, normalise, prepare_bank
from .pixels import preprocess
from .prompts import INJECTED, pack_prompt
from .types import FORMATS, Bank, PixelFormat, frame_size

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
    "match_places",
    "match_scaled",
    "nearest_row",
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
