"""Every operation in NumPy, short and simple: the results that the compiled kernels must equal.

This module is an ``implementation.Implementation``. The public functions (``kernels.preprocess`` and so on) check the
arguments before they call it.
"""

from .maps import cell_peaks, components, localise, project, summarise, upsample
from .matching import coreset, match, match_places, pack_bank
from .pixels import preprocess
from .prompts import pack_prompt

name = "reference"

__all__ = [
    "cell_peaks",
    "components",
    "coreset",
    "localise",
    "match",
    "match_places",
    "name",
    "pack_bank",
    "pack_prompt",
    "preprocess",
    "project",
    "summarise",
    "upsample",
]
