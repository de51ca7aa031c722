"""Measurements when a language model opens: the number of threads to use, the cost of a pass, the rounding noise."""

from __future__ import annotations

import time
from collections.abc import Callable

import llama_cpp
import numpy as np

from .decoding import Decoder, Noise
from .draft_tree import DraftTree, PrefixTree
from .pass_cost import measure_costs

SHARED_STEP_SECONDS = 0.003  # a pass of one row that is shorter runs on one thread
NUM_STEPS = 3  # tokens of a probe's answer
NUM_DRAFTED = (28, 60)  # draft rows of a probe, alternating
MAX_PROBES = 12
MAX_PROBING_SECONDS = 0.5
NOISE_MARGIN = 1.5  # safety factor: the noise of a real part may exceed that of all probes
LEAST_NOISE = 1e-4  # lower bound as a share of the largest logit; float16 has three digits
TILED_ROWS = 64  # from here on ggml's CPU attention computes in tiles, which rounds differently
WORTH_PADDING = 1.15  # a prompt's pass may be padded up to this multiple of its time
NOISE_REDUCTION = 0.1  # ... if that reduces the noise of the first token to this share


def probe(decoder: Decoder, rows: np.ndarray, threads: int) -> None:
    """Measure and set the session's number of threads and the decoder's costs and noise.

    Args:
        decoder: the decoder.
        rows: float32 [n, D], a typical prompt after the shared prefix.
        threads: the most CPU threads to use.
    """
    threads = choose_threads(decoder, threads)
    decoder.costs = measure_costs(decoder.run_rows, decoder.room, choose_clock(threads))
    decoder.noise = choose_noise(decoder, rows)


def choose_clock(threads: int) -> Callable[[], float]:
    """The clock to time passes with: CPU time if llama.cpp runs on the CPU, so that other processes do not count.

    With wall-clock time on a busy machine, nano's pass of 64 rows, which is longer than a time slice of the scheduler,
    took four times as long, but its pass of one row did not. Too few tokens were drafted, and a ninth of the answers
    needed a second pass.
    """
    if llama_cpp.llama_supports_gpu_offload():
        return time.perf_counter
    return lambda: time.process_time() / threads


def choose_threads(decoder: Decoder, threads: int) -> int:
    """Set and return the number of threads: 1 for a small model, because llama.cpp's threads busy-wait for each other.

    A pass of one row of nano (0.1 ms) takes three times as long on two threads, and far longer on a busy machine.
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
    """Measure the noise, and pad the prompt's pass to ``TILED_ROWS`` where that costs little and reduces it much.

    Nano's logits after a prompt of 33 rows change by 1e-3 when drafts are added; padded to 64 rows they do not change.
    """
    noise = measure_noise(decoder, rows, decoder.costs.cheapest(len(rows)))
    few, many = decoder.costs.seconds(np.array([len(rows), TILED_ROWS]))
    if noise.min_rows < TILED_ROWS <= decoder.room and many <= WORTH_PADDING * few:
        padded = measure_noise(decoder, rows, TILED_ROWS)
        if padded.first <= NOISE_REDUCTION * noise.first:
            return padded
    return noise


def measure_noise(decoder: Decoder, rows: np.ndarray, min_rows: int) -> Noise:
    """Measure how much the difference of two logits can change with the other rows of a pass.

    A few greedy tokens are computed one a pass and in a single pass with drafts. The noise is the largest range of the
    logits' changes over the vocabulary (largest minus smallest change), over all probes, times ``NOISE_MARGIN``.

    Args:
        decoder: the decoder; its ``noise`` is overwritten.
        rows: float32 [n, D], a prompt; in each probe some of its rows are replaced by random ones of the same scale.
        min_rows: size that the prompt's pass is padded to.
    """
    decoder.noise = Noise(0.0, 0.0, min_rows)
    rng = np.random.default_rng(0)
    rows = rows[: max(1, decoder.room // 2)]
    scale = np.sqrt(np.mean(rows**2))
    room = decoder.room - len(rows) - NUM_STEPS
    first = later = least = 0.0
    started = time.perf_counter()
    for index in range(MAX_PROBES):
        mixed = np.where(rng.random((len(rows), 1)) < 0.5, rows, scale * rng.normal(size=rows.shape))
        num_others = min(NUM_DRAFTED[index % len(NUM_DRAFTED)], room) // (NUM_STEPS + 1)

        def draft(tokens: list[int], num_others: int = num_others) -> DraftTree:
            others = [[token, *tokens] for token in range(num_others) if token != tokens[0]]
            tree = PrefixTree([tokens, *others])
            return tree.draft(-1, np.arange(len(tree.tokens)), decoder.max_turns)

        alone, together = decoder.compare(mixed.astype(np.float32), NUM_STEPS, draft)
        moved = np.ptp(together - alone, axis=1)
        first, later = max(first, float(moved[0])), max(later, float(moved[1:].max()))
        least = max(least, LEAST_NOISE * float(np.abs(alone).max()))
        if time.perf_counter() - started > MAX_PROBING_SECONDS:
            break
    first, later = (max(NOISE_MARGIN * found, least) for found in (first, later))
    return Noise(first, max(first, later), min_rows)
