"""Token lists of cells with genes deleted or put first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stofm.genes import RankedTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray


def cells_of(ranked: RankedTokens) -> NDArray[np.int64]:
    """Row of each token's cell, (n_tokens_in_all,)."""
    return np.repeat(np.arange(ranked.n_cells), np.diff(ranked.offsets))


def delete(ranked: RankedTokens, genes: NDArray[np.integer]) -> RankedTokens:
    """Remove tokens from all lists; the values of the others stay."""
    kept = ~np.isin(ranked.tokens, genes)
    lengths = np.bincount(cells_of(ranked)[kept], minlength=ranked.n_cells)
    values = None if ranked.values is None else ranked.values[kept]
    return RankedTokens(ranked.tokens[kept], np.concatenate([[0], np.cumsum(lengths)]), values)


def put_first(ranked: RankedTokens, gene: int) -> RankedTokens:
    """Put a token in front of all lists, with the value of the token that was first.

    In an empty list its value is 1, a typical count of the gene.
    """
    rest = delete(ranked, np.array([gene]))
    starts = rest.offsets[:-1]
    leads: dict[str, Any] = {"values": None}
    if ranked.values is not None and rest.values is not None:
        padded = np.append(ranked.values, np.float32(1.0))
        places = np.where(ranked.n_tokens > 0, ranked.offsets[:-1], len(padded) - 1)
        leads = {"values": np.insert(rest.values, starts, padded[places])}
    tokens = np.insert(rest.tokens, starts, np.int32(gene))
    return RankedTokens(tokens, rest.offsets + np.arange(len(rest.offsets)), **leads)
