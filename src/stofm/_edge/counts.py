"""The edge to AnnData for counts: checked CSR blocks of genes out of any matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.features import read_features
from stofm._edge.not_counts import cause_of
from stofm._edge.tables import layer_names, require_cells_and_genes
from stofm.genes.compressed import DamagedMatrixError, require_sound, require_sound_pointers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData
    from numpy.typing import NDArray

    Rows = slice | NDArray[np.integer]

#: Entries of a block if it were dense: 64 MB in double precision.
_BLOCK_ENTRIES: Final = 1 << 23
_MAX_BLOCK_ROWS: Final = 1 << 15
#: Rows of a CSC matrix cost a pass over all of it, so there are at most this many blocks.
_MAX_CSC_BLOCKS: Final = 16
_SAMPLE_ROWS: Final = 256
#: A count this near to an integer is one: noise of float32 arithmetic, not a normalised value.
_INTEGER_TOLERANCE: Final = 1e-3


class NotRawCountsError(ValueError):
    """A matrix holds something else than raw counts."""


@dataclass(frozen=True, eq=False)
class CountReader:
    """Blocks of rows of a count matrix, from `bounds` to `bounds`, read and checked one at a time.

    They are CSR matrices of (rows of the block, n_vars). Columns that are no genes are empty, so
    that they enter neither genes nor totals.
    """

    adata: AnnData
    layer: str | None
    bounds: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        read = _row_reader(self.adata, self.layer)
        is_gene = read_features(self.adata).is_gene
        for start, stop in self.bounds:
            block = _to_csr(read(slice(start, stop)), _name(self.layer), start)
            yield _checked(_columns_only(block, is_gene), self.adata, self.layer, start)


def read_counts(
    adata: AnnData, *, layer: str | None = None, chunk_size: int | None = None
) -> CountReader:
    """Return the counts of the genes as blocks of rows, without changing or copying the whole.

    CSR, CSC and dense matrices are read, in memory, backed by a file, or as Dask arrays, also
    through views. Values may have any numeric type. Memory is bounded by a block: `chunk_size`
    rows, or as many as make about 8 million entries; Dask arrays are cut at their own chunks. A
    block that does not hold raw counts, or has indices out of range, raises ValueError when read.
    """
    require_cells_and_genes(adata)
    if chunk_size is not None and chunk_size < 1:
        msg = f"chunk_size must be at least 1, found {chunk_size}."
        raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"There is no layer {layer!r}; layers of the AnnData: {sorted(layer_names(adata))}."
        raise KeyError(msg)
    return CountReader(adata, layer, _block_bounds(adata, layer, chunk_size))


def peek_counts(
    adata: AnnData, layer: str | None, rows: NDArray[np.integer]
) -> tuple[sparse.csr_matrix, bool]:
    """Read some rows, ascending, whatever they hold, and tell whether they are raw counts."""
    block = _to_csr(_row_reader(adata, layer)(rows), _name(layer), int(rows[0]))
    values = _columns_only(block, read_features(adata).is_gene)
    is_raw = not fault_of(values.data)
    return (_rounded(values) if is_raw else values), is_raw


def _block_bounds(
    adata: AnnData, layer: str | None, chunk_size: int | None
) -> tuple[tuple[int, int], ...]:
    n_obs, n_vars = adata.shape
    rows = chunk_size or min(_MAX_BLOCK_ROWS, max(1, _BLOCK_ENTRIES // n_vars))
    # To look at the matrix of a view would copy it.
    matrix = None if adata.is_view else _matrix(adata, layer)
    if getattr(matrix, "format", "") == "csc" and chunk_size is None:
        rows = max(rows, -(-n_obs // _MAX_CSC_BLOCKS))
    if matrix is not None and hasattr(matrix, "chunks") and hasattr(matrix, "compute"):
        starts = _starts_at_chunks(matrix.chunks[0], rows)
    else:
        starts = list(range(0, n_obs, rows))
    return tuple(zip(starts, [*starts[1:], n_obs], strict=True))


def _starts_at_chunks(chunk_rows: tuple[int, ...], rows: int) -> list[int]:
    """Join whole Dask chunks up to `rows` rows, so that none is computed twice."""
    starts = [0]
    position = 0
    for size in chunk_rows:
        if position + size - starts[-1] > rows and position > starts[-1]:
            starts.append(position)
        position += size
    return starts


def _matrix(adata: AnnData, layer: str | None) -> Any:
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        names = sorted(layer_names(adata))
        way_out = f"pass `layer`, one of {names}" if names else "put raw counts there"
        msg = f"adata.X is empty; {way_out}."
        raise ValueError(msg)
    return matrix


def _row_reader(adata: AnnData, layer: str | None) -> Callable[[Rows], Any]:
    """Return a function that reads rows of the matrix, in whatever form it has them."""
    if adata.is_view:
        # Its rows and columns are taken by compiled code that trusts the indices.
        require_sound(_matrix(adata._adata_ref, layer), _name(layer))
    if adata.is_view and not adata.isbacked:
        # The matrix of a view is a copy of all its rows; that of a view's slice is not.
        return lambda rows: _matrix(adata[rows], layer)
    # anndata cannot slice a view of a backed file again: its rows are read together.
    matrix = _matrix(adata, layer)
    form = getattr(matrix, "format", "")
    if form == "csr":
        require_sound_pointers(matrix, _name(layer))
    elif form == "csc":
        require_sound(matrix, _name(layer))

    def read(rows: Rows) -> Any:
        is_csr = isinstance(matrix, sparse.csr_matrix | sparse.csr_array)
        if is_csr and isinstance(rows, slice):
            return _csr_rows(matrix, rows.start, rows.stop)
        return matrix[rows]

    return read


def _name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _csr_rows(matrix: Any, start: int, stop: int) -> sparse.csr_matrix:
    """Rows of a CSR matrix that share its memory."""
    entries = slice(matrix.indptr[start], matrix.indptr[stop])
    return sparse.csr_matrix(
        (
            matrix.data[entries],
            matrix.indices[entries],
            matrix.indptr[start : stop + 1] - matrix.indptr[start],
        ),
        shape=(stop - start, matrix.shape[1]),
    )


def _to_csr(rows: Any, name: str, start: int = 0) -> sparse.csr_matrix:
    if hasattr(rows, "compute"):
        rows = rows.compute()
    if hasattr(rows, "to_memory"):
        rows = rows.to_memory()
    if not sparse.issparse(rows):
        rows = np.asarray(rows)
        # scipy has no sparse matrices of half precision.
        rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    if rows.dtype.kind not in "buif":
        msg = (
            f"Counts must be numbers, found the type {rows.dtype} in {name}. If they are numbers "
            f"all the same: {name} = {name}.astype('float32')."
        )
        raise TypeError(msg)
    require_sound(rows, name, first_row=start)
    return sparse.csr_matrix(rows)


def _columns_only(block: sparse.csr_matrix, kept: NDArray[np.bool_]) -> sparse.csr_matrix:
    """The block with nothing in the other columns."""
    if kept.all():
        return block
    is_kept = kept[block.indices]
    indptr = np.concatenate([[0], np.cumsum(is_kept)])[block.indptr]
    return sparse.csr_matrix((block.data[is_kept], block.indices[is_kept], indptr), block.shape)


def _checked(
    block: sparse.csr_matrix, adata: AnnData, layer: str | None, start: int
) -> sparse.csr_matrix:
    """Return the block with integer values, or say what they are instead."""
    fault = fault_of(block.data)
    if fault:
        finding, advice = cause_of(block)
        elsewhere = _counts_elsewhere(adata, layer)
        advice = f"No layer looks like raw counts either. {advice.format(matrix=_name(layer))}"
        msg = (
            f"{_name(layer)} does not hold raw counts: {fault} (non-zero entries of cells {start} "
            f"to {start + block.shape[0] - 1}). {finding}{elsewhere or advice}"
        )
        raise NotRawCountsError(msg)
    return _rounded(block)


def _rounded(block: sparse.csr_matrix) -> sparse.csr_matrix:
    if block.dtype.kind != "f":
        return block
    integers = np.rint(block.data)
    if np.array_equal(integers, block.data):
        return block
    return sparse.csr_matrix((integers, block.indices, block.indptr), shape=block.shape)


def _counts_elsewhere(adata: AnnData, layer: str | None) -> str:
    """Say which other matrix looks like raw counts; ``""`` if none does."""
    places: dict[str, tuple[str, str | None]] = {
        _name(name): (f"pass layer={name!r}", name) for name in layer_names(adata)
    }
    # To look at the matrix of a view would copy it.
    if (adata._adata_ref if adata.is_view else adata).X is not None:
        places = {"adata.X": ("leave out `layer`", None)} | places
    first = slice(0, min(_SAMPLE_ROWS, adata.n_obs))
    for where, (advice, name) in places.items():
        if name != layer and _looks_raw(partial(_first_rows, adata, name, first)):
            return f"{where} looks like raw counts: {advice}."
    if adata.raw is not None and _looks_raw(partial(_rows_of_raw, adata, first)):
        return "adata.raw looks like raw counts: pass adata.raw.to_adata()."
    return ""


def _first_rows(adata: AnnData, layer: str | None, rows: slice) -> Any:
    return _row_reader(adata, layer)(rows)


def _rows_of_raw(adata: AnnData, rows: slice) -> Any:
    require_sound(adata.raw.X, "adata.raw.X")
    return adata.raw.X[rows]


def _looks_raw(read: Callable[[], Any]) -> bool:
    try:
        values = _to_csr(read(), "").data
    except (TypeError, DamagedMatrixError):
        return False
    return bool(values.any()) and not fault_of(values)


def fault_of(values: NDArray[Any]) -> str:
    """What keeps `values` from being counts, with the share; ``""`` if nothing does."""
    if not len(values) or values.dtype.kind in "bu":
        return ""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        undefined = np.isnan(values)
        if undefined.any():
            return f"{_percent(undefined)} are NaN"
        return f"{_percent(np.isinf(values))} are infinite"
    if values.min() < 0:
        return f"{_percent(values < 0)} are negative, down to {values.min():.4g}"
    return _fault_of_floats(values) if values.dtype.kind == "f" else ""


def _fault_of_floats(values: NDArray[np.floating]) -> str:
    largest = values.max()
    if largest >= 2.0 ** (np.finfo(values.dtype).nmant + 1):
        return f"values up to {largest:.4g}, which {values.dtype} does not hold to the last digit"
    off = np.abs(values - np.rint(values))
    if off.max() > _INTEGER_TOLERANCE:
        return f"{_percent(off > _INTEGER_TOLERANCE)} are not integers, up to {largest:.4g}"
    return ""


def _percent(marks: NDArray[np.bool_]) -> str:
    return f"{100 * marks.mean():.3g} %"
