from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.spatial.distance import cdist
from sklearn import metrics as reference

import stofm as st

groupings = some.lists(
    some.tuples(some.sampled_from("abc"), some.integers(0, 4)), min_size=2, max_size=30
)


@settings(deadline=None, max_examples=50)
@given(groupings, some.sampled_from(["arithmetic", "geometric", "min", "max"]))
def test_like_scikit_learn(pairs, average):
    true, found = map(list, zip(*pairs, strict=True))
    assert st.metrics.ari(true, found) == pytest.approx(reference.adjusted_rand_score(true, found))
    assert st.metrics.nmi(true, found, average=average) == pytest.approx(
        reference.normalized_mutual_info_score(true, found, average_method=average)
    )
    assert st.metrics.ami(true, found, average=average) == pytest.approx(
        reference.adjusted_mutual_info_score(true, found, average_method=average)
    )


def test_ari_by_hand():
    # Pairs of cells: together in both, in the classes, in the clusters, in all.
    true, found = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2]
    together, classes, clusters, pairs = 2, 4, 4, 15
    expected = classes * clusters / pairs
    assert st.metrics.ari(true, found) == pytest.approx(
        (together - expected) / ((classes + clusters) / 2 - expected)
    )


def test_nmi_is_arithmetic_by_default():
    true, found = [0, 0, 1, 1], [0, 1, 2, 3]
    # Mutual information log 2, entropies log 2 and log 4.
    assert st.metrics.nmi(true, found) == pytest.approx(2 / 3)
    assert st.metrics.nmi(true, found, average="geometric") == pytest.approx(1 / np.sqrt(2))


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


def test_silhouette_of_a_sample(rng):
    features, groups = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
    features[:, 0] += 6.0 * groups
    whole = st.metrics.silhouette(features, groups)
    sample = [st.metrics.silhouette(features, groups, n_sampled=60, seed=s) for s in (1, 1, 2)]
    assert sample[0] == sample[1] != sample[2]
    assert sample[0] == pytest.approx(whole, abs=0.1)
    assert st.metrics.silhouette(features, groups, n_sampled=200) == whole


def test_silhouette_of_what_can_not_be_scored(rng):
    features = rng.normal(size=(4, 2))
    with pytest.raises(ValueError, match="found 1 groups of 4 cells"):
        st.metrics.silhouette(features, ["a"] * 4)
    with pytest.raises(ValueError, match="found 4 groups of 4 cells"):
        st.metrics.silhouette(features, list("abcd"))
    with pytest.raises(ValueError, match=r"shape \(4, 2\) and there are 3 labels"):
        st.metrics.silhouette(features, list("abc"))
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 cells have NaN or infinite features"):
        st.metrics.silhouette(features, list("aabb"))
