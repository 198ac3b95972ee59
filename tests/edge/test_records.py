from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from stofm._edge.tables import (
    frame_names,
    make_frame,
    read_record,
    remove_entry,
    same_params,
    storable_names,
    write_frame,
    write_record,
)
from stofm._keys import Uns

NAMES = ["L2/3", "L2_3", "Forebrain/Midbrain/Hindbrain", "a_2", "a/2", "a_2_2"]


def write(adata, names=NAMES, key="mine"):
    values = np.arange(adata.n_obs * len(names)).reshape(adata.n_obs, -1)
    write_frame(adata, key, make_frame(adata, values, names), names)


def test_names_stay_if_they_can_and_never_become_the_same():
    assert storable_names(["T cell", "b", "Bär"]) == ["T cell", "b", "Bär"]
    assert storable_names(NAMES) == [
        *("L2_3_2", "L2_3", "Forebrain_Midbrain_Hindbrain"),
        *("a_2", "a_2_3", "a_2_2"),
    ]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_file_round_trip(adata, tmp_path, suffix):
    write(adata)
    path = tmp_path / f"cells.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    assert frame_names(again, "mine") == NAMES
    np.testing.assert_array_equal(again.obsm["mine"], adata.obsm["mine"])


def test_true_names(adata):
    write(adata)
    assert frame_names(adata, "mine") == NAMES
    # Also of some columns, in another order.
    adata.obsm["mine"] = adata.obsm["mine"][["a_2_3", "L2_3_2"]]
    assert frame_names(adata, "mine") == ["a/2", "L2/3"]
    write_record(adata, "other", {"seed": 1})
    before = read_record(adata, "other")
    write(adata, ["a", "b"], "other")
    assert read_record(adata, "other") == before
    assert frame_names(adata, "other") == ["a", "b"]


def test_those_of_an_earlier_run_are_gone(adata):
    write(adata)
    write(adata, ["L2_3", "b"])
    assert frame_names(adata, "mine") == ["L2_3", "b"]
    write(adata)
    remove_entry(adata, "mine")
    remove_entry(adata, "never there")
    assert "mine" not in adata.obsm
    assert adata.uns[Uns.STOFM] == {}


def test_nothing_is_recorded_that_need_not_be(adata):
    write(adata, ["a", "b"])
    assert not adata.uns


def test_records_survive_a_file(adata, tmp_path):
    params = {"layer": None, "n": 3, "weight": 0.2, "name": "x", "flag": True}
    write_record(adata, "X_thing", params, model="abc")
    adata.write_h5ad(tmp_path / "a.h5ad")
    record = read_record(ad.read_h5ad(tmp_path / "a.h5ad"), "X_thing")
    assert record["model"] == "abc"
    assert same_params(record, params)
    assert not same_params(record, params | {"n": 4})
    assert not same_params(record, params | {"more": 1})
    assert read_record(adata, "other") is None
