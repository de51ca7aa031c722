"""The hot loops around the networks: pixels in, features matched, maps out."""

from .reference import Window, match, normalise, preprocess, resize_window, upsample

__all__ = ["Window", "match", "normalise", "preprocess", "resize_window", "upsample"]
