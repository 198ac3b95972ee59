"""Counts of a cell to its gene tokens, the most characteristic gene first."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm._config import require_rules
from stofm._digests import fingerprint
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

#: Rows of a matrix of tokens that are checked at once.
_ROWS_AT_ONCE: Final = 1 << 14
#: Stored entries that are ranked at once: keys and their padded copy stay near 15 MB.
_BLOCK_ENTRIES: Final = 1 << 18
#: numpy sorts and gathers outside the interpreter's lock; each thread holds one block.
_N_THREADS: Final = min(4, os.cpu_count() or 1)
#: Rows are sorted together if the longest is at most this much longer than the shortest,
#: so that little padding is sorted along.
_LENGTH_RATIO: Final = 1.15
_LENGTH_SLACK: Final = 8
_NO_GENE: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
#: Values are those of a cell scaled to so many counts.
_TARGET_SUM: Final = 10_000


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
        (n_tokens_in_all,) float32 value of each token: count / total count of the cell x 10,000
        / median of the gene. None where only the order was asked for.
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


# Ranking


def rank_genes(
    counts: sparse.csr_matrix,
    token_ids: NDArray[np.integer],
    medians: NDArray[np.floating],
    *,
    max_tokens: int = 2048,
    duplicates: Literal["sum", "keep"] = "sum",
    values: bool = False,
    totals: NDArray[np.floating] | None = None,
) -> RankedTokens:
    """Order the genes of each cell by their count relative to the gene's median.

    The value of gene g in cell c is count / total count of c x 10,000 / median of g (SToFM,
    arXiv 2507.11588, section 3.2, after Geneformer). Total and factor are the same for all
    genes of a cell and positive, so the order is that of count / median. Equal values (to
    about 1e-10 relative) are ordered by token, so the result does not depend on the order of
    columns.

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
    values
        Return the values too, not their order only.
    totals
        (n_cells,) total count of each cell, for `counts` that lack some of its columns; by
        default the sum of the row. Only values depend on it.

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
    n_cells, n_vars = counts.shape
    totals = None if totals is None else np.asarray(totals, dtype=np.float64)
    known = medians[tokens >= 0] if tokens.shape == medians.shape else np.empty(0)
    require_rules(
        (
            tokens.shape == medians.shape == (n_vars,),
            f"The counts have {n_vars} columns, but token_ids has shape {tokens.shape} and medians "
            f"{medians.shape}; pass one token and one median per column.",
        ),
        (
            totals is None or totals.shape == (n_cells,),
            f"The counts have {n_cells} rows, but totals has shape {getattr(totals, 'shape', ())}; pass one per "
            "cell.",
        ),
        (
            bool((np.isfinite(known) & (known > 0)).all()),
            "The medians of genes with a token must be positive and finite.",
        ),
        (
            duplicates in ("sum", "keep"),
            f"duplicates must be 'sum' or 'keep', found {duplicates!r}.",
        ),
        (max_tokens >= 1, f"max_tokens must be at least 1, found {max_tokens}."),
    )
    divisors = np.where(tokens >= 0, medians, np.inf)
    columns = np.flatnonzero(tokens >= 0)
    genes, first, local = np.unique(tokens[columns], return_index=True, return_inverse=True)
    sums = None
    if duplicates == "sum" and len(genes) < len(columns):
        # Multiplied from the right it sums the columns of each gene.
        entries = (np.ones(len(columns)), (columns, local))
        sums = sparse.csr_matrix(entries, shape=(n_vars, len(genes)))
        tokens, divisors = genes, divisors[columns][first]

    def rank(start_and_block: tuple[int, sparse.csr_matrix]) -> RankedTokens:
        start, block = start_and_block
        block = _defined(block)
        scale = _scale_of_cells(block, start, totals) if values else None
        if sums is not None:
            block = sparse.csr_matrix(block @ sums)
        return _rank_block(block, tokens, divisors, max_tokens, scale)

    with ThreadPoolExecutor(_N_THREADS) as threads:
        parts = list(threads.map(rank, _row_blocks(counts)))
    return RankedTokens.concatenate(parts)


def _row_blocks(counts: sparse.csr_matrix) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Cut the rows into blocks of bounded size that share memory with `counts`, at least one.

    Each comes with the number of its first row.
    """
    n_cells, n_vars = counts.shape
    if not n_cells:
        yield 0, counts
    indptr = counts.indptr.astype(np.int64)
    start = 0
    while start < n_cells:
        limit = indptr[start] + _BLOCK_ENTRIES
        stop = max(int(np.searchsorted(indptr, limit, side="right")) - 1, start + 1)
        own = slice(indptr[start], indptr[stop])
        starts = indptr[start : stop + 1] - indptr[start]
        entries = (counts.data[own], counts.indices[own], starts)
        yield start, sparse.csr_matrix(entries, shape=(stop - start, n_vars))
        start = stop


def _defined(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the counts with 0 in every cell that holds NaN or infinity.

    DISCREPANCY: the reference implementation divides by a total of NaN or 0 and then emits every
    gene of the vocabulary for such a cell; here it has no genes.
    """
    values: NDArray[Any] = block.data
    if len(values) and values.min() < 0:
        raise ValueError("Counts must not be negative.")
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return block
    rows = _rows_of_entries(block)
    undefined = np.zeros(block.shape[0], dtype=bool)
    undefined[rows[~np.isfinite(values)]] = True
    defined = np.where(undefined[rows], 0, values)
    return sparse.csr_matrix((defined, block.indices, block.indptr), block.shape)


def _scale_of_cells(
    block: sparse.csr_matrix, start: int, totals: NDArray[np.floating] | None
) -> NDArray[np.float64]:
    """Return 10,000 / total count of each cell of a block; 0 for a cell without counts."""
    n_cells = block.shape[0]
    # Integers add up exactly in float64, whatever the order of columns.
    sums = np.bincount(_rows_of_entries(block), weights=block.data, minlength=n_cells)
    found: Any = sums if totals is None else totals[start : start + n_cells]
    scale = np.zeros(n_cells)
    np.divide(_TARGET_SUM, found, out=scale, where=sums > 0)
    return scale


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
        padded = _padded_rows(keys, block.indptr[rows], lengths[rows])
        padded.sort(axis=1)
        # Entries without a value have nothing but ones above the token bits.
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
            # Count / median, read back from the key, where it stands to 1e-10.
            ratios = (~kept & ~token_mask).view(np.float64)
            amounts[places] = (ratios * scale[rows, None])[is_token]
    return RankedTokens(tokens=tokens, offsets=offsets, values=amounts)


def _sort_keys(
    block: sparse.csr_matrix,
    token_ids: NDArray[np.int64],
    divisors: NDArray[np.float64],
    token_mask: np.uint64,
) -> NDArray[np.uint64]:
    """Pack value and token of each stored entry into one key; ascending keys are ranks.

    The bits of a positive double rise with its value, so their complement falls. Its lowest
    bits (17 of 52 for a vocabulary of 100,000 genes) make room for the token, which decides
    between equal values. A key more than there are entries stands for padding.
    """
    ratios = np.zeros(len(block.data) + 1)
    np.divide(block.data, divisors[block.indices], out=ratios[:-1])
    ratios += 0.0  # turns -0.0, whose sign bit would rank it first, into 0.0
    keys = ratios.view(np.uint64)
    np.invert(keys, out=keys)
    keys &= ~token_mask
    tokens = np.where(token_ids >= 0, token_ids, 0).astype(np.uint64)
    keys[:-1] |= tokens[block.indices]
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


def _padded_rows(
    keys: NDArray[np.uint64], starts: NDArray[np.integer], lengths: NDArray[np.integer]
) -> NDArray[np.uint64]:
    place = np.arange(int(lengths.max()))
    entries = np.where(place < lengths[:, None], starts[:, None] + place, len(keys) - 1)
    return keys[entries]
