"""What probe leaves out, and scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.metrics import f1_score

import stofm as st
from stofm.heads.network import apply_head, fit_head
from stofm.heads.request import resolve_slices
from stofm.heads.targets import MISSING, Targets, read_label_names
from stofm.tl import _probe_scores
from stofm.tl._probe_scores import (
    Fold,
    common_classes,
    log_counts,
    most_variable,
    plan_folds,
    plan_protocol,
    principal_components,
    score_clusters,
    score_head,
    score_regression,
    side_by_side,
    with_neighbors,
)


def blobs(rng, n, *, spread=1.0):
    """Cells of three classes that lie apart."""
    labels = np.array(["x", "y", "z"])[np.arange(n) % 3]
    centers = {"x": (0, 9), "y": (9, 0), "z": (-9, -9)}
    places = np.array([centers[label] for label in labels])
    return (rng.normal(scale=spread, size=(n, 2)) + places).astype(np.float32), labels


def fold_of(labels, n_fitted):
    rows = np.arange(len(labels))
    return Fold.of("s", labels, rows[:n_fitted], rows[n_fitted:])


def macro_f1(features, labels, n_fitted, seed=0):
    return score_head(features, fold_of(labels, n_fitted), seed=seed)["macro_f1"]


def test_a_head_learns_classes_that_lie_apart_and_nothing_else(rng):
    features, labels = blobs(rng, 150)
    found = score_head(features, fold_of(labels, 90), seed=0)
    assert found["macro_f1"] == found["accuracy"] == 1.0
    assert found["calibration_error"] < 0.1
    noise = rng.normal(size=(150, 2)).astype(np.float32)
    assert macro_f1(noise, labels, 90) < 0.7


def test_scores_are_those_of_fitting_the_head_directly(rng):
    """The rule that published numbers of probes were measured with."""
    features, labels = blobs(rng, 130, spread=6.0)
    labels[:9] = ""
    known = labels[:90] != ""
    fitted, classes = features[:90][known], np.unique(labels[:90][known])
    targets = Targets("classes", np.searchsorted(classes, labels[:90][known]), 3)
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(len(fitted))
        held_out, rows = np.split(order, [8])
        head = fit_head(fitted, targets, fitted=rows, held_out=held_out, seed=seed).head
        predicted = classes[apply_head(head, features[90:], "classes").argmax(axis=1)]
        expected = f1_score(labels[90:], predicted, average="macro")
        assert macro_f1(features, labels, 90, seed) == expected


def test_scores_depend_on_the_seed_alone(rng):
    features, labels = blobs(rng, 120, spread=9.0)
    state = torch.get_rng_state()
    first = [macro_f1(features, labels, 60, seed) for seed in range(3)]
    assert_array_equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert [macro_f1(features, labels, 60, seed) for seed in range(3)] == first
    assert len(set(first)) > 1


def test_inputs_are_standardised_by_the_fitted_cells(rng):
    features, labels = blobs(rng, 210)
    scaled = features.astype(np.float64) * 1e6 + 1e8
    assert macro_f1(scaled.astype(np.float32), labels, 150) == 1.0


def test_rare_classes_and_cells_without_class_are_left_out():
    labels = np.array(["x"] * 100 + ["y"] * 98 + ["z"] * 2 + ["w"] + [""] * 9)
    assert common_classes(labels[:200]).tolist() == ["x", "y", "z"]
    assert common_classes(labels).tolist() == ["x", "y"]
    fold = fold_of(np.concatenate([labels, ["x", "w", "v", "v", ""]]), len(labels))
    assert fold.classes.tolist() == ["x", "y"]
    assert_array_equal(fold.fitted, np.arange(198))
    # Of w there are too few cells to fit, and of v none.
    assert fold.tested.tolist() == [210]
    assert fold.labelled.tolist() == [210, 211, 212, 213]
    assert fold.absent == {"v": 2}


def test_f1_is_a_mean_over_the_tested_classes(rng):
    features, labels = blobs(rng, 210)
    # All x are found as x, half of the true y too; z does not occur.
    kept = np.concatenate([np.arange(150), 150 + np.flatnonzero(labels[150:] == "x")])
    half = labels[kept].copy()
    half[150:] = np.where(np.arange(20) < 10, "x", "y")
    assert_allclose(macro_f1(features[kept], half, 150), (2 / 3 + 0) / 2)


def test_logistic_regression_is_as_good_where_classes_lie_apart(rng):
    features, labels = blobs(rng, 150)
    fold = fold_of(labels, 90)
    found = score_regression(sparse.csr_matrix(features), fold)
    assert found["macro_f1"] == 1.0
    assert found == score_regression(sparse.csr_matrix(features), fold)
    noise = score_regression(sparse.csr_matrix(rng.normal(size=(150, 4))), fold)
    assert noise["macro_f1"] < 0.7


def test_clusters_are_compared_with_the_classes(rng):
    features, labels = blobs(rng, 90)
    features[:9], labels[:9] = rng.normal(scale=50, size=(9, 2)), ""
    found = score_clusters(features, labels, seed=1)
    assert found == {"ari": 1.0, "nmi": pytest.approx(1.0)}
    noise = score_clusters(rng.normal(size=(90, 2)).astype(np.float32), labels, seed=0)
    assert abs(noise["ari"]) < 0.2
    single = score_clusters(features, np.repeat("x", 90), seed=0)
    assert np.isnan(list(single.values())).all()


def test_side_by_side_no_part_drowns_the_others(rng):
    small = rng.normal(scale=1e-3, size=(50, 3)) + 5
    large = rng.normal(scale=100, size=(50, 2))
    found = side_by_side([small, large, np.ones((50, 1))])
    assert found.shape == (50, 6)
    assert found.dtype == np.float32
    assert_allclose(found[:, :3].var(axis=0).mean(), 1.0, rtol=1e-3)
    assert_allclose(found[:, 3:5].var(axis=0).mean(), 1.0, rtol=1e-3)
    # One scale for all columns of a part.
    ratio = found[:, 3:5] / large
    assert_allclose(ratio, np.full((50, 2), ratio[0, 0]), rtol=1e-4)
    assert_array_equal(found[:, 5], 1.0)
    assert_array_equal(side_by_side([large]), large.astype(np.float32))


@pytest.fixture
def slices(adata):
    """A slice, and one with fewer genes in another order."""
    left, right = (adata[adata.obs["library"] == name].copy() for name in ("left", "right"))
    return [left, right[:, ::-1][:, 5:].copy()]


def expected_values(slices, genes):
    # All genes of a cell count, those that other slices lack too.
    usual = np.median(np.concatenate([one.X.toarray().sum(axis=1) for one in slices]))
    values = []
    for one in slices:
        counts = one.X.toarray().astype(float)
        scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * usual)
        values.append(scaled[:, [one.var_names.get_loc(name) for name in genes]])
    return np.vstack(values)


def test_counts_and_components_are_those_of_shared_genes(slices):
    from sklearn.decomposition import PCA

    genes = [name for name in slices[0].var_names if name in set(slices[1].var_names)]
    expected = expected_values(slices, genes)
    values = log_counts(resolve_slices(slices))
    assert_allclose(values.toarray(), expected, atol=1e-5)
    found = principal_components(values)
    assert found.shape == (184, 50)
    scores = PCA(50, svd_solver="full").fit_transform(expected)
    assert_allclose(np.abs(found)[:, :40], np.abs(scores)[:, :40], atol=1e-3)


def test_dense_counts_and_those_of_a_layer_are_the_same(slices):
    expected = log_counts(resolve_slices(slices)).toarray()
    slices[0].X = slices[0].X.toarray()
    assert_allclose(log_counts(resolve_slices(slices)).toarray(), expected, atol=1e-6)
    for one in slices:
        one.layers["raw"] = one.X
        one.X = one.X * 0.5
    found = log_counts(resolve_slices(slices), layer="raw")
    assert_allclose(found.toarray(), expected, atol=1e-6)


def test_slices_without_common_genes_are_refused(slices):
    slices[1].var_names = [f"other{k}" for k in range(slices[1].n_vars)]
    with pytest.raises(ValueError, match="share no gene"):
        log_counts(resolve_slices(slices))
    single = slices[0][:, :1].copy()
    with pytest.raises(ValueError, match=r"a single gene in common, 'ENSG00000000001'"):
        log_counts(resolve_slices(single))


def test_of_many_genes_the_most_variable_are_taken(slices, monkeypatch):
    monkeypatch.setattr(_probe_scores, "_MOST_GENES", 6)
    values = log_counts(resolve_slices(slices[0]))
    best = np.sort(np.argsort(-values.toarray().var(axis=0))[:6])
    assert_allclose(most_variable(values).toarray(), values.toarray()[:, best])


def test_neighbours_are_of_the_same_slice(slices, rng):
    sections = resolve_slices(slices)
    components = rng.normal(size=(184, 3)).astype(np.float32)
    found = with_neighbors(components, sections, spatial_key="spatial")
    assert found.shape == (184, 6)
    means = np.empty((184, 3))
    for rows, one in zip(sections.rows, slices, strict=True):
        xy = one.obsm["spatial"]
        for cell, place in enumerate(xy):
            near = np.argsort(np.linalg.norm(xy - place, axis=1))[1:11]
            means[rows[cell]] = components[rows[near]].mean(axis=0)
    assert_allclose(found[:, 3:] * np.sqrt(means.var(axis=0).mean()), means, atol=1e-4)


@pytest.fixture
def simulated():
    """Three slices of 67 cells, whose rows are mixed."""
    simulated = st.datasets.simulate_slice(67, 31, n_slices=3, seed=3)
    return simulated[np.random.default_rng(1).permutation(simulated.n_obs)].copy()


def slice_of(simulated):
    return simulated.obs["slice_id"].to_numpy(dtype=str)


def read(data, *, label_key="region", library_key="slice_id"):
    sections = resolve_slices(data, library_key)
    return sections, read_label_names(sections, label_key, missing=MISSING)


def plan(data, *, left_out=None, **options):
    return plan_folds(*read(data, **options), left_out=left_out, spatial_key="spatial")


def rename(simulated, rows, name):
    simulated.obs["region"] = simulated.obs["region"].cat.add_categories([name])
    simulated.obs.iloc[rows, simulated.obs.columns.get_loc("region")] = name


def test_each_slice_is_left_out_once(simulated):
    folds = plan(simulated)
    assert [fold.name for fold in folds] == ["slice0", "slice1", "slice2"]
    own = slice_of(simulated)
    for fold in folds:
        assert set(own[fold.tested]) == {fold.name}
        assert_array_equal(fold.labelled, np.flatnonzero(own == fold.name))
        assert set(own[fold.fitted]) == set(own) - {fold.name}
        assert (np.diff(fold.fitted) > 0).all()
        names = simulated.obs["region"].to_numpy(dtype=str)
        assert_array_equal(fold.classes[fold.codes[fold.fitted]], names[fold.fitted])


def test_slices_are_left_out_by_name_and_together(simulated):
    (one,) = plan(simulated, left_out="slice1")
    assert_array_equal(one.tested, plan(simulated)[1].tested)
    pair, single = plan(simulated, left_out=[("slice0", "slice2"), "slice1"])
    assert (pair.name, single.name) == ("slice0 + slice2", "slice1")
    assert set(slice_of(simulated)[pair.tested]) == {"slice0", "slice2"}
    assert_array_equal(np.sort(np.concatenate([pair.fitted, pair.tested])), np.arange(201))


def test_a_key_of_a_dict_stands_for_all_slices_of_its_table(simulated):
    is_pair = slice_of(simulated) != "slice1"
    tables = {"pair": simulated[is_pair].copy(), "rest": simulated[~is_pair].copy()}
    (fold,) = plan(tables, left_out=["pair"])
    assert_array_equal(fold.tested, np.arange(134))
    assert [one.name for one in plan(tables)] == ["pair:slice0", "pair:slice2", "rest:slice1"]
    # In a list tables are numbered.
    assert [one.name for one in plan(list(tables.values()))][-1] == "1:slice1"


@pytest.mark.filterwarnings("ignore:Classes that no cell outside")
def test_of_a_single_slice_blocks_are_left_out(simulated):
    # Slices without labels are not left out, and take no part in fitting.
    own = np.flatnonzero(slice_of(simulated) == "slice0")
    simulated.obs.loc[simulated.obs["slice_id"] != "slice0", "cell_type"] = None
    folds = plan(simulated, label_key="cell_type")
    assert [fold.name for fold in folds] == [f"block {k}" for k in range(1, 6)]
    assert_array_equal(np.sort(np.concatenate([fold.labelled for fold in folds])), own)
    places = simulated.obsm["spatial"]
    for fold in folds:
        assert set(fold.fitted) <= set(own) - set(fold.labelled)
        # The margin takes some.
        assert len(fold.fitted) + len(fold.labelled) < 67
        distance = np.linalg.norm(places[fold.fitted][:, None] - places[fold.labelled], axis=2)
        assert distance.min() > np.linalg.norm(places[own] - places[own[0]], axis=1)[1:].min()
    alone = simulated[own].copy()
    for one, other in zip(folds, plan(alone, label_key="cell_type"), strict=True):
        assert_array_equal(one.tested, own[other.tested])


def test_a_protocol_tests_a_random_fifth_of_all_slices(simulated):
    with pytest.warns(UserWarning, match="their neighbours were fitted"):
        folds = plan_protocol(*read(simulated), protocol="stofm-paper", spatial_key="spatial")
    assert [fold.name for fold in folds] == ["random cells"] * 3
    for fold in folds:
        assert set(slice_of(simulated)[fold.tested]) == set(slice_of(simulated))
        assert not set(fold.tested) & set(fold.fitted)
        assert set(fold.held_out) <= set(fold.fitted)
        assert 36 <= len(fold.tested) <= 40
        assert 12 <= len(fold.held_out) <= 20
        rows, held_out = fold.parts(0)
        assert_array_equal(np.sort(np.concatenate([rows, held_out])), fold.fitted)
    assert set(folds[0].tested) != set(folds[1].tested)


def test_classes_that_only_a_left_out_slice_has_are_counted(simulated):
    own = np.flatnonzero(slice_of(simulated) == "slice1")
    rename(simulated, own[:7], "new")
    with pytest.warns(UserWarning, match=r"not tested: 'new' \(7 cells of slice1\)\.$"):
        folds = plan(simulated)
    assert_array_equal(folds[1].tested, np.setdiff1d(own, own[:7]))
    assert_array_equal(folds[1].labelled, own)
    assert "new" in folds[0].classes


def test_rare_classes_are_neither_fitted_nor_tested(simulated):
    own = slice_of(simulated)
    rows = [np.flatnonzero(own == name)[0] for name in ("slice0", "slice1")]
    rename(simulated, rows, "rare")
    # One of 134 cells.
    with pytest.warns(UserWarning, match=r"neither fitted nor tested \(cells to fit\): rare \(1\)"):
        first = plan(simulated)[0]
    assert "rare" not in first.classes
    assert not set(rows) & {*first.fitted, *first.tested}


def test_labels_that_stand_for_none_are_left_out(simulated):
    rows = np.flatnonzero(slice_of(simulated) == "slice0")[:5]
    rename(simulated, rows, "Unknown")
    with pytest.warns(UserWarning, match=r"'Unknown' \(5 cells"):
        (fold,) = plan(simulated, left_out="slice0")
    assert not set(rows) & set(fold.labelled)
    assert len(fold.labelled) == 62


def test_what_can_not_be_tested_is_named(simulated):
    slices = simulated.obs["slice_id"].astype(str)
    # Classes of its own in one slice; the other two share theirs.
    simulated.obs["own"] = slices.where(slices == "slice2", "") + simulated.obs["region"].astype(
        str
    )
    with (
        pytest.warns(UserWarning, match="are not tested: 'slice2"),
        pytest.warns(UserWarning, match="slice2 can't be tested: the other cells have fewer"),
    ):
        folds = plan(simulated, label_key="own")
    assert [fold.name for fold in folds] == ["slice0", "slice1"]
    simulated.obs["own"] = slices + simulated.obs["region"].astype(str)
    with (
        pytest.warns(UserWarning, match="are not tested"),
        pytest.raises(ValueError, match="Nothing can be tested: that needs two classes"),
    ):
        plan(simulated, label_key="own")
