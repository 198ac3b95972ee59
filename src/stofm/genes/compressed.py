"""Sparse matrices from outside: whether their indices stay inside, before anything reads by them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

#: Indices of a file that are read at once.
_ENTRIES_AT_ONCE: Final = 1 << 22


def require_sound(matrix: Any, name: str, *, entries: bool = True) -> None:
    """Refuse a sparse matrix that would be read outside of its entries or its shape.

    Compiled code follows such indices without a check: they count for another gene, or end the
    process. CSR and CSC matrices are looked at, in memory or in a file (a sparse dataset of
    anndata); without `entries`, only where their rows or columns start.
    """
    form = getattr(matrix, "format", "")
    if form not in ("csr", "csc"):
        return
    parts = getattr(matrix, "group", None)
    if parts is None:
        parts = {part: getattr(matrix, part) for part in ("indptr", "indices", "data")}
    indptr, indices = parts["indptr"][...], parts["indices"]
    n_lines, n_places = matrix.shape if form == "csr" else matrix.shape[::-1]
    is_sound = (
        len(indptr) == n_lines + 1
        and indptr[0] == 0
        and indptr[-1] <= min(indices.shape[0], parts["data"].shape[0])
        and bool((indptr[1:] >= indptr[:-1]).all())
    )
    n = int(indptr[-1]) if is_sound and entries else 0
    for start in range(0, n, _ENTRIES_AT_ONCE):
        part = np.asarray(indices[start : min(start + _ENTRIES_AT_ONCE, n)])
        is_sound = is_sound and part.min() >= 0 and part.max() < n_places
    if not is_sound:
        raise ValueError(
            f"{name} is damaged: indices of its entries do not fit its shape {tuple(matrix.shape)} "
            "or their number. Get the file again, or build the matrix again from its source."
        )
