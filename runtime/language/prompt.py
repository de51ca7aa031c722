"""AnomalyGPT's prompt as the language model takes it: rows of embeddings, one batch.

The prompt mixes token embeddings with injected rows, and llama.cpp takes a batch of either tokens or embeddings. So the
token embeddings are looked up here, in the GGUF's own table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...kernels import INJECTED
from ..bundles.bundle import PromptLayout
from .answer import Part
from .gguf_header import TokenEmbeddings

MAX_CACHED_PIECES = 256


class Prompt:
    """Makes rows of what is asked.

    Attributes:
        prefix: float32 [num_prefix, D], the constant piece in front of the image.
        width: D.
    """

    def __init__(
        self,
        layout: PromptLayout,
        embed: TokenEmbeddings,
        tokenise: Callable[[str], list[int]],
        bos: int,
    ) -> None:
        """
        Args:
            embed: the GGUF's table.
            tokenise: a text on its own, as the original does, without BOS.
            bos: the token that begins it all.
        """
        self.layout = layout
        self._embed, self._tokenise = embed, tokenise
        self._pieces: dict[str, list[int]] = {}
        self._prefix_ids = [bos, *tokenise(layout.before_image)]
        self._image_ids = [INJECTED, *tokenise(layout.after_image), *[INJECTED] * layout.num_prompts]
        self.prefix = embed(self._prefix_ids)
        self.width = self.prefix.shape[1]

    def __call__(self, part: Part) -> np.ndarray:
        """float32 [n, D]: the whole prompt behind the constant piece; errors as for ``image_rows``."""
        return self.image_rows(part.image_embedding, part.prompt_embeddings, self._asked(part.question))

    def image_rows(
        self, image_embedding: np.ndarray, prompt_embeddings: np.ndarray, text: str = ""
    ) -> np.ndarray:
        """float32 [n, D]: the prompt behind the constant piece up to the question, or with ``text`` in its place.

        Raises:
            ValueError: an embedding has another shape or is not finite.
        """
        _check_rows("the image embedding", image_embedding, (self.width,))
        _check_rows("prompt embeddings", prompt_embeddings, (self.layout.num_prompts, self.width))
        token_ids = [*self._image_ids, *(self._piece(text) if text else ())]
        return self._embed(token_ids, np.concatenate([image_embedding[None], prompt_embeddings]))

    def embed(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int [n] → float32 [n, D]."""
        return self._embed(token_ids)

    def token_ids(self, question: str = "") -> list[int]:
        """The whole prompt, position by position; ``INJECTED`` where an embedding goes in.

        Args:
            question: "" asks the bundle's own.
        """
        return [*self._prefix_ids, *self._image_ids, *self._piece(self._asked(question))]

    def _asked(self, question: str) -> str:
        return (question or self.layout.question) + self.layout.assistant

    def _piece(self, text: str) -> list[int]:
        token_ids = self._pieces.get(text)
        if token_ids is None:
            if len(self._pieces) >= MAX_CACHED_PIECES:
                self._pieces.clear()
            token_ids = self._pieces[text] = self._tokenise(text)
        return token_ids


def _check_rows(what: str, rows: np.ndarray, shape: tuple[int, ...]) -> None:
    if rows.shape != shape or not np.isfinite(rows).all():
        raise ValueError(f"{what} must be finite {list(shape)}, not {list(rows.shape)} as they came")
