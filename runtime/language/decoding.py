"""Greedy decoding of one or several answers, with drafts that the passes verify on the way.

A pass computes what is pending of each turn (its prompt, or the last token said) and behind it the answers that may be
coming, as a tree: what step-by-step decoding would compute, for every branch. The branch that the model itself chooses
is the answer. What nobody foresaw is decoded on from there.

The answer is that of plain greedy decoding, token for token. Passes of different sizes differ in the last bits, though.
So where two tokens come closer to each other than that noise, measured when the model opens, plain decoding says again
what was said up to there, and that counts.
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
    """How far two logits can move against each other with what a pass holds besides; closer ones are a tie.

    Attributes:
        first: behind a prompt that is computed whole in a pass of at least ``fewest`` rows.
        later: behind a token, which plain decoding computes alone, or a prompt that is computed otherwise.
        fewest: rows that a prompt's pass is filled up to, drafts or not, so that it is computed the same way.
    """

    first: float
    later: float
    fewest: int = 1


@dataclass(eq=False)
class Turn:
    """An answer in the making: ``pending`` rows are still to be computed, ``position`` are in the cache.

    Attributes:
        rows: float32 [n, D], the whole prompt behind the shared prefix.
        limit: tokens of the answer, at most.
        tokens: what was said, the stop token included when it was reached.
        ties: which of the tokens another one came near.
        alone: no other turn is in its passes, and the first of them holds the whole prompt and rows enough.
        plain: nothing but what plain decoding does has been done.
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
    settled: bool = False
    done: bool = False

    @property
    def is_certain(self) -> bool:
        """Plain decoding says the same."""
        return self.plain or self.settled or not self.ties


class Decoder:
    """Turns in, tokens out, over the cache of one session, whose first positions hold the prompts' constant piece.

    Attributes:
        num_prefix: positions of the constant piece.
        drafting: set False to decode step by step.
        drafter: what to expect.
        costs: what a pass costs on this machine.
        noise: what is a tie.
        cache_owner: whose turn the cache holds.
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
            prefix: float32 [num_prefix, D], the constant piece.
            embed: int [n] → float32 [n, D].
            stops: tokens that end an answer.
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
        self._num_sequences = session.num_sequences - 1  # the last one is for rows that only fill a pass up
        self._nothing = np.zeros((0, prefix.shape[1]), np.float32)

    @property
    def max_turns(self) -> int:
        """That fit into one pass, for each needs a sequence."""
        return self._num_sequences

    @property
    def room(self) -> int:
        """Positions behind the constant piece."""
        return self.session.num_context - self.num_prefix

    def turn(
        self, rows: np.ndarray, question: str, reading: MapReading | None, limit: int, cached: int = 0
    ) -> Turn:
        """
        Args:
            rows: the prompt behind the constant piece.
            cached: of these, what the cache holds already.
        """
        position = self.num_prefix + cached
        return Turn(
            rows, question, reading, limit, rows[cached:], position, alone=not cached, plain=not cached
        )

    def finish(
        self, turns: Sequence[Turn], stop: Stop, choose: Choose | None = None, owner: object = None
    ) -> None:
        """Say the turns, all in the same passes; their earlier positions, if any, are in the cache.

        Args:
            stop: asked before every pass but the first; True leaves the turns as they are.
            choose: draws the tokens instead of taking the likeliest; step by step then.
            owner: whose the cache is from now on.

        Raises:
            RuntimeError: llama.cpp failed or gave NaN.
        """
        block = self._num_sequences // len(turns)
        for index, turn in enumerate(turns):
            turn.sequence = index * block
            turn.alone &= len(turns) == 1
            turn.plain &= len(turns) == 1
        self.ready_prefix()
        if all(turn.position == self.num_prefix for turn in turns):
            self.session.forget(self.num_prefix)
        self._prefix_cached = False  # until all is said: after a failure the cache may hold anything
        self.cache_owner = None
        while unfinished := [turn for turn in turns if not turn.done]:
            if unfinished[0].num_passes and stop():
                break
            drafting = self.drafting and choose is None
            trees = self._plan(unfinished, block) if drafting else [NO_DRAFT] * len(unfinished)
            self._advance(unfinished, trees, choose)
        for turn in turns:
            if choose is None and not turn.is_certain and not stop():
                self._settle(turn, stop)
        self._prefix_cached, self.cache_owner = True, owner

    def ready_prefix(self) -> None:
        """The constant piece lies in every sequence and stays from answer to answer."""
        if not self._prefix_cached:
            self.session.forget(0)
            self.cache_owner = None
            count = self.num_prefix
            self.session.decode(
                [self._prefix], np.arange(count), 0, self._num_sequences, np.array([count - 1])
            )
            self._prefix_cached = True

    def run_rows(self, num_rows: int, num_logits: int = 1) -> None:
        """A pass of so many rows behind the constant piece, with the logits of the last ones: to be timed."""
        self.ready_prefix()
        self.session.forget(self.num_prefix)
        rows = np.resize(self._prefix, (num_rows, self._prefix.shape[1]))
        positions = self.num_prefix + np.arange(num_rows)
        self.session.decode([rows], positions, 0, 1, np.arange(num_rows - num_logits, num_rows))

    def compare(
        self, rows: np.ndarray, num_steps: int, draft: Callable[[list[int]], DraftTree]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The logits of a prompt and its first greedy tokens, step by step and in one pass with a draft.

        Args:
            rows: float32 [n, D], the prompt.
            num_steps: tokens.
            draft: of the tokens that were said, a tree that they are a branch of.

        Returns:
            float32 [num_steps + 1, vocab] each.
        """
        self.ready_prefix()
        self.session.forget(self.num_prefix)
        turn = self.turn(rows, "", None, num_steps + 1)
        alone = []
        for _ in range(num_steps + 1):
            logits = self._pass([turn], [NO_DRAFT])[0]
            alone.append(logits[0].copy())
            self._accept(turn, NO_DRAFT, logits, None)
            turn.pending = self._embed(turn.tokens[-1:])  # behind a stop token too
        said = np.array(turn.tokens)
        tree = draft(turn.tokens[:num_steps])
        path = tree.accept(said[np.concatenate([[0], np.minimum(tree.depths + 1, num_steps)])])
        self.session.forget(self.num_prefix)
        together = self._pass([self.turn(rows, "", None, 1)], [tree])[0]
        self._prefix_cached = False
        return np.array(alone), together[[0, *(node + 1 for node in path)]]

    def _plan(self, turns: Sequence[Turn], block: int) -> list[DraftTree]:
        """What to draft for each turn: of all of them the likeliest tokens, as many as pay."""
        found = [self.drafter.expect(turn.question, turn.reading, turn.tokens) for turn in turns]
        pairs = [(index, expected) for index, expected in enumerate(found) if expected]
        if not pairs:
            return [NO_DRAFT] * len(turns)
        owner = np.repeat([index for index, _ in pairs], [len(expected.nodes) for _, expected in pairs])
        node = np.concatenate([expected.nodes for _, expected in pairs])
        chance = np.concatenate([expected.chances for _, expected in pairs])
        depth = np.concatenate([expected.depths for _, expected in pairs])
        left = np.array([turn.limit - len(turn.tokens) - 1 for turn in turns])
        allowed = np.flatnonzero((depth < left[owner]) & (chance > 0))
        num_pending = sum(len(turn.pending) for turn in turns)
        room = min(self._num_free(turns) - num_pending, self.session.max_outputs - len(turns))
        order = allowed[np.argsort(-chance[allowed], kind="stable")][: max(0, room)]
        saved = float(self.costs.seconds(len(turns))) / len(turns)
        order = order[: self.costs.num_worth_drafting(num_pending, chance[order], saved)]
        trees = [NO_DRAFT] * len(turns)
        for index, expected in pairs:
            trees[index] = expected.tree.draft(expected.root, node[order[owner[order] == index]], block)
        return trees

    def _num_free(self, turns: Sequence[Turn]) -> int:
        """Positions of the cache that nothing of these turns lies in."""
        return self.room - sum(turn.position - self.num_prefix for turn in turns)

    def _advance(self, turns: Sequence[Turn], trees: Sequence[DraftTree], choose: Choose | None) -> None:
        for turn, tree, logits in zip(turns, trees, self._pass(turns, trees), strict=True):
            self._accept(turn, tree, logits, choose)

    def _pass(self, turns: Sequence[Turn], trees: Sequence[DraftTree]) -> list[np.ndarray]:
        """Compute what is pending with the drafts behind it, and as many rows besides as make the pass cheaper: for
        each turn the logits behind its last pending row and behind each node, float32 [n + 1, vocab]."""
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
        fewest = self.noise.fewest if turns[0].alone and turns[0].first_logits is None else 1
        num_more = max(self.costs.cheapest(start), fewest) - start
        if 0 < num_more <= self._num_free(turns) - start:
            rows.append(self._filling(num_more))
            positions.append(np.arange(num_more))
            first.append(np.full(num_more, self._num_sequences))
            counts.append(np.ones(num_more, np.int64))
        elif start < fewest:
            turns[0].alone = False
        logits = self.session.decode(rows, *map(np.concatenate, (positions, first, counts, wanted)))
        self.session.forget(0, self._num_sequences)
        return np.split(logits, np.cumsum([len(one) for one in wanted[:-1]]))

    def _filling(self, count: int) -> np.ndarray:
        """float32 [count, D]: rows of no meaning, in a sequence that nothing else sees."""
        if len(self._nothing) < count:
            self._nothing = np.resize(self._prefix, (count, self._prefix.shape[1]))
        return self._nothing[:count]

    def _accept(self, turn: Turn, tree: DraftTree, logits: np.ndarray, choose: Choose | None) -> None:
        """Take over what the model says of a draft, and one token more; cut the cache back to that."""
        best = logits.argmax(axis=1)
        if choose:
            best[0] = choose(logits[0])
        path = tree.accept(best)
        passed = np.array([0, *(node + 1 for node in path)])
        said = best[passed].tolist()
        room = turn.limit - len(turn.tokens)
        end = next((i for i, token in enumerate(said[:room]) if token in self._stops), None)
        said = said[: room if end is None else end + 1]
        lead = _lead(logits[passed[: len(said)]], best[passed[: len(said)]])
        margin = np.full(len(said), self.noise.later)
        if turn.first_logits is None:
            turn.first_logits = logits[0].copy()
            if turn.alone:
                margin[0] = self.noise.first
        turn.ties |= {len(turn.tokens) + int(i) for i in np.flatnonzero(lead < margin)}
        num_kept = len(said) - 1  # nodes; the last token is no node
        turn.num_accepted += num_kept
        turn.tokens += said
        turn.done = end is not None or len(turn.tokens) >= turn.limit
        self._keep(turn, tree, path[:num_kept])
        if not turn.done:
            turn.pending = self._embed(said[-1:])

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

    def _settle(self, turn: Turn, stop: Stop) -> None:
        """Decode plainly until the last tie is behind; where that says something else, to the end.

        The result is plain decoding's by construction: between the ties, no draft can have changed a token.
        """
        again = self.turn(turn.rows, turn.question, turn.reading, turn.limit)
        self.session.forget(self.num_prefix)
        agreed = False
        while not (again.done or agreed):
            if again.num_passes and stop():
                break
            self._advance([again], [NO_DRAFT], None)
            num_said = len(again.tokens)
            agreed = num_said > max(turn.ties) and again.tokens == turn.tokens[:num_said]
        if not agreed:
            turn.tokens, turn.done = again.tokens, again.done
        turn.pending, turn.position, turn.sequence = again.pending, again.position, 0
        turn.first_logits = again.first_logits
        turn.num_passes += again.num_passes
        turn.settled = True

    def spoken(self, turn: Turn) -> list[int]:
        """The turn's tokens without the stop token."""
        return turn.tokens[:-1] if turn.tokens[-1] in self._stops else turn.tokens


def _lead(logits: np.ndarray, best: np.ndarray) -> np.ndarray:
    """How far the best token of each row float32 [n, vocab] is ahead of the next: float [n].

    Raises:
        RuntimeError: a row holds NaN.
    """
    rows = np.arange(len(best))
    top = logits[rows, best]
    logits[rows, best] = -np.inf
    lead = top - logits.max(axis=1)
    logits[rows, best] = top
    if np.isnan(lead).any():  # argmax finds the first NaN when there is one
        raise RuntimeError("the language model gave NaN")
    return lead
