from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm._edge.records import make_frame, write_frame
from stofm.heads.request import Request, resolve_slices
from stofm.heads.spots import grid_into_spots, read_proportions
from stofm.heads.targets import read_labels


@pytest.fixture
def spots(adata, rng):
    """Spots with proportions of three types in obsm, five rows not known, and in obs."""
    shares = pd.DataFrame(
        rng.dirichlet(np.ones(3), adata.n_obs), index=adata.obs_names, columns=["a", "b", "c"]
    )
    adata.obs[["a", "b", "c"]] = shares
    shares.iloc[3:8, 1] = np.nan
    adata.obsm["shares"] = shares
    return adata


def read(adata, key="shares"):
    data = adata if isinstance(adata, list) else [adata]
    return read_proportions(resolve_slices(data, "library"), key)


def test_a_dataframe(spots):
    found = read(spots)
    assert found.types == ["a", "b", "c"]
    assert np.isnan(found.proportions[3:8]).all()
    known = np.r_[0:3, 8:184]
    np.testing.assert_allclose(
        found.proportions[known], spots.obsm["shares"].to_numpy()[known], rtol=1e-6
    )


def test_columns_and_arrays(spots):
    values = spots.obs[["a", "b", "c"]].to_numpy()
    np.testing.assert_allclose(read(spots, ["a", "b", "c"]).proportions, values, rtol=1e-6)
    spots.obsm["proportions"] = sparse.csr_matrix(values)
    found = read(spots, "proportions")
    assert found.types == ["0", "1", "2"]
    np.testing.assert_allclose(found.proportions, values, rtol=1e-6)
    spots.uns["proportion_names"] = ["x", "y", "z"]
    assert read(spots, "proportions").types == ["x", "y", "z"]


def test_types_of_several_tables_may_be_in_another_order(spots):
    other = spots.copy()
    other.obsm["shares"] = other.obsm["shares"][["c", "a", "b"]]
    found = read([spots, other])
    assert found.types == ["a", "b", "c"]
    np.testing.assert_array_equal(found.proportions[:184], found.proportions[184:])
    other.obsm["shares"].columns = ["c", "a", "d"]
    with pytest.raises(ValueError, match=r"the types .* in the first AnnData and .* in number 2"):
        read([spots, other])


def test_rounding_is_divided_out(spots):
    spots.obsm["shares"] = spots.obsm["shares"].fillna(1 / 3) * 1.0005
    spots.obsm["shares"].iloc[3:8] = 0.3335
    np.testing.assert_allclose(read(spots).proportions.sum(axis=1), 1.0, rtol=1e-6)


def test_proportions_that_can_not_be(spots):
    shares = spots.obsm["shares"]
    shares.iloc[10:12] *= 2.0
    shares.iloc[12] *= 0.5
    match = r"3 of 179 spots in obsm\['shares'\] do not sum to 1: they sum to 0\.5 to 2\."
    with pytest.raises(ValueError, match=match):
        read(spots)
    shares.iloc[12, 0] = -0.25
    with pytest.raises(ValueError, match=r"1 of 179 spots have negative .* down to -0\.25"):
        read(spots)
    with pytest.raises(KeyError, match=r"no obsm\['share'\]; there are \['shares', 'spatial'\]"):
        read(spots, "share")
    with pytest.raises(KeyError, match=r"There is no obs column \['d'\]"):
        read(spots, ["a", "d"])
    with pytest.raises(ValueError, match=r"obs\[\['library', 'a'\]\] must hold numbers"):
        read(spots, ["library", "a"])
    with pytest.raises(ValueError, match="has 1 types; at least two are needed"):
        read(spots, ["a"])


def grid(data, spot_size=90.0):
    slices = resolve_slices(data, "library")
    labels = read_labels(slices, "kind", missing=("2",))
    return grid_into_spots(slices, labels, Request(), spot_size=spot_size)


def test_cells_become_spots(adata):
    found = grid(adata)
    table = found.slices.tables[0]
    assert found.types == ["0", "1"]
    assert found.slices.names == ["left", "right"]
    is_known = (adata.obs["kind"] != "2").to_numpy()
    for name in ("left", "right"):
        own = (adata.obs["library"] == name).to_numpy() & is_known
        summed = table[table.obs["slice"] == name].X.sum(axis=0)
        np.testing.assert_array_equal(np.asarray(summed), adata[own].X.sum(axis=0))
    np.testing.assert_allclose(found.proportions.sum(axis=1), 1.0, rtol=1e-6)
    assert list(table.var_names) == list(adata.var_names)


@pytest.mark.parametrize(("spot_size", "is_small"), [(90.0, False), (3.0, True)])
def test_spots_of_a_single_cell_are_told(adata, caplog, spot_size, is_small):
    caplog.set_level("INFO", logger="stofm")
    if is_small:
        with pytest.warns(
            UserWarning, match=r"100% have a single cell.* Is spot_size=3 in the unit"
        ):
            grid(adata, spot_size)
    else:
        grid(adata, spot_size)
        assert "cells on average" in caplog.text


def test_cells_of_several_tables(adata):
    names = adata.obs["library"].to_numpy()
    # The second table has none with a type.
    parts = [adata[names == "left"].copy(), adata[:9].copy(), adata[names == "right"].copy()]
    parts[1].obs["kind"] = "2"
    together, apart = grid(adata), grid(parts)
    assert len(apart.slices.tables) == 2
    np.testing.assert_array_equal(together.proportions, apart.proportions)
    both = np.concatenate([table.X.toarray() for table in apart.slices.tables])
    np.testing.assert_array_equal(together.slices.tables[0].X.toarray(), both)
    assert apart.slices.names == ["0:left", "2:right"]
    for one, other in zip(together.slices.rows, apart.slices.rows, strict=True):
        np.testing.assert_array_equal(one, other)


def test_spots_keep_the_genes_that_were_mapped(adata, vocabulary):
    adata.var["mine"], adata.var_names = adata.var_names, [f"probe{k}" for k in range(71)]
    st.pp.map_genes(adata, gene_key="mine", vocabulary=vocabulary)
    table = grid(adata).slices.tables[0]
    st.pp.tokenize(table, vocabulary, show_progress_bar=False)
    assert table.obs["stofm_n_tokens"].min() > 0


def test_types_that_a_file_can_not_name(spots):
    names = ["T/NK", "b", "c"]
    frame = make_frame(spots, spots.obs[["a", "b", "c"]].to_numpy(), names)
    write_frame(spots, "mine", frame, names)
    assert read(spots, "mine").types == names


def test_size_that_can_not_be(adata):
    with pytest.raises(ValueError, match="spot_size must be positive"):
        grid(adata, spot_size=0.0)


@pytest.mark.parametrize("kind", ["obs", "obsm", "second"])
def test_a_type_that_occurs_twice_is_refused(spots, kind):
    data, key = spots, "shares"
    if kind == "obs":
        key = ["a", "b", "a", "c"]
    else:
        twice = spots.copy() if kind == "second" else spots
        shares = spots.obsm["shares"]
        twice.obsm["shares"] = shares[["a", "b", "c", "a"]]
        data = [spots, twice] if kind == "second" else spots
    with pytest.raises(ValueError, match=r"has the types \['a'\] more than once"):
        read(data, key)
