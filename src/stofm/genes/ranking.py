"""Counts of a cell to its gene tokens, the most characteristic gene first."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm._config import require_rules
from stofm.genes.compressed import require_sound
from stofm.genes.ranked_tokens import RankedTokens

if TYPE_CHECKING:
    from collections.abc import Iterator

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
#: Values are those of a cell scaled to so many counts.
_TARGET_SUM: Final = 10_000


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
    depth_power: float = 1.0,
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
    depth_power
        Values are count x (10,000 / total)^`depth_power` / median. 1 is the paper's rule, 0 leaves
        counts as they are. With 1, a single count in a cell of 100 counts weighs as much as 100
        counts in a cell of 10,000, and is mostly noise.

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
        scale = _scale_of_cells(block, start, totals) ** depth_power if values else None
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
