"""Counts of a cell to its gene tokens, most characteristic gene first."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

#: Stored entries that are ranked at once: keys and their padded copy stay near 15 MB.
_BLOCK_ENTRIES: Final = 1 << 18
#: numpy sorts and gathers outside the interpreter's lock; each thread holds one block.
_N_THREADS: Final = min(4, os.cpu_count() or 1)
#: Rows are sorted together if the longest is at most this much longer than the shortest,
#: so that little padding is sorted along.
_LENGTH_RATIO: Final = 1.15
_LENGTH_SLACK: Final = 8
_NO_GENE: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, eq=False)
class RankedTokens:
    """Gene tokens of many cells, one after another.

    Attributes
    ----------
    tokens
        (n_tokens_in_all,) int32, cell after cell, in the order of rank.
    offsets
        (n_cells + 1,) int64; cell c owns ``tokens[offsets[c]:offsets[c + 1]]``.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        rising = bool((np.diff(self.offsets) >= 0).all())
        if not rising or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            msg = "offsets must rise from 0 to the number of tokens."
            raise ValueError(msg)

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
        padding token), so the matrix loses none.

        Raises
        ------
        ValueError
            A cell has more than `max_tokens` tokens.
        """
        longest = int(self.n_tokens.max(initial=0))
        if longest > max_tokens:
            msg = f"A cell has {longest} tokens, which do not fit into {max_tokens} columns."
            raise ValueError(msg)
        index_dtype = np.int32 if len(self.tokens) <= np.iinfo(np.int32).max else np.int64
        offsets = self.offsets.astype(index_dtype)
        columns: NDArray[Any] = np.arange(len(self.tokens), dtype=index_dtype)
        columns -= np.repeat(offsets[:-1], np.diff(offsets))
        return sparse.csr_matrix(
            (self.tokens, columns, offsets),
            shape=(self.n_cells, max_tokens),
        )

    @classmethod
    def from_csr(cls, matrix: Any) -> RankedTokens:
        """Read back what :meth:`to_csr` gave, from any sparse matrix of that content.

        Raises
        ------
        ValueError
            A row has a gap, so it does not hold tokens in order of rank.
        """
        rows = sparse.csr_matrix(matrix)
        if not rows.has_sorted_indices:
            rows = rows.sorted_indices()
        offsets = rows.indptr.astype(np.int64)
        lengths = np.diff(offsets)
        filled = lengths > 0
        if not np.array_equal(rows.indices[offsets[1:][filled] - 1], lengths[filled] - 1):
            msg = "The matrix has empty places between tokens; it was not made by stofm."
            raise ValueError(msg)
        return cls(tokens=rows.data.astype(np.int32, copy=False), offsets=offsets)

    def equals(self, other: RankedTokens) -> bool:
        """Whether all cells have the same tokens in the same order."""
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(
            self.tokens, other.tokens
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over all cells' tokens."""
        hashed = hashlib.blake2b(np.ascontiguousarray(self.offsets).data, digest_size=8)
        hashed.update(np.ascontiguousarray(self.tokens).data)
        return hashed.hexdigest()

    @classmethod
    def concatenate(cls, parts: Sequence[RankedTokens]) -> RankedTokens:
        """Join the cells of `parts`, in order."""
        lengths = [np.diff(part.offsets) for part in parts]
        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate([[], *lengths]))]).astype(
                np.int64
            ),
        )


def rank_genes(
    counts: sparse.csr_matrix,
    token_ids: NDArray[np.integer],
    medians: NDArray[np.floating],
    *,
    max_tokens: int = 2048,
    duplicates: Literal["sum", "keep"] = "sum",
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

    Returns
    -------
    RankedTokens
        A cell without counts in known genes, or with NaN or infinite entries, has no tokens.

    Raises
    ------
    ValueError
        Sizes do not fit, a count is negative, or a median of a known gene is not positive.
    """
    if duplicates not in ("sum", "keep"):
        msg = f"duplicates must be 'sum' or 'keep', found {duplicates!r}."
        raise ValueError(msg)
    counts = _canonical(counts)
    tokens = np.asarray(token_ids).astype(np.int64)
    _check_genes(counts.shape[1], tokens, np.asarray(medians), max_tokens)
    divisors = np.where(tokens >= 0, medians, np.inf)
    shared = _shared_columns(tokens) if duplicates == "sum" else None

    def rank(block: sparse.csr_matrix) -> RankedTokens:
        values = _defined_counts(block)
        if shared is not None:
            values = _sum_shared_columns(block, values, tokens, shared)
        return _rank_block(block, values, tokens, divisors, max_tokens)

    with ThreadPoolExecutor(_N_THREADS) as threads:
        return RankedTokens.concatenate(list(threads.map(rank, _row_blocks(counts))))


def _canonical(counts: Any) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(counts)
    if matrix.has_canonical_format:
        return matrix
    matrix = matrix.copy()
    matrix.sum_duplicates()
    return matrix


def _check_genes(
    n_vars: int, token_ids: NDArray[np.int64], medians: NDArray[Any], max_tokens: int
) -> None:
    if token_ids.shape != (n_vars,) or medians.shape != (n_vars,):
        msg = (
            f"The counts have {n_vars} columns, but token_ids has shape {token_ids.shape} and "
            f"medians {medians.shape}; pass one token and one median per column."
        )
        raise ValueError(msg)
    known = medians[token_ids >= 0]
    if not (np.isfinite(known) & (known > 0)).all():
        msg = "The medians of genes with a token must be positive and finite."
        raise ValueError(msg)
    if max_tokens < 1:
        msg = f"max_tokens must be at least 1, found {max_tokens}."
        raise ValueError(msg)


def _row_blocks(counts: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    """Cut the rows into blocks of bounded size that share memory with `counts`."""
    n_cells = counts.shape[0]
    indptr = counts.indptr.astype(np.int64)
    start = 0
    while start < n_cells:
        limit = indptr[start] + _BLOCK_ENTRIES
        stop = max(int(np.searchsorted(indptr, limit, side="right")) - 1, start + 1)
        entries = slice(indptr[start], indptr[stop])
        yield sparse.csr_matrix(
            (
                counts.data[entries],
                counts.indices[entries],
                indptr[start : stop + 1] - indptr[start],
            ),
            shape=(stop - start, counts.shape[1]),
        )
        start = stop


def _defined_counts(block: sparse.csr_matrix) -> NDArray[Any]:
    """Return the stored counts, with 0 in every cell that holds NaN or infinity.

    DISCREPANCY: the reference implementation divides by a total of NaN or 0 and then emits every
    gene of the vocabulary for such a cell; here it has no genes.
    """
    values: NDArray[Any] = block.data
    if len(values) and values.min() < 0:
        msg = "Counts must not be negative."
        raise ValueError(msg)
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return values
    rows = _rows_of_entries(block)
    undefined = np.zeros(block.shape[0], dtype=bool)
    undefined[rows[~np.isfinite(values)]] = True
    return np.where(undefined[rows], 0, values)


def _rows_of_entries(block: sparse.csr_matrix) -> NDArray[np.int64]:
    return np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))


def _shared_columns(token_ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Mark the columns whose token another column has too; None if there are none."""
    known = token_ids[token_ids >= 0]
    occurrences = np.bincount(known, minlength=1)
    shared = (token_ids >= 0) & (occurrences[np.maximum(token_ids, 0)] > 1)
    return shared if shared.any() else None


def _sum_shared_columns(
    block: sparse.csr_matrix,
    values: NDArray[Any],
    token_ids: NDArray[np.int64],
    shared: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Give the first entry of each cell and gene the gene's sum, and the others 0."""
    affected = np.flatnonzero(shared[block.indices])
    summed = values.astype(np.float64)
    if not len(affected):
        return summed
    rows = np.searchsorted(block.indptr, affected, side="right") - 1
    tokens = token_ids[block.indices[affected]]
    order = np.lexsort((tokens, rows))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (np.diff(rows[order]) != 0) | (np.diff(tokens[order]) != 0)
    sums = np.add.reduceat(summed[affected[order]], np.flatnonzero(is_first))
    summed[affected] = 0
    summed[affected[order[is_first]]] = sums
    return summed


def _rank_block(
    block: sparse.csr_matrix,
    values: NDArray[Any],
    token_ids: NDArray[np.int64],
    divisors: NDArray[np.float64],
    max_tokens: int,
) -> RankedTokens:
    token_mask = np.uint64((1 << int(token_ids.max(initial=0)).bit_length()) - 1)
    keys = _sort_keys(block, values, token_ids, divisors, token_mask)
    lengths = np.diff(block.indptr)
    n_tokens = np.zeros(block.shape[0], dtype=np.int64)
    ranked = []
    for rows in _rows_of_similar_length(lengths):
        padded = _padded_rows(keys, block.indptr[rows], lengths[rows])
        padded.sort(axis=1)
        # Entries without a value have nothing but ones above the token bits.
        n_tokens[rows] = (padded < (_NO_GENE & ~token_mask)).sum(axis=1)
        ranked.append((rows, (padded[:, :max_tokens] & token_mask).astype(np.int32)))
    np.minimum(n_tokens, max_tokens, out=n_tokens)
    offsets = np.concatenate([[0], np.cumsum(n_tokens)])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for rows, columns in ranked:
        place = np.arange(columns.shape[1])
        is_token = place < n_tokens[rows, None]
        tokens[(offsets[rows, None] + place)[is_token]] = columns[is_token]
    return RankedTokens(tokens=tokens, offsets=offsets)


def _sort_keys(
    block: sparse.csr_matrix,
    values: NDArray[Any],
    token_ids: NDArray[np.int64],
    divisors: NDArray[np.float64],
    token_mask: np.uint64,
) -> NDArray[np.uint64]:
    """Pack value and token of each stored entry into one key; ascending keys are ranks.

    The bits of a positive double rise with its value, so their complement falls. Its lowest
    bits (17 of 52 for a vocabulary of 100,000 genes) make room for the token, which decides
    between equal values. A key more than there are entries stands for padding.
    """
    ratios = np.zeros(len(values) + 1)
    np.divide(values, divisors[block.indices], out=ratios[:-1])
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
