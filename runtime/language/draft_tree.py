"""Expected continuations of an answer as a prefix tree that one pass of the language model can verify.

The nodes are rows of the pass, in preorder after the text that they continue. A node's position is the text's length
plus its depth. It belongs to the sequences of the leaves below it, so each branch attends to the text and to its own
path only. (Tree attention: Miao et al., SpecInfer, ASPLOS 2024; here with llama.cpp's sequence ids instead of a mask.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROOT = -1  # the text that the tree continues


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Draft tokens in preorder; every array is int [n].

    Attributes:
        tokens: the token of each node.
        parents: index of the parent node; ``ROOT`` for nodes that directly follow the text.
        depths: 0 for nodes that directly follow the text.
        first_leaf: the leaves of a node's subtree are numbers ``first_leaf … first_leaf + num_leaves - 1``; a leaf is
            the only one of its own subtree.
        num_leaves: number of leaves of the subtree, at least 1.
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
        """Number of cache sequences that the tree needs: its leaves, at least 1."""
        return max(1, int(self.num_leaves[self.parents == ROOT].sum()))

    def accept(self, best: np.ndarray) -> list[int]:
        """Indices of the nodes on the path that the model itself chooses.

        Args:
            best: int [n + 1], the chosen token after the text (first) and after each node.
        """
        path: list[int] = []
        for node in np.flatnonzero(best[self.parents + 1] == self.tokens).tolist():
            if self.parents[node] == (path[-1] if path else ROOT):
                path.append(node)
        return path


NO_DRAFT = DraftTree(*(np.empty(0, np.int64) for _ in range(5)))


@dataclass(frozen=True, eq=False)
class Continuations:
    """All nodes of a tree below ``root``, with their probabilities.

    Attributes:
        tree: the tree.
        root: a node of it, or ``ROOT``.
        nodes: int [n], the nodes below ``root``, ascending.
        probabilities: float [n], the probability that the answer passes through each node, given that it reached
            ``root``.
    """

    tree: PrefixTree
    root: int
    nodes: np.ndarray
    probabilities: np.ndarray

    @property
    def depths(self) -> np.ndarray:
        """int [n]: depths below ``root``; 0 for its children."""
        return self.tree.depths[self.nodes] - (0 if self.root == ROOT else self.tree.depths[self.root] + 1)


class PrefixTree:
    """The prefix tree of all known answers; drafts are subtrees of it.

    Attributes:
        tokens, parents, depths: int [n] each, as in ``DraftTree``.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        """
        Args:
            paths: the tokens of each answer. An answer may be empty or the beginning of another one.
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
        self._ends = np.arange(1, len(tokens) + 1)  # index after the last node of each subtree
        self.depths = np.zeros(len(tokens), np.int64)
        for node, parent in enumerate(parents):
            self.depths[node] = 0 if parent == ROOT else self.depths[parent] + 1
        for node in reversed(range(len(tokens))):
            if (parent := parents[node]) != ROOT:
                self._ends[parent] = max(self._ends[parent], self._ends[node])
        self._through = np.zeros((len(paths), len(tokens)))
        if through:
            self._through[tuple(np.array(through).T)] = 1

    def find(self, tokens: Sequence[int]) -> int | None:
        """The node of the last of these first tokens (``ROOT`` for none); None if no answer begins with them."""
        node = ROOT
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                return None
            node = child
        return node

    def below(self, node: int, path_probabilities: np.ndarray) -> Continuations:
        """The nodes below ``node`` with their probabilities.

        Args:
            node: a node, or ``ROOT``.
            path_probabilities: float [num_paths], the probability of each answer.
        """
        begin, end = (0, len(self.tokens)) if node == ROOT else (node + 1, int(self._ends[node]))
        probabilities = path_probabilities @ self._through[:, begin:end]
        reached = 1.0 if node == ROOT else float(path_probabilities @ self._through[:, node])
        if reached > 0:
            probabilities = probabilities / reached
        return Continuations(self, node, np.arange(begin, end), probabilities)

    def draft(self, root: int, nodes: np.ndarray, max_leaves: int) -> DraftTree:
        """A draft of some nodes below ``root``.

        Args:
            root: the node that the draft continues, or ``ROOT``.
            nodes: int [n], the nodes to take, the most likely first. A node whose parent is neither ``root`` nor
                taken before it is left out.
            max_leaves: nodes that would give the draft more leaves are left out.
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
        """The subtree of ``nodes``, ascending int [n], with nodes numbered from 0 and depths counted from ``root``."""
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
