from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import ids_and_symbols
from stofm._edge.slice_files import open_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = (43, 13)


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(0.7, size=SHAPE)


def in_blocks_of(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", n_rows * SHAPE[1])


def together(adata: anndata.AnnData, **options: Any) -> np.ndarray:
    blocks = list(read_counts(adata, **options))
    assert all(isinstance(block, sparse.csr_matrix) for block in blocks)
    return np.vstack([block.toarray() for block in blocks])


def chunked(values: Any) -> da.Array:
    return da.from_array(values, chunks=(7, 5))


def chunked_sparse(values: np.ndarray) -> da.Array:
    return da.from_array(values, chunks=(7, 13)).map_blocks(sparse.csr_matrix)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "dask": chunked,
    "dask_sparse": chunked_sparse,
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("n_rows", [1, 11, 100])
def test_every_kind_of_matrix(
    counts: np.ndarray, kind: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(n_rows, monkeypatch)
    adata = anndata.AnnData(KINDS[kind](counts))
    assert np.array_equal(together(adata), counts)
    adata = anndata.AnnData(shape=SHAPE, layers={"raw": KINDS[kind](counts)})
    assert np.array_equal(together(adata, layer="raw"), counts)


@kinds
def test_views(counts: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(2, monkeypatch)
    adata = anndata.AnnData(KINDS[kind](counts))
    rows, columns = np.array([40, 3, 3, 17, 0]), np.array([12, 1, 7])
    view = adata[rows][:, columns]
    assert np.array_equal(together(view), counts[rows][:, columns])
    assert np.array_equal(together(adata[5:29:3]), counts[5:29:3])
    assert view.is_view


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense"])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files(
    counts: np.ndarray, kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(11, monkeypatch)
    adata = anndata.AnnData(KINDS[kind](counts.astype(np.float32)))
    path = tmp_path / f"slice{suffix}"
    adata.write_zarr(path) if suffix == ".zarr" else adata.write_h5ad(path)
    opened = open_table(path)
    assert opened.isbacked == (suffix == ".h5ad")
    assert np.array_equal(together(opened), counts)
    assert np.array_equal(together(opened[3:31, 2:9]), counts[3:31, 2:9])


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "uint64", "int64", "float16", "float32", "float64"]
)
def test_types(counts: np.ndarray, dtype: str) -> None:
    counts = np.minimum(counts, 1 if dtype == "bool" else 100)
    assert np.array_equal(together(anndata.AnnData(counts.astype(dtype))), counts)
    if dtype != "float16":
        adata = anndata.AnnData(sparse.csr_matrix(counts.astype(dtype)))
        assert np.array_equal(together(adata), counts)


def test_dask_chunks_are_computed_once(counts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(17, monkeypatch)
    seen: list[int] = []

    def note(block: np.ndarray) -> np.ndarray:
        seen.append(len(block))
        return block

    lazy = chunked(counts).rechunk((7, 13)).map_blocks(note, dtype=counts.dtype, meta=counts[:0])
    adata = anndata.AnnData(lazy)
    seen.clear()
    blocks = read_counts(adata)
    assert [block.shape[0] for block in blocks] == [14, 14, 15]
    assert sum(seen) == 43


def test_rows_of_a_block(monkeypatch: pytest.MonkeyPatch, counts: np.ndarray) -> None:
    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", 13 * 2)
    assert len(list(read_counts(anndata.AnnData(sparse.csr_matrix(counts))))) == 22
    # Each block of a CSC matrix costs a pass over all of it.
    assert len(list(read_counts(anndata.AnnData(sparse.csc_matrix(counts))))) == 15


def test_memory_is_that_of_a_block(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stofm._edge.counts._BLOCK_ENTRIES", 100 * 700)
    whole = sparse.random(3_000, 700, 0.3, format="csr", random_state=rng, dtype=np.float32)
    whole.data[:] = 1
    anndata.AnnData(whole).write_h5ad(tmp_path / "slice.h5ad")
    opened = open_table(tmp_path / "slice.h5ad")
    tracemalloc.start()
    n_counts = sum(block.sum() for block in read_counts(opened))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_counts == whole.nnz
    assert peak < (whole.data.nbytes + whole.indices.nbytes) / 4


def test_noise_of_floats_is_rounded_away(counts: np.ndarray) -> None:
    noisy = sparse.csr_matrix(counts * np.float32(1.00001))
    adata = anndata.AnnData(noisy.copy())
    assert np.array_equal(together(adata), counts)
    assert np.array_equal(adata.X.data, noisy.data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 2.5, 3.0], [0, 0, 0.25]], "50 % are not integers, up to 3 "),
        ([[1.0, -2.0, 3.0], [0, 0, 1]], "25 % are negative, down to -2 "),
        ([[1, -2, 3], [0, 0, 1]], "25 % are negative, down to -2 "),
        ([[1.0, np.nan, 3.0], [0, 0, 0]], "33.3 % are NaN"),
        ([[1.0, np.inf, 3.0], [0, 0, 0]], "33.3 % are infinite"),
    ],
)
def test_what_is_not_counts(values: list, message: str) -> None:
    adata = anndata.AnnData(sparse.csr_matrix(np.array(values)))
    with pytest.raises(ValueError, match="adata.X does not hold raw counts: " + message) as caught:
        together(adata)
    assert "(non-zero entries of cells 0 to 1)" in str(caught.value)
    assert "No layer looks like raw counts either" in str(caught.value)


def test_message_names_where_counts_are(counts: np.ndarray) -> None:
    def normalised() -> anndata.AnnData:
        return anndata.AnnData(np.log1p(counts).astype(np.float32))

    adata = normalised()
    adata.layers["scaled"] = counts - 0.5
    adata.layers["counts"] = sparse.csc_matrix(counts)
    with pytest.raises(ValueError, match=r"layers\['counts'\] looks like .*: pass layer='counts'"):
        together(adata)
    with pytest.raises(ValueError, match=r"layers\['counts'\] looks like .*: pass layer='counts'"):
        together(adata[:7])
    with pytest.raises(ValueError, match=r"adata.layers\['scaled'\] does not hold raw counts"):
        together(adata, layer="scaled")
    adata = anndata.AnnData(counts)
    adata.layers["scaled"] = counts - 0.5
    with pytest.raises(ValueError, match=r"adata\.X looks like raw counts: leave out `layer`"):
        together(adata, layer="scaled")
    adata = normalised()
    adata.raw = anndata.AnnData(sparse.csr_matrix(counts))
    with pytest.raises(ValueError, match=r"adata.raw looks like .*: pass adata.raw.to_adata\(\)"):
        together(adata)


def test_later_blocks_are_checked_too(counts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(15, monkeypatch)
    values = counts.astype(np.float64)
    values[41, 3] = 0.5
    with pytest.raises(ValueError, match="entries of cells 30 to 42"):
        together(anndata.AnnData(values))


@pytest.mark.parametrize(("shape", "what"), [((0, 3), "cells"), ((3, 0), "genes")])
def test_empty(shape: tuple[int, int], what: str) -> None:
    with pytest.raises(ValueError, match=f"has no {what} \\(shape \\({shape[0]}, {shape[1]}\\)\\)"):
        read_counts(anndata.AnnData(np.ones(shape)))


def test_unusable_arguments(counts: np.ndarray) -> None:
    adata = anndata.AnnData(shape=SHAPE, layers={"raw": counts})
    with pytest.raises(ValueError, match=r"adata.X is empty; pass `layer`, one of \['raw'\]"):
        read_counts(adata)
    with pytest.raises(ValueError, match=r"adata.X is empty; put raw counts there"):
        read_counts(anndata.AnnData(shape=SHAPE))
    with pytest.raises(KeyError, match=r"no layer 'counts'; layers of the AnnData: \['raw'\]"):
        read_counts(adata, layer="counts")
    adata.layers["text"] = np.full(SHAPE, "a", dtype=object)
    with pytest.raises(TypeError, match="Counts must be numbers, found the type object"):
        together(adata, layer="text")


def test_gene_names() -> None:
    adata = anndata.AnnData(np.ones((2, 2)))
    adata.var_names = ["GFAP", "MBP"]
    assert ids_and_symbols(adata) == (["GFAP", "MBP"], [""] * 2)
    adata.var["feature_name"] = pd.Categorical(["A", "B"])
    adata.var["gene_ids"] = ["ENSG00000131095", None]
    adata.var["score"] = [0.1, 0.2]
    (first, missing), others = ids_and_symbols(adata)
    assert first == "ENSG00000131095"
    assert missing == ""
    assert others == ["GFAP", "MBP"]
    adata.var_names = ["ENSG00000131095", "ENSG00000197971"]
    assert ids_and_symbols(adata) == (list(adata.var_names), ["A", "B"])


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "csr_array"])
@pytest.mark.parametrize(("place", "value"), [("indices", 50), ("indices", -2), ("indptr", 10**6)])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_damaged_matrices(
    counts: np.ndarray, form: str, place: str, value: int, layer: str | None, tmp_path: Path
) -> None:
    adata = anndata.AnnData(shape=SHAPE, layers={"raw": KINDS[form](counts)})
    adata.X = KINDS[form](counts) if layer is None else None
    getattr(adata.X if layer is None else adata.layers[layer], place)[5] = value
    adata.write_h5ad(tmp_path / "slice.h5ad")
    adata.write_zarr(tmp_path / "slice.zarr")
    name = "adata.X" if layer is None else r"adata.layers\['raw'\]"
    opened = [open_table(tmp_path / f"slice.{end}") for end in ("h5ad", "zarr")]
    for damaged in (adata, adata[3:, ::2], *opened):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            list(read_counts(damaged, layer=layer))


def test_duplicate_and_unsorted_indices_are_no_damage() -> None:
    entries = (np.array([1.0, 2, 3, 4]), np.array([2, 0, 2, 1]), np.array([0, 3, 4]))
    adata = anndata.AnnData(sparse.csr_matrix(entries, shape=(2, 3)))
    assert together(adata).tolist() == [[2, 0, 4], [0, 4, 0]]


@kinds
def test_only_genes_are_counted(
    counts: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(11, monkeypatch)
    adata = anndata.AnnData(KINDS[kind](counts))
    adata.var["type"] = ["Gene Expression"] * 9 + ["Antibody Capture"] * 4
    assert np.array_equal(together(adata), counts * (np.arange(13) < 9))
    normalised = counts * np.where(np.arange(13) < 9, 1, -0.7)
    adata = anndata.AnnData(KINDS[kind](normalised), var=adata.var)
    assert np.array_equal(together(adata)[:, :9], counts[:, :9])


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda x: np.log1p(x / 3), "look like logarithms. Raw counts are needed, before any"),
        (lambda x: x - 0.7, "look scaled gene by gene"),
        (lambda x: x * 30.7, "look normalised or corrected"),
        (lambda x: np.where(x > 1, np.nan, x), "join='outer', fill it in: adata.X = np.nan_to_num"),
    ],
)
def test_what_values_look_like(counts: np.ndarray, change: Callable, advice: str) -> None:
    with pytest.raises(ValueError, match="No layer looks like raw counts either") as caught:
        together(anndata.AnnData(change(counts)))
    assert advice in str(caught.value)
