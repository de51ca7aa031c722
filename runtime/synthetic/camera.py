"""Effects of the line on good and defective parts alike: dirt and wear, light, lens, sensor, compression.

The strength of each effect is the line's (``style``, fixed for a product); its value in one shot is drawn from
``part``. None of these is a defect: masks do not contain them, and enrolled good samples show them too.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .canvas import Image, clip, pigment
from .noise import Field, smooth, white

BRIGHTEST = 0.82  # largest mean grey level: cameras of a line are not set up to overexpose


def photograph(image: Image, style: Generator, part: Generator, variation: float = 1.0) -> NDArray[np.uint8]:
    """Photograph a part: soil, light, lens, sensor.

    Args:
        image: the rendered part, [H, W, 3] BGR in 0..1.
        style: generator of the line's properties; in the same state for every part of a product.
        part: generator of everything that varies from shot to shot.
        variation: share of the line's usual variation from shot to shot, 0..1; below 1 there is no soil either.

    Returns:
        uint8 BGR [H, W, 3].
    """
    shot = np.array(image, np.float32)
    if variation >= 1:
        shot = _soil(shot, style, part)
    gain = _light(style, part, image.shape[:2])
    if variation < 1:
        gain = 1 + np.float32(variation) * (gain - 1)
    shot = shot * (gain * min(1.0, BRIGHTEST / max(float(shot.mean() * gain.mean()), 1e-3)))
    gamma, cast = style.choice([0.8, 1.0, 1.0, 1.25]), style.uniform(0, 0.03)
    shot = shot * (1 + variation * cast * part.uniform(-1, 1, 3)).astype(np.float32)
    soft, unsteady = style.uniform(0, 0.8), style.choice([0.1, 0.3, 1.0], p=[0.5, 0.3, 0.2])
    sigma = soft * (
        1 + variation * unsteady * part.uniform(-0.5, 1.0)
    )  # focus and depth differ from shot to shot
    if sigma > 0.25:
        shot = np.asarray(cv2.GaussianBlur(shot, (0, 0), sigma * min(image.shape[:2]) / 224), np.float32)
    noise, quality = noise_level(style), style.choice([0, 0, 0, 60, 85])
    shot = clip(shot)
    if gamma != 1.0:
        shot = np.asarray(cv2.pow(shot, float(gamma)), np.float32)
    shot = shot + (noise * part.uniform(0.7, 1.2)) * white(part, image.shape[:2])[..., None]
    pixels = np.rint(clip(shot) * 255).astype(np.uint8)
    if quality:
        encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
        pixels = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return pixels


def noise_level(style: Generator) -> np.float32:
    """Standard deviation of the sensor's noise, 0.3 % to 2.5 % of the grey range, mostly small (good cameras)."""
    return np.float32(0.003 * np.exp(style.uniform(0, 2.1) * style.uniform(0, 1)))


def _light(style: Generator, part: Generator, size: tuple[int, int]) -> Field:
    """Gain float32 [H, W, 1]: exposure, gradient, vignette, and a sheen that moves from shot to shot."""
    exposure = style.choice([0.02, 0.06, 0.15, 0.35], p=[0.3, 0.35, 0.2, 0.15])
    slope, vignette = style.uniform(0.05, 0.3), style.uniform(-0.3, 0.35)
    sheen, fixed = style.uniform(-0.1, 0.05), style.uniform(0, 2 * np.pi)
    y, x = np.ogrid[-0.5 : 0.5 : size[0] * 1j, -0.5 : 0.5 : size[1] * 1j]
    y, x = y.astype(np.float32), x.astype(np.float32)
    angle = fixed + part.normal() * 0.5
    gain = 1 + slope * part.uniform(0.2, 1.0) * (np.cos(angle) * x + np.sin(angle) * y)
    if vignette > 0:
        gain = gain - vignette * (x * x + y * y)
    if sheen > 0:
        gain = gain + sheen * smooth(part, size, max(size) / 2)
    gain = gain * np.clip(np.exp(exposure * part.normal()), 0.4, 1.9)
    return gain.astype(np.float32)[..., None]


def _soil(image: Image, style: Generator, part: Generator) -> Image:
    """Add the dust, crumbs, lint, smudges and scuffs that are usual on this line; changes ``image`` in place."""
    dusty, crumby, linty, smudged, scuffed = style.random(5)
    strength, amount = style.uniform(0.4, 1.0), style.uniform(0.2, 1.0)
    crumb, crumb_size = pigment(style, 0.1, 0.9), style.uniform(0.4, 1.6)
    direction = style.random() < 0.5
    size = image.shape[:2]
    scale = min(size) / 224
    if dusty > 0.65:
        for _ in range(part.poisson(8 * amount)):
            _dab(
                image,
                part,
                part.uniform(0.3, 1.1) * scale,
                part.choice([-1, 1]) * part.uniform(0.03, 0.16) * strength,
            )
    if crumby > 0.88:
        for _ in range(part.poisson(30 * amount)):
            _dab(image, part, part.uniform(0.3, 1.0) * crumb_size * scale, crumb)
    if linty > 0.9:
        for _ in range(part.poisson(2 * amount)):
            _hair(image, part, part.uniform(0.08, 0.2) * strength)
    if smudged > 0.75:
        field = smooth(part, size, part.uniform(20, 70) * scale)
        image *= (1 + 0.035 * strength * field)[..., None]
    if scuffed > 0.85:
        streaks = (
            smooth(part, size, 1.5 * scale, 30.0)
            if direction
            else smooth(part, size[::-1], 1.5 * scale, 30.0).T
        )
        image += (0.04 * strength * np.clip(streaks - 1.6, 0, 1))[..., None]
    return image


def _dab(image: Image, part: Generator, radius: float, tone: float | np.floating | Field) -> None:
    """Add a speck at a random place: lighter or darker by a scalar ``tone``, or of the colour ``tone`` (BGR)."""
    height, width = image.shape[:2]
    reach = int(np.ceil(radius + 1))
    x, y = int(part.integers(reach, width - reach)), int(part.integers(reach, height - reach))
    dy, dx = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    squeeze = part.uniform(0.7, 1.4)
    alpha = np.clip(radius + 0.5 - np.hypot(dx * squeeze, dy / squeeze), 0, 1).astype(np.float32)[..., None]
    window = image[y - reach : y + reach + 1, x - reach : x + reach + 1]
    window += alpha * (np.float32(tone) if np.ndim(tone) == 0 else np.asarray(tone) - window)


def _hair(image: Image, part: Generator, strength: float) -> None:
    """Add a short, faint, bent line of lint."""
    size = image.shape[:2]
    turn = part.uniform(0, 2 * np.pi) + np.cumsum(part.normal(0, 0.3, 10))
    steps = part.uniform(0.005, 0.02) * min(size) * np.stack([np.cos(turn), np.sin(turn)], 1)
    points = np.cumsum(steps, axis=0) + part.uniform(0, 1, 2) * size[::-1]
    canvas = np.zeros(size, np.uint8)
    cv2.polylines(canvas, [np.rint(points * 16).astype(np.int32)], False, 255, 1, cv2.LINE_AA, shift=4)
    image += (canvas.astype(np.float32) * np.float32(part.choice([-1, 1]) * strength / 255))[..., None]
