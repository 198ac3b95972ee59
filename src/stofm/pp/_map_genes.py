"""Find out which gene of a vocabulary each column of an AnnData is."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._anndata import resolve_table, write_record
from stofm._counts import read_counts, require_cells_and_genes
from stofm._features import (
    VAR_NAMES,
    gene_name_sources,
    names_of_genes,
    read_features,
    text_columns,
)
from stofm._keys import Var
from stofm._logging import logger
from stofm._writing import all_or_nothing
from stofm.genes import (
    GeneMapping,
    GeneVocabulary,
    embedded_vocabulary,
    map_gene_ids,
    read_orthologs,
)
from stofm.genes.compressed import DamagedMatrixError
from stofm.genes.gene_ids import IdType, clean_names
from stofm.genes.mapping import advice_for_names
from stofm.pp._gene_report import report_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._features import Features
    from stofm.genes.mapping import Species

#: Names that mean the same gene in a smaller share of columns are names of something else.
_LEAST_AGREEMENT: Final = 0.9
#: Rows whose names are looked up, to see whether they are genes.
_MOST_ROWS: Final = 2000
#: Share of lost genes from which on their names are looked at for a pattern.
_MOST_LOST: Final = 0.2


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
    advice
        How to change names so that lost genes are found; ``""`` for no idea.
    """

    mapping: GeneMapping
    params: Mapping[str, str]
    vocabulary: str
    names: str
    advice: str = ""


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

    Columns that are no genes by a column of `adata.var`, such as ``feature_types`` ("Antibody
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
    counts = _counts_per_gene(target)
    genes = compute_gene_mapping(
        target,
        vocabulary_of(vocabulary),
        species=species,
        gene_key=gene_key,
        orthologs=orthologs,
        counts_per_gene=counts,
    )
    report_mapping(target, genes, counts)
    with all_or_nothing(target):
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
    features = read_features(adata)
    names = candidate_names(adata, gene_key)
    pairs = None if orthologs is None else read_orthologs(orthologs)
    best, second = next(iter(names)), ""
    if len(names) > 1:
        found = {
            source: map_gene_ids(ids, vocabulary, species=species, orthologs=pairs)
            for source, ids in names.items()
        }
        best, second = _best_sources(found)
    mapping = map_gene_ids(
        names[best],
        vocabulary,
        species=species,
        orthologs=pairs,
        fallback_ids=names.get(second),
        counts_per_gene=counts_per_gene,
    )
    mapping = _of_genes_alone(mapping, features)
    mapping.require_enough(lambda: _advice(adata, mapping, vocabulary))
    params = {
        "species": species,
        "gene_key": gene_key or "",
        "orthologs": _describe_orthologs(orthologs),
        "source": best,
        "fallback": second,
    }
    fingerprint = names_fingerprint(adata, params)
    advice = ""
    if len(mapping.lost) > _MOST_LOST * mapping.n_vars:
        where = "adata.var_names" if best == VAR_NAMES else f"adata.var[{best!r}]"
        advice = advice_for_names(mapping.lost, vocabulary, where)
    return MappedGenes(mapping, params, vocabulary.fingerprint, fingerprint, advice)


def _best_sources(found: Mapping[str, GeneMapping]) -> tuple[str, str]:
    """Source of names that most genes are found by, and the next best that means the same genes.

    Other columns may name genes too: neighbours, partners, paralogs. They disagree with the names
    of the features themselves.
    """
    order = sorted(found, key=lambda source: -found[source].n_matched)
    index = found[VAR_NAMES]
    trusted = VAR_NAMES if 2 * index.n_matched >= found[order[0]].n_matched else order[0]
    kept = [source for source in order if _agree(found[source], found[trusted])]
    for source in order:
        if source not in kept and 2 * found[source].n_matched > index.n_matched:
            logger.info(
                "var[%r] names other genes than %s and is not read; pass `gene_key` if its are right.",
                source,
                trusted,
            )
    return kept[0], kept[1] if len(kept) > 1 else ""


def _agree(first: GeneMapping, second: GeneMapping) -> bool:
    both = (first.gene_index >= 0) & (second.gene_index >= 0)
    same = first.gene_index[both] == second.gene_index[both]
    return not both.any() or float(same.mean()) >= _LEAST_AGREEMENT


def _of_genes_alone(mapping: GeneMapping, features: Features) -> GeneMapping:
    """The mapping with a report that does not count columns that are no genes."""
    if not features.others:
        return mapping
    types = Counter(mapping.id_types)
    types[IdType.MISSING.value] -= int((~features.is_gene).sum())
    return replace(mapping, id_types=dict(+types))


def _advice(adata: AnnData, mapping: GeneMapping, vocabulary: GeneVocabulary) -> str:
    """What to do about too few genes, if there is more to say than which arguments there are."""
    rows = clean_names(adata.obs_names[:: -(-adata.n_obs // _MOST_ROWS)])
    n_genes = map_gene_ids(rows, vocabulary).n_matched
    if n_genes > max(len(rows) / 2, mapping.n_matched):
        return (
            f"The rows are genes: {n_genes} of {len(rows)} obs_names are in the vocabulary. "
            "Transpose the AnnData, so that cells are in its rows: adata = adata.T.copy()."
        )
    for name in (VAR_NAMES, *text_columns(adata)):
        where = "adata.var_names" if name == VAR_NAMES else f"adata.var[{name!r}]"
        if advice := advice_for_names(names_of_genes(adata, name), vocabulary, where):
            return f"{advice}."
    return ""


def write_gene_mapping(adata: AnnData, genes: MappedGenes) -> None:
    """Write the columns of ``adata.var`` and their records."""
    adata.var[Var.GENE] = np.asarray(genes.mapping.gene_id, dtype=object)
    adata.var[Var.TOKEN_ID] = genes.mapping.token_id
    for key in (Var.GENE, Var.TOKEN_ID):
        write_record(adata, key, genes.params, vocabulary=genes.vocabulary, names=genes.names)


def candidate_names(adata: AnnData, gene_key: str | None) -> dict[str, list[str]]:
    """Return all names of the genes, or only those of one column of ``adata.var``."""
    if gene_key is None:
        return gene_name_sources(adata)
    columns = list(adata.var.columns)
    if gene_key not in columns:
        msg = f"adata.var has no column {gene_key!r}; it has {columns}."
        raise KeyError(msg)
    return {gene_key: names_of_genes(adata, gene_key)}


def names_fingerprint(adata: AnnData, params: Mapping[str, str]) -> str:
    """Return 16 hexadecimal digits over the names that a mapping with these params is made from.

    ``""`` if they are not there.
    """
    hashed = hashlib.blake2b(digest_size=8)
    for source in filter(None, (params.get("source", ""), params.get("fallback", ""))):
        if source != VAR_NAMES and source not in adata.var.columns:
            return ""
        hashed.update("\n".join([source, *names_of_genes(adata, source)]).encode())
    return hashed.hexdigest()


def columns_fingerprint(token_ids: NDArray[np.integer]) -> str:
    """Return 16 hexadecimal digits over the tokens of all columns."""
    return hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()[:16]


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
    except DamagedMatrixError:
        raise
    except (TypeError, ValueError):
        return None
    return total
