"""Answers that may be coming, as a prefix tree that one pass of the language model can verify.

Laid out in preorder behind the text that it continues: a node's position is its depth, and it belongs to the
sequences of the leaves below it, so that each branch sees the text and its own path only. (Tree attention:
Miao et al., SpecInfer, ASPLOS 2024; here by llama.cpp's sequence ids instead of a mask.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROOT = -1  # the text itself


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Draft tokens in preorder; every array is int [n].

    Attributes:
        tokens: what each node says.
        parents: the node before it; ``ROOT`` continues the text itself.
        depths: 0 continues the text.
        first_leaf: the leaves below a node, itself included, are ``first_leaf … first_leaf + num_leaves - 1``.
        num_leaves: at least 1.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    first_leaf: np.ndarray
    num_leaves: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Sequences that the tree takes, at least the text's own."""
        return max(1, int(self.num_leaves[self.parents == ROOT].sum()))

    def accept(self, best: np.ndarray) -> list[int]:
        """The nodes on the path that the model itself would say.

        Args:
            best: int [n + 1], the greedy token behind the text (first) and behind each node.
        """
        path: list[int] = []
        for node in np.flatnonzero(best[self.parents + 1] == self.tokens).tolist():
            if self.parents[node] == (path[-1] if path else ROOT):
                path.append(node)
        return path


NO_DRAFT = DraftTree(*(np.empty(0, np.int64) for _ in range(5)))


@dataclass(frozen=True, eq=False)
class Continuations:
    """Nodes of a tree that may follow ``root``.

    Attributes:
        nodes: int [n], ascending.
        chances: float [n], that the text goes through the node, now that it reached ``root``.
    """

    tree: PrefixTree
    root: int
    nodes: np.ndarray
    chances: np.ndarray

    @property
    def depths(self) -> np.ndarray:
        """int [n]: 0 follows ``root`` at once."""
        return self.tree.depths[self.nodes] - (0 if self.root == ROOT else self.tree.depths[self.root] + 1)


class PrefixTree:
    """Every known answer; what is drafted is a part of it."""

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        """
        Args:
            paths: the answers' tokens; one may begin with another, or be empty.
        """
        order = sorted(range(len(paths)), key=lambda i: tuple(paths[i]))
        tokens: list[int] = []
        parents: list[int] = []
        through: list[tuple[int, int]] = []  # (path, node)
        self._children: dict[tuple[int, int], int] = {}
        for index in order:
            node = ROOT
            for token in paths[index]:
                child = self._children.get((node, token))
                if child is None:
                    child = self._children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = child
                through.append((index, node))
        self.tokens, self.parents = np.array(tokens, np.int64), np.array(parents, np.int64)
        self._ends = np.arange(1, len(tokens) + 1)  # behind a node's subtree
        self.depths = np.zeros(len(tokens), np.int64)
        for node, parent in enumerate(parents):
            self.depths[node] = 0 if parent == ROOT else self.depths[parent] + 1
        for node in reversed(range(len(tokens))):
            if (parent := parents[node]) != ROOT:
                self._ends[parent] = max(self._ends[parent], self._ends[node])
        self._through = np.zeros((len(paths), len(tokens)))
        if through:
            self._through[tuple(np.array(through).T)] = 1

    def find(self, spoken: Sequence[int]) -> int | None:
        """The node where these first tokens end; None when no answer begins so."""
        node = ROOT
        for token in spoken:
            child = self._children.get((node, token))
            if child is None:
                return None
            node = child
        return node

    def below(self, node: int, path_chances: np.ndarray) -> Continuations:
        """What may follow ``node``.

        Args:
            path_chances: float [num_paths], of the answers.
        """
        begin, end = (0, len(self.tokens)) if node == ROOT else (node + 1, int(self._ends[node]))
        chances = path_chances @ self._through[:, begin:end]
        reached = 1.0 if node == ROOT else float(path_chances @ self._through[:, node])
        return Continuations(self, node, np.arange(begin, end), chances / reached if reached > 0 else chances)

    def draft(self, root: int, nodes: np.ndarray, max_leaves: int) -> DraftTree:
        """Some nodes below ``root``, the likeliest first, as a draft.

        Args:
            root: the node that the draft continues.
            nodes: int [n]; one whose parent is neither ``root`` nor before it is left out.
            max_leaves: what would branch the tree further is left out.
        """
        taken: list[int] = []
        with_child: set[int] = set()
        known = {root}
        num_leaves = 1
        for node in nodes.tolist():
            parent = int(self.parents[node])
            branches = parent in with_child
            if parent in known and num_leaves + branches <= max_leaves:
                num_leaves += branches
                taken.append(node)
                known.add(node)
                with_child.add(parent)
        return self._relabel(root, np.array(sorted(taken), np.int64))

    def _relabel(self, root: int, nodes: np.ndarray) -> DraftTree:
        if len(nodes) == 0:
            return NO_DRAFT
        number = np.full(len(self.tokens) + 1, ROOT)  # the last entry is ROOT's own
        number[nodes] = np.arange(len(nodes))
        if root != ROOT:
            number[root] = ROOT
        parents = number[self.parents[nodes]]
        is_leaf = np.ones(len(nodes), bool)
        is_leaf[parents[parents != ROOT]] = False
        before = np.concatenate([[0], np.cumsum(is_leaf)])
        ends = np.searchsorted(nodes, self._ends[nodes])
        depths = self.depths[nodes] - (0 if root == ROOT else self.depths[root] + 1)
        return DraftTree(
            tokens=self.tokens[nodes],
            parents=parents,
            depths=depths,
            first_leaf=before[:-1],
            num_leaves=before[ends] - before[:-1],
        )
