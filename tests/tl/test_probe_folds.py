from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import stofm as st
from stofm.heads.request import resolve_slices
from stofm.heads.targets import MISSING, read_label_names
from stofm.tl._probe_scores import plan_folds, plan_protocol


@pytest.fixture
def adata():
    """Three slices of 67 cells, whose rows are mixed."""
    adata = st.datasets.simulate_slice(67, 31, n_slices=3, seed=3)
    return adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()


def slice_of(adata):
    return adata.obs["slice_id"].to_numpy(dtype=str)


def read(data, *, label_key="region", library_key="slice_id"):
    sections = resolve_slices(data, library_key)
    return sections, read_label_names(sections, label_key, missing=MISSING)


def plan(data, *, left_out=None, **options):
    return plan_folds(*read(data, **options), left_out=left_out, spatial_key="spatial")


def rename(adata, rows, name):
    adata.obs["region"] = adata.obs["region"].cat.add_categories([name])
    adata.obs.iloc[rows, adata.obs.columns.get_loc("region")] = name


def test_each_slice_is_left_out_once(adata):
    folds = plan(adata)
    assert [fold.name for fold in folds] == ["slice0", "slice1", "slice2"]
    own = slice_of(adata)
    for fold in folds:
        assert set(own[fold.tested]) == {fold.name}
        assert_array_equal(fold.labelled, np.flatnonzero(own == fold.name))
        assert set(own[fold.fitted]) == set(own) - {fold.name}
        assert (np.diff(fold.fitted) > 0).all()
        names = adata.obs["region"].to_numpy(dtype=str)
        assert_array_equal(fold.classes[fold.codes[fold.fitted]], names[fold.fitted])


def test_slices_are_left_out_by_name_and_together(adata):
    (one,) = plan(adata, left_out="slice1")
    assert_array_equal(one.tested, plan(adata)[1].tested)
    pair, single = plan(adata, left_out=[("slice0", "slice2"), "slice1"])
    assert (pair.name, single.name) == ("slice0 + slice2", "slice1")
    assert set(slice_of(adata)[pair.tested]) == {"slice0", "slice2"}
    assert_array_equal(np.sort(np.concatenate([pair.fitted, pair.tested])), np.arange(201))


def test_a_key_of_a_dict_stands_for_all_slices_of_its_table(adata):
    is_pair = slice_of(adata) != "slice1"
    tables = {"pair": adata[is_pair].copy(), "rest": adata[~is_pair].copy()}
    (fold,) = plan(tables, left_out=["pair"])
    assert_array_equal(fold.tested, np.arange(134))
    assert [one.name for one in plan(tables)] == ["pair:slice0", "pair:slice2", "rest:slice1"]
    # In a list tables are numbered.
    assert [one.name for one in plan(list(tables.values()))][-1] == "1:slice1"


@pytest.mark.filterwarnings("ignore:Classes that no cell outside")
def test_of_a_single_slice_blocks_are_left_out(adata):
    # Slices without labels are not left out, and take no part in fitting.
    own = np.flatnonzero(slice_of(adata) == "slice0")
    adata.obs.loc[adata.obs["slice_id"] != "slice0", "cell_type"] = None
    folds = plan(adata, label_key="cell_type")
    assert [fold.name for fold in folds] == [f"block {k}" for k in range(1, 6)]
    assert_array_equal(np.sort(np.concatenate([fold.labelled for fold in folds])), own)
    places = adata.obsm["spatial"]
    for fold in folds:
        assert set(fold.fitted) <= set(own) - set(fold.labelled)
        # The margin takes some.
        assert len(fold.fitted) + len(fold.labelled) < 67
        distance = np.linalg.norm(places[fold.fitted][:, None] - places[fold.labelled], axis=2)
        assert distance.min() > np.linalg.norm(places[own] - places[own[0]], axis=1)[1:].min()
    alone = adata[own].copy()
    for one, other in zip(folds, plan(alone, label_key="cell_type"), strict=True):
        assert_array_equal(one.tested, own[other.tested])


def test_a_protocol_tests_a_random_fifth_of_all_slices(adata):
    with pytest.warns(UserWarning, match="their neighbours were fitted"):
        folds = plan_protocol(*read(adata), protocol="stofm-paper", spatial_key="spatial")
    assert [fold.name for fold in folds] == ["random cells"] * 3
    for fold in folds:
        assert set(slice_of(adata)[fold.tested]) == set(slice_of(adata))
        assert not set(fold.tested) & set(fold.fitted)
        assert set(fold.held_out) <= set(fold.fitted)
        assert 36 <= len(fold.tested) <= 40
        assert 12 <= len(fold.held_out) <= 20
        rows, held_out = fold.parts(0)
        assert_array_equal(np.sort(np.concatenate([rows, held_out])), fold.fitted)
    assert set(folds[0].tested) != set(folds[1].tested)


def test_classes_that_only_a_left_out_slice_has_are_counted(adata):
    own = np.flatnonzero(slice_of(adata) == "slice1")
    rename(adata, own[:7], "new")
    with pytest.warns(UserWarning, match=r"not tested: 'new' \(7 cells of slice1\)\.$"):
        folds = plan(adata)
    assert_array_equal(folds[1].tested, np.setdiff1d(own, own[:7]))
    assert_array_equal(folds[1].labelled, own)
    assert "new" in folds[0].classes


def test_rare_classes_are_neither_fitted_nor_tested(adata):
    own = slice_of(adata)
    rows = [np.flatnonzero(own == name)[0] for name in ("slice0", "slice1")]
    rename(adata, rows, "rare")
    first = plan(adata)[0]
    # One of 134 cells.
    assert "rare" not in first.classes
    assert not set(rows) & {*first.fitted, *first.tested}


def test_labels_that_stand_for_none_are_left_out(adata):
    rows = np.flatnonzero(slice_of(adata) == "slice0")[:5]
    rename(adata, rows, "Unknown")
    with pytest.warns(UserWarning, match=r"'Unknown' \(5 cells"):
        (fold,) = plan(adata, left_out="slice0")
    assert not set(rows) & set(fold.labelled)
    assert len(fold.labelled) == 62


def test_what_can_not_be_tested_is_named(adata):
    slices = adata.obs["slice_id"].astype(str)
    # Classes of its own in one slice; the other two share theirs.
    adata.obs["own"] = slices.where(slices == "slice2", "") + adata.obs["region"].astype(str)
    with (
        pytest.warns(UserWarning, match="are not tested: 'slice2"),
        pytest.warns(UserWarning, match="slice2 can't be tested: the other cells have fewer"),
    ):
        folds = plan(adata, label_key="own")
    assert [fold.name for fold in folds] == ["slice0", "slice1"]
    adata.obs["own"] = slices + adata.obs["region"].astype(str)
    with (
        pytest.warns(UserWarning, match="are not tested"),
        pytest.raises(ValueError, match="Nothing can be tested: that needs two classes"),
    ):
        plan(adata, label_key="own")
