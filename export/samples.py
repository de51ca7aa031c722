"""Generated images for the parity check: parts, and images as unlike them as a line's photographs may be.

On parts before a grey background, an int8 network has a tenth of the error that it has on photographs. The parity check
therefore also uses textures with the spectrum of photographs and flat areas of black, white and full colour.
"""

from __future__ import annotations

import cv2
import numpy as np

NUM_SHAPES = 7


def draw_part(seed: int, scratched: bool) -> np.ndarray:
    """uint8 BGR [256, 320, 3]: a disc on a grained background; not square, so that resizing is tested too."""
    rng = np.random.default_rng(seed)
    grain = cv2.GaussianBlur(rng.normal(0, 60, (256, 320, 3)), (0, 0), 1.5)
    frame = np.clip(110 + grain, 0, 255).astype(np.uint8)
    centre = (160 + int(rng.integers(-8, 9)), 128 + int(rng.integers(-8, 9)))
    cv2.circle(frame, centre, 80, (70, 150, 200), -1, cv2.LINE_AA)
    cv2.circle(frame, centre, 30, (40, 60, 90), -1, cv2.LINE_AA)
    if scratched:
        cv2.line(frame, (centre[0] - 60, centre[1] - 35), (centre[0] + 5, centre[1] - 60), (235, 240, 240), 3)
    return frame


def draw_texture(seed: int) -> np.ndarray:
    """uint8 BGR [256, 320, 3]: noise whose amplitude falls as 1/f, as that of photographs (Field, JOSA A 1987)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(320)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1 / 320)[..., None]
    spectrum = np.fft.rfft2(rng.normal(size=(256, 320, 3)), axes=(0, 1)) / frequency
    planes = np.fft.irfft2(spectrum, (256, 320), axes=(0, 1)) @ rng.normal(size=(3, 3))
    planes = (planes - planes.mean(axis=(0, 1))) / planes.std(axis=(0, 1))
    return np.clip(127 + 70 * planes, 0, 255).astype(np.uint8)


def draw_poster(seed: int) -> np.ndarray:
    """uint8 BGR [256, 320, 3]: hard-edged shapes in extreme colours on white."""
    rng = np.random.default_rng(seed)
    frame = np.full((256, 320, 3), 255, np.uint8)
    for _ in range(NUM_SHAPES):
        colour = tuple(int(level) for level in rng.choice([0, 255], 3))
        x, y = int(rng.integers(20, 300)), int(rng.integers(20, 236))
        size = int(rng.integers(15, 60))
        if rng.random() < 0.5:
            cv2.circle(frame, (x, y), size, colour, -1)
        else:
            cv2.rectangle(frame, (x, y), (x + size, y + 2 * size), colour, -1)
    return frame
