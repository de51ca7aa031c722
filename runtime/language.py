"""The judge: image embedding and prompt embeddings in, an answer in words and p(anomaly) out.

The prompt mixes token embeddings with injected rows, and llama.cpp takes a batch of either tokens or embeddings.
So the token embeddings are looked up here, in the GGUF's own table, and everything goes in as one embedding batch:
the prompt, and behind it the answers that may be coming as a tree. That one pass computes what step-by-step
decoding would, for every branch; the branch that the model itself chooses is the answer. What nobody foresaw is
decoded on from there.

The answer is that of plain greedy decoding, token for token. Passes of different sizes differ in the last bits,
though, so where two tokens come closer to each other than that noise, measured when the model opens, the whole
answer is decoded again plainly and that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..kernels import INJECTED
from .bundle import FIX, Language, PromptLayout
from .dialogue import Dialogue
from .draft_tree import NO_DRAFT, DraftTree, PrefixTree
from .errors import BundleError, ConfigError
from .gguf_header import TokenEmbeddings, check_language_model, read_header
from .grammar import AnswerGrammar, Drafter
from .llama_session import MAX_SEQUENCES, LlamaSession
from .localise import MapReading
from .pass_cost import PassCosts, measure_costs, time_pass
from .sampling import Sampling, make_sampler

MAX_CONTEXT = 1024  # one part's dialogue; a longer cache only costs memory
MAX_ANSWER_TOKENS = 64
MAX_CACHED_PIECES = 256
SHARED_STEP_SECONDS = 0.003  # a shorter step is not worth sharing between threads
NUM_PROBED_ROWS = 64
NUM_PROBED_STEPS = 4
NOISE_MARGIN = 8.0  # standard deviations of the noise within which two tokens are a tie
LEAST_NOISE = 1e-6  # of the largest logit


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


@dataclass(eq=False)
class Turn:
    """An answer in the making: ``pending`` rows are still to be computed, ``position`` are in the cache."""

    rows: np.ndarray  # the whole prompt behind the shared prefix
    question: str
    reading: MapReading | None
    limit: int  # tokens of the answer
    pending: np.ndarray
    position: int
    sequence: int = 0
    tokens: list[int] = field(default_factory=list)
    first_logits: np.ndarray | None = None
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    plain: bool = True  # nothing but what plain decoding does has been done
    ties: set[int] = field(default_factory=set)  # which tokens another one came near
    settled: bool = False
    done: bool = False


def never() -> bool:
    return False


class LanguageModel:
    """A LLaMA with AnomalyGPT's prompt. Not thread-safe.

    Attributes:
        costs: what a pass costs on this machine.
        noise: logits closer than this are a tie; see the module's text.
        drafting: set False to decode step by step.
    """

    def __init__(
        self, session: LlamaSession, embed: TokenEmbeddings, layout: PromptLayout, bos: int, eos: int
    ) -> None:
        self.session = session
        self.layout = layout
        self.drafting = True
        self._embed = embed
        self._bos = bos
        self._pieces: dict[str, list[int]] = {}
        self._before_image = embed([bos, *self.piece(layout.before_image)])
        self._image_ids = [INJECTED, *self.piece(layout.after_image), *[INJECTED] * layout.num_prompts]
        self._width = self._before_image.shape[1]
        self.num_prefix = len(self._before_image)
        self._prefix_cached = False
        self.cache_owner: object = None  # the dialogue whose turns the cache holds
        stop = session.find_piece(layout.stop_piece)
        if stop is None:
            raise BundleError(f"the language model has no token {layout.stop_piece!r} to stop at: {FIX}")
        self._stops = (stop, eos)
        grammar = AnswerGrammar(layout.answers) if layout.answers else None
        self.affirmative_ids = self._first_tokens(
            [layout.affirmative, *(grammar.affirmative if grammar else ())]
        )
        self.negative_ids = self._first_tokens([layout.negative, *(grammar.negative if grammar else ())])
        if set(self.affirmative_ids) & set(self.negative_ids):
            raise BundleError(
                f"{layout.affirmative!r} and {layout.negative!r} begin with the same token, "
                "so the first token cannot tell them apart: re-run agpt export with a fitting tokenizer"
            )
        self.drafter = Drafter(grammar, layout.question, self._tokenise_answer)
        self.costs = PassCosts(np.array([1]), np.array([1.0]))
        self.noise = 0.0

    @classmethod
    def open(
        cls,
        path: Path,
        layout: PromptLayout,
        expected: Language,
        threads: int,
        max_context: int = MAX_CONTEXT,
    ) -> LanguageModel:
        """Check the GGUF against the manifest, load it, and measure what it costs on this machine (seconds).

        Raises:
            BundleError: the file is malformed, not the model in the manifest, or lacks a token.
        """
        header = read_header(path)
        check_language_model(path, header, expected)
        embed = TokenEmbeddings(path, header.tensors["token_embd.weight"])
        session = LlamaSession(path, min(max_context, expected.context_length), expected.width, MAX_SEQUENCES)
        bos = header.metadata.get("tokenizer.ggml.bos_token_id", 1)
        eos = header.metadata.get("tokenizer.ggml.eos_token_id", 2)
        model = cls(session, embed, layout, bos, eos)
        model._choose_threads(threads)
        model.costs = measure_costs(model._run_rows, session.num_context - model.num_prefix)
        model.noise = model._measure_noise()
        return model

    def close(self) -> None:
        self.session.close()

    def answer(
        self,
        image_embedding: np.ndarray,
        prompt_embeddings: np.ndarray,
        question: str = "",
        max_tokens: int = MAX_ANSWER_TOKENS,
        *,
        reading: MapReading | None = None,
        stop: Callable[[], bool] = never,
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
        stop: Callable[[], bool] = never,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Answers about several images, computed together as far as the context has room.

        Each is what ``answer`` gives for it alone. Arguments and errors as there.
        """
        rows = [self._prompt_rows(part) for part in parts]
        answers = []
        for group in self._groups(rows, max_tokens):
            turns = [
                self.turn(rows[i], parts[i].question or self.layout.question, parts[i].reading, max_tokens)
                for i in group
            ]
            answers += self.say(turns, stop, sampling)
        return answers

    def num_together(self, question: str = "", max_tokens: int = MAX_ANSWER_TOKENS) -> int:
        """How many images ``answer_all`` answers a question about in the same passes."""
        after = self.piece((question or self.layout.question) + self.layout.assistant)
        rows = len(self._image_ids) + len(after)
        room = (self.session.num_context - self.num_prefix) // (rows + max_tokens)
        return max(1, min(room, self.session.num_sequences))

    def prompt_token_ids(self, question: str = "") -> list[int]:
        """The whole prompt as ``answer`` feeds it, position by position; ``INJECTED`` where an embedding goes in.

        Args:
            question: "" asks the bundle's own.
        """
        question = question or self.layout.question
        return [
            self._bos,
            *self.piece(self.layout.before_image),
            *self._image_ids,
            *self.piece(question + self.layout.assistant),
        ]

    # What an answer is made of.

    def prompt_rows(
        self, image_embedding: np.ndarray, prompt_embeddings: np.ndarray, text: str = ""
    ) -> np.ndarray:
        """The prompt behind its constant first piece, up to the question or with ``text`` in its place: float32 [n, D],
        the rows of tokens out of the quantised table and those injected in one batch.

        Raises:
            ValueError: an embedding has another shape or is not finite.
        """
        _check_rows("the image embedding", image_embedding, (self._width,))
        _check_rows("prompt embeddings", prompt_embeddings, (self.layout.num_prompts, self._width))
        token_ids = [*self._image_ids, *(self.piece(text) if text else ())]
        return self._embed(token_ids, np.concatenate([image_embedding[None], prompt_embeddings]))

    def embed(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int [n] → float32 [n, D]."""
        return self._embed(token_ids)

    def piece(self, text: str) -> list[int]:
        """Token ids of a text tokenised on its own, as the original does."""
        token_ids = self._pieces.get(text)
        if token_ids is None:
            if len(self._pieces) >= MAX_CACHED_PIECES:
                self._pieces.clear()
            token_ids = self._pieces[text] = self.session.tokenise(text)
        return token_ids

    def dialogue(
        self,
        image_embedding: np.ndarray,
        prompt_embeddings: np.ndarray,
        reading: MapReading | None = None,
    ) -> Dialogue:
        """Questions about one image, each seeing the turns before it; arguments as for ``answer``."""
        return Dialogue(self, image_embedding, prompt_embeddings, reading)

    def say(
        self,
        turns: Sequence[Turn],
        stop: Callable[[], bool] = never,
        sampling: Sampling | None = None,
        owner: object = None,
    ) -> list[Answer]:
        """Answers of turns whose earlier positions, if any, are in the cache, which is the owner's from now on."""
        block = self.session.num_sequences // len(turns)
        for index, turn in enumerate(turns):
            turn.sequence = index * block
            turn.plain = len(turns) == 1 and len(turn.pending) == len(turn.rows)
        choose = make_sampler(sampling) if sampling else None
        self._ready_prefix()
        if all(turn.position == self.num_prefix for turn in turns):
            self.session.forget(self.num_prefix)
        self._prefix_cached = False  # until all is said: after a failure the cache may hold anything
        self.cache_owner = None
        self._finish(turns, block, stop, choose)
        for turn in turns:
            if turn.ties and not turn.plain and not choose and not stop():
                self._settle(turn, stop)
        self._prefix_cached, self.cache_owner = True, owner
        return [self._conclude(turn, greedy=choose is None) for turn in turns]

    def _finish(
        self,
        turns: Sequence[Turn],
        block: int,
        stop: Callable[[], bool],
        choose: Callable[[np.ndarray], int] | None,
    ) -> None:
        """Passes until every turn is done."""
        while unfinished := [turn for turn in turns if not turn.done]:
            if unfinished[0].num_passes and stop():
                return
            drafting = self.drafting and choose is None
            trees = self._plan(unfinished, block) if drafting else [NO_DRAFT] * len(unfinished)
            for turn, tree, logits in zip(unfinished, trees, self._pass(unfinished, trees), strict=True):
                self._accept(turn, tree, logits, choose)

    def _plan(self, turns: Sequence[Turn], block: int) -> list[DraftTree]:
        """What to draft for each turn: of all of them the likeliest tokens, as many as pay."""
        found = [self.drafter.expect(turn.question, turn.reading, turn.tokens) for turn in turns]
        pairs = [(index, expected) for index, expected in enumerate(found) if expected]
        if not pairs:
            return [NO_DRAFT] * len(turns)
        owner = np.concatenate([np.full(len(expected.nodes), index) for index, expected in pairs])
        node = np.concatenate([expected.nodes for _, expected in pairs])
        chance = np.concatenate([expected.chances for _, expected in pairs])
        answer_chance = np.concatenate([expected.answer_chances for _, expected in pairs])
        depth = np.concatenate([expected.depths for _, expected in pairs])
        left = np.array([turn.limit - len(turn.tokens) - 1 for turn in turns])
        allowed = np.flatnonzero((depth < left[owner]) & (chance > 0))
        num_pending = sum(len(turn.pending) for turn in turns)
        used = self.num_prefix + sum(turn.position - self.num_prefix for turn in turns)
        room = min(self.session.num_context - used - num_pending, self.session.max_outputs - len(turns))
        order = allowed[np.argsort(-chance[allowed], kind="stable")][: max(0, room)]
        saved = float(self.costs.seconds(len(turns))) / len(turns)
        num_best, num_affordable = self.costs.num_worth_drafting(num_pending, chance[order], saved)
        insured = allowed[np.argsort(-answer_chance[allowed], kind="stable")]
        order = np.array(
            list(dict.fromkeys([*order[:num_best].tolist(), *insured.tolist()]))[:num_affordable], int
        )
        trees = [NO_DRAFT] * len(turns)
        for index, expected in pairs:
            trees[index] = expected.tree.draft(expected.root, node[order[owner[order] == index]], block)
        return trees

    def _pass(self, turns: Sequence[Turn], trees: Sequence[DraftTree]) -> list[np.ndarray]:
        """Compute what is pending with the drafts behind it: for each turn the logits behind its last pending row
        and behind each node, float32 [n + 1, vocab]."""
        rows, positions, first, counts, wanted = [], [], [], [], []
        start = 0
        for turn, tree in zip(turns, trees, strict=True):
            num_pending = len(turn.pending)
            if turn.position > self.num_prefix:
                for branch in range(1, tree.width):
                    self.session.share(turn.sequence, turn.sequence + branch, self.num_prefix)
            rows += [turn.pending, self.embed(tree.tokens)] if len(tree) else [turn.pending]
            positions += [turn.position + np.arange(num_pending), turn.position + num_pending + tree.depths]
            first += [np.full(num_pending, turn.sequence), turn.sequence + tree.first_leaf]
            counts += [np.full(num_pending, tree.width), tree.num_leaves]
            wanted.append(start + num_pending - 1 + np.arange(len(tree) + 1))
            start += num_pending + len(tree)
            turn.num_passes += 1
            turn.num_drafted += len(tree)
            turn.plain &= len(tree) == 0
        logits = self.session.decode(rows, *map(np.concatenate, (positions, first, counts, wanted)))
        return np.split(logits, np.cumsum([len(one) for one in wanted[:-1]]))

    def _accept(
        self,
        turn: Turn,
        tree: DraftTree,
        logits: np.ndarray,
        choose: Callable[[np.ndarray], int] | None,
    ) -> None:
        """Take over what the model says of a draft, and one token more; cut the cache back to that."""
        best = logits.argmax(axis=1)
        if choose:
            best[0] = choose(logits[0])
        path = tree.accept(best)
        passed = np.array([0, *(node + 1 for node in path)])
        said = best[passed].tolist()
        room = turn.limit - len(turn.tokens)
        ends = [i for i, token in enumerate(said[:room]) if token in self._stops]
        said = said[: ends[0] + 1 if ends else room]
        passed = passed[: len(said)]
        lead = _lead(logits[passed], best[passed])
        turn.ties |= {len(turn.tokens) + int(i) for i in np.flatnonzero(lead < self.noise)}
        if turn.first_logits is None:
            turn.first_logits = logits[0].copy()
        num_kept = len(said) - 1  # nodes; the last token is no node
        turn.num_accepted += num_kept
        turn.tokens += said
        turn.done = bool(ends) or len(turn.tokens) >= turn.limit
        self._keep(turn, tree, path[:num_kept])
        turn.pending = self.embed(said[-1:])

    def _keep(self, turn: Turn, tree: DraftTree, path: list[int]) -> None:
        """Of what a pass put into the cache, keep the pending rows and this path, in the turn's own sequence."""
        session, behind = self.session, turn.position + len(turn.pending)
        source = turn.sequence + (int(tree.first_leaf[path[-1]]) if path else 0)
        if source != turn.sequence:
            session.forget(behind, turn.sequence)
            session.share(source, turn.sequence, behind, behind + len(path))
        elif len(tree):
            session.forget(behind + len(path), turn.sequence)
        for branch in range(1, tree.width):
            session.forget(self.num_prefix, turn.sequence + branch)
        turn.position = behind + len(path)

    def _settle(self, turn: Turn, stop: Callable[[], bool]) -> None:
        """Decode plainly what came near a tie: the result is plain decoding's by construction."""
        again = self.turn(turn.rows, turn.question, turn.reading, turn.limit)
        self.session.forget(self.num_prefix)
        drafting, self.drafting = self.drafting, False
        try:
            self._finish([again], 1, stop, None)
        finally:
            self.drafting = drafting
        turn.tokens, turn.first_logits, turn.done = again.tokens, again.first_logits, again.done
        turn.pending, turn.position, turn.sequence = again.pending, again.position, 0
        turn.num_passes += again.num_passes
        turn.settled = True

    def _conclude(self, turn: Turn, greedy: bool) -> Answer:
        assert turn.first_logits is not None
        spoken = turn.tokens[:-1] if turn.tokens[-1] in self._stops else turn.tokens
        if greedy and turn.done:
            self.drafter.learn(turn.question, turn.reading, tuple(spoken))
        first = turn.tokens[0]
        affirmative = True if first in self.affirmative_ids else False if first in self.negative_ids else None
        unsettled = set() if turn.plain or turn.settled or not greedy else turn.ties
        return Answer(
            token_ids=tuple(turn.tokens),
            text=self.session.text(spoken).strip(),
            affirmative=None if 0 in unsettled else affirmative,
            p_anomaly=_share(turn.first_logits, self.affirmative_ids, self.negative_ids),
            first_token_logits=turn.first_logits,
            num_passes=turn.num_passes,
            num_tokens_drafted=turn.num_drafted,
            num_accepted=turn.num_accepted,
            settled=turn.settled,
            complete=turn.done and not unsettled,
        )

    def turn(
        self, rows: np.ndarray, question: str, reading: MapReading | None, max_tokens: int, cached: int = 0
    ) -> Turn:
        """
        Args:
            rows: the prompt behind the shared prefix.
            cached: of these, what the cache holds already.

        Raises:
            ConfigError: the prompt does not fit.
        """
        needed = self.num_prefix + len(rows)
        if needed >= self.session.num_context:
            raise ConfigError(
                f"the question makes a prompt of {needed} positions and the model has "
                f"{self.session.num_context}: ask a shorter question or shorten the description"
            )
        limit = min(max_tokens, self.session.num_context - needed)
        return Turn(rows, question, reading, limit, rows[cached:], self.num_prefix + cached)

    def _prompt_rows(self, part: Part) -> np.ndarray:
        question = part.question or self.layout.question
        return self.prompt_rows(
            part.image_embedding, part.prompt_embeddings, question + self.layout.assistant
        )

    def _groups(self, rows: Sequence[np.ndarray], max_tokens: int) -> Iterator[list[int]]:
        """Indices of parts that fit into the context together."""
        group: list[int] = []
        used = self.num_prefix
        for index, prompt in enumerate(rows):
            needed = len(prompt) + max_tokens
            if group and (
                used + needed > self.session.num_context or len(group) == self.session.num_sequences
            ):
                yield group
                group, used = [], self.num_prefix
            group.append(index)
            used += needed
        if group:
            yield group

    def _ready_prefix(self) -> None:
        """The constant first piece lies in every sequence and stays from answer to answer."""
        if not self._prefix_cached:
            self.session.forget(0)
            self.cache_owner = None
            count = self.num_prefix
            self.session.decode(
                [self._before_image], np.arange(count), 0, self.session.num_sequences, np.array([count - 1])
            )
            self._prefix_cached = True

    def _tokenise_answer(self, text: str) -> list[int]:
        """As the model says it: up to the stop token, without it."""
        ids = self.session.tokenise(text + self.layout.turn_end)
        return ids[: next((i for i, token in enumerate(ids) if token in self._stops), len(ids))]

    def _first_tokens(self, texts: Sequence[str]) -> list[int]:
        return sorted({self.session.tokenise(text)[0] for text in texts})

    # What is measured when the model opens.

    def _run_rows(self, count: int, num_logits: int = 1) -> None:
        """A pass of so many rows behind the prefix, with the logits of the last ones."""
        self._ready_prefix()
        self.session.forget(self.num_prefix)
        rows = np.resize(self._before_image, (count, self._width))
        positions = self.num_prefix + np.arange(count)
        self.session.decode([rows], positions, 0, 1, np.arange(count - num_logits, count))

    def _choose_threads(self, threads: int) -> None:
        """One thread for a small model: llama.cpp's threads spin while they wait for each other.

        A nano step (0.1 ms) takes three times as long on two threads, and far longer where something else runs.
        """
        self.session.set_threads(1)
        if time_pass(self._run_rows, 1) >= SHARED_STEP_SECONDS:
            self.session.set_threads(threads)

    def _measure_noise(self) -> float:
        """How far apart two logits must be for their order to be certain, whatever a pass holds besides.

        The same few tokens are computed one by one, and in one pass among others; the deviation is taken over the
        whole vocabulary.
        """
        count = min(NUM_PROBED_ROWS, self.session.num_context - self.num_prefix) // 2
        some = self.embed(self.piece(self.layout.after_image))
        turn = self.turn(np.resize(some, (count, self._width)), "", None, NUM_PROBED_STEPS)
        self._run_rows(1)
        self.session.forget(self.num_prefix)
        single = [self._pass([turn], [NO_DRAFT])[0][0].copy()]
        tokens: list[int] = []
        for step in range(NUM_PROBED_STEPS - 1):
            tokens.append(int(single[-1].argmax()))
            turn.pending, turn.position = self.embed(tokens[-1:]), self.num_prefix + count + step
            single.append(self._pass([turn], [NO_DRAFT])[0][0].copy())
        room = self.session.num_context - self.num_prefix - count - len(tokens)
        num_others = min(NUM_PROBED_ROWS, room) // NUM_PROBED_STEPS
        others = [[token, *tokens] for token in range(num_others) if token != tokens[0]]
        tree = PrefixTree([tokens, *others])
        draft = tree.draft(-1, np.arange(len(tree.tokens)), MAX_SEQUENCES)
        self.session.forget(self.num_prefix)
        turn.pending, turn.position = turn.rows, self.num_prefix
        together = self._pass([turn], [draft])[0]
        first = int(np.flatnonzero((draft.parents < 0) & (draft.tokens == tokens[0]))[0])
        nodes = [0, *(first + 1 + step for step in range(len(tokens)))]
        deviation = max(
            float(np.sqrt(np.mean((together[node] - row) ** 2)))
            for node, row in zip(nodes, single, strict=True)
        )
        return NOISE_MARGIN * max(deviation, LEAST_NOISE * float(np.abs(single[0]).max()))


def _check_rows(what: str, rows: np.ndarray, shape: tuple[int, ...]) -> None:
    if rows.shape != shape or not np.isfinite(rows).all():
        raise ValueError(f"{what} must be finite {list(shape)}, not {list(rows.shape)} as they came")


def _lead(logits: np.ndarray, best: np.ndarray) -> np.ndarray:
    """How far the best token of each row is ahead of the next: float [n].

    Raises:
        RuntimeError: a row holds NaN.
    """
    rest = logits.copy()
    rows = np.arange(len(best))
    top = rest[rows, best]
    rest[rows, best] = -np.inf
    lead = top - rest.max(axis=1)
    if np.isnan(lead).any():  # argmax finds the first NaN when there is one
        raise RuntimeError("the language model gave NaN")
    return lead


def _share(logits: np.ndarray, ours: Sequence[int], others: Sequence[int]) -> float:
    """Softmax over both sets of tokens, the share of the first."""
    values = logits[[*ours, *others]].astype(np.float64)
    mass = np.exp(values - values.max())
    return float(mass[: len(ours)].sum() / mass.sum())
