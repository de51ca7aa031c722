"""The judge: image embedding and prompt embeddings in, an answer in words and p(anomaly) out.

The prompt mixes token embeddings with injected rows, and llama.cpp takes a batch of either tokens or
embeddings. So the token embeddings are looked up here, in the GGUF's own table, and the prompt goes in as one
embedding batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import FIX, Language, PromptLayout
from .errors import BundleError, ConfigError
from .gguf_header import TokenEmbeddings, check_language_model, read_header
from .llama_session import LlamaSession

MAX_CONTEXT = 1024  # one part's dialogue; a longer cache only costs memory
MAX_ANSWER_TOKENS = 64
MAX_CACHED_PIECES = 256
NUM_MEASURED_STEPS = 3  # the fastest counts
INJECTED = -1  # stands for an injected row among a prompt's token ids
SHARED_STEP_SECONDS = 0.003  # a shorter step is not worth sharing between threads


@dataclass(frozen=True, eq=False)
class Answer:
    """What the language model said.

    Attributes:
        token_ids: the greedy tokens, the stop token included when it was reached.
        text: the answer without the stop string.
        affirmative: True when the first token is the affirmative's, False the negative's, None neither's.
        p_anomaly: probability of the affirmative first token against the negative one, 0..1.
        first_token_logits: float32 [vocab].
        num_passes: calls of ``llama_decode``.
    """

    token_ids: tuple[int, ...]
    text: str
    affirmative: bool | None
    p_anomaly: float
    first_token_logits: np.ndarray
    num_passes: int


class LanguageModel:
    """A LLaMA with AnomalyGPT's prompt. Not thread-safe."""

    def __init__(
        self, session: LlamaSession, embed: TokenEmbeddings, layout: PromptLayout, bos: int, eos: int
    ) -> None:
        self._session = session
        self._embed = embed
        self._layout = layout
        self._bos = bos
        self._eos = eos
        self._pieces: dict[str, np.ndarray] = {}
        self._before_image = np.concatenate([embed([bos]), self._piece(layout.before_image)])
        self._after_image = self._piece(layout.after_image)
        self._width = self._after_image.shape[1]
        self._prefix_cached = 0  # positions of <bos> before_image that the cache holds from the last answer
        self.affirmative_id = session.tokenise(layout.affirmative)[0]
        self.negative_id = session.tokenise(layout.negative)[0]
        stop = session.find_piece(layout.stop_piece)
        if stop is None:
            raise BundleError(f"the language model has no token {layout.stop_piece!r} to stop at: {FIX}")
        if self.affirmative_id == self.negative_id:
            raise BundleError(
                f"{layout.affirmative!r} and {layout.negative!r} begin with the same token, "
                "so the first token cannot tell them apart: re-run agpt export with a fitting tokenizer"
            )
        self._stop = stop

    @classmethod
    def open(
        cls,
        path: Path,
        layout: PromptLayout,
        expected: Language,
        threads: int,
        max_context: int = MAX_CONTEXT,
    ) -> LanguageModel:
        """Check the GGUF against the manifest, then load it.

        Raises:
            BundleError: the file is malformed, not the model in the manifest, or lacks a token.
        """
        header = read_header(path)
        check_language_model(path, header, expected)
        embed = TokenEmbeddings(path, header.tensors["token_embd.weight"])
        session = LlamaSession(path, min(max_context, expected.context_length), expected.width)
        bos = header.metadata.get("tokenizer.ggml.bos_token_id", 1)
        eos = header.metadata.get("tokenizer.ggml.eos_token_id", 2)
        model = cls(session, embed, layout, bos, eos)
        model._choose_threads(threads)
        return model

    def close(self) -> None:
        self._session.close()

    def answer(
        self,
        image_embedding: np.ndarray,
        prompt_embeddings: np.ndarray,
        question: str = "",
        max_tokens: int = MAX_ANSWER_TOKENS,
    ) -> Answer:
        """Greedy answer to one question about one image.

        Args:
            image_embedding: float32 [D].
            prompt_embeddings: float32 [num_prompts, D].
            question: "" asks the bundle's own.
            max_tokens: where an answer that does not stop is cut.

        Raises:
            ConfigError: the question does not fit into the context.
            ValueError: an embedding has another shape or is not finite.
            RuntimeError: llama.cpp failed or gave NaN.
        """
        _check_rows("the image embedding", image_embedding, (self._width,))
        _check_rows("prompt embeddings", prompt_embeddings, (self._layout.num_prompts, self._width))
        position = self._prefill(image_embedding, prompt_embeddings, question)
        first_logits = self._session.logits().copy()
        tokens: list[int] = []
        token = _greedy(first_logits)
        for next_position in range(position, min(position + max_tokens, self._session.num_context)):
            tokens.append(token)
            if token in (self._stop, self._eos):
                break
            if len(tokens) < max_tokens:
                self._session.step(token, next_position)
                token = _greedy(self._session.logits())
        self._prefix_cached = len(self._before_image)
        return Answer(
            token_ids=tuple(tokens),
            text=self._session.text([t for t in tokens if t not in (self._stop, self._eos)]).strip(),
            affirmative={self.affirmative_id: True, self.negative_id: False}.get(tokens[0]),
            p_anomaly=_against(first_logits[self.affirmative_id], first_logits[self.negative_id]),
            first_token_logits=first_logits,
            num_passes=len(tokens),
        )

    def prompt_token_ids(self, question: str = "") -> list[int]:
        """The whole prompt as ``answer`` feeds it, position by position; ``INJECTED`` where an embedding goes in.

        Args:
            question: "" asks the bundle's own.
        """
        layout, tokenise = self._layout, self._session.tokenise
        return [
            self._bos,
            *tokenise(layout.before_image),
            INJECTED,
            *tokenise(layout.after_image),
            *[INJECTED] * layout.num_prompts,
            *tokenise((question or layout.question) + layout.assistant),
        ]

    def _prefill(self, image_embedding: np.ndarray, prompt_embeddings: np.ndarray, question: str) -> int:
        """Put the prompt into the cache; the constant first piece stays there from answer to answer."""
        rest = [
            image_embedding[None],
            self._after_image,
            prompt_embeddings,
            self._piece((question or self._layout.question) + self._layout.assistant),
        ]
        needed = len(self._before_image) + sum(map(len, rest))
        if needed >= self._session.num_context:
            raise ConfigError(
                f"the question makes a prompt of {needed} positions and the model has "
                f"{self._session.num_context}: ask a shorter question or shorten the description"
            )
        cached = self._prefix_cached or self._session.prefill([self._before_image], 0)
        self._prefix_cached = 0  # until the answer is whole: after a failure the cache may hold anything
        return self._session.prefill(rest, cached)

    def _choose_threads(self, threads: int) -> None:
        """One thread for a small model: llama.cpp's threads spin while they wait for each other.

        A nano step (0.1 ms) takes three times as long on two threads, and far longer where something else runs.
        """
        self._session.set_threads(1)
        start = self._session.prefill([self._before_image], 0)
        for position in range(start, start + NUM_MEASURED_STEPS):
            before = time.perf_counter()
            self._session.step(self.affirmative_id, position)
            if time.perf_counter() - before < SHARED_STEP_SECONDS:
                return
        self._session.set_threads(threads)

    def _piece(self, text: str) -> np.ndarray:
        """Embeddings of a text tokenised on its own, as the original does: float32 [n, D]."""
        rows = self._pieces.get(text)
        if rows is None:
            if len(self._pieces) >= MAX_CACHED_PIECES:
                self._pieces.clear()
            rows = self._pieces[text] = self._embed(self._session.tokenise(text))
        return rows


def _check_rows(what: str, rows: np.ndarray, shape: tuple[int, ...]) -> None:
    if rows.shape != shape or not np.isfinite(rows).all():
        raise ValueError(f"{what} must be finite {list(shape)}, not {list(rows.shape)} as they came")


def _greedy(logits: np.ndarray) -> int:
    token = int(logits.argmax())
    if math.isnan(logits[token]):  # argmax finds the first NaN when there is one
        raise RuntimeError("the language model gave NaN")
    return token


def _against(affirmative: float, negative: float) -> float:
    """Softmax of two logits, the first one's share."""
    return float(1 / (1 + math.exp(min(700.0, float(negative) - float(affirmative)))))
