"""Tokens in an AnnData: written with their records, read back if they fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stofm._edge.records import read_record, same_params, write_record
from stofm._keys import Obs, Obsm, Uns
from stofm.genes import RankedTokens
from stofm.pp._map_genes import MappedGenes, columns_fingerprint, write_gene_mapping
from stofm.pp._staleness import outdate_by_counts

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Columns:
    """Which token each column of the counts is.

    Attributes
    ----------
    token_ids, medians
        (n_vars,) token and median of each column's gene; token -1 for none.
    genes
        The mapping, if it is new; None if the one in the AnnData was taken.
    vocabulary
        Fingerprint of the vocabulary.
    """

    token_ids: NDArray[np.int32]
    medians: NDArray[np.float64]
    genes: MappedGenes | None
    vocabulary: str

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the tokens of all columns."""
        return columns_fingerprint(self.token_ids)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What :func:`tokenize` writes, before it is written.

    Attributes
    ----------
    ranked
        Tokens of all cells, with values if the parameters ask for them.
    columns
        What the columns of the counts are.
    params
        Layer, largest number of tokens, treatment of columns of one gene; ``values=True`` if
        values are made too.
    is_new
        False if `ranked` was read from the AnnData.
    """

    ranked: RankedTokens
    columns: Columns
    params: Mapping[str, Any]
    is_new: bool = True


def write_tokens(adata: AnnData, tokens: Tokens) -> None:
    """Write tokens, their number, their values, a new mapping of the columns, and the records.

    Values that belong to other tokens, which the new ones replace, are removed. Embeddings that
    are of other counts are marked as such.
    """
    max_tokens = tokens.params["max_tokens"]
    matrix = tokens.ranked.to_csr(max_tokens)
    with_values = bool(tokens.params.get("values"))
    values = tokens.ranked.values_to_csr(max_tokens) if with_values else None
    columns = tokens.columns
    outdate_by_counts(adata)
    if columns.genes is not None:
        write_gene_mapping(adata, columns.genes)
    adata.obsm[Obsm.TOKENS] = matrix
    adata.obs[Obs.N_TOKENS] = tokens.ranked.n_tokens
    written = [Obsm.TOKENS, Obs.N_TOKENS]
    _remove(adata, Obsm.TOKEN_VALUES)
    if values is not None:
        adata.obsm[Obsm.TOKEN_VALUES] = values
        written.append(Obsm.TOKEN_VALUES)
    for key in written:
        write_record(
            adata, key, tokens.params, vocabulary=columns.vocabulary, columns=columns.fingerprint
        )


def stored_tokens(
    adata: AnnData, columns: Columns, params: Mapping[str, Any]
) -> RankedTokens | None:
    """Return the stored tokens if they were made with these columns and parameters.

    Tokens that were stored with values do for a model that reads none.
    """
    record = read_record(adata, Obsm.TOKENS)
    if record is None or Obsm.TOKENS not in adata.obsm:
        return None
    fits = (
        _fits_but_for_values(record, params)
        and record.get("vocabulary") == columns.vocabulary
        and record.get("columns") == columns.fingerprint
    )
    if not fits or (params.get("values") and not values_are_stored(adata)):
        return None
    n_tokens = int(columns.token_ids.max(initial=0)) + 1
    return read_ranked(adata, n_tokens, values=bool(params.get("values")))


def read_ranked(adata: AnnData, n_tokens: int, *, values: bool) -> RankedTokens:
    """Read the stored tokens, checked.

    Parameters
    ----------
    n_tokens
        Tokens must be smaller.
    values
        Read the values too.

    Raises
    ------
    ValueError
        The matrices are damaged, or were not made by stofm.
    """
    try:
        ranked = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
        if (largest := int(ranked.tokens.max(initial=0))) >= n_tokens:
            msg = f"The token {largest} is not in the vocabulary."
            raise ValueError(msg)
        return ranked.with_values(adata.obsm[Obsm.TOKEN_VALUES]) if values else ranked
    except ValueError as error:
        msg = f"Tokens in adata.obsm[{Obsm.TOKENS!r}]: {error} Run st.pp.tokenize(adata, model) again."
        raise ValueError(msg) from error


def values_are_stored(adata: AnnData) -> bool:
    """Whether the stored tokens were made with values, and those are stored beside them."""
    record = read_record(adata, Obsm.TOKENS) or {}
    beside = read_record(adata, Obsm.TOKEN_VALUES)
    return (
        bool(record.get("params", {}).get("values"))
        and record == beside
        and Obsm.TOKEN_VALUES in adata.obsm
    )


def _fits_but_for_values(record: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    made, asked = (
        {name: value for name, value in entries.items() if name != "values"}
        for entries in (record.get("params", {}), params)
    )
    return same_params({"params": made}, asked)


def _remove(adata: AnnData, key: str) -> None:
    """Remove an entry of ``obsm`` and its record, if they are there."""
    if key in adata.obsm:
        del adata.obsm[key]
    records = dict(adata.uns.get(Uns.STOFM, {}))
    if records.pop(key, None) is not None:
        adata.uns[Uns.STOFM] = records
