"""Which columns of an AnnData are genes, their names, and their genes in a vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._digests import fingerprint
from stofm._edge.tables import read_record, require_cells_and_genes, write_record
from stofm._keys import Var
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes import GeneMapping, GeneVocabulary, embedded_vocabulary, map_gene_ids
from stofm.genes.mapping import (
    ENSEMBL_TYPES,
    MOST_REPEATED,
    MOST_UNKNOWN,
    SYMBOL_TYPES,
    IdType,
    advice_for_names,
    clean_names,
    counts_of_repeated_genes,
    id_type,
    read_orthologs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from os import PathLike

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes.mapping import Species

    Orthologs = Mapping[str, str] | str | PathLike[str] | None

VAR_NAMES: Final = "var_names"
#: A column with more different values than this does not state the kind of a feature.
_MOST_KINDS: Final = 32
#: If one of these values occurs, other values are something else.
_GENES: Final = re.compile(
    r"((gene|rna) )?expression|gex|genes?|m? ?rna|transcripts?|endogenous", re.IGNORECASE
)
_NO_GENES: Final = re.compile(
    r"antibod|\b(adt|hto|prot(eins?)?(?! coding)|atac)\b|hashtag|peak|capture|control|codeword|\bblank"
    r"|\bneg(ative|prb| ?probe)?\b|positive|false ?code|spike|\bercc|crispr|guide|custom",
    re.IGNORECASE,
)
#: Names that agree on the gene in a smaller share of columns are names of something else.
_LEAST_AGREEMENT: Final = 0.9
#: Number of rows whose names are looked up, to see whether they are genes.
_MOST_ROWS: Final = 2000
_N_NAMED: Final = 3


# Names of genes


def kinds_of_others(adata: AnnData) -> NDArray[np.object_]:
    """Kind of each column that is not a gene, (n_vars,): an antibody, a control; ``""`` for genes.

    Any text column of ``adata.var`` with few values may state it, such as ``feature_types``.
    """
    kinds = np.full(adata.n_vars, "", dtype=object)
    for name in _text_columns(adata):
        column = adata.var[name]
        values = column.dropna().unique() if column.nunique() <= _MOST_KINDS else ()
        words = {value: re.sub(r"[\W_]+", " ", str(value)).strip() for value in values}
        if any(map(_GENES.fullmatch, words.values())):
            others = [value for value, text in words.items() if _NO_GENES.search(text)]
            is_other = column.isin(others).to_numpy() & (kinds == "")
            kinds[is_other] = column.astype(str).to_numpy()[is_other]
    if adata.n_vars and kinds.all():
        raise ValueError(
            f"adata has no genes: its columns are {_counted(kinds)}. Pass the gene expression."
        )
    return kinds


def _counted(kinds: NDArray[np.object_]) -> str:
    found = Counter(kinds[kinds != ""].tolist()).most_common()
    return ", ".join(f"{number} {kind}" for kind, number in found)


def _text_columns(adata: AnnData) -> list[str]:
    kinds = adata.var.dtypes.items()  # "O" is that of categories too
    return [str(name) for name, one in kinds if one.kind in "OSTU" and name != Var.GENE]


def names_by_source(adata: AnnData, gene_key: str | None = None) -> dict[str, list[str]]:
    """All possible names of the genes by source; ``""`` if there is none or it is not a gene.

    Sources are the column `gene_key` of ``adata.var``, or columns with Ensembl ids or with mostly
    unique words, those with most Ensembl ids first, and ``var_names`` last.
    """
    if gene_key is not None:
        if gene_key not in adata.var:
            there = list(adata.var.columns)
            raise KeyError(f"adata.var has no column {gene_key!r}; it has {there}.")
        return {gene_key: _names_of_genes(adata, gene_key)}
    sources = {name: _names_of_genes(adata, name) for name in sorted(_text_columns(adata))}
    kept = [name for name, names in sources.items() if _may_be_names(names)]
    kept.sort(key=lambda name: -_count(sources[name], ENSEMBL_TYPES))
    names = _names_of_genes(adata, VAR_NAMES)
    return {name: sources[name] for name in kept} | {VAR_NAMES: names}


def _names_of_genes(adata: AnnData, source: str) -> list[str]:
    names = clean_names(adata.var_names if source == VAR_NAMES else np.asarray(adata.var[source]))
    others = kinds_of_others(adata)
    return ["" if other else name for name, other in zip(names, others, strict=True)]


def _may_be_names(names: list[str]) -> bool:
    known = [name for name in names if name]
    if 2 * _count(known, ENSEMBL_TYPES) > len(known):
        return True
    n_words = sum(not name.isdigit() and " " not in name for name in known)
    return 2 * n_words > len(known) and 2 * len(set(known)) >= len(known)


def _count(names: Iterable[str], kinds: frozenset[Any]) -> int:
    return sum(id_type(name) in kinds for name in names)


def ids_and_symbols(adata: AnnData) -> tuple[list[str], list[str]]:
    """Return the names with most Ensembl ids, and the others with most symbols."""
    _log_others(adata)
    sources = names_by_source(adata)

    def take_best(kinds: frozenset[Any]) -> list[str]:
        best = max(sources, key=lambda s: (_count(sources[s], kinds), s == VAR_NAMES), default="")
        return sources.pop(best, [""] * adata.n_vars)

    return take_best(ENSEMBL_TYPES), take_best(SYMBOL_TYPES)


# Genes of a vocabulary


@dataclass(frozen=True, eq=False)
class Columns:
    """Token and median of each column's gene, (n_vars,); no gene has token -1.

    `mapping` is None if it was taken from ``adata.var``. `names` and `vocabulary` are fingerprints,
    `params` the request for a new mapping and the sources of its names.
    """

    token_ids: NDArray[np.int32]
    medians: NDArray[np.float64]
    vocabulary: str
    mapping: GeneMapping | None
    params: Mapping[str, str]
    names: str

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the tokens."""
        return fingerprint(self.token_ids.astype("<i4"))


def vocabulary_of(model_or_vocabulary: GeneVocabulary | Any | None) -> GeneVocabulary:
    """Return a vocabulary, the one of a model, or the embedded one for None."""
    if model_or_vocabulary is None:
        return embedded_vocabulary()
    vocabulary = getattr(model_or_vocabulary, "vocabulary", model_or_vocabulary)
    if not isinstance(vocabulary, GeneVocabulary):
        raise TypeError(
            "Expected a GeneVocabulary or a model that has one, "
            f"found {type(model_or_vocabulary).__name__}."
        )
    return vocabulary


def find_columns(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    *,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Orthologs = None,
    may_reuse: bool = True,
) -> Columns:
    """Use the mapping in ``adata.var`` if it fits vocabulary and arguments, else make one."""
    require_cells_and_genes(adata)
    record = read_record(adata, Var.TOKEN_ID) or {}
    made = record.get("params", {})
    is_as_asked = species in ("auto", made.get("species")) and gene_key in (
        None,
        made.get("gene_key"),
    )
    may_reuse = may_reuse and orthologs is None and is_as_asked
    index = _stored_index(adata, record, vocabulary) if may_reuse else None
    mapping, params, names = None, {}, ""
    if index is None:
        mapping, sources = _map(adata, vocabulary, species, gene_key, orthologs)
        index = mapping.gene_index
        pairs = "mapping" if hasattr(orthologs, "items") else str(orthologs or "")
        params = {"species": species, "gene_key": gene_key or "", "orthologs": pairs, **sources}
        names = _names_fingerprint(adata, params)
    token_ids = np.where(index >= 0, vocabulary.tokens[index], -1).astype(np.int32)
    medians = vocabulary.medians[index]
    return Columns(token_ids, medians, vocabulary.fingerprint, mapping, params, names)


def _stored_index(
    adata: AnnData, record: Mapping[str, Any], vocabulary: GeneVocabulary
) -> NDArray[np.int64] | None:
    """Index of each column's gene in the vocabulary, if a fitting mapping is in the AnnData."""
    read = (record.get("vocabulary"), record.get("names"))
    fitting = (vocabulary.fingerprint, _names_fingerprint(adata, record.get("params", {})))
    if read != fitting or not {Var.GENE, Var.TOKEN_ID} <= set(adata.var.columns):
        return None
    rows = vocabulary.rows_by_id
    index = np.array([rows.get(gene, -1) for gene in np.asarray(adata.var[Var.GENE])])
    expected = np.where(index >= 0, vocabulary.tokens[index], -1)
    # Joining slices can leave columns without an entry, whatever their genes are.
    return index if np.array_equal(expected, np.asarray(adata.var[Var.TOKEN_ID])) else None


def _names_fingerprint(adata: AnnData, params: Mapping[str, str]) -> str:
    """Fingerprint of the names that a mapping with these params uses; ``""`` if one is gone."""
    sources = [params[name] for name in ("source", "fallback") if params.get(name)]
    if not all(source == VAR_NAMES or source in adata.var for source in sources):
        return ""
    return fingerprint(*("\n".join([one, *_names_of_genes(adata, one)]) for one in sources))


def _map(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    species: Species,
    gene_key: str | None,
    orthologs: Orthologs,
) -> tuple[GeneMapping, dict[str, str]]:
    """Map the columns by the names that find most genes, and by the next best that agree with them.

    Other columns may name genes too: neighbours, partners, paralogs. They disagree with the names
    of the features themselves.
    """
    names = names_by_source(adata, gene_key)
    options: Any = {
        "species": species,
        "orthologs": None if orthologs is None else read_orthologs(orthologs),
    }
    found = {source: map_gene_ids(ids, vocabulary, **options) for source, ids in names.items()}
    order = sorted(found, key=lambda source: -found[source].n_matched)
    trusted = order[0]
    if VAR_NAMES in found and 2 * found[VAR_NAMES].n_matched >= found[trusted].n_matched:
        trusted = VAR_NAMES
    best, second, *_ = [*(one for one in order if _agree(found[one], found[trusted])), "", ""]
    if best != order[0]:
        logger.info(
            "var[%r] names other genes than %s and is not used; pass `gene_key` if it is right.",
            *(order[0], trusted),
        )
    mapping = map_gene_ids(names[best], vocabulary, fallback_ids=names.get(second), **options)
    # The report does not count columns that are not genes.
    types = Counter(mapping.id_types)
    types[IdType.MISSING.value] -= int((kinds_of_others(adata) != "").sum())
    mapping = replace(mapping, id_types=dict(+types))
    mapping.require_enough(lambda: _advice(adata, mapping, vocabulary, names))
    return mapping, {"source": best, "fallback": second}


def _agree(first: GeneMapping, second: GeneMapping) -> bool:
    both = (first.gene_index >= 0) & (second.gene_index >= 0)
    same = first.gene_index[both] == second.gene_index[both]
    return not both.any() or float(same.mean()) >= _LEAST_AGREEMENT


def _advice(
    adata: AnnData,
    mapping: GeneMapping,
    vocabulary: GeneVocabulary,
    names: Mapping[str, list[str]],
) -> str:
    """Advice on too few genes, if there is more to say than which arguments there are."""
    rows = clean_names(adata.obs_names[:: -(-adata.n_obs // _MOST_ROWS)])
    n_genes = map_gene_ids(rows, vocabulary).n_matched
    if n_genes > max(len(rows) / 2, mapping.n_matched):
        return (
            f"The rows are genes: {n_genes} of {len(rows)} obs_names are in the vocabulary. "
            "Transpose the AnnData, so that cells are in its rows: adata = adata.T.copy()."
        )
    for source, ids in names.items():
        where = "adata.var_names" if source == VAR_NAMES else f"adata.var[{source!r}]"
        if advice := advice_for_names(ids, vocabulary, where):
            return advice
    return ""


def write_columns(adata: AnnData, columns: Columns) -> None:
    """Write a new mapping to ``adata.var``, with records."""
    if columns.mapping is not None:
        adata.var[Var.GENE] = np.asarray(columns.mapping.gene_id, dtype=object)
        adata.var[Var.TOKEN_ID] = columns.mapping.token_id
        more = {"vocabulary": columns.vocabulary, "names": columns.names}
        for key in (Var.GENE, Var.TOKEN_ID):
            write_record(adata, key, columns.params, **more)


def report_columns(
    adata: AnnData,
    columns: Columns,
    counts: NDArray[np.float64] | None,
    *,
    is_written: bool = True,
) -> None:
    """Log a mapping; warn of counts (n_vars,) without a gene, and of genes with several columns.

    `is_written` says whether the caller writes the mapping, which the warning then recommends.
    """
    if columns.mapping is not None:
        sources = " and ".join(filter(None, (columns.params["source"], columns.params["fallback"])))
        mapping = replace(columns.mapping, counts_per_gene=counts)
        logger.info("%s; names in %s", mapping.summary(), sources)
        _log_others(adata)
    if counts is not None:
        found = "" if is_written or Var.GENE in adata.var else "st.pp.map_genes(adata); "
        drop = f": {found}adata = adata[:, adata.var[{Var.GENE!r}] != ''].copy()"
        warn_of_counts(columns.token_ids, counts, adata.var_names, drop)


def warn_of_counts(
    genes: NDArray[np.integer], counts: NDArray[np.float64], names: Sequence[str], drop: str = "."
) -> None:
    """Warn of many counts (n_vars,) in columns without a gene, or of a gene with several columns.

    `genes` are numbers, negative for none. `drop` says how to drop columns without one.
    """
    total = counts.sum()
    unknown, repeated = np.where(genes >= 0, 0.0, counts), counts_of_repeated_genes(genes, counts)

    def largest(part: NDArray[np.float64]) -> str:
        order = np.argsort(-part, kind="stable")[:_N_NAMED]
        named = ", ".join(f"{names[k]} ({part[k] / total:.1%})" for k in order if part[k])
        return f"most of them in {named}" if np.count_nonzero(part) > _N_NAMED else named

    if unknown.sum() > MOST_UNKNOWN * total:
        warn(
            f"{unknown.sum() / total:.1%} of the counts are in columns that no gene was found for "
            f"({largest(unknown)}). They count towards the totals by which the values of all genes are "
            "divided. If they are not genes (controls, spike-ins, antibodies, another species), drop "
            f"them{drop}"
        )
    if repeated.sum() > MOST_REPEATED * total:
        warn(
            f"{repeated.sum() / total:.1%} of the counts are in columns of genes that another column "
            f"before them has too ({largest(repeated)}). The columns of a gene count together. If "
            "some are not genes (antibodies, another modality), drop them."
        )


def _log_others(adata: AnnData) -> None:
    kinds = kinds_of_others(adata)
    if kinds.any():
        logger.info(
            "%d of %d columns are not genes and are left out (%s).",
            np.count_nonzero(kinds),
            adata.n_vars,
            _counted(kinds),
        )
