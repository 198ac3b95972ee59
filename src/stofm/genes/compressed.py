"""Sparse matrices from outside: whether their indices stay inside, before anything reads by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Indices of a file that are read at once.
_ENTRIES_AT_ONCE: Final = 1 << 22
_WAY_OUT: Final = "Get the file again, or build the matrix again from its source."


class DamagedMatrixError(ValueError):
    """A sparse matrix has indices that do not fit its shape or its entries."""


def require_sound(matrix: Any, name: str, *, first_row: int = 0) -> None:
    """Refuse a sparse matrix that would be read outside of its entries or its shape.

    Compiled code follows such indices without a check: they count for another gene, or end the
    process. CSR, CSC and COO matrices are looked at, in memory or in a file (a sparse dataset of
    anndata). `name` and `first_row`, for the rows of a larger matrix, are for messages.
    """
    form = getattr(matrix, "format", "")
    if not isinstance(form, str):  # a column of a table
        return
    if form == "coo":
        for axis, (indices, n) in enumerate(zip(matrix.coords, matrix.shape, strict=True)):
            if (place := _first_outside(np.asarray(indices), n)) is not None:
                msg = (
                    f"{name} is damaged: indices of axis {axis} must be 0 to {n - 1}, found "
                    f"{indices[place]}. {_WAY_OUT}"
                )
                raise DamagedMatrixError(msg)
    if form not in ("csr", "csc"):
        return
    indptr = require_sound_pointers(matrix, name)
    indices = getattr(matrix, "group", None)
    indices = matrix.indices if indices is None else indices["indices"]
    n_minor, what = (matrix.shape[1], "column") if form == "csr" else (matrix.shape[0], "row")
    for start in range(0, int(indptr[-1]), _ENTRIES_AT_ONCE):
        part = np.asarray(indices[start : min(start + _ENTRIES_AT_ONCE, int(indptr[-1]))])
        place = _first_outside(part, n_minor)
        if place is None:
            continue
        line = int(np.searchsorted(indptr, start + place, side="right")) - 1
        at = f"cell {first_row + line}" if form == "csr" else f"column {line}"
        msg = (
            f"{name} is damaged: a {what} index is {part[place]} (at {at}), and there are "
            f"{n_minor} {what}s. {_WAY_OUT}"
        )
        raise DamagedMatrixError(msg)


def require_sound_pointers(matrix: Any, name: str) -> NDArray[Any]:
    """Return where the rows (CSR) or columns (CSC) of a matrix start, if these places are possible."""
    group = getattr(matrix, "group", None)
    indptr, indices, data = (
        (matrix.indptr, matrix.indices, matrix.data)
        if group is None
        else (group["indptr"][...], group["indices"], group["data"])
    )
    n_lines = matrix.shape[0 if matrix.format == "csr" else 1]
    n_entries = min(indices.shape[0], data.shape[0])
    if (
        len(indptr) != n_lines + 1
        or indptr[0] != 0
        or indptr[-1] > n_entries
        or (indptr[1:] < indptr[:-1]).any()
    ):
        lines = "rows" if matrix.format == "csr" else "columns"
        msg = (
            f"{name} is damaged: the places where its {n_lines} {lines} start must rise from 0 to at "
            f"most {n_entries}, the number of its entries. {_WAY_OUT}"
        )
        raise DamagedMatrixError(msg)
    found: NDArray[Any] = indptr
    return found


def _first_outside(indices: NDArray[Any], n: int) -> int | None:
    """Place of the first index that is not in 0 to n - 1; None if all are."""
    if indices.dtype.kind == "i":
        # Negative ones become the largest: one pass instead of two.
        indices = indices.view(f"u{indices.dtype.itemsize}")
    if not len(indices) or indices.max() < n:
        return None
    return int(np.argmax(indices >= n))
