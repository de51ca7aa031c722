"""AnomalyGPT's prompt as rows of embeddings.

The prompt mixes token embeddings with injected ones (image and prompt learner), but a llama.cpp batch holds either
tokens or embeddings. Therefore the token embeddings are looked up here, in the GGUF's table.
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
    """Makes the rows of a prompt.

    Attributes:
        layout: the prompt's pieces, from the manifest.
        prefix: float32 [num_prefix, D], the shared prefix: the constant text before the image.
        width: D, the width of the embeddings.
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
            layout: the prompt's pieces, from the manifest.
            embed: the GGUF's token-embedding table.
            tokenise: token ids of a text without BOS.
            bos: the token that begins the prompt.
        """
        self.layout = layout
        self._embed, self._tokenise = embed, tokenise
        self._pieces: dict[str, list[int]] = {}
        self._prefix_ids = [bos, *tokenise(layout.before_image)]
        self._image_ids = [INJECTED, *tokenise(layout.after_image), *[INJECTED] * layout.num_prompts]
        self.prefix = embed(self._prefix_ids)
        self.width = self.prefix.shape[1]

    def __call__(self, part: Part) -> np.ndarray:
        """The whole prompt after the shared prefix, float32 [n, D]; errors as in ``image_rows``."""
        return self.image_rows(part.image_embedding, part.prompt_embeddings, self._asked(part.question))

    def image_rows(
        self, image_embedding: np.ndarray, prompt_embeddings: np.ndarray, text: str = ""
    ) -> np.ndarray:
        """The prompt after the shared prefix up to the question, float32 [n, D], followed by ``text`` if given.

        Raises:
            ValueError: an embedding has another shape or is not finite.
        """
        _check_rows("the image embedding", image_embedding, (self.width,))
        _check_rows("prompt embeddings", prompt_embeddings, (self.layout.num_prompts, self.width))
        token_ids = [*self._image_ids, *(self._piece(text) if text else ())]
        return self._embed(token_ids, np.concatenate([image_embedding[None], prompt_embeddings]))

    def embed(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids, int [n] → embeddings, float32 [n, D]."""
        return self._embed(token_ids)

    def token_ids(self, question: str = "") -> list[int]:
        """Token ids of the whole prompt, with ``INJECTED`` where an embedding is injected.

        Args:
            question: the question; "" for the bundle's.
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
        raise ValueError(f"{what} must be finite and {list(shape)}, but the shape is {list(rows.shape)}")
