from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from anndata import AnnData

from stofm._anndata import layer_names, read_record, resolve_table, same_params, write_record


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
