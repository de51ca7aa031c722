"""int8 coding of tokens, and rounding of weights to match.

Each token is first divided by its own largest value, so one constant scale fits all tokens. A scale fixed by
calibration would clip values that the calibration images do not have, and defects have such values (measured at full
size: maps of images unlike the calibration's had five times the decorrelation). Where tokens are one-sided, as behind
GELU, whose least value is -0.17, half of a symmetric range would be unused: such tokens are shifted down by a constant
share of their size (``SKEWS``; this leaves a quarter of the error's variance at full size).

Where a LayerNorm produces the tokens, it also subtracts each channel's centre and equalises outlier channels, at no
cost: channel j is divided by s_j and row j of the weights multiplied by it, s_j = max|x_j|^α / max|w_j|^(1−α)
(SmoothQuant, Xiao et al., ICML 2023). Weights are rounded one input channel after the other, and each compensates for
the errors of the earlier ones on the calibration tokens (GPTQ, Frantar et al., ICLR 2023, in the form of LDLQ, Chee
et al., NeurIPS 2023); the remaining mean error goes into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = 127
MAX_TRIED = 512  # tokens that codings are compared on
MAX_CHANNELS = 5120  # whose covariance is held in memory at once
DAMPING = (
    0.01  # share of the mean variance added to every channel's: calibration tokens do not cover everything
)
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # α; 0: not equalised
SKEWS = (1.0, 16.0)  # ratio of the ranges above and below zero
BLOCK = 128  # rows whose errors are propagated together
TINY = np.float32(1e-12)


@dataclass
class Coding:
    """int8 coding of a token x: z = (x - centre) / shares; size = max(max z, -skew · min z); z / size - middle is
    rounded to multiples of ``scale``."""

    centre: np.ndarray  # float32 [K]
    shares: np.ndarray  # float32 [K]
    skew: float = 1.0

    @property
    def middle(self) -> float:
        return (1 - 1 / self.skew) / 2

    @property
    def scale(self) -> float:
        return (1 + 1 / self.skew) / 2 / LEVELS

    def spread(self, tokens: np.ndarray) -> np.ndarray:
        """z [R, K]."""
        return (tokens - self.centre) / self.shares

    def rounded(self, tokens: np.ndarray) -> np.ndarray:
        """z [R, K] after coding and decoding, as one pass multiplies it."""
        z = self.spread(tokens)
        size = np.maximum(z.max(axis=1, keepdims=True), -self.skew * z.min(axis=1, keepdims=True))
        size = np.maximum(size, TINY)
        return (np.rint((z / size - self.middle) / self.scale) * self.scale + self.middle) * size


@dataclass
class Quantised:
    """x @ W in int8.

    Attributes:
        weight: int8 [K, N].
        weight_scale: float32 [N].
        bias: float32 [N]: the mean error of the product, which is added to it.
    """

    coding: Coding
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray


def quantise(tokens: np.ndarray, weight: np.ndarray, behind_norm: bool) -> Quantised:
    """Choose the coding with the smallest error on the tokens, and round the weights to match.

    Args:
        tokens: float32 [R, K].
        weight: float32 [K, N].
        behind_norm: only this product uses a LayerNorm's output, so the LayerNorm can absorb centre and shares.
    """
    coding = choose_coding(tokens, weight, behind_norm)
    scaled = weight * coding.shares[:, None]
    scale = scale_of(scaled)
    z = coding.spread(tokens)
    mean, z_mean = tokens.mean(axis=0), z.mean(axis=0)
    rounded = round_weights(scaled / scale, z - z_mean)
    bias = mean @ weight - (z_mean @ rounded.astype(np.float32)) * scale
    return Quantised(coding, rounded, scale, bias)


def choose_coding(tokens: np.ndarray, weight: np.ndarray, behind_norm: bool) -> Coding:
    """The coding with the smallest error of the product: centred and equalised behind a LayerNorm, with several
    strengths; elsewhere symmetric or one-sided."""
    tried = tokens[:: -(-len(tokens) // MAX_TRIED)]
    exact = tried @ weight
    if not behind_norm:
        zeros, ones = np.zeros_like(weight[:, 0]), np.ones_like(weight[:, 0])
        codings = [Coding(zeros, ones, skew) for skew in SKEWS]
    else:
        centre = tokens.mean(axis=0)
        peaks = np.abs(tokens - centre).max(axis=0)
        codings = [Coding(centre, shares_of(strength, peaks, weight)) for strength in STRENGTHS]

    def error(coding: Coding) -> float:
        scaled = weight * coding.shares[:, None]
        scale = scale_of(scaled)
        found = coding.rounded(tried) @ (np.rint(scaled / scale) * scale) + coding.centre @ weight
        return float(np.linalg.norm(found - exact))

    return min(codings, key=error)


def shares_of(strength: float, peaks: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Equalisation factors s [K]; all 1 for a strength of 0."""
    if not strength:
        return np.ones_like(peaks)
    shares = np.maximum(peaks, TINY) ** strength
    shares /= np.maximum(np.abs(weight).max(axis=1), TINY) ** (1 - strength)
    return shares / np.exp(np.log(shares).mean())  # the LayerNorm's scale keeps its size


def scale_of(weight: np.ndarray) -> np.ndarray:
    """Step size [N] of each output channel."""
    return np.maximum(np.abs(weight).max(axis=0), TINY) / LEVELS


def round_weights(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Weights [K, N] in units of their step → int8 [K, N], such that tokens [R, K] @ weights change little.
    ``MAX_CHANNELS`` of K are rounded at a time."""
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), MAX_CHANNELS):
        part = slice(start, start + MAX_CHANNELS)
        rounded[part] = round_in_turn(weight[part], feedback_of(tokens[:, part]))
    return rounded


def feedback_of(tokens: np.ndarray) -> np.ndarray:
    """LDLQ's feedback: U [K, K], upper triangular with a diagonal of 1, of tokensᵀ tokens = U D Uᵀ."""
    covariance = tokens.T @ tokens
    diagonal = np.einsum("kk->k", covariance)
    diagonal += DAMPING * diagonal.mean() + TINY
    factor = np.linalg.cholesky(covariance[::-1, ::-1])[::-1, ::-1]
    return factor / np.diagonal(factor)


def round_in_turn(weight: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """Round one row after the other, each after adding the feedback of all earlier rows' errors."""
    rounded = np.empty(weight.shape, np.int8)
    errors = np.zeros_like(weight)
    for start in range(0, len(weight), BLOCK):
        stop = min(start + BLOCK, len(weight))
        wanted = weight[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for row in range(start, stop):
            exact = wanted[row - start] + feedback[start:row, row] @ errors[start:row]
            rounded[row] = np.clip(np.rint(exact), -LEVELS, LEVELS)
            errors[row] = weight[row] - rounded[row]
    return rounded
