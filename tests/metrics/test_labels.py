from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.spatial.distance import cdist
from sklearn import metrics as reference
from sklearn.metrics import accuracy_score, f1_score

import stofm as st

labels = some.lists(
    some.tuples(some.sampled_from("abcd"), some.sampled_from("abcde")), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=50)
@given(labels)
def test_like_scikit_learn(pairs):
    true, found = map(list, zip(*pairs, strict=True))
    assert st.metrics.accuracy(true, found) == pytest.approx(accuracy_score(true, found))
    options = {"average": "macro", "zero_division": 0}
    assert st.metrics.macro_f1(true, found) == pytest.approx(
        f1_score(true, found, labels=sorted(set(true)), **options)
    )
    assert st.metrics.weighted_f1(true, found) == pytest.approx(
        f1_score(true, found, average="weighted", zero_division=0)
    )


def test_by_hand():
    true, found = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    # a: precision 1, recall 2/3; b: precision 1/2, recall 1.
    f1 = {"a": 4 / 5, "b": 2 / 3}
    assert st.metrics.macro_f1(true, found) == pytest.approx((f1["a"] + f1["b"]) / 2)
    assert st.metrics.weighted_f1(true, found) == pytest.approx((3 * f1["a"] + f1["b"]) / 4)


def test_class_that_occurs_in_predictions_only():
    true, found = ["a", "a", "b"], ["a", "a", "c"]
    assert st.metrics.macro_f1(true, found) == pytest.approx(1 / 2)


def test_no_prediction_is_no_class():
    true, found = ["a", "a", "b", "b"], ["a", None, "b", "unknown"]
    # Of both classes precision 1 and recall 1/2.
    assert st.metrics.macro_f1(true, found, missing=["unknown"]) == pytest.approx(2 / 3)


def test_names_of_classes_do_not_matter():
    true, found = np.array([3, 3, 7, 7, 9]), np.array([3, 7, 7, 7, 3])
    names = {3: "x", 7: "a", 9: "m"}
    renamed = [[names[k] for k in y] for y in (true, found)]
    assert st.metrics.macro_f1(true, found) == st.metrics.macro_f1(*renamed)


groupings = some.lists(
    some.tuples(some.sampled_from("abc"), some.integers(0, 4)), min_size=2, max_size=30
)


@settings(deadline=None, max_examples=50)
@given(groupings)
def test_clusters_like_scikit_learn(pairs):
    true, found = map(list, zip(*pairs, strict=True))
    assert st.metrics.ari(true, found) == pytest.approx(reference.adjusted_rand_score(true, found))
    assert st.metrics.nmi(true, found) == pytest.approx(
        reference.normalized_mutual_info_score(true, found)
    )
    assert st.metrics.ami(true, found) == pytest.approx(
        reference.adjusted_mutual_info_score(true, found)
    )


def test_ari_by_hand():
    # Pairs of cells: together in both, in the classes, in the clusters, in all.
    true, found = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2]
    together, classes, clusters, pairs = 2, 4, 4, 15
    expected = classes * clusters / pairs
    assert st.metrics.ari(true, found) == pytest.approx(
        (together - expected) / ((classes + clusters) / 2 - expected)
    )


def test_nmi_is_arithmetic():
    true, found = [0, 0, 1, 1], [0, 1, 2, 3]
    # Mutual information log 2, entropies log 2 and log 4.
    assert st.metrics.nmi(true, found) == pytest.approx(2 / 3)


def test_random_clusters(rng):
    true, found = rng.integers(0, 5, 300), rng.integers(0, 60, 300)
    assert abs(st.metrics.ari(true, found)) < 0.05
    assert abs(st.metrics.ami(true, found)) < 0.1
    assert st.metrics.nmi(true, found) > 0.15


def test_cells_without_a_class_are_left_out():
    assert st.metrics.ari(["a", "a", "b", None], [0, 0, 1, None]) == 1.0
    with pytest.raises(ValueError, match="1 of 2 cells with a class have no cluster"):
        st.metrics.nmi(["a", "b"], [0, None])


def test_silhouette_by_definition(rng):
    features, groups = rng.normal(size=(23, 3)), np.arange(23) % 3
    features[groups == 1] += 2.0
    groups[0] = 7
    distances = cdist(features, features)
    scores = []
    for k, group in enumerate(groups):
        means = {
            other: distances[k, (groups == other) & (np.arange(23) != k)].mean()
            for other in np.unique(groups)
            if other != group or (groups == group).sum() > 1
        }
        own = means.pop(group, None)
        nearest = min(means.values())
        scores.append(0.0 if own is None else (nearest - own) / max(own, nearest))
    assert st.metrics.silhouette(features, groups) == pytest.approx(np.mean(scores))


def test_silhouette_leaves_out_cells_without_a_group(rng):
    features = rng.normal(size=(9, 2))
    labels = ["a", "b", "a", "b", "a", None, "Unknown", "b", "a"]
    known = [0, 1, 2, 3, 4, 7, 8]
    features[5] = np.nan
    assert st.metrics.silhouette(features, labels, missing=["Unknown"]) == pytest.approx(
        reference.silhouette_score(features[known], [labels[k] for k in known])
    )


def test_silhouette_of_what_can_not_be_scored(rng):
    features = rng.normal(size=(4, 2))
    for labels, message in (
        (["a"] * 4, "Number of labels is 1"),
        ("abcd", "Number of labels is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            st.metrics.silhouette(features, list(labels))


def test_missing_truth_is_left_out_and_missing_prediction_is_wrong():
    true = ["a", None, "b", np.nan, "Unknown", "b"]
    found = ["a", "a", None, "b", "a", "b"]
    assert st.metrics.accuracy(true, found, missing=["Unknown"]) == pytest.approx(2 / 3)
    # Without the name it is a class like others.
    assert st.metrics.accuracy(true, found) == pytest.approx(2 / 4)


def test_series_are_paired_by_index():
    true = pd.Series(["a", "b", "b"], index=["x", "y", "z"])
    found = pd.Series(["b", "b", "a"], index=["z", "y", "x"])
    assert st.metrics.accuracy(true, found) == 1.0
    assert st.metrics.accuracy(true, found.to_numpy()) == pytest.approx(1 / 3)


def test_categoricals_are_read():
    true = pd.Series(["a", "b", None], dtype="category")
    assert st.metrics.accuracy(true, pd.Categorical(["a", "a", "b"])) == 0.5


def test_other_index_is_refused():
    true = pd.Series(["a", "b"], index=["x", "y"])
    with pytest.raises(ValueError, match=r"rows .* \['w', 'y'\] are in one of them only"):
        st.metrics.accuracy(true, pd.Series(["a", "b"], index=["x", "w"]))
    with pytest.raises(ValueError, match=r"\['y', 'x'\] are in one of them only, or twice"):
        st.metrics.accuracy(true, pd.Series(["a", "b"], index=["x", "x"]))


def test_text_and_numbers_are_not_compared():
    with pytest.raises(TypeError, match=r"y_true holds \['1', '2'\], y_pred \[1, 2\]"):
        st.metrics.accuracy(["1", "2"], [1, 2])
    # Clusters have no names to compare.
    assert st.metrics.ari(["a", "a", "b"], [1, 1, 0]) == 1.0


def test_labels_that_are_no_labels():
    with pytest.raises(ValueError, match="2 labels and y_pred 3"):
        st.metrics.accuracy(["a", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="None of 2 cells has a true label"):
        st.metrics.accuracy([None, "?"], ["a", "b"], missing=["?"])
    with pytest.raises(ValueError, match=r"one label per cell; found the shape \(2, 1\)"):
        st.metrics.accuracy(np.array([["a"], ["b"]]), ["a", "b"])
