from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import stofm as st
from stofm._edge.tables import label_text, layer_names, resolve_table
from stofm._keys import Obsm


def test_the_only_table_of_a_spatialdata_needs_no_key(adata):
    assert resolve_table(SimpleNamespace(tables={"cells": adata})) is adata
    with pytest.raises(KeyError, match=r"has the tables \['cells'\]"):
        resolve_table(SimpleNamespace(tables={"cells": adata}), "spots")


def test_names_of_layers_without_that_of_x():
    adata = AnnData(np.ones((3, 2)), layers={"b": np.ones((3, 2)), "a": np.ones((3, 2))})
    assert layer_names(adata) == ["b", "a"]


NUMBERS = pd.Series([1.0, np.nan, 0.0, 1.0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "Int64", "category", object])
def test_whole_numbers_are_the_same_however_they_are_stored(dtype):
    assert label_text(NUMBERS.astype(dtype)).tolist() == ["1", "", "0", "1"]


def test_other_labels():
    assert label_text(pd.Series(["b", None, "a"])).tolist() == ["b", "", "a"]
    assert label_text(pd.Series([True, False])).tolist() == ["True", "False"]
    assert label_text(pd.Series([0.5, np.inf])).tolist() == ["0.5", "inf"]
    assert label_text(pd.Series([None, None])).tolist() == ["", ""]


@pytest.mark.filterwarnings("ignore:(Writing )?zarr v[23] :UserWarning")
def test_a_lazy_anndata_is_embedded(adata, model, tmp_path):
    read_lazy = getattr(ad.experimental, "read_lazy", None)
    if read_lazy is None:
        pytest.skip("needs anndata 0.12")
    options = {"library_key": "library", "show_progress_bar": False}
    expected = st.tl.embed(adata, model, copy=True, **options)
    adata.write_zarr(tmp_path / "x.zarr")
    lazy = read_lazy(tmp_path / "x.zarr")
    st.tl.embed(lazy, model, **options)
    np.testing.assert_array_equal(lazy.obsm[Obsm.X], expected.obsm[Obsm.X])
    assert hasattr(lazy.X, "compute")  # still on disk
    st.tl.domains(lazy, n_domains=2, library_key="library")
    assert lazy.obs["stofm_domain"].nunique() == 2
