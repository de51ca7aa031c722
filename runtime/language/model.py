"""The judge: image embedding and prompt embeddings in, an answer in words and p(anomaly) out.

``prompt.py`` makes the rows that llama.cpp takes, ``expected_answers.py`` lists the answers to expect, ``decoding.py``
verifies them in the prompt's own pass, ``probing.py`` measures what that costs on this machine.
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

MAX_CONTEXT = 1024  # one part's dialogue; a longer cache only costs memory


def never() -> bool:
    return False


class LanguageModel:
    """A LLaMA with AnomalyGPT's prompt. Calls from several threads wait for each other.

    Attributes:
        lock: held while the model works; whoever uses ``session`` or ``decoder`` directly holds it too.
        decoder: its ``drafting`` may be set False, to decode step by step.
    """

    def __init__(
        self, session: LlamaSession, embed: TokenEmbeddings, layout: PromptLayout, bos: int, eos: int
    ) -> None:
        """
        Raises:
            BundleError: the model has no token to stop at, or says yes and no with the same one.
        """
        stop = session.find_piece(layout.stop_piece)
        if stop is None:
            raise BundleError(f"the language model has no token {layout.stop_piece!r} to stop at: {FIX}")
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
                "so the first token cannot tell them apart: re-run agpt export with a fitting tokenizer"
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
        """Check the GGUF against the manifest, load it, and measure what it costs on this machine (seconds).

        Args:
            drafting: False decodes step by step and measures nothing: a dozen passes spared, which count where
                memory does not hold the file and every pass reads it from the disk.

        Raises:
            BundleError: the file is malformed, not the model in the manifest, or lacks a token.
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
                nothing = np.zeros((1 + layout.num_prompts, expected.width), np.float32)
                probe(model.decoder, model.prompt(Part(nothing[0], nothing[1:])), threads)
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
        """Answer to one question about one image.

        Args:
            image_embedding: float32 [D].
            prompt_embeddings: float32 [num_prompts, D].
            question: "" asks the bundle's own.
            max_tokens: where an answer that does not stop is cut.
            reading: of the map, to draft answers from; costs only speed when left out.
            stop: asked before every pass but the first; True ends the answer as it is (a deadline, a cancellation).
            sampling: draws the tokens instead of taking the likeliest; step by step then.

        Raises:
            ConfigError: the question does not fit into the context.
            ValueError: an embedding has another shape or is not finite.
            RuntimeError: llama.cpp failed or gave NaN.
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
        """Answers about several images, computed together as far as the context has room.

        Each is what ``answer`` gives for it alone. Arguments and errors as there.
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
                answers += self.say(turns, stop, sampling)
            return answers

    def num_together(self, question: str = "", max_tokens: int = MAX_ANSWER_TOKENS) -> int:
        """How many images ``answer_all`` answers a question about in the same passes."""
        num_rows = len(self.prompt.token_ids(question)) - self.decoder.num_prefix
        return max(1, min(self.decoder.room // (num_rows + max_tokens), self.decoder.max_turns))

    def turn(
        self, rows: np.ndarray, question: str, reading: MapReading | None, max_tokens: int, cached: int = 0
    ) -> Turn:
        """An answer to begin.

        Args:
            rows: float32 [n, D], the prompt behind the constant piece.
            cached: of these, what the cache holds already.

        Raises:
            ConfigError: the prompt does not fit.
        """
        room = self.decoder.room - len(rows)
        if room <= 0:
            raise ConfigError(
                f"the question makes a prompt of {self.decoder.num_prefix + len(rows)} positions and the model has "
                f"{self.session.num_context}: ask a shorter question or shorten the description"
            )
        return self.decoder.turn(rows, question, reading, min(max_tokens, room), cached)

    def say(
        self,
        turns: Sequence[Turn],
        stop: Stop = never,
        sampling: Sampling | None = None,
        owner: object = None,
    ) -> list[Answer]:
        """Answers of turns whose earlier positions, if any, are in the cache, which is the owner's from now on."""
        self.decoder.finish(turns, stop, make_sampler(sampling) if sampling else None, owner)
        return [self._conclude(turn, greedy=sampling is None) for turn in turns]

    def _conclude(self, turn: Turn, greedy: bool) -> Answer:
        assert turn.first_logits is not None
        spoken = self.decoder.spoken(turn)
        certain = turn.is_certain or not greedy
        if greedy and turn.done:
            self.drafter.learn(turn.question, turn.reading, tuple(spoken))
        return Answer(
            token_ids=tuple(turn.tokens),
            text=self.session.text(spoken).strip(),
            affirmative=self.first_tokens.judge(turn.tokens[0]) if certain or 0 not in turn.ties else None,
            p_anomaly=self.first_tokens.p_anomaly(turn.first_logits),
            first_token_logits=turn.first_logits,
            num_passes=turn.num_passes,
            num_tokens_drafted=turn.num_drafted,
            num_accepted=turn.num_accepted,
            settled=turn.settled,
            complete=turn.done and certain,
        )

    def _groups(self, rows: Sequence[np.ndarray], max_tokens: int) -> Iterator[list[int]]:
        """Indices of parts that fit into the context together."""
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
        """As the model says it: up to the stop token, without it."""
        ids = self.session.tokenise(text + self.layout.turn_end)
        return ids[: next((i for i, token in enumerate(ids) if token in self.stops), len(ids))]

    def _first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({self.session.tokenise(text)[0] for text in texts}))
