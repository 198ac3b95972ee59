"""Ranked gene tokens of cells, as arrays and as a matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._digests import fingerprint
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


#: Rows of a matrix of tokens that are checked at once.
_ROWS_AT_ONCE: Final = 1 << 14


@dataclass(frozen=True, eq=False)
class RankedTokens:
    """Gene tokens of many cells, one after another.

    Attributes
    ----------
    tokens
        (n_tokens_in_all,) int32, cell after cell, in the order of rank.
    offsets
        (n_cells + 1,) int64; cell c owns ``tokens[offsets[c]:offsets[c + 1]]``.
    values
        (n_tokens_in_all,) float32 value of each token (:func:`rank_genes`). None where only the
        order was asked for.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        rising = bool((np.diff(self.offsets) >= 0).all())
        if not rising or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError("offsets must rise from 0 to the number of tokens.")

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """(n_cells,) number of tokens of each cell."""
        return np.diff(self.offsets).astype(np.int32)

    def to_csr(self, max_tokens: int) -> sparse.csr_matrix:
        """Return the tokens as an int32 matrix, (n_cells, max_tokens).

        Row c holds the cell's tokens in its first columns, in order; no token is 0 (the
        padding token), so the matrix loses none. No cell may have more than `max_tokens` tokens.
        """
        return self._csr(self.tokens, max_tokens)

    def values_to_csr(self, max_tokens: int) -> sparse.csr_matrix:
        """Return the values as a float32 matrix with the places of :meth:`to_csr`."""
        return self._csr(self.values, max_tokens)

    def _csr(self, entries: Any, max_tokens: int) -> sparse.csr_matrix:
        index_dtype = np.int32 if len(entries) <= np.iinfo(np.int32).max else np.int64
        offsets = self.offsets.astype(index_dtype)
        columns: NDArray[Any] = np.arange(len(entries), dtype=index_dtype)
        columns -= np.repeat(offsets[:-1], np.diff(offsets))
        return sparse.csr_matrix((entries, columns, offsets), shape=(self.n_cells, max_tokens))

    @classmethod
    def from_csr(cls, matrix: Any) -> RankedTokens:
        """Read back what :meth:`to_csr` gave, from any sparse matrix of that content.

        Raises
        ------
        ValueError
            A row has a gap, so it does not hold tokens in order of rank; an entry is no positive
            integer, or an index is out of range.
        """
        entries, offsets = _entries_in_order(matrix)
        if entries.dtype.kind not in "iu" or (len(entries) and entries.min() < 1):
            raise ValueError(
                f"Tokens must be positive integers, found the type {entries.dtype} and "
                f"{entries.min(initial=1):g} as the smallest; they were not made by stofm."
            )
        return cls(tokens=entries.astype(np.int32, copy=False), offsets=offsets)

    def with_values(self, matrix: Any) -> RankedTokens:
        """Add the values that :meth:`values_to_csr` gave, from any sparse matrix of that content.

        Raises
        ------
        ValueError
            The matrix has its entries in other places than the tokens, or one is negative, NaN or
            infinite.
        """
        entries, offsets = _entries_in_order(matrix)
        is_sound = (np.isfinite(entries) & (entries >= 0)).all()
        if not is_sound or not np.array_equal(offsets, self.offsets):
            raise ValueError(
                "Values of tokens are negative, NaN or infinite, or are in other places than the "
                "tokens. Make both anew."
            )
        return replace(self, values=entries.astype(np.float32, copy=False))

    def without_values(self) -> RankedTokens:
        """Return the same tokens without values."""
        return self if self.values is None else replace(self, values=None)

    def head(self, max_tokens: int) -> RankedTokens:
        """Return the first `max_tokens` tokens of each cell, with their values if there are any."""
        lengths = np.diff(self.offsets)
        if int(lengths.max(initial=0)) <= max_tokens:
            return self
        place = np.arange(len(self.tokens)) - np.repeat(self.offsets[:-1], lengths)
        is_kept = place < max_tokens
        return RankedTokens(
            tokens=self.tokens[is_kept],
            offsets=np.concatenate([[0], np.cumsum(np.minimum(lengths, max_tokens))]),
            values=None if self.values is None else self.values[is_kept],
        )

    def equals(self, other: RankedTokens) -> bool:
        """Whether all cells have the same tokens in the same order, and the same values if any."""
        return self.digest == other.digest

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over all cells' tokens, and their values if there are any."""
        parts = (self.offsets, self.tokens, self.values)
        return fingerprint(*(part for part in parts if part is not None))

    @classmethod
    def concatenate(cls, parts: Sequence[RankedTokens]) -> RankedTokens:
        """Join the cells of `parts`, in order; all of them have values, or none."""
        lengths = [np.diff(part.offsets) for part in parts]
        values = [part.values for part in parts if part.values is not None]
        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
            offsets=np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64),
            values=np.concatenate(values) if values else None,
        )


def _entries_in_order(matrix: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return a sparse matrix's entries row after row, and where each row starts."""
    require_sound(matrix, "The matrix of tokens")
    rows = sparse.csr_matrix(matrix)
    if not rows.has_sorted_indices:
        rows = rows.sorted_indices()
    offsets = rows.indptr.astype(np.int64)
    for start in range(0, len(offsets) - 1, _ROWS_AT_ONCE):
        own = offsets[start : start + _ROWS_AT_ONCE + 1]
        places = np.arange(own[0], own[-1]) - np.repeat(own[:-1], np.diff(own))
        if not np.array_equal(rows.indices[own[0] : own[-1]], places):
            raise ValueError(
                "The matrix has empty places between tokens; it was not made by stofm."
            )
    return rows.data, offsets
