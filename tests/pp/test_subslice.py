from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

import stofm as st
from stofm._keys import Obs, Obsm, Uns
from stofm.spatial import SubSliceConfig, lay_out_slice, virtual_cells


@pytest.fixture
def encoded(adata, rng):
    adata.obsm[Obsm.X_CELL] = rng.normal(size=(adata.n_obs, 5)).astype(np.float32)
    return adata


def test_fields(encoded):
    st.pp.subslice(encoded, library_key="library", n_cells=40)
    layout = encoded.uns[Uns.STOFM][Uns.SUBSLICE]
    assert encoded.obs[Obs.SUBSLICE].nunique() == 3 + 3
    n_virtual = encoded.obs[Obs.VIRTUAL_CELL].nunique()
    assert layout["coordinates"].shape == (n_virtual, 2)
    assert layout["features"].shape == (n_virtual, 5)
    assert layout["features"].dtype == np.float32
    assert sorted(set(layout["slice"])) == ["left", "right"]
    assert layout["params"]["library_key"] == "library"
    assert layout["params"]["n_cells"] == 40


def test_nothing_crosses_slices(encoded):
    st.pp.subslice(encoded, library_key="library", n_cells=40)
    for key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL):
        assert (encoded.obs.groupby(key, observed=True)["library"].nunique() == 1).all()
    xy = encoded.obsm[Obsm.COORDINATES]
    for rows in encoded.obs.groupby("library", observed=True).indices.values():
        assert np.hypot(*np.ptp(xy[rows], axis=0)) == pytest.approx(100.0)


def test_virtual_cells_are_means_of_their_cells(encoded):
    st.pp.subslice(encoded, library_key="library", n_cells=40)
    layout = encoded.uns[Uns.STOFM][Uns.SUBSLICE]
    codes = encoded.obs[Obs.VIRTUAL_CELL].cat.codes.to_numpy()
    expected = virtual_cells(codes, encoded.obsm[Obsm.COORDINATES], encoded.obsm[Obsm.X_CELL])
    np.testing.assert_allclose(layout["coordinates"], expected.coordinates)
    np.testing.assert_allclose(layout["features"], expected.features, atol=1e-6)


def test_like_the_core(encoded):
    one = encoded[encoded.obs["library"] == "left"].copy()
    st.pp.subslice(one, n_cells=30, leiden_resolution=0.7, position_weight=0.5, seed=4)
    rules = SubSliceConfig(n_cells=30, leiden_resolution=0.7, position_weight=0.5)
    expected = lay_out_slice(one.obsm["spatial"], one.obsm[Obsm.X_CELL], rules, seed=4)
    np.testing.assert_array_equal(one.obs[Obs.SUBSLICE].cat.codes, expected.subslice)
    np.testing.assert_array_equal(one.obs[Obs.VIRTUAL_CELL].cat.codes, expected.virtual_cell)


def test_rules_of_a_model_or_a_config(encoded, model):
    one = encoded[encoded.obs["library"] == "left"].copy()
    st.pp.subslice(one, model)
    assert one.uns[Uns.STOFM][Uns.SUBSLICE]["params"]["n_cells"] == 53
    st.pp.subslice(one, replace(SubSliceConfig.reference(), n_cells=20), leiden_resolution=2.0)
    params = one.uns[Uns.STOFM][Uns.SUBSLICE]["params"]
    assert (params["partition"], params["n_cells"]) == ("reference", 20)
    assert params["leiden_resolution"] == 2.0


def test_limit_on_virtual_cells(encoded):
    one = encoded[encoded.obs["library"] == "left"].copy()
    st.pp.subslice(one, SubSliceConfig(max_virtual_cells=2))
    assert one.obs[Obs.VIRTUAL_CELL].nunique() <= 2


def test_copy(encoded):
    new = st.pp.subslice(encoded, library_key="library", copy=True)
    assert Obs.SUBSLICE in new.obs
    assert Obs.SUBSLICE not in encoded.obs
    assert Uns.STOFM not in encoded.uns


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_file_round_trip(encoded, tmp_path, suffix):
    st.pp.subslice(encoded, library_key="library", n_cells=40)
    path = tmp_path / f"slice.{suffix}"
    if suffix == "zarr":
        encoded.write_zarr(path)
        again = ad.read_zarr(path)
    else:
        encoded.write_h5ad(path)
        again = ad.read_h5ad(path)
    before, after = (a.uns[Uns.STOFM][Uns.SUBSLICE] for a in (encoded, again))
    np.testing.assert_array_equal(after["features"], before["features"])
    assert list(after["slice"]) == list(before["slice"])
    assert after["params"] == before["params"]
    assert again.obs[Obs.SUBSLICE].tolist() == encoded.obs[Obs.SUBSLICE].tolist()


def test_missing_features_say_what_to_run(adata):
    with pytest.raises(KeyError, match=r"Run st\.tl\.encode_cells\(adata\) first"):
        st.pp.subslice(adata, library_key="library")


def test_features_with_nan_are_refused(encoded):
    encoded.obsm[Obsm.X_CELL][3:5] = np.nan
    with pytest.raises(ValueError, match="2 of 184 cells have NaN or infinite values"):
        st.pp.subslice(encoded, library_key="library")


def test_something_else_than_rules_is_refused(encoded):
    with pytest.raises(TypeError, match="must be a Stofm model or a SubSliceConfig, found str"):
        st.pp.subslice(encoded, "mini", library_key="library")
