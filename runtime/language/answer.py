"""What is asked about an image, and what the language model says to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class MapReading:
    """An anomaly map in the words of an answer, from which answers are drafted.

    Attributes:
        score: mean of the highest 1 % of the map.
        ranking: all nine places, the one with the highest peak first.
        places: of the regions, strongest first.
    """

    score: float
    ranking: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """What is asked about one image.

    Attributes:
        image_embedding: float32 [D].
        prompt_embeddings: float32 [num_prompts, D].
        question: "" asks the bundle's own.
        reading: of the map, to draft answers from; costs only speed when left out.
        view: which region or tile of a frame it shows, for people.
    """

    image_embedding: np.ndarray
    prompt_embeddings: np.ndarray
    question: str = ""
    reading: MapReading | None = None
    view: str = ""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the language model said.

    Attributes:
        token_ids: the greedy tokens, the stop token included when it was reached.
        text: the answer without the stop string.
        affirmative: True when the first token is an affirmative one, False a negative one, None neither.
        p_anomaly: probability mass of the affirmative first tokens against the negative ones, 0..1.
        first_token_logits: float32 [vocab].
        num_passes: calls of ``llama_decode``.
        num_tokens_drafted: tokens that were put in to be verified.
        num_accepted: of these, the ones that the model said.
        settled: two tokens tied within the arithmetic's noise, and plain decoding had the last word.
        complete: False when ``stop`` ended it early.
        num_turns_dropped: earlier turns of a dialogue that the context has no room for any more.
    """

    token_ids: tuple[int, ...]
    text: str
    affirmative: bool | None
    p_anomaly: float
    first_token_logits: np.ndarray
    num_passes: int
    num_tokens_drafted: int = 0
    num_accepted: int = 0
    settled: bool = False
    complete: bool = True
    num_turns_dropped: int = 0


@dataclass(frozen=True)
class FirstTokens:
    """The tokens that an answer may begin with, by what they say of the part."""

    affirmative: tuple[int, ...]
    negative: tuple[int, ...]

    def judge(self, token: int) -> bool | None:
        """None: neither yes nor no."""
        return True if token in self.affirmative else False if token in self.negative else None

    def p_anomaly(self, logits: np.ndarray) -> float:
        """Softmax of float32 [vocab] over both sets of tokens, the share of the affirmative one."""
        values = logits[[*self.affirmative, *self.negative]].astype(np.float64)
        mass = np.exp(values - values.max())
        return float(mass[: len(self.affirmative)].sum() / mass.sum())
