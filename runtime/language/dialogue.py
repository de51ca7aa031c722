"""A dialogue about one image: each question is answered with the earlier turns in the context.

The prompt is AnomalyGPT's, token by token: the whole history is one text, "{question}\\n### Assistant: {answer}\\n###
Human: {question} …", tokenised as one piece. Positions that the cache already holds are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .answer import MAX_ANSWER_TOKENS, Answer, MapReading
from .model import LanguageModel
from .sampling import Sampling


class Dialogue:
    """Turns about one image. When the context is full, the oldest turns are dropped; the image stays.

    Attributes:
        turns: (question, answer) of the turns that are still in the context.
        num_dropped: number of turns that were dropped.
        num_computed: number of prompt positions that had to be computed for the last answer.
        view: name of the region or tile that the image shows; "" for the whole frame.
    """

    def __init__(
        self,
        model: LanguageModel,
        image_embedding: np.ndarray,
        prompt_embeddings: np.ndarray,
        reading: MapReading | None = None,
    ) -> None:
        """Arguments as for ``LanguageModel.answer``."""
        self.turns: list[tuple[str, str]] = []
        self.num_dropped = 0
        self.num_computed = 0
        self.view = ""
        self._model = model
        self._reading = reading
        self._image = model.prompt.image_rows(image_embedding, prompt_embeddings)
        self._cached: list[int] = []  # text tokens in the cache, while this dialogue owns it

    def ask(
        self,
        question: str = "",
        max_tokens: int | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        sampling: Sampling | None = None,
    ) -> Answer:
        """The next answer; arguments as for ``LanguageModel.answer``.

        Raises:
            ConfigError: the question does not fit into the context even without earlier turns.
            ClosedError: the model was closed.
        """
        with self._model.lock:
            return self._ask(question, max_tokens, stop, sampling)

    def _ask(
        self, question: str, max_tokens: int | None, stop: Callable[[], bool], sampling: Sampling | None
    ) -> Answer:
        model = self._model
        question = question or model.layout.question
        max_tokens = max_tokens or MAX_ANSWER_TOKENS
        token_ids = self._fit(question, max_tokens)
        cached = self._num_cached(token_ids)
        rows = np.concatenate([self._image, model.prompt.embed(token_ids)])
        turn = model.turn(rows, question, self._reading, max_tokens, cached)
        self.num_computed = len(turn.pending)
        self._cached = []
        answer = model.generate([turn], stop, sampling, owner=self)[0]
        # The last token was never computed, so the cache does not hold it.
        num_cached = turn.position - model.decoder.num_prefix - len(self._image)
        self._cached = [*token_ids, *answer.token_ids][:num_cached]
        if answer.complete:
            self.turns.append((question, answer.text))
        return replace(answer, num_turns_dropped=self.num_dropped)

    def _fit(self, question: str, max_tokens: int) -> list[int]:
        """Tokens of the history and the question; drops the oldest turns as far as the context requires."""
        model = self._model
        room = model.decoder.room - len(self._image)
        while True:
            token_ids = model.session.tokenise(self._text(question))
            if len(token_ids) + max_tokens <= room or not self.turns:
                return token_ids
            self.turns.pop(0)
            self.num_dropped += 1

    def _text(self, question: str) -> str:
        """The history as AnomalyGPT writes it. Each turn but the first begins with " Human: ", like the prompt."""
        layout = self._model.layout
        human = layout.before_image.removeprefix(layout.turn_end.strip()).partition("<")[0]
        pieces: list[str] = []
        for asked, answer in [*self.turns, (question, "")]:
            pieces.append((human if pieces else "") + asked + layout.assistant)
            pieces.append(f" {answer}{layout.turn_end}")
        return "".join(pieces[:-1])

    def _num_cached(self, token_ids: list[int]) -> int:
        """Number of rows after the shared prefix that the cache holds; positions after them are dropped from it.

        The last row is always computed again, because its logits are needed.
        """
        decoder = self._model.decoder
        if decoder.cache_owner is not self or not self._cached:
            return 0
        same = 0
        for ours, cached in zip(token_ids[:-1], self._cached, strict=False):
            if ours != cached:
                break
            same += 1
        decoder.session.forget(decoder.num_prefix + len(self._image) + same)
        return len(self._image) + same
