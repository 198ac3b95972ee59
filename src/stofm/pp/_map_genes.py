"""Find out which gene of a vocabulary each column of an AnnData is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._anndata import resolve_table, write_record
from stofm._counts import gene_name_sources, read_counts, require_cells_and_genes
from stofm._keys import Var
from stofm._logging import logger
from stofm.genes import (
    GeneMapping,
    GeneVocabulary,
    embedded_vocabulary,
    map_gene_ids,
    read_orthologs,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes.mapping import Species


@dataclass(frozen=True, eq=False)
class MappedGenes:
    """A mapping of the columns and what it was made with.

    Attributes
    ----------
    mapping
        Gene of each column, with the report.
    params
        Species, `gene_key`, ortholog table, and the names that were used (``source``,
        ``fallback``).
    vocabulary
        Fingerprint of the vocabulary.
    names
        Fingerprint of the names that the genes were found by.
    """

    mapping: GeneMapping
    params: Mapping[str, str]
    vocabulary: str
    names: str


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

    Parameters
    ----------
    adata
        Cells x genes, or a SpatialData that holds such a table.
    species
        ``"auto"`` decides id by id; with ``"human"`` or ``"mouse"`` symbols are taken for that
        species'.
    gene_key
        Column of `adata.var` with the genes' names. None takes ``var_names`` or the column with
        ids or symbols (such as ``ensembl_id``, ``gene_ids``, ``feature_name``), whichever
        matches most genes, and for a gene that it does not find the next best of them.
    orthologs
        Mouse to human Ensembl ids: a mapping, a table or its address, see
        :func:`stofm.genes.read_orthologs`. Not needed with the embedded vocabulary, which knows
        mouse genes.
    vocabulary
        A vocabulary, or a model that has one; None is that of the embedded model.
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
    """
    table = resolve_table(adata, table_key, copy=copy)
    require_cells_and_genes(table)
    target = table.copy() if copy else table
    genes = compute_gene_mapping(
        target,
        vocabulary_of(vocabulary),
        species=species,
        gene_key=gene_key,
        orthologs=orthologs,
        counts_per_gene=_counts_per_gene(target),
    )
    logger.info(genes.mapping.summary())
    write_gene_mapping(target, genes)
    return target if copy else None


def vocabulary_of(model_or_vocabulary: GeneVocabulary | Any | None) -> GeneVocabulary:
    """Return a vocabulary, the one of a model, or the embedded one for None.

    Raises
    ------
    TypeError
        The argument is neither a vocabulary nor has one.
    """
    if model_or_vocabulary is None:
        return embedded_vocabulary()
    vocabulary = getattr(model_or_vocabulary, "vocabulary", model_or_vocabulary)
    if not isinstance(vocabulary, GeneVocabulary):
        msg = (
            "Expected a GeneVocabulary or a model that has one, "
            f"found {type(model_or_vocabulary).__name__}."
        )
        raise TypeError(msg)
    return vocabulary


def compute_gene_mapping(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    *,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    counts_per_gene: NDArray[Any] | None = None,
) -> MappedGenes:
    """Map the columns of `adata` without writing anything; arguments as in :func:`map_genes`."""
    names = candidate_names(adata, gene_key)
    pairs = None if orthologs is None else read_orthologs(orthologs)
    best, second = next(iter(names)), ""
    if len(names) > 1:
        matched = {
            source: map_gene_ids(ids, vocabulary, species=species, orthologs=pairs).n_matched
            for source, ids in names.items()
        }
        best, second = sorted(matched, key=lambda source: -matched[source])[:2]
    mapping = map_gene_ids(
        names[best],
        vocabulary,
        species=species,
        orthologs=pairs,
        fallback_ids=names.get(second),
        counts_per_gene=counts_per_gene,
    )
    mapping.require_enough()
    params = {
        "species": species,
        "gene_key": gene_key or "",
        "orthologs": _describe_orthologs(orthologs),
        "source": best,
        "fallback": second,
    }
    fingerprint = names_fingerprint(adata, gene_key)
    return MappedGenes(mapping, params, vocabulary.fingerprint, fingerprint)


def write_gene_mapping(adata: AnnData, genes: MappedGenes) -> None:
    """Write the columns of ``adata.var`` and their records."""
    adata.var[Var.GENE] = np.asarray(genes.mapping.gene_id, dtype=object)
    adata.var[Var.TOKEN_ID] = genes.mapping.token_id
    for key in (Var.GENE, Var.TOKEN_ID):
        write_record(adata, key, genes.params, vocabulary=genes.vocabulary, names=genes.names)


def candidate_names(adata: AnnData, gene_key: str | None) -> dict[str, list[Any]]:
    """Return all names of the genes, or only those of one column of ``adata.var``."""
    if gene_key is None:
        return gene_name_sources(adata)
    columns = list(adata.var.columns)
    if gene_key not in columns:
        msg = f"adata.var has no column {gene_key!r}; it has {columns}."
        raise KeyError(msg)
    return {gene_key: list(np.asarray(adata.var[gene_key]))}


def names_fingerprint(adata: AnnData, gene_key: str | None) -> str:
    """Return 16 hexadecimal digits over all names that a mapping could be made from."""
    hashed = hashlib.blake2b(digest_size=8)
    for source, names in candidate_names(adata, gene_key).items():
        hashed.update("\n".join([source, *map(str, names)]).encode())
    return hashed.hexdigest()


def _describe_orthologs(orthologs: Mapping[str, str] | str | PathLike[str] | None) -> str:
    if orthologs is None:
        return ""
    return str(orthologs) if not hasattr(orthologs, "items") else "mapping"


def _counts_per_gene(adata: AnnData) -> NDArray[np.float64] | None:
    """Sum each column of ``X``; None if ``X`` does not hold counts, which mapping can do without."""
    total = np.zeros(adata.n_vars)
    try:
        for block in read_counts(adata):
            total += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
    except ValueError:
        return None
    return total
