from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import igraph
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from stofm.spatial import mix_expression_and_place, principal_components, virtual_cells
from stofm.spatial.plane import nearest_neighbors
from stofm.spatial.virtual_cells import (
    _igraph_numbers,
    cluster_cells,
    leiden,
    merge_clusters,
    umap_weights,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = [
    ("alpha0.2_res1.0", 0.2, 1.0),
    ("alpha0.8_res1.0", 0.8, 1.0),
    ("alpha0.2_res0.5", 0.2, 0.5),
]


@pytest.fixture(params=["small", "medium"])
def golden(request):
    if request.param == "small":
        return np.load(GOLDEN / "d_virtual_small.npz")
    return np.load(request.getfixturevalue("shared") / "golden" / "d_virtual_medium.npz")


def test_principal_components_like_the_reference(golden):
    ours = principal_components(golden["features"], 2)
    for own, expected in zip(ours.T, golden["pca_features"].T, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("tag", "weight", "resolution"), SETTINGS)
def test_mixed_like_the_reference(golden, tag, weight, resolution):
    ours = mix_expression_and_place(
        golden["pca_features"], golden["nodes"], position_weight=weight, mixing="sum"
    )
    np.testing.assert_allclose(ours, golden[f"{tag}_cluster_features"], atol=1e-5)


@pytest.mark.parametrize(("tag", "weight", "resolution"), SETTINGS)
def test_labels_of_the_reference(golden, tag, weight, resolution):
    labels = cluster_cells(
        golden[f"{tag}_cluster_features"],
        resolution=resolution,
        max_clusters=None,
        clustering="scanpy",
    )
    assert adjusted_rand_score(labels, golden[f"{tag}_labels"]) == 1.0


@pytest.mark.parametrize(("tag", "weight", "resolution"), SETTINGS)
def test_canonical_labels_agree_as_well_as_other_seeds_do(golden, tag, weight, resolution):
    labels = cluster_cells(golden[f"{tag}_cluster_features"], resolution=resolution)
    score = adjusted_rand_score(labels, golden[f"{tag}_labels"])
    assert score >= min(0.75, golden[f"{tag}_ari_other_seeds"].min())


@pytest.mark.parametrize(("tag", "weight", "resolution"), SETTINGS)
def test_means_like_the_reference(golden, tag, weight, resolution):
    ours = virtual_cells(golden[f"{tag}_labels"], golden["nodes"], golden["features"])
    np.testing.assert_allclose(ours.coordinates, golden[f"{tag}_virtual_nodes"], atol=1e-9)
    np.testing.assert_allclose(ours.features, golden[f"{tag}_virtual_features"], atol=1e-6)


def test_graph_weights_like_the_reference():
    golden = np.load(GOLDEN / "d_virtual_small.npz")
    parts = [golden[f"alpha02_graph_{name}"] for name in ("data", "indices", "indptr")]
    expected = sp.csr_array(tuple(parts))
    points = golden["alpha0.2_res1.0_cluster_features"]
    ours = umap_weights(*nearest_neighbors(points, 10))
    np.testing.assert_allclose(ours.toarray(), expected.toarray(), atol=1e-5)


def test_principal_components_like_scikit_learn(rng):
    features = rng.normal(size=(83, 7)).astype(np.float32) * np.arange(1, 8)
    expected = PCA(3, svd_solver="full").fit_transform(features.astype(np.float64))
    ours = principal_components(features, 3)
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-6)


def test_sign_of_components_does_not_follow_the_data_order(rng):
    features = rng.normal(size=(41, 5))
    shuffled = rng.permutation(41)
    ours = principal_components(features, 2)
    np.testing.assert_allclose(
        principal_components(features[shuffled], 2), ours[shuffled], atol=1e-9
    )


def test_components_beyond_the_features_are_zero(rng):
    scores = principal_components(rng.normal(size=(11, 1)), 3)
    assert scores.shape == (11, 3)
    assert not scores[:, 1:].any()


def test_concatenation_keeps_place_and_expression_apart(rng):
    scores, xy = rng.normal(size=(13, 3)), rng.normal(size=(13, 2))
    out = mix_expression_and_place(scores, xy, position_weight=0.25, mixing="concatenate")
    assert out.shape == (13, 5)
    assert np.linalg.norm(out[:, :2], axis=1).max() == pytest.approx(0.25)
    assert np.linalg.norm(out[:, 2:], axis=1).max() == pytest.approx(0.75)


def test_neighbors_are_exact_and_start_with_the_point(rng):
    points = rng.normal(size=(59, 3))
    points[:7] = points[0]  # coincident points
    indices, distances = nearest_neighbors(points, 6)
    full = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(59))
    np.testing.assert_allclose(distances, np.sort(full, axis=1)[:, :6], atol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(full, indices, 1), distances, atol=1e-12)


def test_weights_sum_to_the_bandwidths_target(rng):
    indices, distances = nearest_neighbors(rng.normal(size=(37, 2)), 8)
    excess = distances[:, 1:] - distances[:, 1:2]
    weights = umap_weights(indices, distances).toarray()
    np.testing.assert_allclose(weights, weights.T)
    assert (weights.diagonal() == 0).all()
    # Each directed part is at most the joint weight, and its nearest neighbour's is 1.
    np.testing.assert_allclose(weights[np.arange(37), indices[:, 1]], 1.0, atol=1e-6)
    assert (excess >= 0).all()


def test_leiden_leaves_the_random_module_alone(rng):
    weights = umap_weights(*nearest_neighbors(rng.normal(size=(50, 2)), 6))
    random.seed(3)
    expected = random.random()
    random.seed(3)
    for clustering in ("canonical", "scanpy"):
        leiden(weights, seed=1, clustering=clustering)
    assert random.random() == expected


@pytest.mark.parametrize("clustering", ["canonical", "scanpy"])
def test_threads_give_each_other_no_random_numbers(rng, clustering):
    slices = [umap_weights(*nearest_neighbors(rng.normal(size=(150, 2)), 6)) for _ in range(4)]

    def labels(weights):
        return leiden(weights, seed=1, clustering=clustering)

    expected = [labels(weights) for weights in slices]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(labels, slices))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_igraph_draws_from_the_random_module_again_after_an_error(rng):
    weights = umap_weights(*nearest_neighbors(rng.normal(size=(50, 2)), 6))
    with pytest.raises(ZeroDivisionError), _igraph_numbers(random.Random(1)):
        raise ZeroDivisionError
    random.seed(3)
    before = random.getstate()
    igraph.Graph(edges=np.column_stack(weights.nonzero())).community_leiden()
    assert random.getstate() != before


def test_same_seed_same_labels_other_seed_other(rng):
    points = rng.normal(size=(400, 2))
    first, again = (cluster_cells(points, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    others = [cluster_cells(points, seed=s) for s in (6, 7, 8)]
    assert any(not np.array_equal(first, other) for other in others)


def test_limit_on_clusters_is_honoured_and_merges_whole_clusters(rng):
    points = rng.normal(size=(600, 2))
    free = cluster_cells(points, max_clusters=None)
    assert free.max() + 1 > 7
    limited = cluster_cells(points, max_clusters=7)
    assert limited.max() + 1 <= 7
    assert len({(a, b) for a, b in zip(free, limited, strict=True)}) == free.max() + 1


def test_limit_holds_for_parts_that_no_edge_connects(rng):
    centres = np.argwhere(np.ones((6, 5))) * 1000.0
    points = np.repeat(centres, 11, axis=0) + rng.normal(size=(330, 2))
    assert cluster_cells(points, max_clusters=None).max() + 1 >= 30
    limited = cluster_cells(points, max_clusters=4)
    assert limited.max() + 1 == 4


def test_labels_are_ordered_by_size(rng):
    labels = cluster_cells(np.vstack([rng.normal(size=(n, 2)) + 50 * n for n in (9, 40, 20)]))
    assert (np.diff(np.bincount(labels)) <= 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_tiny_slices(n, rng):
    labels = cluster_cells(rng.normal(size=(n, 2)))
    assert set(labels) == set(range(labels.max() + 1))


def test_coincident_cells_cluster_without_warnings():
    labels = cluster_cells(np.zeros((30, 2)))
    assert len(labels) == 30


def test_merge_does_nothing_below_the_limit():
    labels = np.array([0, 1, 1, 2])
    weights = sp.csr_array((4, 4))
    out = merge_clusters(weights, labels, np.zeros((4, 2)), resolution=1.0, max_clusters=3)
    np.testing.assert_array_equal(out, labels)


def test_of_a_large_slice_a_sample_is_clustered_and_the_others_join_it(rng, monkeypatch):
    group = np.repeat(np.arange(4), 101)
    points = rng.normal(size=(404, 3)) + 9.0 * np.eye(4, 3)[group]
    options = {"resolution": 0.2, "seed": 3}
    module = sys.modules[cluster_cells.__module__]
    monkeypatch.setattr(module, "MOST_CLUSTERED", 150)
    labels = cluster_cells(points, **options)
    assert adjusted_rand_score(group, labels) == 1.0
    assert (np.diff(np.bincount(labels)) <= 0).all()
    np.testing.assert_array_equal(labels, cluster_cells(points, **options))
    searched = []

    def counted(found, n_neighbors):
        searched.append(len(found))
        return nearest_neighbors(found, n_neighbors)

    monkeypatch.setattr(module, "nearest_neighbors", counted)
    cluster_cells(points, **options)
    cluster_cells(points, **options, clustering="scanpy")
    assert searched == [150, 404]
