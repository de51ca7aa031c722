"""Questions about one image, one after the other, each seeing the turns before it.

The prompt is the original's, token by token: the whole history is one text, "{question}\\n### Assistant: {answer}\\n###
Human: {question} …", tokenised as one piece. What the cache already holds of it is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .answer import MAX_ANSWER_TOKENS, Answer, MapReading
from .model import LanguageModel
from .sampling import Sampling


class Dialogue:
    """Turns about one image. The image stays; the oldest turns leave when the context is full.

    Attributes:
        turns: (question, answer) each, those that the model still sees.
        num_dropped: turns that it does not see any more.
        num_computed: positions of the prompt that the last answer had to compute.
        view: which region or tile of a frame the image is, for people.
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
        self._cached: list[int] = []  # of the text, when the model's cache is ours

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
            ConfigError: this question alone does not fit into the context.
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
        answer = model.say([turn], stop, sampling, owner=self)[0]
        num_cached = (
            turn.position - model.decoder.num_prefix - len(self._image)
        )  # the last token was not read
        self._cached = [*token_ids, *answer.token_ids][:num_cached]
        if answer.complete:
            self.turns.append((question, answer.text))
        return replace(answer, num_turns_dropped=self.num_dropped)

    def _fit(self, question: str, max_tokens: int) -> list[int]:
        """Tokens of the history and the question, without the oldest turns if need be."""
        model = self._model
        room = model.decoder.room - len(self._image)
        while True:
            token_ids = model.session.tokenise(self._text(question))
            if len(token_ids) + max_tokens <= room or not self.turns:
                return token_ids
            self.turns.pop(0)
            self.num_dropped += 1

    def _text(self, question: str) -> str:
        """The original's history; each turn but the first begins with " Human: ", as the prompt itself does."""
        layout = self._model.layout
        human = layout.before_image.removeprefix(layout.turn_end.strip()).partition("<")[0]
        pieces: list[str] = []
        for asked, answer in [*self.turns, (question, "")]:
            pieces.append((human if pieces else "") + asked + layout.assistant)
            pieces.append(f" {answer}{layout.turn_end}")
        return "".join(pieces[:-1])

    def _num_cached(self, token_ids: list[int]) -> int:
        """Rows behind the shared prefix that the cache holds; what differs from there on is dropped from it.

        The last row is always computed: its logits are wanted.
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
