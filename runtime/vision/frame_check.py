"""The frame check: does a frame show the enrolled product at all, or something else, or nothing?

It is learned from the normal samples at enrolment. A frame that is no picture of the product gets NO_RESULT, because a
verdict about it would mean nothing: a dark camera is full of patches that are normal on a dark part.

Three questions are asked of a frame:

- brightness: is its mean grey level near that of the normal samples (dark, covered, over-exposed frames)?
- contrast: is there any structure in it (blank frames)?
- unlikeness: are its patches near normal patches, and near as many different ones as those of a good part? The median
  distance of its patches, relative to that of good parts, is divided by the share of different normal patches that
  they match, relative to that of good parts. A foreign frame has a large distance and matches few different patches.

The limits were chosen on five folders of photos with lite (figures: ``models/lite/MODEL_CARD.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import cv2
import msgspec
import numpy as np
from msgspec import Meta

BRIGHTNESS = 1.8  # largest factor between a frame's mean grey level and that of the nearest normal sample
LEAST_GREY = 8.0  # added to grey levels, so that noise in black does not count as a factor
CONTRAST = 0.35  # least share of the normal samples' smallest contrast
BLANK = 2.0  # standard deviation of grey levels below which a frame shows nothing, whatever the product
LIMITS = {1: 25.0, 2: 12.0, 3: 12.0}  # of the unlikeness, by number of different normal samples
LIMIT_OF_MANY = 7.5
SAMPLED = 128  # pixels per side at which grey levels are measured
LEAST = 1e-5  # smallest distance of good parts: below is rounding

Positive = Annotated[float, Meta(gt=0)]


class FrameCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What frames of the product look like.

    Attributes:
        darkest, brightest: smallest and largest mean grey level of the normal samples, 0..255.
        contrast: smallest standard deviation of their grey levels.
        distance: mean of the median distance of a good part's patches to the others' patches.
        diversity: mean share of different rows of the memory bank that a good part's patches match, 0..1.
        limit: largest unlikeness of a frame of the product, see ``unlikeness``.
    """

    darkest: Annotated[float, Meta(ge=0, le=255)]
    brightest: Annotated[float, Meta(ge=0, le=255)]
    contrast: Annotated[float, Meta(ge=0)]
    distance: Positive
    diversity: Annotated[float, Meta(gt=0, le=1)]
    limit: Positive

    def unlikeness(self, distance: np.ndarray, nearest: np.ndarray) -> float:
        """How unlike the product a frame is; about 1 for a good part.

        Args:
            distance: of its patches to the nearest normal patches, float32 [views, P].
            nearest: rows of the memory bank, int32 [views, T, P].
        """
        found = statistics(distance, nearest)
        return (found[0] / self.distance) / max(found[1] / self.diversity, LEAST)


def statistics(distance: np.ndarray, nearest: np.ndarray) -> tuple[float, float]:
    """Median distance of the patches of a frame, and the mean share over the taps of different rows they match.

    Args:
        distance: float32 [views, P].
        nearest: int32 [views, T, P].
    """
    views, taps, patches = nearest.shape
    different = [len(np.unique(nearest[view, tap])) for view in range(views) for tap in range(taps)]
    return float(np.median(distance)), float(np.mean(different)) / patches


def grey_statistics(frame: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the grey levels of a frame, uint8 [H, W, 3] BGR, sampled at 128 × 128 pixels."""
    sampled = cv2.resize(frame, (SAMPLED, SAMPLED), interpolation=cv2.INTER_NEAREST)
    mean, deviation = cv2.meanStdDev(cv2.cvtColor(sampled, cv2.COLOR_BGR2GRAY))
    return float(mean[0, 0]), float(deviation[0, 0])


def learn_frame_check(
    frames: Sequence[np.ndarray],
    found: Sequence[tuple[float, float]],
    versions: Sequence[tuple[float, float]],
    num_different: int,
) -> FrameCheck:
    """The frame check of a product.

    Args:
        frames: its normal samples, uint8 [H, W, 3].
        found: ``statistics`` of normal samples against the others, or of augmented versions of a single one.
        versions: ``statistics`` of augmented versions of a sample, which may be empty.
        num_different: number of different normal samples.
    """
    grey = np.array([grey_statistics(frame) for frame in frames])
    distances, shares = np.array(found).T
    drift = float(np.mean([distance for distance, _ in versions])) if versions else 0.0
    return FrameCheck(
        darkest=float(grey[:, 0].min()),
        brightest=float(grey[:, 0].max()),
        contrast=float(grey[:, 1].min()),
        distance=max(float(distances.mean()), drift, LEAST),
        diversity=float(shares.mean()),
        limit=LIMITS.get(num_different, LIMIT_OF_MANY),
    )


def refuse_pixels(frame: np.ndarray, check: FrameCheck | None) -> str:
    """Why the pixels of a frame, uint8 [H, W, 3], cannot be of the product; "" if nothing speaks against it.

    Without a check only frames that show nothing at all are refused.
    """
    mean, contrast = grey_statistics(frame)
    least = BLANK if check is None else min(BLANK, check.contrast / 2)
    if contrast < least:
        return (
            f"the frame is blank (one grey level, {mean:.0f} of 255): check the camera, the lens and the light"
        )
    if check is None:
        return ""
    if contrast < CONTRAST * check.contrast:
        return (
            f"the frame has almost no contrast ({contrast:.0f}, good parts at least {check.contrast:.0f}): check the "
            "lens, the focus and the light"
        )
    if (mean + LEAST_GREY) * BRIGHTNESS < check.darkest + LEAST_GREY:
        return (
            f"the frame is too dark (mean grey level {mean:.0f}, good parts at least {check.darkest:.0f}): check the "
            "light, the exposure and the lens"
        )
    if mean + LEAST_GREY > (check.brightest + LEAST_GREY) * BRIGHTNESS:
        return (
            f"the frame is too bright (mean grey level {mean:.0f}, good parts at most {check.brightest:.0f}): check "
            "the light and the exposure"
        )
    return ""


def refuse_patches(distance: np.ndarray, nearest: np.ndarray, check: FrameCheck, name: str) -> str:
    """Why the patches of a frame cannot be of the product ``name``; "" if nothing speaks against it; arguments as of
    ``FrameCheck.unlikeness``."""
    found = check.unlikeness(distance, nearest)
    if found <= check.limit:
        return ""
    return (
        f"this does not look like {name}: hardly anything in the frame is near a normal sample (unlikeness "
        f"{found:.3g}, limit {check.limit:.3g}); check the recipe, the part's position and the camera"
    )
