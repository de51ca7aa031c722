"""What is measured when a language model opens: how many threads help it, what a pass costs, how exact it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import llama_cpp
import numpy as np

from .decoding import Decoder, Noise
from .draft_tree import DraftTree, PrefixTree
from .pass_cost import measure_costs

SHARED_STEP_SECONDS = 0.003  # a shorter step is not worth sharing between threads
NUM_STEPS = 3  # of a probed answer
NUM_DRAFTED = (28, 60)  # rows beside a probed answer, in turns
MAX_PROBES = 12
MAX_PROBING_SECONDS = 0.5
NOISE_MARGIN = 1.5  # a part may be worse than every probe
LEAST_NOISE = 1e-4  # of the largest logit; float16 keeps three digits
FEWEST_ROWS = 64  # from here on ggml's CPU attention computes in tiles, in other steps than below
WORTH_FILLING = 1.15  # of a prompt's time: what its pass may cost more, for a first token that is never a tie
MUCH_LESS = 0.1


def probe(decoder: Decoder, rows: np.ndarray, threads: int) -> None:
    """Set the session's threads and the decoder's costs and noise.

    Args:
        rows: float32 [n, D], a typical prompt behind the constant piece.
        threads: at most.
    """
    threads = choose_threads(decoder, threads)
    decoder.costs = measure_costs(decoder.run_rows, decoder.room, choose_clock(threads))
    decoder.noise = choose_noise(decoder, rows)


def choose_clock(threads: int) -> Callable[[], float]:
    """Seconds of the CPU where that computes, so that what else runs on the machine makes no pass look dear.

    On a busy machine nano's pass of 64 rows, longer than its turn on the CPU, took four times as long as it should and
    its step did not: too little was drafted, and a ninth of the answers took a second pass.
    """
    if llama_cpp.llama_supports_gpu_offload():
        return time.perf_counter
    return lambda: time.process_time() / threads


def choose_threads(decoder: Decoder, threads: int) -> int:
    """One thread for a small model: llama.cpp's threads spin while they wait for each other.

    A nano step (0.1 ms) takes three times as long on two threads, and far longer where something else runs.
    """
    decoder.session.set_threads(1)
    if min(_time_step(decoder) for _ in range(3)) < SHARED_STEP_SECONDS:
        return 1
    decoder.session.set_threads(threads)
    return threads


def _time_step(decoder: Decoder) -> float:
    started = time.perf_counter()
    decoder.run_rows(1)
    return time.perf_counter() - started


def choose_noise(decoder: Decoder, rows: np.ndarray) -> Noise:
    """Measured with the prompt's pass as large as is cheapest, and filled up where that costs little and helps much.

    Nano's 33 rows and the same with drafts behind them differ by 1e-3 in every logit; filled up to 64 by nothing.
    """
    noise = measure_noise(decoder, rows, decoder.costs.cheapest(len(rows)))
    few, many = decoder.costs.seconds(np.array([len(rows), FEWEST_ROWS]))
    if noise.fewest < FEWEST_ROWS <= decoder.room and many <= WORTH_FILLING * few:
        filled = measure_noise(decoder, rows, FEWEST_ROWS)
        if filled.first <= MUCH_LESS * noise.first:
            return filled
    return noise


def measure_noise(decoder: Decoder, rows: np.ndarray, fewest: int) -> Noise:
    """How far two logits can move against each other, whatever a pass holds besides.

    The same few tokens are computed step by step and in one pass among others: how far apart the change of the logit
    that rose most and of the one that fell most are, over the whole vocabulary and all probes.

    Args:
        rows: float32 [n, D], a prompt; probes differ from it by random rows of the same size.
        fewest: rows that the prompt's pass is filled up to.
    """
    decoder.noise = Noise(0.0, 0.0, fewest)
    rng = np.random.default_rng(0)
    rows = rows[: max(1, decoder.room // 2)]
    scale = np.sqrt(np.mean(rows**2))
    room = decoder.room - len(rows) - NUM_STEPS
    first = later = least = 0.0
    started = time.perf_counter()
    for index in range(MAX_PROBES):
        mixed = np.where(rng.random((len(rows), 1)) < 0.5, rows, scale * rng.normal(size=rows.shape))
        num_others = min(NUM_DRAFTED[index % len(NUM_DRAFTED)], room) // (NUM_STEPS + 1)

        def draft(said: list[int], num_others: int = num_others) -> DraftTree:
            others = [[token, *said] for token in range(num_others) if token != said[0]]
            tree = PrefixTree([said, *others])
            return tree.draft(-1, np.arange(len(tree.tokens)), decoder.max_turns)

        alone, together = decoder.compare(mixed.astype(np.float32), NUM_STEPS, draft)
        moved = np.ptp(together - alone, axis=1)
        first, later = max(first, float(moved[0])), max(later, float(moved[1:].max()))
        least = max(least, LEAST_NOISE * float(np.abs(alone).max()))
        if time.perf_counter() - started > MAX_PROBING_SECONDS:
            break
    first, later = (max(NOISE_MARGIN * found, least) for found in (first, later))
    return Noise(first, max(first, later), fewest)
