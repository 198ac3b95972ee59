"""``stofm.pp.map_genes``: which gene of a vocabulary each column is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._edge.counts import NotRawCountsError, read_counts
from stofm._edge.gene_mapping import find_columns, report_columns, vocabulary_of, write_columns
from stofm._edge.tables import all_or_nothing, resolve_table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.genes.mapping import Species


def map_genes(
    adata: AnnData | Any,
    *,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    vocabulary: GeneVocabulary | Any | None = None,
    table_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find the gene of the model's vocabulary that each column is, and report what is lost.

    Ensembl ids (with or without version) and symbols, human and mouse, also mixed, are
    recognised one by one; see :func:`stofm.genes.map_gene_ids`. The report (what was found, how
    many genes and what share of the counts are kept, examples of what is not) is logged.

    Columns that are not genes according to `adata.var`, such as by ``feature_types`` ("Antibody
    Capture", "Negative Control Probe"), are left out here and wherever counts are read.

    Parameters
    ----------
    adata
        Cells x genes, or a SpatialData that holds such a table.
    species
        ``"auto"`` decides id by id; with ``"human"`` or ``"mouse"`` symbols are taken for that
        species'.
    gene_key
        Column of `adata.var` with the genes' names. None takes ``var_names`` or the text column
        that matches most genes, and for a gene that it does not find the next best of them;
        columns that name other genes than ``var_names`` are left out.
    orthologs
        Mouse to human Ensembl ids: a mapping, a table or its address, see
        :func:`stofm.genes.read_orthologs`. Not needed with the embedded vocabulary, which knows
        mouse genes.
    vocabulary
        A vocabulary, or a model that has one; None is that of the built-in model.
    table_key
        Table of a SpatialData; may be left out if there is only one.
    copy
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    None, or the new AnnData if `copy`. Fields set:

    ``var["stofm_gene"]``
        Human Ensembl id; ``""`` where no gene was found.
    ``var["stofm_token_id"]``
        int32 token; -1 where no gene was found.

    Raises
    ------
    ValueError
        No gene, or too few, were found; there are no cells or genes.
    KeyError
        `gene_key` is no column of `adata.var`, or `table_key` no table.

    See Also
    --------
    stofm.pp.check : genes, counts, positions and time on one page.
    stofm.GeneVocabulary : the genes that a model knows.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_cortex_osmfish")
    >>> st.pp.map_genes(adata)
    >>> adata.var.loc["Gad2", "stofm_gene"]
    'ENSG00000136750'
    """
    table = resolve_table(adata, table_key, copy=copy)
    target = table.copy() if copy else table
    columns = find_columns(
        target,
        vocabulary_of(vocabulary),
        species=species,
        gene_key=gene_key,
        orthologs=orthologs,
        may_reuse=False,
    )
    report_columns(target, columns, _counts_per_column(target))
    with all_or_nothing(target):
        write_columns(target, columns)
    return target if copy else None


def _counts_per_column(adata: AnnData) -> NDArray[np.float64] | None:
    """Sum each column of ``X``; None if ``X`` does not hold counts, which mapping can do without."""
    total = np.zeros(adata.n_vars)
    try:
        for block in read_counts(adata):
            total += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
    except (TypeError, NotRawCountsError):
        return None
    return total
