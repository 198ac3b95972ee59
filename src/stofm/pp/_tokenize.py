"""Turn the counts of each cell into ranked gene tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.records import all_or_nothing, read_record
from stofm._edge.tables import require_cells_and_genes, resolve_table
from stofm._keys import Var
from stofm._logging import counter, logger
from stofm._messages import warn
from stofm.genes import GeneVocabulary, RankedTokens, rank_genes
from stofm.pp._gene_report import report_mapping, warn_of_counts
from stofm.pp._map_genes import (
    compute_gene_mapping,
    names_fingerprint,
    vocabulary_of,
)
from stofm.pp._token_entries import Columns, Tokens, stored_tokens, write_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.genes.mapping import Species

Duplicates = Literal["sum", "keep"]
_DEFAULT_MAX_TOKENS: Final = 2048


def tokenize(
    adata: AnnData | Any,
    model_or_vocabulary: GeneVocabulary | Any | None = None,
    *,
    layer: str | None = None,
    max_tokens: int | None = None,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    duplicates: Duplicates = "sum",
    values: bool | None = None,
    chunk_size: int | None = None,
    show_progress_bar: bool = True,
    table_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Write each cell's genes as tokens, the most characteristic gene first.

    Genes are ordered by count relative to their median over a corpus (SToFM, arXiv 2507.11588,
    section 3.2; see :func:`stofm.genes.rank_genes`). The matrix may be CSR, CSC, dense, backed or
    Dask, of any numeric type with integer values; it is read block by block and not changed.

    Parameters
    ----------
    adata
        Cells x genes with raw counts, or a SpatialData that holds such a table.
    model_or_vocabulary
        Model or vocabulary whose tokens to write; None is that of the embedded model.
    layer
        Layer with raw counts; None for ``X``.
    max_tokens
        Genes that a cell keeps; None is the model's number, or 2048.
    species, gene_key, orthologs
        As in :func:`map_genes`. A mapping that :func:`map_genes` wrote for this vocabulary is
        used as it is, unless one of these asks for another.
    duplicates
        Columns of the same gene: ``"sum"`` adds their counts first; ``"keep"`` ranks each on its
        own, so that a token can occur twice, as in the reference implementation.
    values
        Write the value of each token too: count / total count of the cell x 10,000 / median of
        the gene. By default if the model reads values.
    chunk_size
        Cells that are read at once; by default as many as make about 8 million entries.
    show_progress_bar
        Show progress.
    table_key
        Table of a SpatialData; may be left out if there is only one.
    copy
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    None, or the new AnnData if `copy`. Fields set, besides those of :func:`map_genes`:

    ``obsm["stofm_tokens"]``
        int32 CSR matrix (n_obs, max_tokens): tokens in order in the first columns of each row.
    ``obsm["stofm_token_values"]``
        float32 CSR matrix (n_obs, max_tokens): their values, at the same places; only with
        values, and removed otherwise.
    ``obs["stofm_n_tokens"]``
        int32 number of tokens.

    Raises
    ------
    ValueError
        The matrix does not hold raw counts, there are no cells or genes, or no gene, or too few,
        were found in the vocabulary.
    KeyError
        There is no such layer, column or table.
    """
    table = resolve_table(adata, table_key, copy=copy)
    target = table.copy() if copy else table
    columns = find_columns(
        target,
        vocabulary_of(model_or_vocabulary),
        species=species,
        gene_key=gene_key,
        orthologs=orthologs,
    )
    params = token_params(
        model_or_vocabulary,
        layer=layer,
        max_tokens=max_tokens,
        duplicates=duplicates,
        values=values,
    )
    tokens = compute_tokens(
        target, columns, params, chunk_size=chunk_size, show_progress_bar=show_progress_bar
    )
    with all_or_nothing(target):
        write_tokens(target, tokens)
    return target if copy else None


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
    stored = stored_tokens(adata, columns, params)
    tokens = compute_tokens(adata, columns, params, show_progress_bar=show_progress_bar)
    is_same = stored is not None and tokens.ranked.equals(stored)
    if stored is not None and not is_same:
        logger.info("The counts are not those of the stored tokens, which are made again.")
    return replace(tokens, is_new=not is_same or columns.genes is not None)


def find_columns(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    *,
    species: Species,
    gene_key: str | None,
    orthologs: Mapping[str, str] | str | PathLike[str] | None,
) -> Columns:
    """Take the mapping in ``adata.var`` if it fits vocabulary and arguments, else make one."""
    require_cells_and_genes(adata)
    index = None
    if orthologs is None:
        index = _existing_mapping(adata, vocabulary, species, gene_key)
    genes = None
    if index is None:
        genes = compute_gene_mapping(
            adata, vocabulary, species=species, gene_key=gene_key, orthologs=orthologs
        )
        index = genes.mapping.gene_index
    return Columns(
        token_ids=np.where(index >= 0, vocabulary.tokens[index], -1).astype(np.int32),
        medians=vocabulary.medians[index],
        genes=genes,
        vocabulary=vocabulary.fingerprint,
    )


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
            yield _rank(block, columns, params)
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


def _rank(counts: sparse.csr_matrix, columns: Columns, params: Mapping[str, Any]) -> RankedTokens:
    return rank_genes(
        counts,
        columns.token_ids,
        columns.medians,
        max_tokens=params["max_tokens"],
        duplicates=params["duplicates"],
        values=bool(params.get("values")),
    )


def _existing_mapping(
    adata: AnnData, vocabulary: GeneVocabulary, species: Species, gene_key: str | None
) -> NDArray[np.int64] | None:
    """Place of each column's gene in the vocabulary, if a fitting mapping is in the AnnData."""
    record = read_record(adata, Var.TOKEN_ID)
    if record is None or not {Var.GENE, Var.TOKEN_ID} <= set(adata.var.columns):
        return None
    made = record.get("params", {})
    asked = species in ("auto", made.get("species")) and gene_key in (None, made.get("gene_key"))
    if not asked or record.get("vocabulary") != vocabulary.fingerprint:
        return None
    if record.get("names") != names_fingerprint(adata, made):
        return None
    rows = vocabulary.rows_by_id
    index = np.array([rows.get(gene, -1) for gene in np.asarray(adata.var[Var.GENE])])
    expected = np.where(index >= 0, vocabulary.tokens[index], -1)
    # Joining slices can leave columns without an entry, which says nothing about their genes.
    return index if np.array_equal(expected, np.asarray(adata.var[Var.TOKEN_ID])) else None


def warn_of_empty_cells(ranked: RankedTokens) -> None:
    """Warn if some cells have no tokens."""
    n_empty = int((ranked.n_tokens == 0).sum())
    if n_empty:
        warn(
            f"{n_empty} of {ranked.n_cells} cells have no count in any known gene; they have no "
            "tokens, so a model sees nothing but the <cls> token."
        )
