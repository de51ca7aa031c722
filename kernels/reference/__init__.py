"""Every operation in NumPy: short, obviously right, and fast enough for a small line.

What ``implementation.Implementation`` says, function by function; the checks come before (``pixels.py`` and
its siblings).
"""

from .maps import cell_peaks, components, localise, project, summarise, upsample
from .matching import coreset, match, pack_bank
from .pixels import preprocess
from .prompts import pack_prompt

name = "reference"

__all__ = [
    "cell_peaks",
    "components",
    "coreset",
    "localise",
    "match",
    "name",
    "pack_bank",
    "pack_prompt",
    "preprocess",
    "project",
    "summarise",
    "upsample",
]
