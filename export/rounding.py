"""Tokens and weights as int8: how a token is coded, and how weights are rounded to match.

Each token is divided by its own largest value first, so a constant scale fits all of them. A scale that calibration
fixes would clip what the calibration images do not have, and a defect is just that (measured at full size: maps of
images unlike the calibration's decorrelated five times more). Where tokens are one-sided, as behind GELU, whose least
value is -0.17, half of a symmetric range would stay empty: they are moved down by a constant share of their size
(``SKEWS``; a quarter of the error's variance at full size).

Each channel's centre is taken off where a LayerNorm does that for nothing, and outlier channels are equalised there,
channel j divided by s_j and row j of the weights multiplied by it, s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant, Xiao
et al., ICML 2023). Weights are rounded one input channel after the other, each making up for the errors of those before
it on the calibration tokens (GPTQ, Frantar et al., ICLR 2023, as LDLQ, Chee et al., NeurIPS 2023); what is left of
their mean goes into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = 127
MAX_TRIED = 512  # tokens on which ways to code them are compared
MAX_CHANNELS = 5120  # whose covariance is held at once
DAMPING = 0.01  # of the mean variance, in every direction: calibration has not seen all there is
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # α; 0: not equalised
SKEWS = (1.0, 16.0)  # how much further tokens may reach upwards than downwards
BLOCK = 128  # rows whose errors are passed on together
TINY = np.float32(1e-12)


@dataclass
class Coding:
    """How a token x becomes int8: z = (x - centre) / shares, its size the larger of max z and -skew · min z; what is
    rounded is z / size - middle, in steps of ``scale``."""

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
        """z [R, K] as one pass sees it."""
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
        bias: float32 [N]: what the product lacks in the mean.
    """

    coding: Coding
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray


def quantise(tokens: np.ndarray, weight: np.ndarray, behind_norm: bool) -> Quantised:
    """Code the tokens in the way that leaves the smallest error on them, and round the weights to match.

    Args:
        tokens: float32 [R, K].
        weight: float32 [K, N].
        behind_norm: a LayerNorm makes the tokens for this product alone: it takes in the centre and the shares.
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
    """Centred and equalised where a LayerNorm takes it in, elsewhere one-sided or not; by the error of the output."""
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
    """s [K] of an equalisation; 1 for a strength of 0."""
    if not strength:
        return np.ones_like(peaks)
    shares = np.maximum(peaks, TINY) ** strength
    shares /= np.maximum(np.abs(weight).max(axis=1), TINY) ** (1 - strength)
    return shares / np.exp(np.log(shares).mean())  # the LayerNorm's scale keeps its size


def scale_of(weight: np.ndarray) -> np.ndarray:
    """A step [N] of each output channel."""
    return np.maximum(np.abs(weight).max(axis=0), TINY) / LEVELS


def round_weights(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[K, N] in steps → int8, so that tokens [R, K] @ it change little; ``MAX_CHANNELS`` of K at a time."""
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), MAX_CHANNELS):
        part = slice(start, start + MAX_CHANNELS)
        rounded[part] = round_in_turn(weight[part], feedback_of(tokens[:, part]))
    return rounded


def feedback_of(tokens: np.ndarray) -> np.ndarray:
    """[K, K], U of tokensᵀ tokens = U D Uᵀ, upper with a diagonal of 1: LDLQ's feedback."""
    covariance = tokens.T @ tokens
    diagonal = np.einsum("kk->k", covariance)
    diagonal += DAMPING * diagonal.mean() + TINY
    factor = np.linalg.cholesky(covariance[::-1, ::-1])[::-1, ::-1]
    return factor / np.diagonal(factor)


def round_in_turn(weight: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """Round row after row, each with the share of all earlier rows' errors that it can make up for."""
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
