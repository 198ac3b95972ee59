"""Which gene of a vocabulary each column of an AnnData is."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._digests import fingerprint
from stofm._edge.counts import NotRawCountsError, read_counts
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
from stofm._messages import warn
from stofm.genes import (
    GeneMapping,
    GeneVocabulary,
    embedded_vocabulary,
    map_gene_ids,
    read_orthologs,
)
from stofm.genes.gene_ids import IdType, clean_names
from stofm.genes.mapping import (
    MOST_UNKNOWN,
    advice_for_names,
    counts_of_shared_genes,
    spreadsheet_dates,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes.mapping import Species

#: Names that mean the same gene in a smaller share of columns are names of something else.
_LEAST_AGREEMENT: Final = 0.9
#: Rows whose names are looked up, to see whether they are genes.
_MOST_ROWS: Final = 2000
#: Share of lost genes from which on their names are looked at for a pattern.
_MOST_LOST: Final = 0.2
#: Unknown columns that are named, and the share of the unknown counts that makes them all.
_N_NAMED: Final = 3
_MOST_OF_UNKNOWN: Final = 0.9
#: Share of genes with names that became dates from which on more than a few are meant.
_MOST_DATES: Final = 0.01
#: Letters from which on the start of names says what a column is.
_SHORTEST_START: Final = 3


@dataclass(frozen=True, eq=False)
class MappedGenes:
    """A mapping of the columns, what it was made with, and how to name genes that it did not find."""

    mapping: GeneMapping
    params: Mapping[str, str]
    vocabulary: str
    names: str
    advice: str


@dataclass(frozen=True, eq=False)
class Columns:
    """Token, -1 for none, and median of each column's gene; the mapping if it is a new one."""

    token_ids: NDArray[np.int32]
    medians: NDArray[np.float64]
    genes: MappedGenes | None
    vocabulary: str
    fingerprint: str


def vocabulary_of(model_or_vocabulary: GeneVocabulary | Any | None) -> GeneVocabulary:
    """Return a vocabulary, the one of a model, or the embedded one for None."""
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
    if features.others:
        # The report does not count columns that are no genes.
        types = Counter(mapping.id_types)
        types[IdType.MISSING.value] -= int((~features.is_gene).sum())
        mapping = replace(mapping, id_types=dict(+types))
    mapping.require_enough(lambda: _advice(adata, mapping, vocabulary))
    params = {
        "species": species,
        "gene_key": gene_key or "",
        "orthologs": "mapping" if hasattr(orthologs, "items") else str(orthologs or ""),
        "source": best,
        "fallback": second,
    }
    advice = ""
    if len(mapping.lost) > _MOST_LOST * mapping.n_vars:
        advice = advice_for_names(mapping.lost, vocabulary, _written(best))
    names_then = names_fingerprint(adata, params)
    return MappedGenes(mapping, params, vocabulary.fingerprint, names_then, advice)


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
        if advice := advice_for_names(names_of_genes(adata, name), vocabulary, _written(name)):
            return f"{advice}."
    return ""


def _written(source: str) -> str:
    return "adata.var_names" if source == VAR_NAMES else f"adata.var[{source!r}]"


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
    """Fingerprint of the names that a mapping with these params is made from; ``""`` if one is gone."""
    sources = [params[name] for name in ("source", "fallback") if params.get(name)]
    if not all(source == VAR_NAMES or source in adata.var for source in sources):
        return ""
    return fingerprint(*("\n".join([one, *names_of_genes(adata, one)]) for one in sources))


def columns_fingerprint(token_ids: NDArray[np.integer]) -> str:
    """Fingerprint of the tokens of all columns."""
    return hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()[:16]


def counts_per_gene(adata: AnnData) -> NDArray[np.float64] | None:
    """Sum each column of ``X``; None if ``X`` does not hold counts, which mapping can do without."""
    total = np.zeros(adata.n_vars)
    try:
        for block in read_counts(adata):
            total += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
    except (TypeError, NotRawCountsError):
        return None
    return total


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
    index, genes = None, None
    if orthologs is None:
        index = _existing_mapping(adata, vocabulary, species, gene_key)
    if index is None:
        genes = compute_gene_mapping(
            adata, vocabulary, species=species, gene_key=gene_key, orthologs=orthologs
        )
        index = genes.mapping.gene_index
    token_ids = np.where(index >= 0, vocabulary.tokens[index], -1).astype(np.int32)
    digits = columns_fingerprint(token_ids)
    return Columns(token_ids, vocabulary.medians[index], genes, vocabulary.fingerprint, digits)


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


# What is said of a mapping


def report_mapping(
    adata: AnnData, genes: MappedGenes, counts_per_gene: NDArray[np.float64] | None
) -> None:
    """Log which genes were found by what names, and what is left out; warn of lost counts."""
    mapping = replace(genes.mapping, counts_per_gene=counts_per_gene)
    sources = " and ".join(filter(None, (genes.params["source"], genes.params["fallback"])))
    logger.info("%s; names in %s", mapping.summary(), sources)
    read_features(adata).report()
    if genes.advice:
        warn(
            f"{len(mapping.lost)} of {mapping.n_vars} genes were not found. Of those, {genes.advice}."
        )
    if dates := spreadsheet_dates(mapping.lost):
        tell = warn if len(dates) >= _MOST_DATES * mapping.n_vars else logger.info
        tell(
            f"{len(dates)} of {mapping.n_vars} genes are lost, because a spreadsheet turned their names "
            f"into dates, such as {dates[0]}. Take adata.var_names from where they came from."
        )
    if counts_per_gene is not None:
        warn_of_counts(adata, mapping.gene_index, counts_per_gene)


def warn_of_counts(
    adata: AnnData, genes: NDArray[np.integer], counts_per_column: NDArray[np.float64]
) -> None:
    """Warn if many counts are in columns without a gene (negative numbers), or that share their gene."""
    _warn_of_unknown_counts(adata, genes >= 0, counts_per_column)
    _warn_of_shared_genes(adata, genes, counts_per_column)


def _warn_of_shared_genes(
    adata: AnnData, genes: NDArray[np.integer], counts_per_column: NDArray[np.float64]
) -> None:
    shared, keep = counts_of_shared_genes(genes, counts_per_column)
    if not shared.any():
        return
    total = counts_per_column.sum()
    side, argument = ("before", "") if keep == "first" else ("after", "keep='last'")
    n_genes = len(np.unique(genes[shared > 0]))
    warn(
        f"{shared.sum() / total:.1%} of the counts are in {_columns(shared)} of {n_genes} "
        f"gene{'s' if n_genes > 1 else ''} that another column {side} them has too: "
        f"{_largest(adata, shared / total)}. The columns of a gene count together. If these are no "
        f"genes (antibodies, another modality), drop them: gene = adata.var[{Var.GENE!r}]; "
        f"adata = adata[:, ((gene == '') | ~gene.duplicated({argument})).to_numpy()].copy()"
    )


def _warn_of_unknown_counts(
    adata: AnnData, is_known: NDArray[np.bool_], counts_per_column: NDArray[np.float64]
) -> None:
    unknown = np.where(is_known, 0.0, counts_per_column)
    total = counts_per_column.sum()
    if unknown.sum() <= MOST_UNKNOWN * total:
        return
    warn(
        f"{unknown.sum() / total:.1%} of the counts are in {_columns(unknown)} that no gene of the "
        f"vocabulary was found for: {_largest(adata, unknown / total)}. They count in the "
        "totals that the values of all genes are shares of. If they are no genes (controls, "
        "spike-ins, antibodies, another species), drop them: "
        f"adata = adata[:, {_code_for_others(adata, is_known, unknown)}].copy()"
    )


def _columns(counts: NDArray[np.float64]) -> str:
    n_columns = np.count_nonzero(counts)
    return f"{n_columns} column{'s' if n_columns > 1 else ''}"


def _largest(adata: AnnData, shares: NDArray[np.float64]) -> str:
    """The columns with most counts, with their shares."""
    order = np.argsort(-shares, kind="stable")[:_N_NAMED]
    named = ", ".join(f"{adata.var_names[k]} ({shares[k]:.1%})" for k in order if shares[k])
    return f"most of them in {named}" if np.count_nonzero(shares) > _N_NAMED else named


def _code_for_others(
    adata: AnnData, is_known: NDArray[np.bool_], unknown: NDArray[np.float64]
) -> str:
    """Code that is True for all but the unknown columns: by few names, their start, or mapping."""
    names = adata.var_names.astype(str)
    largest = np.argsort(-unknown, kind="stable")[:_N_NAMED]
    enough = _MOST_OF_UNKNOWN * unknown.sum()
    if unknown[largest].sum() >= enough:
        few = [names[k] for k in largest if unknown[k]]
        return f"~adata.var_names.isin({few!r})"
    start = re.split(r"[\W\d_]", names[largest[0]])[0]
    has_start = np.asarray(names.str.startswith(start))
    is_start = len(start) >= _SHORTEST_START and not (has_start & is_known).any()
    if is_start and unknown[has_start].sum() >= enough:
        return f"~adata.var_names.str.startswith({start!r})"
    return f"adata.var[{Var.GENE!r}] != ''"
