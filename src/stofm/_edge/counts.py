"""The edge to AnnData for counts: checked CSR blocks of genes from any matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.gene_mapping import kinds_of_others
from stofm._edge.tables import layer_names, require_cells_and_genes
from stofm.genes.ranking import require_sound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

    Rows = slice | NDArray[np.integer]

#: Entries of a block, counted as if dense: 64 MB in double precision.
_BLOCK_ENTRIES: Final = 1 << 23
_MAX_BLOCK_ROWS: Final = 1 << 15
#: Reading rows of a CSC matrix takes a pass over all of it, so there are at most this many blocks.
_MAX_CSC_BLOCKS: Final = 16
_SAMPLE_ROWS: Final = 256
#: A count this near to an integer is one: the difference is float32 noise, not normalisation.
_INTEGER_TOLERANCE: Final = 1e-3
#: Logarithms of counts are below this.
_LARGEST_LOGARITHM: Final = 20.0


class NotRawCountsError(ValueError):
    """A matrix holds something other than raw counts."""


def read_counts(adata: AnnData, *, layer: str | None = None) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of the genes as CSR blocks of rows, without changing or copying the whole.

    CSR, CSC and dense matrices are read, in memory, backed by a file, or as Dask arrays, also
    through views. Values may have any numeric type. Memory is bounded by a block of about 8 million
    entries; Dask arrays are cut at their own chunks. Columns that are not genes are empty, so that
    they count neither as genes nor in totals. A block that does not hold raw counts, or has indices
    out of range, raises ValueError when read.
    """
    require_cells_and_genes(adata)
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"There is no layer {layer!r}; layers of the AnnData: {sorted(layer_names(adata))}."
        )
    return _checked_blocks(adata, layer, _starts_of_blocks(adata, layer))


def peek_counts(adata: AnnData, layer: str | None, rows: Rows) -> tuple[sparse.csr_matrix, bool]:
    """Read some rows, ascending, and say whether they are raw counts."""
    block = _row_reader(adata, layer)(rows)
    is_raw = not _fault_of(block.data)
    return (_rounded(block) if is_raw else block), is_raw


def _checked_blocks(
    adata: AnnData, layer: str | None, starts: list[int]
) -> Iterator[sparse.csr_matrix]:
    read = _row_reader(adata, layer)
    for start, stop in zip(starts, [*starts[1:], adata.n_obs], strict=True):
        block = read(slice(start, stop))
        if fault := _fault_of(block.data):
            advice = _counts_elsewhere(adata, layer) or (
                f"No layer looks like raw counts either. {_advice(block.data, _name(layer))}"
            )
            raise NotRawCountsError(
                f"{_name(layer)} does not hold raw counts: {fault} (non-zero entries of cells "
                f"{start} to {stop - 1}). {advice}"
            )
        yield _rounded(block)


def _starts_of_blocks(adata: AnnData, layer: str | None) -> list[int]:
    n_obs, n_vars = adata.shape
    rows = min(_MAX_BLOCK_ROWS, max(1, _BLOCK_ENTRIES // n_vars))
    # Accessing the matrix of a view would copy it.
    matrix = None if adata.is_view else _matrix(adata, layer)
    if getattr(matrix, "format", "") == "csc":
        rows = max(rows, -(-n_obs // _MAX_CSC_BLOCKS))
    if matrix is None or not hasattr(matrix, "compute"):
        return list(range(0, n_obs, rows))
    # Whole Dask chunks are joined, so that none is computed twice.
    starts, position = [0], 0
    for size in matrix.chunks[0]:
        if position > starts[-1] and position + size - starts[-1] > rows:
            starts.append(position)
        position += size
    return starts


def _matrix(adata: AnnData, layer: str | None) -> Any:
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        names = sorted(layer_names(adata))
        way_out = f"pass `layer`, one of {names}" if names else "put raw counts there"
        raise NotRawCountsError(f"adata.X is empty; {way_out}.")
    return matrix


def _name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _row_reader(adata: AnnData, layer: str | None) -> Callable[[Rows], sparse.csr_matrix]:
    """Return a function that reads rows of the genes, in whatever form the matrix is."""
    is_gene = kinds_of_others(adata) == ""
    if adata.is_view:
        # Its rows and columns are read by compiled code that trusts the indices.
        require_sound(_matrix(adata._adata_ref, layer), _name(layer))
    if adata.is_view and not adata.isbacked:
        # The matrix of a view is a copy of all its rows; that of a view's slice is not.
        return lambda rows: _to_csr(_matrix(adata[rows], layer), _name(layer), is_gene)
    # anndata cannot slice a view of a backed file again: its rows are read together.
    matrix = _matrix(adata, layer)
    require_sound(matrix, _name(layer), entries=getattr(matrix, "format", "") == "csc")
    return lambda rows: _to_csr(matrix[rows], _name(layer), is_gene)


def _to_csr(rows: Any, name: str, is_gene: NDArray[np.bool_]) -> sparse.csr_matrix:
    """Rows as a CSR matrix with nothing in columns that are not genes."""
    if hasattr(rows, "compute"):
        rows = rows.compute()
    if hasattr(rows, "to_memory"):
        rows = rows.to_memory()
    if not sparse.issparse(rows):
        rows = np.asarray(rows)
        # scipy has no sparse matrices of half precision.
        rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    if rows.dtype.kind not in "buif":
        raise TypeError(
            f"Counts must be numbers, found the type {rows.dtype} in {name}. If they are numbers "
            f"all the same: {name} = {name}.astype('float32')."
        )
    require_sound(rows, name)
    block = sparse.csr_matrix(rows)
    if is_gene.all():
        return block
    is_kept = is_gene[block.indices]
    indptr = np.concatenate([[0], np.cumsum(is_kept)])[block.indptr]
    return sparse.csr_matrix((block.data[is_kept], block.indices[is_kept], indptr), block.shape)


def _rounded(block: sparse.csr_matrix) -> sparse.csr_matrix:
    if block.dtype.kind != "f":
        return block
    return sparse.csr_matrix((np.rint(block.data), block.indices, block.indptr), block.shape)


# Values that are not counts


def _fault_of(values: NDArray[Any]) -> str:
    """Why `values` are not counts, with the share; ``""`` if they are."""
    if not len(values) or values.dtype.kind in "bu":
        return ""
    is_float = values.dtype.kind == "f"
    if is_float and not np.isfinite(values).all():
        is_bad, what = np.isnan(values), "NaN"
        if not is_bad.any():
            is_bad, what = np.isinf(values), "infinite"
    elif values.min() < 0:
        is_bad, what = values < 0, f"negative, down to {values.min():.4g}"
    elif is_float:
        is_bad = np.abs(values - np.rint(values)) > _INTEGER_TOLERANCE
        what = f"not integers, up to {values.max():.4g}"
    else:
        return ""
    return f"{100 * is_bad.mean():.3g} % are {what}" if is_bad.any() else ""


def _advice(values: NDArray[Any], matrix: str) -> str:
    """What values that are not counts look like, and what to do."""
    if np.isnan(values).any():
        return (
            "If a missing value means no count, as after joining slices of different panels with "
            f"join='outer', fill it in: {matrix} = np.nan_to_num({matrix}), or join them with "
            "join='inner'. Else drop these cells or genes."
        )
    looks = "normalised or corrected"
    if values.min() < 0:
        looks = "scaled gene by gene (z-scores, as of sc.pp.scale)"
    elif values.max() < _LARGEST_LOGARITHM:
        looks = "like logarithms"
    return f"They look {looks}. Raw counts are needed, before any normalisation."


def _counts_elsewhere(adata: AnnData, layer: str | None) -> str:
    """Say which other matrix looks like raw counts; ``""`` if none does."""
    rows = slice(0, min(_SAMPLE_ROWS, adata.n_obs))
    for name in (None, *layer_names(adata)):
        if name != layer and _looks_raw(adata, name, rows):
            advice = "leave out `layer`" if name is None else f"pass layer={name!r}"
            return f"{_name(name)} looks like raw counts: {advice}."
    if adata.raw is not None:
        from anndata import AnnData

        if _looks_raw(AnnData(adata.raw.X[rows]), None, rows):
            return "adata.raw looks like raw counts: pass adata.raw.to_adata()."
    return ""


def _looks_raw(adata: AnnData, layer: str | None, rows: slice) -> bool:
    try:
        counts, is_raw = peek_counts(adata, layer, rows)
    except (TypeError, ValueError):
        return False
    return is_raw and bool(counts.data.any())
