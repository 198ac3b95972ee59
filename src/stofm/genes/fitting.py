"""A vocabulary from slices: which genes there are, and their medians."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.compressed import require_sound
from stofm.genes.gene_ids import IdType, clean_names, id_type, strip_version
from stofm.genes.mapping import MOST_UNKNOWN, counts_of_shared_genes, map_gene_ids
from stofm.genes.medians import ExactMedians, HistogramMedians
from stofm.genes.names import GeneNames
from stofm.genes.orthologs import read_orthologs
from stofm.genes.vocabulary import GeneVocabulary
from stofm.genes.vocabulary_table import vocabulary_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from numpy.typing import NDArray

_TARGET_SUM: Final = 10_000
_FIRST_GENE_TOKEN: Final = 2
_METHODS: Final[dict[str, type[ExactMedians | HistogramMedians]]] = {
    "exact": ExactMedians,
    "histogram": HistogramMedians,
}


@dataclass(frozen=True, eq=False)
class CountSlice:
    """Counts of a slice with the names of its columns.

    Attributes
    ----------
    blocks
        CSR matrices (rows of the block, n_vars) of raw counts, all cells together.
    ids
        (n_vars,) ids, ``""`` where missing.
    symbols
        (n_vars,) second names, ``""`` where missing.
    """

    blocks: Iterable[sparse.csr_matrix]
    ids: list[str]
    symbols: list[str]


def fit_vocabulary(
    slices: Iterable[Any],
    *,
    orthologs: Mapping[str, str] | str | PathLike[str] | None,
    reference: GeneVocabulary | None,
    method: Literal["exact", "histogram"],
    min_cells: int,
    layer: str | None,
) -> GeneVocabulary:
    """Make a vocabulary; see :meth:`stofm.genes.GeneVocabulary.fit`."""
    if method not in _METHODS:
        msg = f"method must be one of {sorted(_METHODS)}, found {method!r}."
        raise ValueError(msg)
    pairs = {} if orthologs is None else read_orthologs(orthologs)
    medians = _METHODS[method]()
    names = GeneNames()
    names.add_aliases(pairs)
    if reference is not None:
        names.add(reference.gene_ids.tolist(), reference.symbols.tolist())
        names.add_aliases(reference.aliases)
    numbers: dict[str, int] = {}
    for place, item in enumerate(slices, start=1):
        columns = as_count_slice(item, layer=layer)
        genes = _human_gene_ids(columns, pairs, reference, names)
        counts = _add_values(medians, columns.blocks, genes, numbers)
        _warn_of_counts(place, np.array([numbers.get(gene, -1) for gene in genes]), counts)
    n_cells, values = medians.result(len(numbers))
    kept = {gene: float(values[row]) for gene, row in numbers.items() if n_cells[row] >= min_cells}
    logger.info("%d of %d genes were seen in at least %d cells", len(kept), len(numbers), min_cells)
    return _assemble(kept, names, len(numbers), min_cells)


def as_count_slice(item: Any, *, layer: str | None) -> CountSlice:
    """Read a slice from a tuple of arrays, an AnnData, or the path of one."""
    if isinstance(item, CountSlice):
        return item
    if isinstance(item, tuple):
        counts, ids, *symbols = item
        require_sound(counts, "The matrix of counts")
        return CountSlice(
            blocks=[sparse.csr_matrix(counts)],
            ids=clean_names(ids),
            symbols=clean_names(symbols[0]) if symbols else [""] * len(ids),
        )
    # The only way from here to AnnData: who passes arrays does not need it.
    from stofm._edge.counts import read_counts
    from stofm._edge.features import gene_names
    from stofm._edge.slice_files import open_table

    adata = open_table(item) if isinstance(item, str | Path) else item
    ids, symbols = gene_names(adata)
    return CountSlice(read_counts(adata, layer=layer), ids, symbols)


def _human_gene_ids(
    columns: CountSlice,
    pairs: Mapping[str, str],
    reference: GeneVocabulary | None,
    names: GeneNames,
) -> list[str]:
    """Return the human Ensembl id of each column, ``""`` where none is known; note the names."""
    own = [_human_gene_id(name, pairs) for name in columns.ids]
    names.add(own, columns.ids, columns.symbols)
    if reference is None:
        return own
    mapping = map_gene_ids(columns.ids, reference, fallback_ids=columns.symbols)
    genes = [gene or known for gene, known in zip(own, mapping.gene_id.tolist(), strict=True)]
    # What only the reference tells apart may be a former symbol.
    for gene, known, *others in zip(genes, own, columns.ids, columns.symbols, strict=True):
        if gene and not known:
            names.add_aliases({strip_version(name): gene for name in others if name})
    return genes


def _human_gene_id(name: str, pairs: Mapping[str, str]) -> str:
    bare = strip_version(name)
    is_human = id_type(bare) is IdType.HUMAN_ENSEMBL
    return bare if is_human else pairs.get(bare, "")


def _add_values(
    medians: ExactMedians | HistogramMedians,
    blocks: Iterable[sparse.csr_matrix],
    genes: list[str],
    numbers: dict[str, int],
) -> NDArray[np.float64]:
    """Add the values of a slice; returns the counts of its columns."""
    known = [column for column, gene in enumerate(genes) if gene]
    rows = [numbers.setdefault(genes[column], len(numbers)) for column in known]
    own, local = np.unique(rows, return_inverse=True)
    # Multiplied from the right it sums the columns of each gene.
    sums = sparse.csr_matrix(
        (np.ones(len(known)), (known, local)), shape=(len(genes), len(own)), dtype=np.float64
    )
    per_column = np.zeros(len(genes))
    for block in blocks:
        counts = block.astype(np.float64)
        totals = np.asarray(counts.sum(axis=1)).ravel()
        per_gene = sparse.csr_matrix(counts @ sums)
        per_gene.eliminate_zeros()
        cells = np.repeat(np.arange(per_gene.shape[0]), np.diff(per_gene.indptr))
        medians.add(own[per_gene.indices], per_gene.data / totals[cells] * _TARGET_SUM)
        per_column += np.asarray(counts.sum(axis=0)).ravel()
    return per_column


def _warn_of_counts(place: int, genes: NDArray[np.int64], counts: NDArray[np.float64]) -> None:
    """Warn if many counts of a slice are of no known gene, or in several columns of one gene."""
    shares = counts / (counts.sum() or 1.0)
    unknown = shares[genes < 0].sum()
    if unknown > MOST_UNKNOWN and (shares[genes >= 0] > 0).any():
        warn(
            f"Slice {place}: {unknown:.1%} of the counts are in columns of no known gene, and "
            "medians are of shares of all counts. If these are no genes (controls, spike-ins, "
            "antibodies), drop their columns; `orthologs` and `reference` find more genes."
        )
    shared, _ = counts_of_shared_genes(genes, shares)
    if shared.any():
        n_genes = len(np.unique(genes[shared > 0]))
        warn(
            f"Slice {place}: {shared.sum():.1%} of the counts are in several columns of one gene, "
            f"beside the {n_genes} columns that hold the others, and they count together. "
            "If some of these columns are no genes (antibodies, another modality), drop them."
        )


def _assemble(
    medians: Mapping[str, float], names: GeneNames, n_seen: int, min_cells: int
) -> GeneVocabulary:
    if not medians:
        msg = (
            f"No gene is left: {n_seen} genes were recognised, none of them seen in {min_cells} "
            "cells. Ids must be human Ensembl ids; pass `orthologs` for mouse Ensembl ids, and a "
            "`reference` vocabulary for symbols."
        )
        raise ValueError(msg)
    genes = sorted(medians)
    symbols = names.symbols(genes)
    rows = [
        (gene, symbols.get(gene, ""), _FIRST_GENE_TOKEN + place, medians[gene])
        for place, gene in enumerate(genes)
    ]
    aliases = names.aliases(symbols, genes)
    return GeneVocabulary(**vocabulary_fields(rows, {"pad": 0, "mask": 1}, aliases))
