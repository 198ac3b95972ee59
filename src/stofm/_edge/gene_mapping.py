"""Find out which gene of a vocabulary each column of an AnnData is."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.features import (
    VAR_NAMES,
    gene_name_sources,
    names_of_genes,
    read_features,
    text_columns,
)
from stofm._edge.records import read_record, write_record
from stofm._edge.tables import require_cells_and_genes
from stofm._keys import Var
from stofm._logging import logger
from stofm.genes import (
    GeneMapping,
    GeneVocabulary,
    embedded_vocabulary,
    map_gene_ids,
    read_orthologs,
)
from stofm.genes.compressed import DamagedMatrixError
from stofm.genes.gene_ids import IdType, clean_names
from stofm.genes.name_advice import advice_for_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.features import Features
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


def counts_per_gene(adata: AnnData) -> NDArray[np.float64] | None:
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
