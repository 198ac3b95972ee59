"""``stofm.pp.tokenize``: ranked gene tokens of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._edge.gene_mapping import find_columns, vocabulary_of
from stofm._edge.tables import all_or_nothing, resolve_table
from stofm._edge.tokens import compute_tokens, token_params, write_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData

    from stofm._edge.tokens import Duplicates
    from stofm.genes import GeneVocabulary
    from stofm.genes.mapping import Species


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
        Model or vocabulary whose tokens to write; None is that of the built-in model.
    layer
        Layer with raw counts; None for ``X``.
    max_tokens
        Genes that a cell keeps; None is the model's number, or 2048.

    Returns
    -------
    None, or the new AnnData if `copy`. Fields set, besides those of :func:`map_genes`:

    ``obsm["stofm_tokens"]``
        int32 CSR matrix (n_obs, max_tokens): tokens in order in the first columns of each row.
    ``obsm["stofm_token_values"]``
        float32 CSR matrix (n_obs, max_tokens): their values, in the same order; only with
        values, and removed otherwise.
    ``obs["stofm_n_tokens"]``
        int32 number of tokens.

    Other Parameters
    ----------------
    species, gene_key, orthologs
        As in :func:`map_genes`. A mapping that :func:`map_genes` wrote for this vocabulary is
        used as it is, unless one of these asks for another.
    duplicates
        Columns of the same gene: ``"sum"`` adds their counts first; ``"keep"`` ranks each on its
        own, so that a token can occur twice, as in the reference implementation.
    values
        Write the value of each token too, by the model's rule (``depth_power`` of
        :class:`stofm.nn.CellEncoderConfig`). By default if the model uses values.
    show_progress_bar
        Show progress.
    table_key
        Table of a SpatialData; may be left out if there is only one.
    copy
        Return a new AnnData and leave `adata` as it is.

    Raises
    ------
    ValueError
        The matrix does not hold raw counts, there are no cells or genes, or no gene, or too few,
        were found in the vocabulary.
    KeyError
        There is no such layer, column or table.

    See Also
    --------
    stofm.pp.map_genes : which gene each column is.
    stofm.tl.encode_cells : the next step.
    stofm.tl.embed : runs all steps.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.pp.tokenize(adata, max_tokens=30)
    >>> adata.obsm["stofm_tokens"].shape
    (300, 30)
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
    ranked = compute_tokens(target, columns, params, show_progress_bar=show_progress_bar)
    with all_or_nothing(target):
        write_tokens(target, ranked, columns, params)
    return target if copy else None
