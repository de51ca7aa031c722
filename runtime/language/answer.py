"""The language model's input and output: a question about one image, and the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class MapReading:
    """Summary of an anomaly map in the terms of an answer; answers are drafted from it.

    Attributes:
        score: mean of the highest 1 % of the map.
        ranking: all nine places ("top left"), by their highest map value, highest first.
        places: places of the regions, strongest region first.
    """

    score: float
    ranking: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """The language model's input for one image of a part: the whole frame, or one of its regions or tiles.

    Attributes:
        image_embedding: float32 [D].
        prompt_embeddings: float32 [num_prompts, D].
        question: the question; "" for the bundle's.
        reading: summary of the anomaly map, to draft answers from; without it the answer is the same but slower.
        view: name of the region or tile for messages; "" for the whole frame.
    """

    image_embedding: np.ndarray
    prompt_embeddings: np.ndarray
    question: str = ""
    reading: MapReading | None = None
    view: str = ""


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer of the language model.

    Attributes:
        token_ids: the tokens, including the stop token when it was reached.
        text: the answer without the stop string.
        affirmative: True if the first token is an affirmative one, False if it is a negative one, None otherwise.
        p_anomaly: probability of the affirmative first tokens relative to both the affirmative and negative ones, 0..1.
        first_token_logits: float32 [vocab].
        num_passes: number of calls of ``llama_decode``.
        num_tokens_drafted: number of draft tokens that were verified.
        num_accepted: number of draft tokens that were accepted.
        redecoded: two tokens tied within the rounding noise, so the answer was decoded again without drafts.
        complete: False if ``stop`` ended the answer early.
        num_turns_dropped: number of the dialogue's oldest turns that no longer fit into the context.
    """

    token_ids: tuple[int, ...]
    text: str
    affirmative: bool | None
    p_anomaly: float
    first_token_logits: np.ndarray
    num_passes: int
    num_tokens_drafted: int = 0
    num_accepted: int = 0
    redecoded: bool = False
    complete: bool = True
    num_turns_dropped: int = 0


@dataclass(frozen=True)
class FirstTokens:
    """The first tokens of affirmative answers (there is an anomaly) and of negative ones."""

    affirmative: tuple[int, ...]
    negative: tuple[int, ...]

    def judge(self, token: int) -> bool | None:
        """True for an affirmative token, False for a negative one, None for any other."""
        return True if token in self.affirmative else False if token in self.negative else None

    def p_anomaly(self, logits: np.ndarray) -> float:
        """Share of the affirmative tokens in the softmax over both sets, from logits float32 [vocab]."""
        values = logits[[*self.affirmative, *self.negative]].astype(np.float64)
        mass = np.exp(values - values.max())
        return float(mass[: len(self.affirmative)].sum() / mass.sum())
