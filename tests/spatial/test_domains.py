from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from stofm.spatial import domains
from stofm.spatial.domains import domain_space, find_domains, merge_domains, smooth_domains
from stofm.spatial.virtual_cells import number_by_size


@pytest.fixture
def blobs(rng):
    """Two slices with the same four groups in seven dimensions, apart by an offset."""
    group = rng.choice(4, 211, p=[0.4, 0.3, 0.2, 0.1])
    centres = rng.normal(size=(4, 7)) * 4.0
    features = centres[group] + rng.normal(size=(211, 7))
    rows = rng.permutation(211)
    slices = [np.sort(rows[:120]), np.sort(rows[120:])]
    features[slices[1]] += 9.0
    return features.astype(np.float32), slices, group


def whole(features):
    return domain_space(features, [np.arange(len(features))])


@pytest.mark.parametrize("options", [{"n_domains": 4}, {"resolution": 0.3}])
def test_groups_are_found_across_slices(blobs, options):
    features, slices, group = blobs
    labels = find_domains(domain_space(features, slices), **options)
    assert adjusted_rand_score(group, labels) > 0.9
    sizes = np.bincount(labels)
    assert (np.diff(sizes) <= 0).all()


def test_without_centering_slices_come_apart(blobs):
    features, slices, group = blobs
    own = np.isin(np.arange(211), slices[1])
    apart = find_domains(domain_space(features, slices, centering="none"), n_domains=8)
    assert adjusted_rand_score(group + 4 * own, apart) > 0.9
    assert adjusted_rand_score(group, apart) < 0.8


@pytest.mark.parametrize("options", [{"n_domains": 9}, {"resolution": 1.5}])
def test_order_of_rows_does_not_matter(rng, options):
    # Without groups, so that every tie and start would show.
    features = rng.normal(size=(150, 5))
    features[20:30] = features[10:20]
    slices = [np.arange(0, 70), np.arange(70, 150)]
    expected = find_domains(domain_space(features, slices), **options)
    shuffled = rng.permutation(150)
    place = np.argsort(shuffled)
    again = [np.sort(place[rows]) for rows in slices]
    labels = find_domains(domain_space(features[shuffled], again), **options)
    np.testing.assert_array_equal(labels, expected[shuffled])
    np.testing.assert_array_equal(expected[20:30], expected[10:20])


def test_seed(rng):
    space = whole(rng.normal(size=(120, 4)))
    for options in ({"n_domains": 25}, {"resolution": 2.0}):
        first, second, other = (find_domains(space, seed=seed, **options) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first, second)
        assert (first != other).any()


@pytest.mark.parametrize("n_domains", [1, 2, 5, 13, 17])
def test_exactly_as_many_domains(rng, n_domains):
    features = rng.normal(size=(17, 3))
    labels = find_domains(whole(features), n_domains=n_domains)
    np.testing.assert_array_equal(np.unique(labels), np.arange(n_domains))


def test_a_component_that_is_nowhere_the_likeliest(rng, monkeypatch):
    class WithAnEmptyComponent(GaussianMixture):
        def predict(self, X):
            labels = super().predict(X)
            labels[labels == 3] = 2
            return labels

    monkeypatch.setattr("sklearn.mixture.GaussianMixture", WithAnEmptyComponent)
    labels = find_domains(whole(rng.normal(size=(61, 2))), n_domains=5)
    np.testing.assert_array_equal(np.unique(labels), np.arange(5))


def test_directions_count_by_their_spread_within_domains(rng):
    # Groups that are long across the direction that tells them apart, which cuts k-means' short.
    group = np.repeat([0, 1, 2], 100)
    features = np.column_stack([rng.normal(size=300) * 5, rng.normal(size=300) + 6 * group])
    labels = find_domains(whole(features), n_domains=3)
    assert adjusted_rand_score(group, labels) > 0.95
    by_means = KMeans(3, n_init=10, random_state=0).fit_predict(features)
    assert adjusted_rand_score(group, by_means) < 0.8


def test_more_domains_than_different_embeddings():
    features = np.repeat(np.arange(3.0)[:, None], 4, axis=0)
    with pytest.raises(ValueError, match="n_domains is 4, but only 3 embeddings are different"):
        find_domains(whole(features), n_domains=4)
    assert np.bincount(find_domains(whole(features), n_domains=3)).tolist() == [4, 4, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_cells(rng, n):
    space = whole(rng.normal(size=(n, 4)))
    assert len(find_domains(space)) == n
    assert find_domains(space, n_domains=1).tolist() == [0] * n


def test_cells_all_alike():
    assert find_domains(whole(np.ones((9, 3)))).tolist() == [0] * 9


def test_starts_are_tried_on_a_sample_and_the_likeliest_is_fitted_to_all(blobs, monkeypatch):
    features, slices, group = blobs
    space = domain_space(features, slices)
    sizes = []

    class Counted(GaussianMixture):
        def fit(self, X, y=None):
            sizes.append(len(X))
            return super().fit(X, y)

    monkeypatch.setattr("sklearn.mixture.GaussianMixture", Counted)
    monkeypatch.setattr(domains, "_MAX_AT_START", 60)
    labels = find_domains(space, n_domains=4)
    assert sizes == [60] * 40 + [211]
    assert adjusted_rand_score(group, labels) > 0.9


def test_threads_leave_the_filters_of_warnings_as_they_were(blobs, monkeypatch):
    features, slices, _ = blobs
    space = domain_space(features, slices)

    class Slow(GaussianMixture):
        def fit(self, X, y=None):
            time.sleep(0.001)
            return super().fit(X, y)

    monkeypatch.setattr("sklearn.mixture.GaussianMixture", Slow)
    monkeypatch.setattr(domains, "_N_STARTS", 5)
    before = list(warnings.filters)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: find_domains(space, n_domains=4), range(6)))
    assert warnings.filters == before


@pytest.mark.parametrize("options", [{"n_domains": 4}, {"resolution": 0.3}])
def test_of_many_cells_a_sample_is_clustered(blobs, monkeypatch, options):
    features, slices, group = blobs
    space = domain_space(features, slices)
    monkeypatch.setattr(domains, "_MAX_CLUSTERED", 100)
    monkeypatch.setattr(domains, "_CHUNK", 37)
    labels = find_domains(space, **options)
    assert adjusted_rand_score(group, labels) > 0.85
    np.testing.assert_array_equal(labels, find_domains(space, **options))


def test_space_does_not_change_the_features(blobs):
    features, slices, _ = blobs
    before = features.copy()
    space = domain_space(features, slices)
    np.testing.assert_array_equal(features, before)
    assert space.scores.var(axis=0).sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(space.to_rows(space.point), np.argsort(space.order))


def test_number_by_size():
    labels = np.array([7, 2, 2, 9, 9, 9, 4])
    # Among equals the smaller number comes first.
    assert number_by_size(labels).tolist() == [3, 1, 1, 0, 0, 0, 2]


def test_smoothing_is_a_vote_among_neighbours(rng):
    coordinates = rng.random((83, 2))
    labels = rng.integers(0, 3, 83)
    slices = [np.arange(40), np.arange(40, 83)]
    found = smooth_domains(labels, coordinates, coordinates, slices, 5)
    expected = labels.copy()
    for rows in slices:
        for row in rows:
            gaps = np.linalg.norm(coordinates[rows] - coordinates[row], axis=1)
            votes = np.bincount(labels[rows[np.argsort(gaps)[:6]]], minlength=3)
            winners = np.flatnonzero(votes == votes.max())
            expected[row] = labels[row] if labels[row] in winners else winners[0]
    np.testing.assert_array_equal(found, number_by_size(expected))


def test_smoothing_on_a_grid_does_not_depend_on_order(rng):
    x, y = np.meshgrid(np.arange(9.0), np.arange(7.0))
    coordinates = np.column_stack([x.ravel(), y.ravel()])
    labels = np.sort(rng.integers(0, 3, 63))
    # Only two of four neighbours at the same distance vote.
    found = smooth_domains(labels, coordinates, coordinates, [np.arange(63)], 2)
    order = rng.permutation(63)
    again = smooth_domains(
        labels[order], coordinates[order], coordinates[order], [np.arange(63)], 2
    )
    np.testing.assert_array_equal(again, found[order])


def test_smoothing_with_more_neighbours_than_cells():
    labels = np.array([0, 0, 0, 1, 1])
    found = smooth_domains(labels, np.eye(5)[:, :2], np.eye(5), [np.arange(5)], 50)
    assert found.tolist() == [0] * 5


def test_merging_is_wards_rule_in_units_of_the_covariance(rng):
    group = np.repeat(np.arange(6), [40, 30, 30, 20, 10, 5])
    features = rng.normal(size=(6, 3))[group] * 5 + rng.normal(size=(135, 3)) * [1.0, 3.0, 0.2]
    labels = number_by_size(group)
    found = merge_domains(whole(features), labels, [4, 3, 2])
    # The same with SciPy: cells stand at their domain's mean, and merge there at height 0.
    means = np.stack([features[labels == k].mean(axis=0) for k in range(6)])
    within = np.cov((features - means[labels]).T, bias=True)
    white = np.linalg.solve(np.linalg.cholesky(within), means.T).T
    tree = linkage(white[labels], method="ward")
    for count, level in zip([4, 3, 2], found, strict=True):
        expected = fcluster(tree, count, criterion="maxclust")
        assert adjusted_rand_score(expected, level) == 1.0
        assert len(np.unique(level)) == count


def test_levels_nest(blobs):
    features, slices, _ = blobs
    space = domain_space(features, slices)
    labels = find_domains(space, n_domains=11)
    levels = [labels, *merge_domains(space, labels, [6, 3, 1])]
    for fine, coarse in pairwise(levels):
        pairs = np.unique(np.column_stack([fine, coarse]), axis=0)
        assert len(pairs) == fine.max() + 1
    assert [len(np.unique(level)) for level in levels] == [11, 6, 3, 1]


def test_what_can_not_be_merged_stays(blobs):
    features, slices, _ = blobs
    space = domain_space(features, slices)
    labels = find_domains(space, n_domains=3)
    more, fewer = merge_domains(space, labels, [5, 2])
    np.testing.assert_array_equal(more, labels)
    assert fewer.max() == 1
    assert merge_domains(space, labels, []) == []


def test_what_is_beside_the_embedding_weighs_as_much(rng):
    features, near, far = (rng.normal(size=(60, width)) for width in (5, 3, 2))
    slices = [np.arange(40), np.arange(40, 60)]
    space = domain_space(features, slices, beside=[near, far])
    for factor in (100.0, 0.01):
        scaled = domain_space(features, slices, beside=[near * factor, far / factor])
        np.testing.assert_allclose(scaled.scores, space.scores, atol=1e-9)
    assert not np.allclose(space.scores[:, :5], domain_space(features, slices).scores[:, :5])
    # All components together hold all blocks, each with as much variance within slices.
    assert space.scores.shape == (60, 10)
    constant = domain_space(features, slices, beside=[np.ones((60, 3))])
    gaps = np.linalg.norm(constant.scores[:, None] - constant.scores[None], axis=-1)
    alone = domain_space(features, slices).scores
    np.testing.assert_allclose(
        gaps, np.linalg.norm(alone[:, None] - alone[None], axis=-1), atol=1e-9
    )


def test_number_of_components(rng):
    features, slices = rng.normal(size=(60, 25)), [np.arange(60)]
    assert domain_space(features, slices).scores.shape == (60, 20)
    assert domain_space(features, slices, beside=[features[:, :4]]).scores.shape == (60, 10)
