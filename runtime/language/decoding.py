"""Greedy decoding of one or several answers at a time, sped up by speculative decoding with draft trees.

Plain greedy decoding needs one pass of the model per token. Here a pass computes the pending rows of each turn (its
prompt, or its last token) and after them a tree of likely continuations, the draft (``draft_tree``). The logits after
each node verify the draft: the longest path that the model itself would have chosen is accepted, and the next pass
continues after it. (Leviathan et al., Speculative Decoding, ICML 2023; with trees Miao et al., SpecInfer, ASPLOS 2024.)

The tokens are those of plain greedy decoding. However, passes of different sizes round differently. Where the two
highest logits are closer than this noise, which is measured when the model opens, the token counts as a tie. An answer
with ties is decoded once more without drafts up to its last tie, and that result is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .answer import MapReading
from .draft_tree import NO_DRAFT, DraftTree
from .expected_answers import Drafter
from .llama_session import LlamaSession
from .pass_cost import PassCosts, fixed_costs

Stop = Callable[[], bool]
Choose = Callable[[np.ndarray], int]  # logits float32 [vocab] → token


@dataclass(frozen=True)
class Noise:
    """How much the difference of two logits can change with the other rows of a pass; a smaller margin is a tie.

    Attributes:
        first: for the first token, if the prompt is computed in one pass of at least ``min_rows`` rows.
        later: for every other token, and for a first token whose prompt is computed in another way.
        min_rows: a prompt's pass is padded to this many rows, so that it is computed in the same way with and without
            drafts.
    """

    first: float
    later: float
    min_rows: int = 1


@dataclass(eq=False)
class Turn:
    """The state of one answer while it is decoded.

    Attributes:
        rows: float32 [n, D], the whole prompt after the shared prefix.
        question: the question, by which the drafter looks up expected answers.
        reading: summary of the anomaly map, for the drafter.
        limit: maximum number of tokens of the answer.
        pending: float32 [m, D], the rows that the next pass must compute.
        position: number of positions of this turn, the shared prefix included, that the cache holds.
        sequence: the turn's sequence in the cache.
        tokens: the tokens decoded so far, including the stop token when it was reached.
        first_logits: float32 [vocab], the logits after the prompt.
        num_passes, num_drafted, num_accepted: passes, draft tokens put into them, and draft tokens accepted.
        ties: indices of the tokens whose margin was within the noise.
        alone: the prompt is computed in one pass of at least ``Noise.min_rows`` rows without other turns.
        plain: all passes were those of plain greedy decoding (no draft, no other turn, no reused cache).
        redecoded: the ties were decided by decoding again without drafts.
        done: the stop token or the limit was reached.
    """

    rows: np.ndarray
    question: str
    reading: MapReading | None
    limit: int
    pending: np.ndarray
    position: int
    sequence: int = 0
    tokens: list[int] = field(default_factory=list)
    first_logits: np.ndarray | None = None
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    ties: set[int] = field(default_factory=set)
    alone: bool = False
    plain: bool = True
    redecoded: bool = False
    done: bool = False

    @property
    def is_certain(self) -> bool:
        """Whether the tokens are known to be those of plain greedy decoding."""
        return self.plain or self.redecoded or not self.ties


class Decoder:
    """Decodes turns with one session; its cache keeps the shared prefix (the prompt's constant text) between them.

    Attributes:
        session: the llama.cpp session.
        num_prefix: number of positions of the shared prefix.
        drafting: set False to decode one token a pass.
        drafter: predicts the answers that drafts are made from.
        costs: duration of a pass on this machine.
        noise: margins below which a token is a tie.
        cache_owner: the object whose turn the cache holds, for example a dialogue; None when it holds none.
    """

    def __init__(
        self,
        session: LlamaSession,
        prefix: np.ndarray,
        embed: Callable[[Sequence[int] | np.ndarray], np.ndarray],
        drafter: Drafter,
        stops: Sequence[int],
    ) -> None:
        """
        Args:
            session: the llama.cpp session; its last sequence is reserved for padding rows.
            prefix: float32 [num_prefix, D], the embeddings of the shared prefix.
            embed: token ids, int [n] → their embeddings, float32 [n, D].
            drafter: predicts the answers that drafts are made from.
            stops: the tokens that end an answer.
        """
        self.session = session
        self.drafter = drafter
        self.num_prefix = len(prefix)
        self.drafting = True
        self.costs: PassCosts = fixed_costs([(1, 1.0)])
        self.noise = Noise(0.0, 0.0)
        self.cache_owner: object = None
        self._prefix, self._embed, self._stops = prefix, embed, frozenset(stops)
        self._prefix_cached = False
        self._num_sequences = session.num_sequences - 1  # the last one is reserved for padding rows
        self._padding = np.zeros((0, prefix.shape[1]), np.float32)

    @property
    def max_turns(self) -> int:
        """The most turns that fit into one pass: each needs a sequence."""
        return self._num_sequences

    @property
    def room(self) -> int:
        """Positions of the context after the shared prefix."""
        return self.session.num_context - self.num_prefix

    def turn(
        self, rows: np.ndarray, question: str, reading: MapReading | None, limit: int, cached: int = 0
    ) -> Turn:
        """A turn that has not begun.

        Args:
            rows: float32 [n, D], the prompt after the shared prefix.
            question: the question, by which the drafter looks up expected answers.
            reading: summary of the anomaly map, for the drafter.
            limit: maximum number of tokens of the answer.
            cached: number of ``rows`` that the cache already holds.
        """
        position = self.num_prefix + cached
        return Turn(
            rows, question, reading, limit, rows[cached:], position, alone=not cached, plain=not cached
        )

    def decode(
        self, turns: Sequence[Turn], stop: Stop, choose: Choose | None = None, owner: object = None
    ) -> None:
        """Decode the turns to their ends, all in the same passes.

        Args:
            turns: at most ``max_turns``; their cached positions, if any, must be in the cache.
            stop: called before every pass but the first; True leaves the turns as they are.
            choose: samples each token instead of taking the most likely one; no drafts are used then.
            owner: becomes ``cache_owner``.

        Raises:
            RuntimeError: llama.cpp failed or returned NaN.
        """
        block = self._num_sequences // len(turns)
        for index, turn in enumerate(turns):
            turn.sequence = index * block
            turn.alone &= len(turns) == 1
            turn.plain &= len(turns) == 1
        self.ready_prefix()
        if all(turn.position == self.num_prefix for turn in turns):
            self.session.forget(self.num_prefix)
        self._prefix_cached = False  # until decoding succeeds: after a failure the cache content is unknown
        self.cache_owner = None
        while unfinished := [turn for turn in turns if not turn.done]:
            if unfinished[0].num_passes and stop():
                break
            drafting = self.drafting and choose is None
            trees = self._plan(unfinished, block) if drafting else [NO_DRAFT] * len(unfinished)
            self._step(unfinished, trees, choose)
        for turn in turns:
            if choose is None and not turn.is_certain and not stop():
                self._redecode(turn, stop)
        self._prefix_cached, self.cache_owner = True, owner

    def ready_prefix(self) -> None:
        """Compute the shared prefix once; it stays in every sequence of the cache from answer to answer."""
        if not self._prefix_cached:
            self.session.forget(0)
            self.cache_owner = None
            count = self.num_prefix
            self.session.decode(
                [self._prefix], np.arange(count), 0, self._num_sequences, np.array([count - 1])
            )
            self._prefix_cached = True

    def run_rows(self, num_rows: int, num_logits: int = 1) -> None:
        """Run a pass of ``num_rows`` rows after the shared prefix, with logits for the last ``num_logits`` rows.

        Used for timing only.
        """
        self.ready_prefix()
        self.session.forget(self.num_prefix)
        rows = np.resize(self._prefix, (num_rows, self._prefix.shape[1]))
        positions = self.num_prefix + np.arange(num_rows)
        self.session.decode([rows], positions, 0, 1, np.arange(num_rows - num_logits, num_rows))

    def compare(
        self, rows: np.ndarray, num_steps: int, draft: Callable[[list[int]], DraftTree]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits after a prompt and after its first greedy tokens, computed one token a pass and in a single pass.

        Args:
            rows: float32 [n, D], the prompt after the shared prefix.
            num_steps: number of greedy tokens.
            draft: makes the tree of the single pass from these tokens; they must be one of its branches.

        Returns:
            The logits of plain decoding and those of the single pass, float32 [num_steps + 1, vocab] each.
        """
        self.ready_prefix()
        self.session.forget(self.num_prefix)
        turn = self.turn(rows, "", None, num_steps + 1)
        alone = []
        for _ in range(num_steps + 1):
            logits = self._pass([turn], [NO_DRAFT])[0]
            alone.append(logits[0].copy())
            self._accept(turn, NO_DRAFT, logits, None)
            turn.pending = self._embed(turn.tokens[-1:])  # after a stop token too
        tokens = np.array(turn.tokens)
        tree = draft(turn.tokens[:num_steps])
        path = tree.accept(tokens[np.concatenate([[0], np.minimum(tree.depths + 1, num_steps)])])
        self.session.forget(self.num_prefix)
        together = self._pass([self.turn(rows, "", None, 1)], [tree])[0]
        self._prefix_cached = False
        return np.array(alone), together[[0, *(node + 1 for node in path)]]

    def _plan(self, turns: Sequence[Turn], block: int) -> list[DraftTree]:
        """A draft tree for each turn: the most likely tokens of all turns, as many as reduce the expected time."""
        found = [self.drafter.expect(turn.question, turn.reading, turn.tokens) for turn in turns]
        pairs = [(index, expected) for index, expected in enumerate(found) if expected]
        if not pairs:
            return [NO_DRAFT] * len(turns)
        owner = np.repeat([index for index, _ in pairs], [len(expected.nodes) for _, expected in pairs])
        node = np.concatenate([expected.nodes for _, expected in pairs])
        probability = np.concatenate([expected.probabilities for _, expected in pairs])
        depth = np.concatenate([expected.depths for _, expected in pairs])
        remaining = np.array([turn.limit - len(turn.tokens) - 1 for turn in turns])
        allowed = np.flatnonzero((depth < remaining[owner]) & (probability > 0))
        num_pending = sum(len(turn.pending) for turn in turns)
        room = min(self._num_free(turns) - num_pending, self.session.max_outputs - len(turns))
        order = allowed[np.argsort(-probability[allowed], kind="stable")][: max(0, room)]
        saved = float(self.costs.seconds(len(turns))) / len(turns)
        order = order[: self.costs.num_worth_drafting(num_pending, probability[order], saved)]
        trees = [NO_DRAFT] * len(turns)
        for index, expected in pairs:
            trees[index] = expected.tree.draft(expected.root, node[order[owner[order] == index]], block)
        return trees

    def _num_free(self, turns: Sequence[Turn]) -> int:
        """Positions of the cache that these turns do not use."""
        return self.room - sum(turn.position - self.num_prefix for turn in turns)

    def _step(self, turns: Sequence[Turn], trees: Sequence[DraftTree], choose: Choose | None) -> None:
        """Run one pass and accept its tokens."""
        for turn, tree, logits in zip(turns, trees, self._pass(turns, trees), strict=True):
            self._accept(turn, tree, logits, choose)

    def _pass(self, turns: Sequence[Turn], trees: Sequence[DraftTree]) -> list[np.ndarray]:
        """Run one pass with the pending rows and drafts of all turns, padded where a larger pass is cheaper.

        Returns:
            For each turn the logits after its last pending row and after each of its n draft nodes, float32
            [n + 1, vocab].
        """
        rows, positions, first, counts, wanted = [], [], [], [], []
        start = 0
        for turn, tree in zip(turns, trees, strict=True):
            num_pending = len(turn.pending)
            if turn.position > self.num_prefix:
                for branch in range(1, tree.width):
                    self.session.share(turn.sequence, turn.sequence + branch, self.num_prefix)
            rows += [turn.pending, self._embed(tree.tokens)] if len(tree) else [turn.pending]
            positions += [turn.position + np.arange(num_pending), turn.position + num_pending + tree.depths]
            first += [np.full(num_pending, turn.sequence), turn.sequence + tree.first_leaf]
            counts += [np.full(num_pending, tree.width), tree.num_leaves]
            wanted.append(start + num_pending - 1 + np.arange(len(tree) + 1))
            start += num_pending + len(tree)
            turn.num_passes += 1
            turn.num_drafted += len(tree)
            turn.plain &= len(tree) == 0
        min_rows = self.noise.min_rows if turns[0].alone and turns[0].first_logits is None else 1
        num_padding = max(self.costs.cheapest(start), min_rows) - start
        if 0 < num_padding <= self._num_free(turns) - start:
            rows.append(self._padding_rows(num_padding))
            positions.append(np.arange(num_padding))
            first.append(np.full(num_padding, self._num_sequences))
            counts.append(np.ones(num_padding, np.int64))
        elif start < min_rows:
            turns[0].alone = False
        logits = self.session.decode(rows, *map(np.concatenate, (positions, first, counts, wanted)))
        self.session.forget(0, self._num_sequences)
        return np.split(logits, np.cumsum([len(one) for one in wanted[:-1]]))

    def _padding_rows(self, count: int) -> np.ndarray:
        """Padding, float32 [count, D]; it goes into a sequence that no other row attends to."""
        if len(self._padding) < count:
            self._padding = np.resize(self._prefix, (count, self._prefix.shape[1]))
        return self._padding[:count]

    def _accept(self, turn: Turn, tree: DraftTree, logits: np.ndarray, choose: Choose | None) -> None:
        """Append the accepted path of the draft and the token after it to the turn, and trim the cache accordingly.

        Args:
            logits: float32 [n + 1, vocab], as ``_pass`` returns them for this turn.
        """
        best = logits.argmax(axis=1)
        if choose:
            best[0] = choose(logits[0])
        path = tree.accept(best)
        rows = np.array([0, *(node + 1 for node in path)])
        tokens = best[rows].tolist()
        room = turn.limit - len(turn.tokens)
        end = next((i for i, token in enumerate(tokens[:room]) if token in self._stops), None)
        tokens = tokens[: room if end is None else end + 1]
        margins = _margins(logits[rows[: len(tokens)]], best[rows[: len(tokens)]])
        noise = np.full(len(tokens), self.noise.later)
        if turn.first_logits is None:
            turn.first_logits = logits[0].copy()
            if turn.alone:
                noise[0] = self.noise.first
        turn.ties |= {len(turn.tokens) + int(i) for i in np.flatnonzero(margins < noise)}
        num_kept = len(tokens) - 1  # draft nodes; the last token is not one
        turn.num_accepted += num_kept
        turn.tokens += tokens
        turn.done = end is not None or len(turn.tokens) >= turn.limit
        self._trim_cache(turn, tree, path[:num_kept])
        if not turn.done:
            turn.pending = self._embed(tokens[-1:])

    def _trim_cache(self, turn: Turn, tree: DraftTree, path: list[int]) -> None:
        """Keep the pending rows of the last pass and the accepted path in the turn's sequence; drop the other nodes."""
        session, end = self.session, turn.position + len(turn.pending)
        source = turn.sequence + (int(tree.first_leaf[path[-1]]) if path else 0)
        if source != turn.sequence:
            session.forget(end, turn.sequence)
            session.share(source, turn.sequence, end, end + len(path))
        elif len(tree):
            session.forget(end + len(path), turn.sequence)
        for branch in range(1, tree.width):
            session.forget(self.num_prefix, turn.sequence + branch)
        turn.position = end + len(path)

    def _redecode(self, turn: Turn, stop: Stop) -> None:
        """Decode the turn again without drafts past its last tie, or to the end if a token differs.

        The result is that of plain greedy decoding: where the margin exceeds the noise, drafts cannot change a token.
        """
        again = self.turn(turn.rows, turn.question, turn.reading, turn.limit)
        self.session.forget(self.num_prefix)
        agreed = False
        while not (again.done or agreed):
            if again.num_passes and stop():
                break
            self._step([again], [NO_DRAFT], None)
            num_tokens = len(again.tokens)
            agreed = num_tokens > max(turn.ties) and again.tokens == turn.tokens[:num_tokens]
        if not agreed:
            turn.tokens, turn.done = again.tokens, again.done
        turn.pending, turn.position, turn.sequence = again.pending, again.position, 0
        turn.first_logits = again.first_logits
        turn.num_passes += again.num_passes
        turn.redecoded = True

    def answer_tokens(self, turn: Turn) -> list[int]:
        """The turn's tokens without the stop token."""
        return turn.tokens[:-1] if turn.tokens[-1] in self._stops else turn.tokens


def _margins(logits: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Difference between the chosen token's logit and the highest other one in each row.

    Args:
        logits: float32 [n, vocab].
        best: int [n], the chosen token of each row.

    Returns:
        float32 [n]; negative where sampling chose a less likely token.

    Raises:
        RuntimeError: a row contains NaN.
    """
    rows = np.arange(len(best))
    top = logits[rows, best]
    logits[rows, best] = -np.inf
    margins = top - logits.max(axis=1)
    logits[rows, best] = top
    if np.isnan(margins).any():  # argmax returns the first NaN if there is one
        raise RuntimeError("the language model returned NaN")
    return margins
