from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from anndata import AnnData

from stofm._anndata import (
    layer_names,
    read_coordinates,
    read_record,
    read_slices,
    remark_on_places,
    resolve_table,
    same_params,
    write_record,
)


def test_coordinates_missing_names_what_looks_like_some(adata):
    adata.obsm["X_umap"] = adata.obsm.pop("spatial")
    adata.obs["x_centroid"] = adata.obs["y_centroid"] = 1.0
    with pytest.raises(KeyError) as error:
        read_coordinates(adata)
    text = str(error.value)
    assert "There is no obsm['spatial']" in text
    assert "obsm['X_umap'], obs[['x_centroid', 'y_centroid']]" in text
    assert "pass `spatial_key`" in text


def test_coordinates_missing_with_nothing_like_them(adata):
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match="Nothing in obsm or obs looks like coordinates"):
        read_coordinates(adata)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_coordinates_that_are_not_finite_name_the_cells(adata, bad):
    adata.obsm["spatial"][[4, 7], 1] = bad
    with pytest.raises(ValueError, match=r"2 of 184 cells .* \['cell4', 'cell7'\]. Drop them"):
        read_coordinates(adata)


def test_coordinates_of_another_shape_are_refused(adata):
    adata.obsm["spatial"] = np.ones((184, 5))
    with pytest.raises(ValueError, match=r"shape \(184, 5\); expected \(184, 2\)"):
        read_coordinates(adata)


def test_coordinates_as_a_data_frame(adata):
    import pandas as pd

    expected = adata.obsm["spatial"]
    adata.obsm["spatial"] = pd.DataFrame(expected, index=adata.obs_names, columns=["x", "y"])
    np.testing.assert_array_equal(read_coordinates(adata), expected)


def test_slices_by_name(adata):
    slices = read_slices(adata, "library", read_coordinates(adata))
    assert slices.names == ["left", "right"]
    for name, rows in zip(slices.names, slices.rows, strict=True):
        assert (adata.obs["library"].iloc[rows] == name).all()
        assert (np.diff(rows) > 0).all()


def test_overlapping_samples_without_a_library_key_are_refused(adata):
    with pytest.raises(ValueError, match=r"names 2 samples \(left, right, .*library_key='library'"):
        read_slices(adata, None, read_coordinates(adata))


@pytest.mark.parametrize("name", ["orig.ident", "Sample_ID", "section label", "donor_id", "fov"])
def test_names_of_samples_are_known_in_many_spellings(adata, name):
    adata.obs = adata.obs.rename(columns={"library": name})
    with pytest.raises(ValueError, match="whose coordinates overlap"):
        read_slices(adata, None, read_coordinates(adata))


def test_samples_side_by_side_are_one_slice(adata):
    adata.obsm["spatial"][adata.obs["library"] == "right", 0] += 1e4
    slices = read_slices(adata, None, read_coordinates(adata))
    assert len(slices.rows) == 1


def test_a_column_that_is_the_same_for_all_makes_one_slice(adata):
    adata.obs["all"] = "one"
    assert len(read_slices(adata, "all", read_coordinates(adata)).rows) == 1


def test_a_library_key_that_is_not_there_names_candidates(adata):
    with pytest.raises(KeyError, match=r"no obs\['libary'\].*candidates: \['library'\]"):
        read_slices(adata, "libary", read_coordinates(adata))


def test_cells_without_a_slice_are_refused(adata):
    adata.obs["library"] = adata.obs["library"].where(np.arange(184) > 2)
    with pytest.raises(ValueError, match="3 cells have no value in obs"):
        read_slices(adata, "library", read_coordinates(adata))


def one_slice(xy):
    data = AnnData(np.ones((len(xy), 1)), obsm={"spatial": np.asarray(xy, dtype=float)})
    coordinates = read_coordinates(data)
    return coordinates, read_slices(data, None, coordinates)


def test_all_cells_at_one_place_are_warned_of():
    with pytest.warns(UserWarning, match=r"all 5 cells lie at one place \(3, 4\)"):
        remark_on_places(*one_slice([[3, 4]] * 5))


@pytest.mark.parametrize(("axis", "side"), [(0, "height"), (1, "width")])
def test_a_line_is_remarked_on(caplog, axis, side):
    xy = np.zeros((6, 2))
    xy[:, axis] = np.arange(6)
    remark_on_places(*one_slice(xy))
    assert f"zero {side}: its cells lie on a line" in caplog.text


def test_shared_places_are_remarked_on(caplog):
    remark_on_places(*one_slice([[0, 0], [1, 2], [1, 2], [1, 2], [3, 0]]))
    assert "2 of 5 cells share their place with another" in caplog.text


@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_cells_are_not_remarked_on(n, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        remark_on_places(*one_slice([[3.0, 4.0], [5.0, 4.0]][:n]))
    assert not caplog.text


def test_the_only_table_of_a_spatialdata_needs_no_key(adata):
    assert resolve_table(SimpleNamespace(tables={"cells": adata})) is adata
    with pytest.raises(KeyError, match=r"has the tables \['cells'\]"):
        resolve_table(SimpleNamespace(tables={"cells": adata}), "spots")


def test_records_survive_a_file(adata, tmp_path):
    import anndata

    params = {"layer": None, "n": 3, "weight": 0.2, "name": "x", "flag": True}
    write_record(adata, "X_thing", params, model="abc")
    adata.write_h5ad(tmp_path / "a.h5ad")
    record = read_record(anndata.read_h5ad(tmp_path / "a.h5ad"), "X_thing")
    assert record["model"] == "abc"
    assert same_params(record, params)
    assert not same_params(record, params | {"n": 4})
    assert not same_params(record, params | {"more": 1})
    assert read_record(adata, "other") is None


def test_names_of_layers_without_that_of_x():
    adata = AnnData(np.ones((3, 2)), layers={"b": np.ones((3, 2)), "a": np.ones((3, 2))})
    assert layer_names(adata) == ["b", "a"]
