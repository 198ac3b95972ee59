"""Reading of coordinates, for computing and for drawing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import stofm as st
from stofm._edge.places import read_axes, read_coordinates

N = 60


@pytest.fixture
def xy(rng):
    return rng.random((N, 2)) * 90.0


def table(spatial=None, **obs):
    frame = pd.DataFrame(obs, index=[f"c{k}" for k in range(N)])
    data = AnnData(np.ones((N, 1)), obs=frame)
    if spatial is not None:
        data.obsm["spatial"] = spatial
    return data


def read(spatial):
    return read_coordinates(table(spatial))


def frame(values, columns, dtype=None):
    return pd.DataFrame(values, index=[f"c{k}" for k in range(N)], columns=columns, dtype=dtype)


def test_every_way_to_store_numbers_gives_the_same(xy):
    stored = {
        "text": xy.astype(str),
        "objects": xy.astype(object),
        "sparse": sparse.csr_matrix(xy),
        "table": frame(xy, ["x", "y"]),
        "nullable": frame(xy, ["x", "y"], "Float64"),
        "y first": frame(xy[:, ::-1], ["pxl_row_in_fullres", "pxl_col_in_fullres"]),
        "among others": frame(np.c_[xy[:, 0] * 2, xy], ["area", "x_centroid", "y_centroid"]),
    }
    for name, values in stored.items():
        np.testing.assert_array_equal(read(values), xy, err_msg=name)


def test_named_columns_tell_z(xy):
    z = np.arange(N) % 7.0
    found, depth = read_axes(table(frame(np.c_[z, xy], ["z", "x", "y"])), "spatial")
    np.testing.assert_array_equal(found, xy)
    np.testing.assert_array_equal(depth, z)


@pytest.mark.parametrize("reader", [read_coordinates, lambda a: st.pl.spatial(a, show=False)])
@pytest.mark.parametrize("bad", ["pxl_col", "NA", "1,5"])
def test_text_that_is_no_number_names_the_entry_and_the_cell(xy, reader, bad):
    text = xy.astype(str).astype(object)
    text[4, 0] = bad
    with pytest.raises(
        ValueError, match=r"obsm\['spatial'\] .* 1 of 60 cells, for example c4: "
    ) as error:
        reader(table(text))
    assert repr(bad) in str(error.value)


def test_the_remedy_for_a_decimal_comma_works(xy):
    adata = table(np.char.replace(xy.astype(str), ".", ","))
    with pytest.raises(ValueError, match="a comma: ") as error:
        read_coordinates(adata)
    exec(str(error.value).partition("a comma: ")[2], {"np": np, "adata": adata})
    np.testing.assert_array_equal(read_coordinates(adata), xy)


def test_missing_numbers_are_not_finite(xy):
    nullable = frame(xy, ["x", "y"], "Float64")
    nullable.iloc[3, 1] = pd.NA
    for values in (nullable, np.where(np.arange(N)[:, None] == 3, np.inf, xy)):
        with pytest.raises(ValueError, match=r"1 of 60 cells have NaN .* \['c3'\]. Drop them"):
            read(values)


@pytest.mark.parametrize("n", [1, 4])
def test_another_number_of_columns_is_refused(xy, n):
    with pytest.raises(ValueError, match=rf"shape \(60, {n}\); expected \(60, 2\)"):
        read(np.ones((N, n)))


def test_a_lattice_with_z_is_read():
    x, y = np.divmod(np.arange(N), 6)
    lattice = np.c_[x, y, np.zeros(N)]
    np.testing.assert_array_equal(read(lattice), lattice[:, :2])


def message_of_missing(adata):
    adata.obs["total_counts"] = np.random.default_rng(0).lognormal(3.0, 1.0, adata.n_obs)
    adata.obs["pct"] = np.random.default_rng(1).lognormal(0.0, 1.0, adata.n_obs)
    with pytest.raises(KeyError) as error:
        read_coordinates(adata)
    return error.value.args[0]


@pytest.mark.parametrize("names", [("CenterX_px", "CenterY_px"), ("pxl_col", "pxl_row")])
def test_columns_that_look_like_places_are_named_with_the_line_to_write(xy, names):
    adata = table(**dict(zip(names, xy.T, strict=True)))
    text = message_of_missing(adata)
    line = f"adata.obsm['spatial'] = adata.obs[{list(names)}].to_numpy()"
    assert "There is no obsm['spatial']" in text
    assert line in text
    assert text.count("adata.obs[[") == 1
    exec(line, {"adata": adata})
    np.testing.assert_array_equal(read_coordinates(adata), xy)


def test_arrays_that_look_like_places_are_named(xy):
    adata = table()
    adata.obsm["X_umap"] = adata.obsm["X_spatial"] = xy
    text = message_of_missing(adata)
    assert "obsm['X_spatial'] (pass spatial_key='X_spatial')" in text
    assert "X_umap" not in text


def test_nothing_looks_like_places():
    assert "Nothing in obsm or obs looks like coordinates" in message_of_missing(table())


@pytest.mark.parametrize("flaw", ["comma", "text", "missing"])
def test_columns_of_places_with_flaws_are_named_and_then_explained(adata, flaw):
    xy = adata.obsm.pop("spatial").astype(str).astype(object)
    if flaw == "comma":
        xy = np.char.replace(xy.astype(str), ".", ",").astype(object)
    else:
        xy[3, 0] = "NA" if flaw == "text" else np.nan
    adata.obs["x"], adata.obs["y"] = xy.T
    with pytest.raises(KeyError, match=r"adata.obs\[\['x', 'y'\]\].to_numpy\(\)"):
        read_coordinates(adata)
    adata.obsm["spatial"] = adata.obs[["x", "y"]].to_numpy()
    with pytest.raises(ValueError, match=r"a comma|cell3"):
        read_coordinates(adata)
