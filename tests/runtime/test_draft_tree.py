"""Draft trees: what a pass sees of each branch, and what is accepted, against plain lists of tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.draft_tree import NO_DRAFT, PrefixTree
from anomalygpt_edge.runtime.pass_cost import PassCosts, fixed_costs, measure_costs

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8)


def prefixes(paths: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(path[: i + 1]) for path in paths for i in range(len(path))}


def path_to(tree, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tuple(path)


@settings(max_examples=300, deadline=None)
@given(PATHS, st.integers(1, 9))
def test_a_draft_is_the_answers_prefixes(paths: list[list[int]], max_leaves: int) -> None:
    tree = PrefixTree(paths)
    assert {path_to(tree, node) for node in range(len(tree.tokens))} == prefixes(paths)
    assert len(tree.tokens) == len(prefixes(paths))
    draft = tree.draft(-1, np.arange(len(tree.tokens)), max_leaves)
    assert draft.width <= max_leaves
    if max_leaves == 9:
        assert len(draft) == len(tree.tokens)
    for node in range(len(draft)):
        assert draft.depths[node] == len(path_to(draft, node)) - 1
        parent = int(draft.parents[node])
        assert parent < node
        if parent >= 0:  # a child's sequences are among its parent's, so it sees the whole path
            assert draft.first_leaf[parent] <= draft.first_leaf[node]
            assert (
                draft.first_leaf[node] + draft.num_leaves[node]
                <= draft.first_leaf[parent] + draft.num_leaves[parent]
            )
    for depth in set(draft.depths.tolist()):  # a sequence holds one token at each position
        spans = sorted(
            (int(draft.first_leaf[i]), int(draft.num_leaves[i]))
            for i in np.flatnonzero(draft.depths == depth)
        )
        assert all(first + count <= after for (first, count), (after, _) in itertools.pairwise(spans))


@settings(max_examples=300, deadline=None)
@given(PATHS, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_accepted_path_is_the_longest_common_one(paths: list[list[int]], said: list[int]) -> None:
    tree = PrefixTree(paths)
    draft = tree.draft(-1, np.arange(len(tree.tokens)), 64)
    best = np.array([said[0], *(said[int(depth) + 1] for depth in draft.depths)])
    path = draft.accept(best)
    longest = max((len(p) for p in prefixes(paths) if list(p) == said[: len(p)]), default=0)
    assert [int(draft.tokens[node]) for node in path] == said[:longest]


@settings(max_examples=200, deadline=None)
@given(PATHS, st.data())
def test_a_draft_below_a_node_continues_it(paths: list[list[int]], data: st.DataObject) -> None:
    tree = PrefixTree(paths)
    spoken = list(data.draw(st.sampled_from(sorted({(), *prefixes(paths)}))))
    node = tree.find(spoken)
    assert node is not None
    weights = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=len(paths), max_size=len(paths))))
    following = tree.below(node, weights / weights.sum() if len(paths) else weights)
    draft = tree.draft(node, following.nodes, 64)
    rests = [p[len(spoken) :] for p in paths if p[: len(spoken)] == spoken]
    assert {path_to(draft, n) for n in range(len(draft))} == prefixes(rests)
    assert (following.chances <= 1 + 1e-9).all()
    assert (following.answer_chances <= following.chances + 1e-9).all()
    np.testing.assert_array_equal(following.depths, draft.depths)


def test_what_no_answer_begins_with_is_not_found() -> None:
    assert PrefixTree([[1, 2]]).find([2]) is None
    assert PrefixTree([]).find([]) == -1
    assert NO_DRAFT.width == 1
    assert NO_DRAFT.accept(np.array([5])) == []


def test_an_unlikely_branch_does_not_pay_where_positions_cost() -> None:
    dear = fixed_costs([(1, 1.0), (64, 64.0)])
    cheap = fixed_costs([(1, 1.0), (256, 1.0)])
    chances = np.array([0.9, 0.9, 0.3, 0.3, 0.01])
    assert dear.num_worth_drafting(40, chances, 0.5) == (0, 1), "nothing pays; 3 % of 40 are insurance"
    assert dear.num_worth_drafting(40, chances, 2.0) == (2, 3)
    assert cheap.num_worth_drafting(40, chances, 1.0) == (5, 5)
    assert cheap.num_worth_drafting(40, np.empty(0), 1.0) == (0, 0)


def test_a_larger_pass_that_is_cheaper_is_filled_up() -> None:
    tiled = fixed_costs([(1, 1.0), (63, 63.0), (64, 20.0), (128, 40.0)])
    best, affordable = tiled.num_worth_drafting(40, np.full(60, 1e-3), 1.0)
    assert 40 + best == 64
    assert 40 + affordable > 64


def test_costs_are_measured_within_a_bound() -> None:
    now = [0.0]

    def run(size: int, num_logits: int) -> None:
        now[0] += 0.1 * size + 0.01 * (num_logits - 1)

    costs = measure_costs(run, 1000, lambda: now[0])
    assert now[0] <= 8.1 + 1.75, "and once more, the sixteen"
    assert float(costs.seconds(1)) == pytest.approx(0.1)
    assert float(costs.seconds(1000)) == pytest.approx(100)
    assert float(costs.seconds(3)) == pytest.approx(0.3)
    assert costs.logits_seconds == pytest.approx(0.01)


def test_a_draft_pays_for_its_logits() -> None:
    """Every drafted position goes through the output layer, the prompt's do not: with few layers that decides."""
    free = PassCosts(np.array([1, 200]), np.array([1.0, 1.0]))
    dear = PassCosts(np.array([1, 200]), np.array([1.0, 1.0]), logits_seconds=0.5)
    chances = np.array([0.9, 0.8, 0.4, 0.2])
    assert free.num_worth_drafting(40, chances, 1.0)[0] == 4
    assert dear.num_worth_drafting(40, chances, 1.0)[0] == 2
