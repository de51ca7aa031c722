"""The language model: from image embedding and prompt embeddings to an answer in words and p(anomaly).

``prompt.py`` makes the rows that llama.cpp computes, ``expected_answers.py`` predicts answers, ``decoding.py`` verifies
them as drafts while it decodes, and ``probing.py`` measures the cost of a pass on this machine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from ..bundles.bundle import FIX, Language, PromptLayout
from ..common.errors import BundleError, ConfigError
from .answer import MAX_ANSWER_TOKENS, Answer, FirstTokens, MapReading, Part
from .decoding import Decoder, Stop, Turn
from .expected_answers import AnswerGrammar, Drafter
from .gguf_header import TokenEmbeddings, check_language_model, read_header
from .llama_session import MAX_SEQUENCES, LlamaSession
from .probing import probe
from .prompt import Prompt
from .sampling import Sampling, make_sampler

MAX_CONTEXT = 1024  # positions, enough for a dialogue about one part; more would only cost memory


def never() -> bool:
    """A ``Stop`` that never stops."""
    return False


class LanguageModel:
    """A LLaMA with AnomalyGPT's prompt. Calls from several threads run one after the other.

    Attributes:
        lock: held during a call; code that uses ``session`` or ``decoder`` directly must hold it too.
        layout: the prompt's pieces, from the manifest.
        session: the llama.cpp session.
        stops: the tokens that end an answer.
        first_tokens: the first tokens of affirmative and of negative answers.
        prompt: makes the prompt's rows.
        drafter: predicts answers.
        decoder: decodes answers; set its ``drafting`` False to decode one token a pass.
    """

    def __init__(
        self, session: LlamaSession, embed: TokenEmbeddings, layout: PromptLayout, bos: int, eos: int
    ) -> None:
        """
        Raises:
            BundleError: the model has no stop token, or affirmative and negative answers begin with the same token.
        """
        stop = session.find_piece(layout.stop_piece)
        if stop is None:
            raise BundleError(f"the language model has no stop token {layout.stop_piece!r}: {FIX}")
        self.lock = threading.RLock()
        self.layout = layout
        self.session = session
        self.stops = (stop, eos)
        grammar = AnswerGrammar(layout.answers) if layout.answers else None
        self.first_tokens = FirstTokens(
            self._first_tokens([layout.affirmative, *(grammar.affirmative if grammar else ())]),
            self._first_tokens([layout.negative, *(grammar.negative if grammar else ())]),
        )
        if set(self.first_tokens.affirmative) & set(self.first_tokens.negative):
            raise BundleError(
                f"{layout.affirmative!r} and {layout.negative!r} begin with the same token, "
                "so the first token does not distinguish them: re-run agpt export with the model's own tokenizer"
            )
        self.prompt = Prompt(layout, embed, session.tokenise, bos)
        self.drafter = Drafter(grammar, layout.question, self._tokenise_answer)
        self.decoder = Decoder(session, self.prompt.prefix, embed, self.drafter, self.stops)

    @classmethod
    def open(
        cls,
        path: Path,
        layout: PromptLayout,
        expected: Language,
        threads: int,
        max_context: int = MAX_CONTEXT,
        *,
        drafting: bool = True,
    ) -> LanguageModel:
        """Check the GGUF against the manifest, load it, and measure the cost of a pass (this takes seconds).

        Args:
            path: the GGUF file.
            layout: the prompt's pieces, from the manifest.
            expected: the model's dimensions, from the manifest.
            threads: the most CPU threads to use.
            max_context: the most positions of the cache.
            drafting: False decodes one token a pass and skips the measurement. That saves a dozen passes, which
                matters when the file is larger than memory and every pass reads it from the disk.

        Raises:
            BundleError: the file is malformed, differs from the manifest, or lacks a token.
        """
        header = read_header(path)
        check_language_model(path, header, expected)
        embed = TokenEmbeddings(path, header.tensors["token_embd.weight"])
        num_context = min(max_context, expected.context_length)
        with ExitStack() as stack:
            session = stack.enter_context(
                closing(LlamaSession(path, num_context, expected.width, MAX_SEQUENCES))
            )
            bos = header.metadata.get("tokenizer.ggml.bos_token_id", 1)
            eos = header.metadata.get("tokenizer.ggml.eos_token_id", 2)
            model = cls(session, embed, layout, bos, eos)
            model.decoder.drafting = drafting
            if drafting:
                zeros = np.zeros((1 + layout.num_prompts, expected.width), np.float32)
                probe(model.decoder, model.prompt(Part(zeros[0], zeros[1:])), threads)
            else:
                session.set_threads(threads)
            stack.pop_all()
        return model

    def close(self) -> None:
        """Free the native memory; the model cannot be used afterwards."""
        self.session.close()

    def answer(
        self,
        image_embedding: np.ndarray,
        prompt_embeddings: np.ndarray,
        question: str = "",
        max_tokens: int = MAX_ANSWER_TOKENS,
        *,
        reading: MapReading | None = None,
        stop: Stop = never,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer one question about one image.

        Args:
            image_embedding: float32 [D].
            prompt_embeddings: float32 [num_prompts, D].
            question: the question; "" for the bundle's.
            max_tokens: maximum number of tokens of the answer.
            reading: summary of the anomaly map, to draft answers from; without it the answer is the same but slower.
            stop: called before every pass but the first; True ends the answer there (a deadline, a cancellation).
            sampling: sample the tokens instead of taking the most likely ones; no drafts are used then.

        Raises:
            ConfigError: the question does not fit into the context.
            ValueError: an embedding has another shape or is not finite.
            RuntimeError: llama.cpp failed or returned NaN.
        """
        part = Part(image_embedding, prompt_embeddings, question, reading)
        return self.answer_all([part], max_tokens, stop=stop, sampling=sampling)[0]

    def answer_all(
        self,
        parts: Sequence[Part],
        max_tokens: int = MAX_ANSWER_TOKENS,
        *,
        stop: Stop = never,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Answers about several images, computed in the same passes as far as they fit into the context together.

        Each answer equals that of ``answer`` for the image alone. Arguments and errors as in ``answer``.
        """
        with self.lock:
            rows = [self.prompt(part) for part in parts]
            answers = []
            for group in self._groups(rows, max_tokens):
                turns = [
                    self.turn(
                        rows[i], parts[i].question or self.layout.question, parts[i].reading, max_tokens
                    )
                    for i in group
                ]
                answers += self.generate(turns, stop, sampling)
            return answers

    def num_together(self, question: str = "", max_tokens: int = MAX_ANSWER_TOKENS) -> int:
        """Number of images about which ``answer_all`` answers a question in the same passes."""
        num_rows = len(self.prompt.token_ids(question)) - self.decoder.num_prefix
        return max(1, min(self.decoder.room // (num_rows + max_tokens), self.decoder.max_turns))

    def turn(
        self, rows: np.ndarray, question: str, reading: MapReading | None, max_tokens: int, cached: int = 0
    ) -> Turn:
        """A turn for ``generate``; its answer is limited to ``max_tokens`` and to the room in the context.

        Args:
            rows: float32 [n, D], the prompt after the shared prefix.
            question: the question, by which the drafter looks up expected answers.
            reading: summary of the anomaly map, for the drafter.
            max_tokens: maximum number of tokens of the answer.
            cached: number of ``rows`` that the cache already holds.

        Raises:
            ConfigError: the prompt does not fit into the context.
        """
        room = self.decoder.room - len(rows)
        if room <= 0:
            raise ConfigError(
                f"the prompt with this question takes {self.decoder.num_prefix + len(rows)} positions, but the model "
                f"has {self.session.num_context}: ask a shorter question or shorten the description"
            )
        return self.decoder.turn(rows, question, reading, min(max_tokens, room), cached)

    def generate(
        self,
        turns: Sequence[Turn],
        stop: Stop = never,
        sampling: Sampling | None = None,
        owner: object = None,
    ) -> list[Answer]:
        """Decode turns and return their answers; arguments as in ``Decoder.decode``."""
        self.decoder.decode(turns, stop, make_sampler(sampling) if sampling else None, owner)
        return [self._conclude(turn, greedy=sampling is None) for turn in turns]

    def _conclude(self, turn: Turn, greedy: bool) -> Answer:
        """The answer of a decoded turn; a complete greedy answer is added to the drafter's statistics."""
        assert turn.first_logits is not None
        answer_tokens = self.decoder.answer_tokens(turn)
        certain = turn.is_certain or not greedy
        if greedy and turn.done:
            self.drafter.learn(turn.question, turn.reading, tuple(answer_tokens))
        return Answer(
            token_ids=tuple(turn.tokens),
            text=self.session.text(answer_tokens).strip(),
            affirmative=self.first_tokens.judge(turn.tokens[0]) if certain or 0 not in turn.ties else None,
            p_anomaly=self.first_tokens.p_anomaly(turn.first_logits),
            first_token_logits=turn.first_logits,
            num_passes=turn.num_passes,
            num_tokens_drafted=turn.num_drafted,
            num_accepted=turn.num_accepted,
            redecoded=turn.redecoded,
            complete=turn.done and certain,
        )

    def _groups(self, rows: Sequence[np.ndarray], max_tokens: int) -> Iterator[list[int]]:
        """Indices of consecutive prompts that fit into the context together, float32 [n, D] each."""
        group: list[int] = []
        used = 0
        for index, prompt in enumerate(rows):
            needed = len(prompt) + max_tokens
            if group and (used + needed > self.decoder.room or len(group) == self.decoder.max_turns):
                yield group
                group, used = [], 0
            group.append(index)
            used += needed
        if group:
            yield group

    def _tokenise_answer(self, text: str) -> list[int]:
        """Tokens of an answer as the model generates them, up to but without the stop token."""
        ids = self.session.tokenise(text + self.layout.turn_end)
        return ids[: next((i for i, token in enumerate(ids) if token in self.stops), len(ids))]

    def _first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({self.session.tokenise(text)[0] for text in texts}))
