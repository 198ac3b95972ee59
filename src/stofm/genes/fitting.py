"""A vocabulary from slices: which genes there are, what they are called, and their medians."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm._edge.gene_mapping import warn_of_counts
from stofm._logging import logger
from stofm._messages import naming
from stofm.genes.mapping import (
    MOUSE_TYPES,
    IdType,
    clean_names,
    id_type,
    map_gene_ids,
    read_orthologs,
    strip_version,
)
from stofm.genes.ranking import require_sound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from numpy.typing import NDArray

    from stofm.genes.vocabulary import GeneVocabulary

_TARGET_SUM: Final = 10_000
_FIRST_GENE_TOKEN: Final = 2
#: Largest relative error of a median from a histogram.
RELATIVE_ERROR: Final = 1e-3
#: Values are counts per 10,000; one count in a cell of 100 million gives the smallest.
_SMALLEST: Final = 1e-4
_LARGEST: Final = 1e4
#: Ratio of a bin's ends for which their harmonic middle is within the error of both.
_BIN_RATIO: Final = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
#: Bins that may wait to be joined.
_FEW: Final = 1 << 20
_N_BINS: Final = int(np.ceil(np.log(_LARGEST / _SMALLEST) / np.log(_BIN_RATIO))) + 1


@dataclass(frozen=True, eq=False)
class CountSlice:
    """Counts of a slice: blocks of CSR rows, ids and symbols of its columns (``""`` if missing)."""

    blocks: Iterable[sparse.csr_matrix]
    ids: list[str]
    symbols: list[str]


def fit_genes(
    slices: Iterable[Any],
    *,
    orthologs: Mapping[str, str] | str | PathLike[str] | None,
    reference: GeneVocabulary | None,
    method: Literal["exact", "histogram"],
    min_cells: int,
    layer: str | None,
) -> tuple[list[tuple[str, str, int, float]], dict[str, int], dict[str, str]]:
    """Genes, special tokens and aliases; see :meth:`stofm.genes.GeneVocabulary.fit`."""
    if method not in ("exact", "histogram"):
        raise ValueError(f"method must be one of ['exact', 'histogram'], found {method!r}.")
    pairs = {} if orthologs is None else read_orthologs(orthologs)
    medians = Medians(binned=method == "histogram")
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
        numbered = np.array([numbers.get(gene, -1) for gene in genes])
        if counts[numbered >= 0].any():
            with naming(f"slice {place}"):
                called = [a or b for a, b in zip(columns.ids, columns.symbols, strict=True)]
                warn_of_counts(numbered, counts, called)
    n_cells, values = medians.result(len(numbers))
    kept = {gene: float(values[row]) for gene, row in numbers.items() if n_cells[row] >= min_cells}
    logger.info("%d of %d genes were seen in at least %d cells", len(kept), len(numbers), min_cells)
    if not kept:
        raise ValueError(
            f"No gene is left: {len(numbers)} genes were recognised, none of them seen in "
            f"{min_cells} cells. Ids must be human Ensembl ids; pass `orthologs` for mouse Ensembl "
            "ids, and a `reference` vocabulary for symbols."
        )
    symbols = names.symbols(kept)
    tokens = enumerate(sorted(kept), start=_FIRST_GENE_TOKEN)
    rows = [(gene, symbols[gene], token, kept[gene]) for token, gene in tokens]
    return rows, {"pad": 0, "mask": 1}, names.aliases(symbols)


def as_count_slice(item: Any, *, layer: str | None) -> CountSlice:
    """Read a slice from a tuple of arrays, an AnnData, a SpatialData, or the path of one."""
    if isinstance(item, CountSlice):
        return item
    if isinstance(item, tuple):
        counts, ids, *symbols = item
        require_sound(counts, "The matrix of counts")
        names = (clean_names(one) for one in (ids, symbols[0] if symbols else [""] * len(ids)))
        return CountSlice([sparse.csr_matrix(counts)], *names)
    # Imported here because only AnnData needs it, and arrays don't.
    from stofm._edge.counts import read_counts
    from stofm._edge.gene_mapping import ids_and_symbols
    from stofm._edge.slice_files import open_table
    from stofm._edge.tables import resolve_table

    adata = open_table(item) if isinstance(item, str | Path) else resolve_table(item)
    ids, symbols = ids_and_symbols(adata)
    return CountSlice(read_counts(adata, layer=layer), ids, symbols)


def _human_gene_ids(
    columns: CountSlice,
    pairs: Mapping[str, str],
    reference: GeneVocabulary | None,
    names: GeneNames,
) -> list[str]:
    """Return the human Ensembl id of each column, ``""`` where none is known; note the names."""
    bare = [strip_version(name) for name in columns.ids]
    own = [name if id_type(name) is IdType.HUMAN_ENSEMBL else pairs.get(name, "") for name in bare]
    names.add(own, columns.ids, columns.symbols)
    if reference is None:
        return own
    mapping = map_gene_ids(columns.ids, reference, fallback_ids=columns.symbols)
    genes = [gene or known for gene, known in zip(own, mapping.gene_id.tolist(), strict=True)]
    # A name that only the reference knows may be a former symbol.
    for gene, known, *others in zip(genes, own, columns.ids, columns.symbols, strict=True):
        if gene and not known:
            names.add_aliases({strip_version(name): gene for name in others if name})
    return genes


def _add_values(
    medians: Medians,
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


class GeneNames:
    """Counts, slice by slice, how often a name stood for a gene, and how often as its symbol."""

    def __init__(self) -> None:
        self._votes: Counter[tuple[str, str]] = Counter()
        self._symbol_votes: Counter[tuple[str, str]] = Counter()

    def add(self, genes: Iterable[str], *names: Iterable[str]) -> None:
        """Add the columns of one slice: human Ensembl ids, and other names; ``""`` where unknown."""
        for gene, *others in zip(genes, *names, strict=True):
            pairs = {(gene, strip_version(name)) for name in others if gene and name} - {
                (gene, gene)
            }
            self._votes.update(pairs)
            if not any(id_type(name) in MOUSE_TYPES for name in others):
                self._symbol_votes.update(one for one in pairs if not one[1].startswith("ENS"))

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Add names that stand for genes but are not their symbols."""
        self._votes.update((gene, name) for name, gene in aliases.items() if name != gene)

    def symbols(self, genes: Iterable[str]) -> dict[str, str]:
        """Return the symbol that most slices give to each gene; no symbol is given twice."""
        symbols: dict[str, str] = dict.fromkeys(genes, "")
        given: set[str] = set()
        for _, (gene, name) in _most_frequent_first(self._symbol_votes):
            if symbols.get(gene) == "" and name not in given:
                symbols[gene] = name
                given.add(name)
        return symbols

    def aliases(self, symbols: Mapping[str, str]) -> dict[str, str]:
        """Return all other names of the genes, each with the gene that most slices mean by it.

        Names that are ids or symbols are left out, and names that stand for two genes equally often.
        """
        taken = {*symbols, *symbols.values()}
        votes: dict[str, list[tuple[int, str]]] = {}
        for number, (gene, name) in _most_frequent_first(self._votes):
            if gene in symbols and name not in taken:
                votes.setdefault(name, []).append((number, gene))
        most = {name: (*found, (0, ""))[:2] for name, found in votes.items()}
        return {name: first[1] for name, (first, next_) in most.items() if first[0] > next_[0]}


def _most_frequent_first(votes: Counter[tuple[str, str]]) -> list[tuple[int, tuple[str, str]]]:
    return sorted(((n, pair) for pair, n in votes.items()), key=lambda one: (-one[0], one[1]))


class Medians:
    """Keeps how often each value of each gene was seen.

    Exact values take 12 bytes each. Binned, memory depends on how many narrow logarithmic bins the
    genes fill, at most 9,212 for each gene, usually some hundreds; a median is within 0.1 % of the
    exact one. The result does not depend on the order in which values, or parts, are added.
    """

    def __init__(self, *, binned: bool) -> None:
        self._binned = binned
        self._whole = (np.empty(0, np.int32), np.empty(0), np.empty(0, np.int64))
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, genes: NDArray[np.integer], values: NDArray[np.floating]) -> None:
        """Add values, from 0.0001 to 10,000 if binned, each with the number of its gene."""
        if self._binned:
            scaled = np.log(np.asarray(values, dtype=np.float64) / _SMALLEST) / np.log(_BIN_RATIO)
            low = _SMALLEST * _BIN_RATIO ** np.clip(np.floor(scaled), 0, _N_BINS - 1)
            values = low * 2 * _BIN_RATIO / (1 + _BIN_RATIO)
        self._parts.append((genes.astype(np.int32), values, np.ones(len(genes), np.int64)))
        # Joined only when they are as large as what is there already, so each entry is moved few
        # times.
        n_waiting = sum(len(part[0]) for part in self._parts)
        if self._binned and n_waiting > max(_FEW, len(self._whole[0])):
            self._join()

    def result(self, n_genes: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return how many values each gene has, and their median (NaN where there are none)."""
        self._join()
        genes, values, times = self._whole
        numbers = np.bincount(genes, weights=times, minlength=n_genes).astype(np.int64)
        first, ends = np.cumsum(numbers) - numbers, np.cumsum(times)
        # Of an even number of values, the middle two are averaged.
        ranks = (first + np.maximum(numbers - 1, 0) // 2, first + numbers // 2)
        places = (np.minimum(np.searchsorted(ends, one, "right"), len(ends) - 1) for one in ranks)
        lower, upper = (np.append(values, np.nan)[one] for one in places)
        return numbers, np.where(numbers > 0, (lower + upper) / 2, np.nan)

    def _join(self) -> None:
        genes, values, times = map(np.concatenate, zip(self._whole, *self._parts, strict=True))
        self._parts.clear()
        order = np.lexsort((values, genes))
        genes, values, times = genes[order], values[order], times[order]
        is_new = np.append(True, (np.diff(genes) != 0) | (np.diff(values) != 0))[: len(genes)]
        starts = np.flatnonzero(is_new)
        summed = np.add.reduceat(times, starts) if len(starts) else times
        self._whole = (genes[starts], values[starts], summed)
