from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import stofm as st
from stofm._keys import Obs, Obsm, Suffix, Uns
from stofm.spatial.domains import domain_space, find_domains
from stofm.spatial.plane import nearest_neighbors, neighbor_means

LEVEL1, LEVEL2 = (Obs.DOMAIN + Suffix.LEVEL.format(k) for k in (1, 2))
COLORS = Obs.DOMAIN + Suffix.COLORS


@pytest.fixture
def embedded(adata, rng):
    """Both slices have the same five regions, bands of x; one slice's embedding is shifted."""
    region = np.minimum((adata.obsm["spatial"][:, 0] // 150).astype(int), 4)
    adata.obs["region"] = pd.Categorical(region.astype(str))
    embedding = (rng.normal(size=(5, 9)) * 3)[region] + rng.normal(size=(adata.n_obs, 9))
    embedding[(adata.obs["library"] == "left").to_numpy()] += 4.0
    adata.obsm[Obsm.X] = embedding.astype(np.float32)
    return adata


def numbers(adata, key=Obs.DOMAIN):
    return adata.obs[key].cat.codes.to_numpy()


def test_fields(embedded):
    st.tl.domains(embedded, n_domains=5, library_key="library", coarser=[3, 2], seed=4)
    column = embedded.obs[Obs.DOMAIN]
    assert column.cat.categories.tolist() == ["0", "1", "2", "3", "4"]
    assert (np.diff(column.value_counts().loc[column.cat.categories]) <= 0).all()
    assert adjusted_rand_score(embedded.obs["region"], column) > 0.9
    assert [embedded.obs[key].nunique() for key in (LEVEL1, LEVEL2)] == [3, 2]
    pairs = embedded.obs[[Obs.DOMAIN, LEVEL1, LEVEL2]].drop_duplicates()
    assert len(pairs) == 5
    record = embedded.uns[Uns.STOFM][Obs.DOMAIN]
    assert record["version"] == st.__version__
    assert record["params"] == {
        "n_domains": 5,
        "resolution": "",
        "library_key": "library",
        "shared": True,
        "coarser": [3, 2],
        "n_neighbors": 10,
        "n_farther": 30,
        "smooth": 0,
        "centering": "slice",
        "use_rep": Obsm.X,
        "spatial_key": Obsm.SPATIAL,
        "seed": 4,
    }


def test_resolution(embedded):
    st.tl.domains(embedded, library_key="library")
    by_default = embedded.obs[Obs.DOMAIN]
    assert embedded.uns[Uns.STOFM][Obs.DOMAIN]["params"]["resolution"] == 1.0
    st.tl.domains(embedded, resolution=1.0, library_key="library")
    assert embedded.obs[Obs.DOMAIN].equals(by_default)
    st.tl.domains(embedded, resolution=4.0, library_key="library")
    assert embedded.obs[Obs.DOMAIN].nunique() > by_default.nunique()


def test_order_of_cells_does_not_matter(embedded, rng):
    shuffled = embedded[rng.permutation(embedded.n_obs)].copy()
    for options in ({"n_domains": 7}, {"resolution": 2.0}, {"n_domains": 7, "shared": False}):
        for one in (embedded, shuffled):
            st.tl.domains(one, library_key="library", smooth=4, coarser=[2], **options)
        for key in (Obs.DOMAIN, LEVEL1):
            assert shuffled.obs[key].reindex(embedded.obs_names).equals(embedded.obs[key])


def test_each_slice_by_itself(embedded):
    st.tl.domains(embedded, n_domains=3, library_key="library", shared=False, coarser=[2])
    names = ["left:0", "left:1", "left:2", "right:0", "right:1", "right:2"]
    assert embedded.obs[Obs.DOMAIN].cat.categories.tolist() == names
    assert embedded.obs[LEVEL1].cat.categories.tolist() == [
        "left:0",
        "left:1",
        "right:0",
        "right:1",
    ]
    assert len(embedded.uns[COLORS]) == 6
    for name in ("left", "right"):
        one = embedded[embedded.obs["library"] == name].copy()
        found = one.obs[Obs.DOMAIN].astype(str).str.removeprefix(f"{name}:")
        st.tl.domains(one, n_domains=3)
        assert one.obs[Obs.DOMAIN].astype(str).equals(found)


def test_smoothing_in_the_plane(embedded):
    st.tl.domains(embedded, n_domains=5, library_key="library")
    rough = numbers(embedded)
    st.tl.domains(embedded, n_domains=5, library_key="library", smooth=8)
    smooth = numbers(embedded)

    def share_alike(labels):
        shares = []
        for rows in embedded.obs.groupby("library", observed=True).indices.values():
            nearest, _ = nearest_neighbors(embedded.obsm["spatial"][rows], 6)
            shares.append((labels[rows][nearest] == labels[rows][:, None]).mean())
        return np.mean(shares)

    assert share_alike(smooth) > share_alike(rough)


def test_colors(embedded):
    st.tl.domains(embedded, n_domains=5, library_key="library", coarser=[2])
    colors, coarse = embedded.uns[COLORS], embedded.uns[LEVEL1 + Suffix.COLORS]
    assert len(set(colors)) == 5
    for number, color in enumerate(coarse):
        parts = embedded.obs[Obs.DOMAIN][numbers(embedded, LEVEL1) == number].value_counts()
        assert color == colors[int(parts.index[0])]
    st.tl.domains(embedded, n_domains=5, library_key="library", seed=9)
    assert embedded.uns[COLORS] == colors


def test_colors_are_dropped_where_there_are_too_many_domains(embedded):
    st.tl.domains(embedded, n_domains=2, library_key="library")
    st.tl.domains(embedded, n_domains=103, library_key="library")
    assert embedded.obs[Obs.DOMAIN].nunique() == 103
    assert COLORS not in embedded.uns


def test_levels_of_an_earlier_run_are_dropped(embedded):
    st.tl.domains(embedded, n_domains=5, library_key="library", coarser=[3, 2])
    st.tl.domains(embedded, n_domains=5, library_key="library", coarser=[3])
    assert LEVEL1 in embedded.obs
    assert LEVEL2 not in embedded.obs
    assert LEVEL2 + Suffix.COLORS not in embedded.uns


def test_another_key_and_another_embedding(embedded, rng):
    embedded.obsm["X_pca"] = rng.normal(size=(embedded.n_obs, 3))
    st.tl.domains(embedded, n_domains=2, library_key="library", use_rep="X_pca", key_added="mine")
    assert embedded.obs["mine"].nunique() == 2
    assert "mine" in embedded.uns[Uns.STOFM]
    assert Obs.DOMAIN not in embedded.obs


def test_centering(embedded):
    left = embedded.obs["library"] == "left"
    found = {}
    for centering in ("slice", "none"):
        st.tl.domains(embedded, n_domains=10, library_key="library", centering=centering)
        found[centering] = pd.crosstab(embedded.obs[Obs.DOMAIN], left).to_numpy()
    # Without it, domains belong to one slice.
    assert (found["none"].min(axis=1) == 0).sum() > (found["slice"].min(axis=1) == 0).sum()


def test_a_view_becomes_an_anndata_of_its_own(embedded):
    view = embedded[10:60]
    # Without a warning, which the tests would make an error.
    st.tl.domains(view, 3, library_key="library", coarser=[2])
    assert view.obs[LEVEL1].nunique() == 2
    assert Obs.DOMAIN not in embedded.obs


def test_a_table_of_a_spatialdata(embedded):
    tables = SimpleNamespace(tables={"cells": embedded})
    st.tl.domains(tables, n_domains=3, library_key="library", table_key="cells")
    assert embedded.obs[Obs.DOMAIN].nunique() == 3


def test_copy(embedded):
    new = st.tl.domains(embedded, n_domains=3, library_key="library", copy=True)
    assert new.obs[Obs.DOMAIN].nunique() == 3
    assert Obs.DOMAIN not in embedded.obs
    assert Uns.STOFM not in embedded.uns


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_file_round_trip(embedded, tmp_path, suffix):
    st.tl.domains(embedded, n_domains=4, library_key="library", coarser=[2])
    path = tmp_path / f"slice.{suffix}"
    if suffix == "zarr":
        embedded.write_zarr(path)
        again = ad.read_zarr(path)
    else:
        embedded.write_h5ad(path)
        again = ad.read_h5ad(path)
    assert again.obs[Obs.DOMAIN].tolist() == embedded.obs[Obs.DOMAIN].tolist()
    assert list(again.uns[COLORS]) == embedded.uns[COLORS]
    # The record is read back to drop what an earlier run wrote.
    st.tl.domains(again, n_domains=4, library_key="library")
    assert LEVEL1 not in again.obs
    again.write_h5ad(tmp_path / "again.h5ad")


def test_origin_of_the_embedding(model, adata):
    st.tl.embed(adata, model, library_key="library", device="cpu", show_progress_bar=False)
    st.tl.domains(adata, n_domains=2, library_key="library")
    record = adata.uns[Uns.STOFM][Obs.DOMAIN]
    assert record["model"] == model.name
    assert record["model_fingerprint"] == model.fingerprint
    assert record["vocabulary"] == model.vocabulary.fingerprint


def test_cells_without_embeddings_are_embedded_first(model, adata):
    before = adata.copy()
    found = st.tl.domains(adata, n_domains=2, library_key="library", model=model, copy=True)
    assert set(adata.obsm) == set(before.obsm)
    st.tl.embed(adata, model, library_key="library", device="cpu", show_progress_bar=False)
    assert np.array_equal(found.obsm[Obsm.X], adata.obsm[Obsm.X])
    st.tl.domains(adata, n_domains=2, library_key="library")
    assert found.obs[Obs.DOMAIN].equals(adata.obs[Obs.DOMAIN])
    assert found.uns[Uns.STOFM][Obs.DOMAIN]["model"] == model.name
    # What is there is used again, unless it is by another model.
    kept = adata.obsm[Obsm.X]
    st.tl.domains(adata, n_domains=2, library_key="library", model=model)
    assert adata.obsm[Obsm.X] is kept
    other = st.Stofm(model.config, model.vocabulary, seed=9)
    st.tl.domains(adata, n_domains=2, library_key="library", model=other)
    record = adata.uns[Uns.STOFM][Obs.DOMAIN]
    assert record["model_fingerprint"] == other.fingerprint


def test_slices_are_those_that_were_embedded(adata, model, rng):
    adata.obs["bregma"] = adata.obs.pop("library")
    adata.obsm["xy"], adata.obsm["spatial"] = adata.obsm["spatial"], rng.random((184, 2))
    options = {"library_key": "bregma", "spatial_key": "xy"}
    st.tl.embed(adata, model, device="cpu", show_progress_bar=False, **options)
    st.tl.domains(adata, n_domains=3)
    again = adata.copy()
    st.tl.domains(again, n_domains=3, **options)
    assert again.obs[Obs.DOMAIN].equals(adata.obs[Obs.DOMAIN])
    # The column that is read can't be written.
    with pytest.raises(ValueError, match="bregma"):
        st.tl.domains(adata, n_domains=3, key_added="bregma")


def test_no_coordinates_are_needed(embedded):
    del embedded.obsm["spatial"]
    st.tl.domains(embedded, n_domains=2)
    assert embedded.obs[Obs.DOMAIN].nunique() == 2
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        st.tl.domains(embedded, n_domains=2, smooth=5)


def test_one_cell(embedded):
    one = embedded[:1].copy()
    st.tl.domains(one, coarser=[2], smooth=3)
    assert one.obs[Obs.DOMAIN].tolist() == ["0"]
    assert one.obs[LEVEL1].tolist() == ["0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_domains": 3, "resolution": 1.0}, r"n_domains=3 or resolution=1\.0, not both"),
        ({"n_domains": 0}, "n_domains must be a whole number of at least 1, found 0"),
        ({"n_domains": 2.5}, r"n_domains must be a whole number of at least 1, found 2\.5"),
        ({"n_domains": 185}, "n_domains is 185, but only 184 embeddings are different"),
        ({"n_neighbors": 2.5}, r"n_neighbors must be .* found 2\.5"),
        ({"smooth": -1}, "smooth must be a whole number of at least 0, found -1"),
        ({"resolution": 0.0}, r"resolution must be positive, found 0\.0"),
        ({"coarser": [3, 3]}, r"coarser must hold falling numbers of domains, found \[3, 3\]"),
        ({"n_domains": 4, "coarser": [4]}, r"falling numbers .* below n_domains=4, found \[4\]"),
        (
            {"coarser": [2, 0]},
            "Each number in coarser must be a whole number of at least 1, found 0",
        ),
        ({"coarser": [2.5]}, r"number in coarser must be a whole number of at least 1, found 2\.5"),
        ({"n_domains": 3.0}, r"n_domains must be a whole number of at least 1, found 3\.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, found -1"),
        ({"key_added": Obs.ANNOTATION}, "key_added='stofm_annotation' would replace"),
        ({"centering": "mean"}, r"centering must be one of \['slice', 'none'\], found 'mean'"),
        ({"key_added": Obsm.X}, "key_added='X_stofm' would replace something that is used"),
        ({"key_added": "library"}, "key_added='library' would replace something that is used"),
    ],
)
def test_options_that_can_not_be(embedded, options, message):
    with pytest.raises(ValueError, match=message):
        st.tl.domains(embedded, library_key="library", **options)
    assert Obs.DOMAIN not in embedded.obs
    assert Uns.STOFM not in embedded.uns


def test_a_single_number_of_coarser_domains(embedded):
    with pytest.raises(TypeError, match=r"coarser must be a list of numbers .* found 2"):
        st.tl.domains(embedded, library_key="library", coarser=2)


def test_no_level_replaces_the_column_of_slices(embedded):
    embedded.obs["d_level1"] = embedded.obs.pop("library")
    with pytest.raises(ValueError, match="'d_level1' would replace something that is used"):
        st.tl.domains(embedded, n_domains=4, coarser=[2], key_added="d", library_key="d_level1")
    assert set(embedded.obs["d_level1"]) == {"left", "right"}


def test_slices_that_can_not_be_told_apart(embedded):
    sorted_by_slice = embedded[np.argsort(embedded.obs["library"])].copy()
    with pytest.raises(ValueError, match="Pass library_key='library'"):
        st.tl.domains(sorted_by_slice, n_domains=2)
    del embedded.obs["library"]
    with pytest.raises(ValueError, match="shared=False clusters each slice by itself"):
        st.tl.domains(embedded, n_domains=2, shared=False)
    with pytest.raises(KeyError, match=r"There is no obs\['slide'\]"):
        st.tl.domains(embedded, n_domains=2, library_key="slide")


def test_embedding_that_is_none(embedded):
    with pytest.raises(KeyError, match=r"no obsm\['X_pca'\]\. There are: .*'X_stofm'"):
        st.tl.domains(embedded, use_rep="X_pca", library_key="library")
    embedded.obsm[Obsm.X][5:8, 2] = np.nan
    with pytest.raises(ValueError, match=r"3 of 184 cells have NaN or infinite values in obsm\['X"):
        st.tl.domains(embedded, library_key="library")
    embedded.obsm[Obsm.X] = np.zeros((embedded.n_obs, 2), dtype="U1")
    with pytest.raises(ValueError, match=r"shape \(184, 2\) and the type <U1; expected numbers"):
        st.tl.domains(embedded, library_key="library")


@pytest.fixture
def around(embedded, rng):
    """Regions of which a single cell shows little, and ten neighbours much."""
    region = embedded.obs["region"].cat.codes.to_numpy()
    cell = rng.normal(size=(184, 5)) + 1.5 * np.eye(5)[region]
    embedded.obsm[Obsm.X] = cell.astype(np.float32)
    return embedded


def agreement(adata, **options):
    st.tl.domains(adata, n_domains=5, library_key="library", **options)
    return adjusted_rand_score(adata.obs["region"], adata.obs[Obs.DOMAIN])


def test_neighbours_tell_regions(around):
    alone = agreement(around, n_neighbors=0)
    assert agreement(around) > max(0.4, 2 * alone)
    assert around.uns[Uns.STOFM][Obs.DOMAIN]["params"]["n_neighbors"] == 10
    around.obsm["X_pca"] = around.obsm[Obsm.X]
    # Other embeddings are read alone unless neighbours are asked for.
    assert agreement(around, use_rep="X_pca") == alone
    assert around.uns[Uns.STOFM][Obs.DOMAIN]["params"]["n_neighbors"] == 0
    assert agreement(around, use_rep="X_pca", n_neighbors=8) > 2 * alone


def test_the_length_of_an_embedding_does_not_matter(around, rng):
    x, left = around.obsm[Obsm.X], (around.obs["library"] == "left").to_numpy()
    for rows in (left, ~left):
        x[rows] -= x[rows].mean(axis=0)
    # In pairs of cells at the same distance on both sides, so that the mean stays.
    x[1::2] = -x[::2]
    expected = agreement(around)
    x *= np.repeat(rng.uniform(0.5, 2.0, 92), 2)[:, None].astype(np.float32)
    assert agreement(around) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("n_neighbors", [None, 4])
def test_near_and_farther_neighbours_are_read(around, n_neighbors):
    st.tl.domains(around, n_domains=5, library_key="library", n_neighbors=n_neighbors)
    slices = [np.flatnonzero(around.obs["library"] == name) for name in ("left", "right")]
    near = n_neighbors or 10
    own = around.obsm[Obsm.X].copy()
    for rows in slices:
        own[rows] -= own[rows].mean(axis=0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    means = [neighbor_means(own, around.obsm[Obsm.SPATIAL], slices, n) for n in (near, 3 * near)]
    expected = find_domains(domain_space(own, slices, beside=means), n_domains=5)
    np.testing.assert_array_equal(around.obs[Obs.DOMAIN].astype(int), expected)


def test_order_of_cells_does_not_matter_to_neighbours(around, rng):
    shuffled = around[rng.permutation(around.n_obs)].copy()
    for one in (around, shuffled):
        st.tl.domains(one, n_domains=5, library_key="library")
    assert shuffled.obs[Obs.DOMAIN].reindex(around.obs_names).equals(around.obs[Obs.DOMAIN])


def test_neighbours_of_each_slice_by_itself(around):
    st.tl.domains(around, n_domains=3, library_key="library", shared=False)
    whole = around.obs[Obs.DOMAIN].copy()
    for name in ("left", "right"):
        one = around[around.obs["library"] == name].copy()
        st.tl.domains(one, n_domains=3)
        pairs = pd.crosstab(one.obs[Obs.DOMAIN], whole[one.obs_names])
        assert (pairs > 0).sum().sum() == 3


def test_without_places(around):
    expected = agreement(around, n_neighbors=0)
    del around.obsm[Obsm.SPATIAL]
    with pytest.raises(KeyError, match=r"There is no obsm\['spatial'\]"):
        agreement(around, n_neighbors=3)
    assert agreement(around) == expected
    assert around.uns[Uns.STOFM][Obs.DOMAIN]["params"]["n_neighbors"] == 0
