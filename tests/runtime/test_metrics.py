"""The figures of merit against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from anomalygpt_edge.runtime.evaluation.metrics import accuracy, auroc, mean


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=60))
def test_auroc_equals_scikit_learns_with_ties(samples):
    labels, scores = zip(*samples, strict=True)
    area = auroc(labels, scores)
    if len(set(labels)) < 2:
        assert area is None
    else:
        assert area == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_on_many_pixels():
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.03
    scores = (rng.standard_normal(200_000) + labels).astype(np.float32)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


def test_higher_scores_are_more_anomalous():
    assert auroc([0, 0, 1], [0.1, 0.2, 0.9]) == 1
    assert auroc([1, 0, 0], [0.1, 0.2, 0.9]) == 0
    assert auroc([0, 1, 0, 1], [3, 3, 3, 3]) == 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        auroc([0, 1], [0.1, np.nan])
    with pytest.raises(ValueError, match="3 labels for 2"):
        auroc([0, 1, 1], [0.1, 0.2])
    with pytest.raises(ValueError, match="labels"):
        accuracy([1, 0], [1])


def test_accuracy_and_mean():
    assert accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == 0.5
    assert accuracy([], []) is None
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean([None]) is None
