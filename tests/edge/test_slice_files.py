"""Slices are read by what is in their files, and every message names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from stofm._edge.slice_files import (
    is_spatialdata,
    open_table,
    read_data,
    refuse_output,
    write_data,
)

if TYPE_CHECKING:
    from anndata import AnnData


#: Of libraries that spatialdata imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def sdata(adata: AnnData):
    spatialdata = pytest.importorskip("spatialdata")
    adata.obs["region"] = adata.obs["library"]
    adata.obs["instance"] = np.arange(adata.n_obs)
    model = spatialdata.models.TableModel
    keys = {"region_key": "region", "instance_key": "instance"}
    table = model.parse(adata, region=["left", "right"], **keys)
    with pytest.warns(UserWarning, match="not present in the SpatialData"):
        return spatialdata.SpatialData(tables={"table": table})


@pytest.fixture
def store(sdata, tmp_path: Path) -> Path:
    path = tmp_path / "sdata.zarr"
    write_data(sdata, path)
    return path


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_matrices_of_a_zarr_store_stay_on_disk_and_are_written_whole(
    adata: AnnData, tmp_path: Path, ending: str
) -> None:
    adata.layers["dense"] = adata.X.toarray()
    adata.obsp["graph"] = adata.X @ adata.X.T
    adata.varm["weights"] = np.ones((adata.n_vars, 2))
    adata.uns["told"] = {"matrix": adata.X.copy()}
    adata.raw = adata.copy()
    adata.write_zarr(tmp_path / "slice.zarr")
    opened = read_data(tmp_path / "slice.zarr", backed=True)
    for matrix in (opened.X, opened.raw.X, opened.layers["dense"], opened.obsp["graph"]):
        assert not isinstance(matrix, np.ndarray | sparse.spmatrix)
    opened.obsm["X_mine"] = np.ones((adata.n_obs, 2))
    write_data(opened, tmp_path / f"out.{ending}")
    found = read_data(tmp_path / f"out.{ending}")
    assert found.obs.equals(adata.obs)
    assert found.var.equals(adata.var)
    np.testing.assert_array_equal(found.varm["weights"], adata.varm["weights"])
    np.testing.assert_array_equal(found.layers["dense"], adata.layers["dense"])
    for one, other in (
        (found.X, adata.X),
        (found.raw.X, adata.raw.X),
        (found.obsp["graph"], adata.obsp["graph"]),
        (found.uns["told"]["matrix"], adata.uns["told"]["matrix"]),
    ):
        np.testing.assert_array_equal(one.toarray(), other.toarray())


@pytest.mark.filterwarnings("ignore:.*not present in the SpatialData")
def test_spatialdata_is_read_and_written(store: Path, adata: AnnData) -> None:
    assert is_spatialdata(store)
    np.testing.assert_array_equal(open_table(store).to_memory().X.toarray(), adata.X.toarray())
    data = read_data(store)
    data.tables["table"].obsm["X_mine"] = np.ones((adata.n_obs, 2))
    write_data(data, store)
    assert "X_mine" in open_table(store, "table").obsm
    with pytest.raises(KeyError, match=r"has the tables \['table'\]"):
        open_table(store, "other")
    assert [path.name for path in store.parent.iterdir()] == ["sdata.zarr"]


def damaged(path: Path, how: str, adata: AnnData) -> Path:
    adata.write_h5ad(path)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_bytes(b"gene,cell\n" * 99)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        with h5py.File(path, "r+") as file:
            if how == "an unknown encoding":
                file["obs"].attrs["encoding-type"] = "nobody knows"
            else:
                del file["var"]
    return path


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "an unknown encoding", "no genes"])
@pytest.mark.parametrize("read", [read_data, open_table])
def test_a_damaged_file_is_named(how: str, read, adata: AnnData, tmp_path: Path) -> None:
    path = damaged(tmp_path / "mine.h5ad", how, adata)
    with pytest.raises(ValueError, match=r"mine\.h5ad (can't be read \(|holds no AnnData)"):
        read(path)


def test_other_files_are_named_and_explained(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.loom", "w") as file:
        file["matrix"] = [1]
    with pytest.raises(ValueError, match=r"expected obs and var, found \['matrix'\]"):
        read_data(tmp_path / "other.loom")
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"folder\.zarr can't be read .*no AnnData"):
        read_data(tmp_path / "folder.zarr")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere"):
        open_table(tmp_path / "nowhere.h5ad")


def test_only_files_of_the_kind_are_replaced(adata: AnnData, store: Path, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "old.h5ad")
    (tmp_path / "text.h5ad").write_text("mine")
    (tmp_path / "images.zarr").mkdir()
    (tmp_path / "images.zarr" / "mydata.txt").write_text("mine")
    refuse_output(tmp_path / "old.h5ad", has_spatialdata=False, overwrite=True)
    refuse_output(store, has_spatialdata=True, overwrite=True)
    for path, has_spatialdata in (("text.h5ad", False), ("images.zarr", False), (store, False)):
        with pytest.raises(FileExistsError, match="holds something other than an AnnData"):
            refuse_output(tmp_path / path, has_spatialdata=has_spatialdata, overwrite=True)
    (store / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"more than a SpatialData .*\['thesis.txt'\]"):
        refuse_output(store, has_spatialdata=True, overwrite=True)
    with pytest.raises(ValueError, match=r"must end in \.h5ad or \.zarr"):
        refuse_output(tmp_path / "out.csv", has_spatialdata=False, overwrite=True)


def foreign(path: Path) -> Path:
    with h5py.File(path / "x.h5ad", "w") as file:
        for name in ("obs", "var"):
            file.create_group(name)
        file.attrs["encoding-type"] = "MuData"
    return path / "x.h5ad"


def test_a_mudata_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds something other than an AnnData"):
        refuse_output(foreign(tmp_path), has_spatialdata=False, overwrite=True)


def test_of_a_mudata_a_table_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no AnnData.*\(MuData\).*write the table"):
        read_data(foreign(tmp_path))


@pytest.mark.parametrize("array", ["X/data", "X/indices"])
@pytest.mark.parametrize("read", [read_data, open_table])
def test_a_store_that_lacks_chunks_is_refused(
    array: str, read, adata: AnnData, tmp_path: Path
) -> None:
    write_data(adata, tmp_path / "x.zarr")
    for file in (tmp_path / "x.zarr" / array).rglob("*"):
        if file.is_file() and file.name not in {".zarray", ".zattrs", ".zgroup", "zarr.json"}:
            file.unlink()
    with pytest.raises(ValueError, match=rf"lacks a part: the array '{array}.* has 0 of 1 chunks"):
        read(tmp_path / "x.zarr")


def test_chunks_of_zeros_may_be_left_out(adata: AnnData, tmp_path: Path) -> None:
    small = adata[:3, :2].copy()
    small.X = small.X * 0
    small.X.eliminate_zeros()
    small.layers["zeros"] = np.zeros((3, 2))
    small.obs["same"] = "a"
    write_data(small, tmp_path / "x.zarr")
    assert read_data(tmp_path / "x.zarr").n_obs == 3


@pytest.mark.parametrize(("name", "k"), [("x.h5ad", 0), ("x.zarr", 1)])
def test_killed_at_a_rename_the_counts_are_found(
    name: str, k: int, adata: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = adata[:5, :4].copy()
    path = tmp_path / name
    real = {call: getattr(os, call) for call in ("rename", "replace")}
    write_data(small, path)
    calls = iter(range(1000))

    def interrupt(*args, call):
        is_ours = Path(args[0]).parent == tmp_path
        if is_ours and next(calls) >= k:
            raise KeyboardInterrupt
        return real[call](*args)

    for call in real:
        monkeypatch.setattr(os, call, lambda *a, call=call: interrupt(*a, call=call))
    try:
        write_data(small, path)
    except KeyboardInterrupt:
        pass
    finally:
        monkeypatch.undo()
    assert read_data(path).shape == (5, 4)
    write_data(small, path)
    assert [one.name for one in tmp_path.iterdir()] == [name]
    assert ad.read_zarr(path).n_obs == 5 if name.endswith("zarr") else True
