from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from stofm._edge.counts import read_counts

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (31, 17)


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(3.0, size=SHAPE).astype(np.float64) * rng.integers(1, 4, size=SHAPE)


def message(values: Any, **adata: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        list(read_counts(anndata.AnnData(values, **adata)))
    return str(caught.value)


def log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def ambient(counts: np.ndarray) -> np.ndarray:
    return np.maximum(counts - np.random.default_rng(0).uniform(0, 0.2, SHAPE), 0)


@pytest.mark.parametrize(
    ("change", "finding", "way_out"),
    [
        (log_normalised, "log1p of counts that were scaled to a total of 10,000", "before any"),
        (lambda x: np.expm1(log_normalised(x)) * 100, "scaled to a total of 1,000,000", "before"),
        (
            lambda x: log_normalised(np.ceil(x / 9))[:, :9],
            "log1p of counts that were divided by a f",
            "before",
        ),
        (np.log1p, "They are log1p of counts. ", "np.rint(np.expm1(adata.X)) gives those back"),
        (
            lambda x: np.log2(1 + x),
            "They are log2(1 + x) of counts",
            "np.expm1(adata.X * np.log(2))",
        ),
        (np.sqrt, "They are square roots of counts", "np.power(adata.X, 2)"),
        (lambda x: (x - x.mean(0)) / x.std(0), "scaled gene by gene (z-scores", "before any"),
        (ambient, "removal of ambient RNA", "adata.layers['counts'] = np.rint(adata.X)"),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_what_values_look_like(
    counts: np.ndarray, change: Callable, finding: str, way_out: str, form: Callable
) -> None:
    found = message(form(change(counts)))
    assert finding in found
    assert "No layer looks like raw counts either. " in found
    assert way_out in found


def test_counts_in_raw(counts: np.ndarray) -> None:
    adata = anndata.AnnData(counts)
    adata.raw = adata
    adata.X = log_normalised(counts)
    with pytest.raises(ValueError, match=r"10,000 in each cell\. adata\.raw looks like raw"):
        list(read_counts(adata))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_missing_genes_of_joined_panels(counts: np.ndarray, kind: type) -> None:
    tables = {name: anndata.AnnData(counts.astype(kind)) for name in ("a", "b")}
    for table in tables.values():
        table.var_names = [f"ABC{k}" for k in range(17)]
    joined = anndata.concat(
        {"a": tables["a"][:, :11], "b": tables["b"][:, 7:]}, join="outer", index_unique="-"
    )
    found = message(joined.X)
    assert "Up to 7 genes are NaN in all of many cells at once, as after joining slices" in found
    assert "join='inner'" in found
    assert "fill_value=0" in found
    joined.X = np.nan_to_num(joined.X)  # as it says
    assert sum(block.shape[0] for block in read_counts(joined)) == 62


def test_missing_values_here_and_there(counts: np.ndarray) -> None:
    counts[np.arange(7), np.arange(7)] = np.nan
    found = message(counts)
    assert "7 cells have NaN. " in found
    assert "join" not in found


def test_values_that_are_no_numbers(counts: np.ndarray) -> None:
    adata = anndata.AnnData(counts)
    adata.layers["text"] = counts.astype(int).astype(str)
    with pytest.raises(TypeError, match=r"in adata.layers\['text'\].*astype\('float32'\)"):
        list(read_counts(adata, layer="text"))


def test_values_beyond_what_a_type_holds(counts: np.ndarray) -> None:
    assert "up to 3e+08, which float32 does not hold to the last digit" in message(
        np.where(counts == counts.max(), 3e8, counts).astype(np.float32)
    )
