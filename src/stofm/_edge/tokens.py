"""Ranked gene tokens of a table: made from its counts, written, and read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import (
    Columns,
    find_columns,
    report_mapping,
    vocabulary_of,
    warn_of_counts,
    write_gene_mapping,
)
from stofm._edge.records import read_record, remove_entry, same_params, write_record
from stofm._edge.staleness import outdate_by_counts
from stofm._keys import Obs, Obsm
from stofm._logging import counter, logger
from stofm._messages import warn
from stofm.genes import RankedTokens, rank_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.genes.mapping import Species

Duplicates = Literal["sum", "keep"]
_DEFAULT_MAX_TOKENS: Final = 2048


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of all cells, before they are written, and whether they differ from those stored."""

    ranked: RankedTokens
    columns: Columns
    params: Mapping[str, Any]
    is_new: bool = True


def tokens_or_stored(
    adata: AnnData,
    model: Any,
    *,
    layer: str | None = None,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    on_columns: Callable[[Columns], object] = lambda _: None,
    show_progress_bar: bool = True,
) -> Tokens:
    """Make tokens, or take those stored if they are the same; writes nothing.

    Ranking costs little beside what follows, so the counts are always read again: no change of
    them goes unnoticed.
    """
    columns = find_columns(
        adata, vocabulary_of(model), species=species, gene_key=gene_key, orthologs=orthologs
    )
    on_columns(columns)
    params = token_params(model, layer=layer)
    stored = _stored_tokens(adata, columns, params)
    tokens = compute_tokens(adata, columns, params, show_progress_bar=show_progress_bar)
    is_same = stored is not None and tokens.ranked.equals(stored)
    if stored is not None and not is_same:
        logger.info("The counts are not those of the stored tokens, which are made again.")
    return replace(tokens, is_new=not is_same or columns.genes is not None)


def compute_tokens(
    adata: AnnData,
    columns: Columns,
    params: Mapping[str, Any],
    *,
    chunk_size: int | None = None,
    show_progress_bar: bool = True,
) -> Tokens:
    """Read the counts block by block and rank them; writes nothing."""
    blocks = token_blocks(
        adata, columns, params, chunk_size=chunk_size, show_progress_bar=show_progress_bar
    )
    ranked = RankedTokens.concatenate(list(blocks))
    warn_of_empty_cells(ranked)
    return Tokens(ranked, columns, params)


def token_blocks(
    adata: AnnData,
    columns: Columns,
    params: Mapping[str, Any],
    *,
    chunk_size: int | None = None,
    show_progress_bar: bool = True,
) -> Iterator[RankedTokens]:
    """Give the tokens block of cells after block, in order; a new mapping is reported at the end."""
    reader = read_counts(adata, layer=params["layer"] or None, chunk_size=chunk_size)
    total = np.zeros(adata.n_vars)
    with counter(
        total=adata.n_obs, description="tokenize", unit="cell", show=show_progress_bar
    ) as advance:
        for block in reader:
            yield rank_genes(
                block,
                columns.token_ids,
                columns.medians,
                max_tokens=params["max_tokens"],
                duplicates=params["duplicates"],
                values=bool(params.get("values")),
            )
            total += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            advance(block.shape[0])
    report_columns(adata, columns, total)


def report_columns(
    adata: AnnData, columns: Columns, counts_per_column: NDArray[np.float64]
) -> None:
    """Report a new mapping; warn of what counts are lost by one that is there."""
    if columns.genes is None:
        warn_of_counts(adata, columns.token_ids, counts_per_column)
    else:
        report_mapping(adata, columns.genes, counts_per_column)


def token_params(
    model_or_vocabulary: GeneVocabulary | Any | None,
    *,
    layer: str | None = None,
    max_tokens: int | None = None,
    duplicates: Duplicates = "sum",
    values: bool | None = None,
) -> dict[str, Any]:
    """Return what tokens depend on besides counts and columns, as it stands in records.

    Number of tokens and need for values are the model's where they are None.
    """
    config = getattr(model_or_vocabulary, "config", None)
    if max_tokens is None:
        max_tokens = int(getattr(config, "max_tokens", _DEFAULT_MAX_TOKENS))
    if values is None and model_or_vocabulary is None:
        values = _embedded_model_reads_values()
    elif values is None:
        values = bool(getattr(getattr(config, "cell_encoder", None), "reads_values", False))
    params = {"layer": layer or "", "max_tokens": max_tokens, "duplicates": duplicates}
    return params | {"values": True} if values else params


@lru_cache(maxsize=1)
def _embedded_model_reads_values() -> bool:
    # Read here, because loading the model would import torch.
    config = resources.files("stofm").joinpath("weights", "stofm-mini", "config.json")
    cell_encoder = json.loads(config.read_text(encoding="utf-8"))["cell_encoder"]
    return cell_encoder.get("values", "none") != "none" or bool(cell_encoder.get("pooled"))


def warn_of_empty_cells(ranked: RankedTokens) -> None:
    """Warn if some cells have no tokens."""
    n_empty = int((ranked.n_tokens == 0).sum())
    if n_empty:
        warn(
            f"{n_empty} of {ranked.n_cells} cells have no count in any known gene; they have no "
            "tokens, so a model sees nothing but the <cls> token."
        )


def write_tokens(adata: AnnData, tokens: Tokens) -> None:
    """Write tokens, their number, their values, a new mapping of the columns, and the records.

    Values that belong to other tokens, which the new ones replace, are removed. Embeddings that
    are of other counts are marked as such.
    """
    ranked, columns, params = tokens.ranked, tokens.columns, tokens.params
    made: dict[str, Any] = {Obsm.TOKENS: ranked.to_csr(params["max_tokens"])}
    if params.get("values"):
        made[Obsm.TOKEN_VALUES] = ranked.values_to_csr(params["max_tokens"])
    outdate_by_counts(adata)
    if columns.genes is not None:
        write_gene_mapping(adata, columns.genes)
    remove_entry(adata, Obsm.TOKEN_VALUES)
    adata.obs[Obs.N_TOKENS] = ranked.n_tokens
    for key, matrix in made.items():
        adata.obsm[key] = matrix
    for key in (Obs.N_TOKENS, *made):
        write_record(adata, key, params, vocabulary=columns.vocabulary, columns=columns.fingerprint)


def _stored_tokens(
    adata: AnnData, columns: Columns, params: Mapping[str, Any]
) -> RankedTokens | None:
    """Return the stored tokens if they were made with these columns and parameters.

    Tokens that were stored with values do for a model that reads none.
    """
    record = read_record(adata, Obsm.TOKENS)
    if record is None or Obsm.TOKENS not in adata.obsm:
        return None
    with_values = bool(params.get("values"))
    made, asked = ({**one, "values": ""} for one in (record.get("params", {}), params))
    fits = (
        same_params({"params": made}, asked)
        and record.get("vocabulary") == columns.vocabulary
        and record.get("columns") == columns.fingerprint
    )
    if not fits or (with_values and not values_are_stored(adata)):
        return None
    return read_ranked(adata, int(columns.token_ids.max(initial=0)) + 1, values=with_values)


def read_ranked(adata: AnnData, n_tokens: int, *, values: bool) -> RankedTokens:
    """Read the stored tokens, all of them below `n_tokens`."""
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
