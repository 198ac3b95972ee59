"""Counts of a cell to its gene tokens, the most characteristic gene first, and sparse matrices of both."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm._digests import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

#: Number of indices that are read from a file at once.
_ENTRIES_AT_ONCE: Final = 1 << 22
#: Rows of a matrix of tokens that are checked at once.
_ROWS_AT_ONCE: Final = 1 << 14
#: Stored entries that are ranked at once: keys and their padded copy stay near 15 MB.
_BLOCK_ENTRIES: Final = 1 << 18
#: numpy sorts and gathers without the interpreter's lock; each thread holds one block.
_N_THREADS: Final = min(4, os.cpu_count() or 1)
#: Rows are sorted together if the longest is at most this much longer than the shortest, so that
#: little padding is sorted with them.
_LENGTH_RATIO: Final = 1.15
_LENGTH_SLACK: Final = 8
_NO_GENE: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
#: Values are those of a cell scaled to this many counts.
_TARGET_SUM: Final = 10_000


def require_sound(matrix: Any, name: str, *, entries: bool = True) -> None:
    """Raise an error for a sparse matrix whose indices lie outside its entries or its shape.

    Compiled code follows such indices without a check: they would count for another gene, or crash
    the process. CSR and CSC matrices are checked, in memory or in a file (a sparse dataset of
    anndata); without `entries`, only the starts of their rows or columns.
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
        (n_tokens_in_all,) float32 value of each token (:func:`rank_genes`). None if only the order
        was requested.
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
        """Return the values as a float32 matrix with the entries of :meth:`to_csr`."""
        return self._csr(self.values, max_tokens)

    def _csr(self, entries: Any, max_tokens: int) -> sparse.csr_matrix:
        index_dtype = np.int32 if len(entries) <= np.iinfo(np.int32).max else np.int64
        offsets = self.offsets.astype(index_dtype)
        columns: NDArray[Any] = np.arange(len(entries), dtype=index_dtype)
        columns -= np.repeat(offsets[:-1], np.diff(offsets))
        return sparse.csr_matrix((entries, columns, offsets), shape=(self.n_cells, max_tokens))

    @classmethod
    def from_csr(cls, matrix: Any) -> RankedTokens:
        """Rebuild the tokens from the matrix of :meth:`to_csr`, in any sparse format.

        Raises ValueError if a row has a gap, so that it does not hold tokens in order of rank, if
        an entry is not a positive integer, or if an index is out of range.
        """
        entries, offsets = _entries_in_order(matrix)
        if entries.dtype.kind not in "iu" or (len(entries) and entries.min() < 1):
            raise ValueError(
                f"Tokens must be positive integers, found the type {entries.dtype} and "
                f"{entries.min(initial=1):g} as the smallest; they were not made by stofm."
            )
        return cls(tokens=entries.astype(np.int32, copy=False), offsets=offsets)

    def with_values(self, matrix: Any) -> RankedTokens:
        """Add values from the matrix of :meth:`values_to_csr`, in any sparse format.

        Raises ValueError if its entries are at other positions than the tokens, or if one is
        negative, NaN or infinite.
        """
        entries, offsets = _entries_in_order(matrix)
        is_sound = (np.isfinite(entries) & (entries >= 0)).all()
        if not is_sound or not np.array_equal(offsets, self.offsets):
            raise ValueError(
                "Values of tokens are negative, NaN or infinite, or are in other places than the "
                "tokens. Make both again."
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


def rank_genes(
    counts: sparse.csr_matrix,
    token_ids: NDArray[np.integer],
    medians: NDArray[np.floating],
    *,
    max_tokens: int = 2048,
    duplicates: Literal["sum", "keep"] = "sum",
    values: bool = False,
    depth_power: float = 1.0,
) -> RankedTokens:
    """Order the genes of each cell by their counts relative to the genes' medians.

    The value of gene g in cell c is count / total count of c x 10,000 / median of g (SToFM,
    arXiv 2507.11588, section 3.2, after Geneformer). Total and factor are the same for all genes
    of a cell, so the order is that of count / median. Equal values (to about 1e-10 relative) are
    ordered by token: the order of columns does not matter.

    Parameters
    ----------
    counts
        (n_cells, n_vars) raw counts, not negative.
    token_ids
        (n_vars,) token of each column; negative where the gene is not in the vocabulary.
    medians
        (n_vars,) median of each column's gene; ignored where there is no token.
    max_tokens
        A cell keeps its first `max_tokens` genes.
    duplicates
        Columns with the same token: ``"sum"`` adds their counts first. ``"keep"`` ranks each
        on its own, so a token can occur twice, as in the reference implementation.
    values, depth_power
        Return the values too: count x (10,000 / total)^`depth_power` / median.

    Returns
    -------
    RankedTokens
        A cell without counts in known genes, or with NaN or infinite entries, has no tokens.

    Raises
    ------
    ValueError
        Sizes or indices do not fit, a count is negative, or a median of a known gene is not positive.
    """
    require_sound(counts, "The matrix of counts")
    counts = sparse.csr_matrix(counts)
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    tokens, medians = np.asarray(token_ids).astype(np.int64), np.asarray(medians)
    n_vars = counts.shape[1]
    if not tokens.shape == medians.shape == (n_vars,):
        raise ValueError(
            f"The counts have {n_vars} columns, but token_ids has shape {tokens.shape} and medians "
            f"{medians.shape}; pass one token and one median per column."
        )
    known = medians[tokens >= 0]
    if not (np.isfinite(known) & (known > 0)).all():
        raise ValueError("The medians of genes with a token must be positive and finite.")
    if duplicates not in ("sum", "keep"):
        raise ValueError(f"duplicates must be 'sum' or 'keep', found {duplicates!r}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}.")
    divisors = np.where(tokens >= 0, medians, np.inf)
    columns = np.flatnonzero(tokens >= 0)
    genes, first, local = np.unique(tokens[columns], return_index=True, return_inverse=True)
    sums = None
    if duplicates == "sum" and len(genes) < len(columns):
        # Multiplied from the right it sums the columns of each gene.
        entries = (np.ones(len(columns)), (columns, local))
        sums = sparse.csr_matrix(entries, shape=(n_vars, len(genes)))
        tokens, divisors = genes, divisors[columns][first]

    def rank(block: sparse.csr_matrix) -> RankedTokens:
        block = _defined(block)
        scale = None
        if values:
            # Integers add up exactly in float64, whatever the order of columns.
            rows, n = _rows_of_entries(block), block.shape[0]
            scale = scale_of_cells(np.bincount(rows, block.data, n), depth_power)
        if sums is not None:
            block = sparse.csr_matrix(block @ sums)
        return _rank_block(block, tokens, divisors, max_tokens, scale)

    with ThreadPoolExecutor(_N_THREADS) as threads:
        return RankedTokens.concatenate(list(threads.map(rank, _row_blocks(counts))))


def _row_blocks(counts: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    """Cut the rows into blocks of bounded size, at least one, that share memory with `counts`."""
    n_cells, n_vars = counts.shape
    if not n_cells:
        yield counts
    indptr, start = counts.indptr.astype(np.int64), 0
    while start < n_cells:
        limit = indptr[start] + _BLOCK_ENTRIES
        stop = max(int(np.searchsorted(indptr, limit, side="right")) - 1, start + 1)
        own = slice(indptr[start], indptr[stop])
        starts = indptr[start : stop + 1] - indptr[start]
        entries = (counts.data[own], counts.indices[own], starts)
        yield sparse.csr_matrix(entries, shape=(stop - start, n_vars))
        start = stop


def _defined(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the counts with 0 in every cell that holds NaN or infinity.

    DISCREPANCY: the reference implementation divides by a total of NaN or 0 and then emits every
    gene of the vocabulary for such a cell; here it has no genes.
    """
    values: NDArray[Any] = block.data
    if values.min(initial=0) < 0:
        raise ValueError("Counts must not be negative.")
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return block
    rows = _rows_of_entries(block)
    defined = np.where(np.isin(rows, rows[~np.isfinite(values)]), 0, values)
    return sparse.csr_matrix((defined, block.indices, block.indptr), block.shape)


def scale_of_cells(totals: NDArray[np.number], depth_power: float) -> NDArray[np.float64]:
    """Factors that make values of count / median: (10,000 / total)^`depth_power`, 0 without counts."""
    scale = np.divide(_TARGET_SUM, totals, out=np.zeros(len(totals)), where=totals > 0)
    return np.asarray(scale**depth_power)


def _rows_of_entries(block: sparse.csr_matrix) -> NDArray[np.int64]:
    return np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))


def _rank_block(
    block: sparse.csr_matrix,
    token_ids: NDArray[np.int64],
    divisors: NDArray[np.float64],
    max_tokens: int,
    scale: NDArray[np.float64] | None,
) -> RankedTokens:
    token_mask = np.uint64((1 << int(token_ids.max(initial=0)).bit_length()) - 1)
    keys = _sort_keys(block, token_ids, divisors, token_mask)
    lengths = np.diff(block.indptr)
    n_tokens = np.zeros(block.shape[0], dtype=np.int64)
    ranked = []
    for rows in _rows_of_similar_length(lengths):
        place = np.arange(lengths[rows].max())
        is_entry = place < lengths[rows, None]
        padded = keys[np.where(is_entry, block.indptr[rows, None] + place, len(keys) - 1)]
        padded.sort(axis=1)
        # Entries without a value have only ones above the token bits.
        n_tokens[rows] = (padded < (_NO_GENE & ~token_mask)).sum(axis=1)
        ranked.append((rows, padded[:, :max_tokens]))
    np.minimum(n_tokens, max_tokens, out=n_tokens)
    offsets = np.concatenate([[0], np.cumsum(n_tokens)])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    amounts = None if scale is None else np.empty(offsets[-1], dtype=np.float32)
    for rows, kept in ranked:
        place = np.arange(kept.shape[1])
        is_token = place < n_tokens[rows, None]
        places = (offsets[rows, None] + place)[is_token]
        tokens[places] = (kept & token_mask)[is_token]
        if amounts is not None and scale is not None:
            # Count / median, read back from the key, which holds it to 1e-10.
            ratios = (~kept & ~token_mask).view(np.float64)
            amounts[places] = (ratios * scale[rows, None])[is_token]
    return RankedTokens(tokens=tokens, offsets=offsets, values=amounts)


def _sort_keys(
    block: sparse.csr_matrix, token_ids: NDArray[np.int64], divisors: Any, token_mask: np.uint64
) -> NDArray[np.uint64]:
    """Pack value and token of each stored entry into one key; ascending keys are ranks.

    The bits of a positive double rise with its value, so their complement falls. Its lowest
    bits (17 of 52 for a vocabulary of 100,000 genes) make room for the token, which decides
    between equal values. One more key than there are entries stands for padding.
    """
    ratios = np.zeros(len(block.data) + 1)
    np.divide(block.data, divisors[block.indices], out=ratios[:-1])
    ratios += 0.0  # turns -0.0, whose sign bit would rank it first, into 0.0
    keys = ~ratios.view(np.uint64) & ~token_mask
    keys[:-1] |= np.maximum(token_ids, 0).astype(np.uint64)[block.indices]
    keys[-1] = _NO_GENE
    return keys


def _rows_of_similar_length(lengths: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    start = int(np.searchsorted(ordered, 0, side="right"))
    while start < len(order):
        limit = max(ordered[start] * _LENGTH_RATIO, ordered[start] + _LENGTH_SLACK)
        stop = int(np.searchsorted(ordered, limit, side="right"))
        yield order[start:stop]
        start = stop
