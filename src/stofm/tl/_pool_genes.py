"""``stofm.tl.pool_genes``: cells as means of what is known of their genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.expression import log_normalised
from stofm._edge.gene_mapping import find_columns, report_columns
from stofm._edge.tables import all_or_nothing, resolve_table, write_record
from stofm._keys import Obsm
from stofm._logging import counter, logger
from stofm._messages import warn
from stofm.genes import embedded_vocabulary
from stofm.genes.gene_table import GeneTable
from stofm.heads.head import refuse_reserved

if TYPE_CHECKING:
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary

#: Share of the counts in genes that the table lacks from which on the rest may be another cell.
_MOST_LACKING = 0.5


def pool_genes(
    adata: Any,
    gene_embeddings: str | PathLike[str],
    *,
    layer: str | None = None,
    key_added: str = Obsm.X_GENES,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed each cell as the mean of its genes' rows in a table, weighted by expression.

    A gene weighs ``log1p(10,000 x count / total)``. With embeddings of texts about genes this is
    GenePT-w but for the length of the vectors, which is 1 there. Genes are found as :func:`stofm.pp.map_genes` finds them,
    or has found them, in the vocabulary of the built-in model. Counts are read block by block.

    Parameters
    ----------
    adata
        Cells x genes with raw counts, or a SpatialData that holds such a table.
    gene_embeddings
        A table (``.parquet``, ``.npz``, ``.tsv``, ``.csv``): genes, as Ensembl ids or symbols of
        human or mouse, in the first column, numbers in the others.
    layer
        Layer with raw counts; None for ``X``.
    key_added
        Entry of ``adata.obsm`` to write, and name of its record.
    table_key
        Table of a SpatialData; may be left out if there is only one.
    show_progress_bar
        Show a bar.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_genes' | key_added]`` : float32 (n_obs, width)
        Weighted means; 0 for a cell without counts in genes of the table.
    ``adata.uns['stofm']['X_genes' | key_added]`` : dict
        Parameters, and the name and fingerprint of the table.

    Raises
    ------
    FileNotFoundError
        There is no such table.
    KeyError
        There is no such layer.
    ValueError
        It is no table of genes, none of its genes is among those of `adata`, the counts are no
        raw counts, or `key_added` is taken.

    See Also
    --------
    stofm.tl.probe : compares the result with other embeddings.
    stofm.tl.train : can start from the same table.

    References
    ----------
    Chen & Zou 2024, Simple and effective embedding model for single-cell biology built from ChatGPT
    (Nature Biomedical Engineering).

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> numbers = np.random.default_rng(0).normal(size=(40, 8))
    >>> pd.DataFrame(numbers, adata.var_names).to_csv("genes.csv")
    >>> st.tl.pool_genes(adata, "genes.csv")
    >>> adata.obsm["X_genes"].shape
    (300, 8)
    """
    refuse_reserved(key_added, Obsm.X_GENES, Obsm.SPATIAL)
    table = resolve_table(adata, table_key, copy=copy)
    genes = GeneTable.read(gene_embeddings)
    means = _pool(table, genes, embedded_vocabulary(), layer, show_progress_bar=show_progress_bar)
    target = table.copy() if copy else table
    with all_or_nothing(target):
        target.obsm[key_added] = means
        write_record(
            target, key_added, {"layer": layer}, model=genes.file, model_fingerprint=genes.digest
        )
    return target if copy else None


def _pool(
    adata: AnnData,
    genes: GeneTable,
    vocabulary: GeneVocabulary,
    layer: str | None,
    *,
    show_progress_bar: bool,
) -> NDArray[np.float32]:
    """Weighted means, (n_obs, width)."""
    columns = find_columns(adata, vocabulary)
    row_of_token = np.full(vocabulary.n_tokens + 1, -1)
    row_of_token[vocabulary.tokens] = genes.rows_of(vocabulary)
    # Token -1, not a gene, indexes the last entry.
    rows = row_of_token[columns.token_ids]
    is_there = np.flatnonzero(rows >= 0)
    if not len(is_there):
        raise ValueError(
            f"None of the {adata.n_vars} genes of the AnnData, such as "
            f"{adata.var_names[:3].tolist()}, is among the {len(genes.names)} of {genes.file}, such "
            f"as {list(genes.names[:3])}: take a table that has them."
        )
    shape = (adata.n_vars, len(genes.names))
    selector = sparse.csr_matrix((np.ones(len(is_there)), (is_there, rows[is_there])), shape=shape)

    means = np.zeros((adata.n_obs, genes.width), dtype=np.float32)
    counts, start = np.zeros(adata.n_vars), 0
    with counter(adata.n_obs, "pool genes", "cell", show=show_progress_bar) as advance:
        for block in read_counts(adata, layer=layer):
            totals = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            weights = log_normalised(block @ selector, totals)
            sums = np.asarray(weights.sum(axis=1, dtype=np.float64))
            stop = start + len(sums)
            means[start:stop] = (weights @ genes.values) / np.where(sums > 0, sums, 1.0)
            counts += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            advance(len(sums))
            start = stop
    report_columns(adata, columns, counts, is_written=False)
    share = counts[is_there].sum() / max(counts.sum(), 1.0)
    tell = logger.info if share > _MOST_LACKING else warn
    tell(
        f"{len(is_there)} of {len(rows)} genes, with {share:.1%} of the counts, are in {genes.file}; "
        "the others are not used."
    )
    return means
