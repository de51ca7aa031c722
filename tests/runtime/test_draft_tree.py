"""Draft trees: structure, attention and accepted paths against plain lists of tokens; the cost of passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.language.draft_tree import NO_DRAFT, PrefixTree
from anomalygpt_edge.runtime.language.pass_cost import (
    SIZES,
    WORTH_PADDING,
    PassCosts,
    fixed_costs,
    measure_costs,
)

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
        if parent >= 0:  # a child's sequences are a subset of its parent's, so it attends to the whole path
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
def test_the_accepted_path_is_the_longest_common_one(paths: list[list[int]], tokens: list[int]) -> None:
    tree = PrefixTree(paths)
    draft = tree.draft(-1, np.arange(len(tree.tokens)), 64)
    best = np.array([tokens[0], *(tokens[int(depth) + 1] for depth in draft.depths)])
    path = draft.accept(best)
    longest = max((len(p) for p in prefixes(paths) if list(p) == tokens[: len(p)]), default=0)
    assert [int(draft.tokens[node]) for node in path] == tokens[:longest]


@settings(max_examples=200, deadline=None)
@given(PATHS, st.data())
def test_a_draft_below_a_node_continues_it(paths: list[list[int]], data: st.DataObject) -> None:
    tree = PrefixTree(paths)
    tokens = list(data.draw(st.sampled_from(sorted({(), *prefixes(paths)}))))
    node = tree.find(tokens)
    assert node is not None
    weights = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=len(paths), max_size=len(paths))))
    following = tree.below(node, weights / weights.sum() if len(paths) else weights)
    draft = tree.draft(node, following.nodes, 64)
    remainders = [p[len(tokens) :] for p in paths if p[: len(tokens)] == tokens]
    assert {path_to(draft, n) for n in range(len(draft))} == prefixes(remainders)
    assert (following.probabilities <= 1 + 1e-9).all()
    np.testing.assert_array_equal(following.depths, draft.depths)


def test_tokens_that_begin_no_answer_are_not_found() -> None:
    assert PrefixTree([[1, 2]]).find([2]) is None
    assert PrefixTree([]).find([]) == -1
    assert NO_DRAFT.width == 1
    assert NO_DRAFT.accept(np.array([5])) == []


def test_unlikely_tokens_are_not_drafted_where_rows_are_expensive() -> None:
    expensive = fixed_costs([(1, 1.0), (64, 64.0)])
    cheap = fixed_costs([(1, 1.0), (256, 1.0)])
    probabilities = np.array([0.9, 0.9, 0.3, 0.3, 0.01])
    assert expensive.num_worth_drafting(40, probabilities, 0.5) == 0
    assert expensive.num_worth_drafting(40, probabilities, 2.0) == 2
    assert cheap.num_worth_drafting(40, probabilities, 1.0) == 5, "rows that cost nothing are used"
    assert cheap.num_worth_drafting(40, np.empty(0), 1.0) == 0


def test_less_likely_tokens_are_drafted_within_the_insurance() -> None:
    """A small model: a pass takes 0.2 ms plus 0.05 ms per further row."""
    costs = fixed_costs([(1, 0.2e-3), (5, 0.4e-3), (105, 5.4e-3)])
    likely = np.full(30, 0.03)
    assert costs.num_worth_drafting(35, likely, 0.2e-3) == 30
    assert costs.num_worth_drafting(35, np.full(30, 0.01), 0.2e-3) == 0
    assert costs.num_worth_drafting(35, np.full(60, 0.03), 0.2e-3) in (39, 40), "two milliseconds"


def test_a_pass_is_padded_where_a_larger_one_is_cheaper() -> None:
    tiled = fixed_costs([(1, 1.0), (63, 63.0), (64, 20.0), (128, 40.0)])
    assert [tiled.cheapest(size) for size in (10, 20, 30, 63, 64, 65, 128, 200)] == [
        10, 20, 64, 64, 64, 65, 128, 200,
    ]  # fmt: skip
    assert float(tiled.seconds(40)) == float(tiled.seconds(64)) == 20
    assert tiled.num_worth_drafting(40, np.full(60, 1e-3), 1.0) == 24, "drafts replace padding rows"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=len(SIZES), max_size=len(SIZES)))
def test_padding_never_costs_more(times: list[float]) -> None:
    """For any measured times, however noisy."""
    costs = PassCosts(np.array(sorted(SIZES)), np.array(times))
    plain = np.interp(np.arange(129), *costs._knots())
    for size in range(1, 129):
        target = costs.cheapest(size)
        assert target >= size
        assert costs.cheapest(target) == target
        assert float(costs.seconds(size)) == pytest.approx(plain[target])
        assert plain[target] <= plain[size]
        assert plain[size:].min() >= WORTH_PADDING * float(costs.seconds(size)) - 1e-9


def test_a_block_begins_as_the_seventeenth_row_does() -> None:
    """The layers of the 7B model in q4_k_m on two cores: blocks of sixteen rows."""
    blocks = fixed_costs([(1, 11), (16, 41), (17, 55), (32, 59), (48, 76), (64, 93)])
    share = (55 - 41) / (59 - 41)
    assert float(blocks.seconds(33)) == pytest.approx(59 + share * 17)
    assert float(blocks.seconds(49)) == pytest.approx(76 + share * 17)
    evenly = fixed_costs([(1, 1), (16, 16), (17, 17), (32, 32), (64, 64)])
    np.testing.assert_allclose(evenly.seconds(np.arange(1, 65)), np.arange(1, 65))


@pytest.mark.parametrize(("row", "largest"), [(0.1, 48), (1e-4, 128)], ids=["large model", "small model"])
def test_costs_are_measured_within_a_bound(row: float, largest: int) -> None:
    now = [0.0]

    def run(size: int, num_logits: int) -> None:
        now[0] += row * (size + 0.1 * (num_logits - 1))

    costs = measure_costs(run, 1000, lambda: now[0])
    assert now[0] <= 8.1 + 1.75, "the limit, and the pass of 16 rows with its logits"
    assert float(costs.seconds(1)) == pytest.approx(row)
    assert float(costs.seconds(1000)) == pytest.approx(1000 * row)
    assert float(costs.seconds(3)) == pytest.approx(3 * row)
    assert costs.logits_seconds == pytest.approx(0.1 * row)
    assert costs.sizes[-1] >= largest


def test_a_disturbance_while_costs_are_measured_does_not_count() -> None:
    """Another process slows the machine down for two periods."""
    now, runs = [0.0], [0]

    def run(size: int, num_logits: int) -> None:
        runs[0] += 1
        slow = 5.0 if 4 < runs[0] < 20 or 40 < runs[0] < 50 else 1.0
        now[0] += slow * 1e-4 * size

    costs = measure_costs(run, 128, lambda: now[0])
    np.testing.assert_allclose(costs.times, 1e-4 * costs.sizes)


def test_a_draft_pays_for_its_logits() -> None:
    """Draft rows go through the output layer, prompt rows do not; with few layers this cost matters."""
    free = PassCosts(np.array([1, 200]), np.array([1.0, 1.0]))
    expensive = PassCosts(np.array([1, 200]), np.array([1.0, 1.0]), logits_seconds=0.5)
    probabilities = np.array([0.9, 0.8, 0.4, 0.2])
    assert free.num_worth_drafting(40, probabilities, 1.0) == 4
    assert expensive.num_worth_drafting(40, probabilities, 1.0) == 2
