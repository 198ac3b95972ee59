"""Slices of shards, as training needs them and as AnnData."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._keys import Obsm
from stofm.corpus.shards import CELLS_AT_ONCE
from stofm.genes import RankedTokens
from stofm.genes.ranking import scale_of_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.corpus.shards import Shard
    from stofm.genes import GeneVocabulary

#: Name of the column with the counts of all other genes, which are part of a cell's total.
OTHERS: Final = "(other genes)"


@dataclass(frozen=True, eq=False)
class Reading:
    """How tokens are read: the shards' vocabulary, tokens per cell, and the rule of values.

    The rule is `depth_power` of :func:`stofm.genes.rank_genes`; None for tokens without values.
    """

    vocabulary: GeneVocabulary
    max_tokens: int
    depth_power: float | None = 1.0

    @cached_property
    def medians(self) -> NDArray[np.float64]:
        """(n_tokens,) median of each token's gene."""
        medians = np.full(self.vocabulary.n_tokens, np.nan)
        medians[self.vocabulary.tokens] = self.vocabulary.medians
        return medians


@dataclass(frozen=True, eq=False)
class CorpusSlice:
    """Slice number `number` of a shard, read with the options `reading`."""

    shard: Shard
    number: int
    reading: Reading

    def __reduce__(self) -> Any:
        # Another process opens the files itself.
        from stofm.corpus.manifest import open_slice

        return open_slice, (self.shard.folder, self.number)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata of the slice."""
        return self.shard.slices[self.number]

    @property
    def name(self) -> str:
        """Name of the slice in messages."""
        return str(self.about["name"])

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any token, count or coordinate."""
        return str(self.about["checksum"])

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.about["cells"])

    @property
    def coordinates(self) -> NDArray[np.float64]:
        """(n_cells, 2) in model units (the slice's diagonal is 100), mapped into memory."""
        return self.part("coordinates")

    def lengths_of(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Number of gene tokens of some cells, (m,)."""
        cells, offsets = rows + self.shard.first_cell[self.number], self.shard["offsets"]
        lengths = offsets[cells + 1] - offsets[cells]
        return np.asarray(np.minimum(lengths, self.reading.max_tokens), dtype=np.int64)

    @property
    def ranked(self) -> RankedTokens:
        """Tokens of all cells, copied into memory."""
        starts = range(0, self.n_cells, CELLS_AT_ONCE)
        rows = np.arange(self.n_cells)
        parts = [self.take(rows[start : start + CELLS_AT_ONCE]) for start in starts]
        return RankedTokens.concatenate(parts or [self.take(rows)])

    def part(self, name: str) -> NDArray[Any]:
        """The slice's part of an array of the shard, mapped into memory."""
        first, last = self.shard.first_cell[self.number : self.number + 2]
        return self.shard[name][first:last]

    def take(self, rows: NDArray[np.integer]) -> RankedTokens:
        """Copy the tokens of some cells, in the order given, into memory."""
        cells = rows + self.shard.first_cell[self.number]
        entries, lengths = self.shard.entries(cells, self.reading.max_tokens)
        tokens = self.shard["tokens"][entries].astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if self.reading.depth_power is None:
            return RankedTokens(tokens, offsets)
        # Rounded to the digits that decide the order: see stofm.genes.rank_genes.
        ratios = self.shard["counts"][entries] / self.reading.medians[tokens]
        ratios.view(np.uint64)[:] &= ~np.uint64((1 << self.about["token_bits"]) - 1)
        scale = scale_of_cells(self.shard["totals"][cells], self.reading.depth_power)
        ratios *= np.repeat(scale, lengths)
        return RankedTokens(tokens, offsets, ratios.astype(np.float32))

    def to_anndata(self) -> AnnData:
        """Counts and positions of the slice. Names of cells are their rows in the source.

        Genes outside the vocabulary share one column, if they have counts.
        """
        import pandas as pd
        from anndata import AnnData

        first = self.shard.first_cell[self.number]
        entries, lengths = self.shard.entries(first + np.arange(self.n_cells))
        used, columns = np.unique(self.shard["tokens"][entries], return_inverse=True)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        data = self.shard["counts"][entries].astype(np.float32)
        counts = sparse.csr_matrix((data, columns, offsets), (self.n_cells, len(used)))
        counts.sort_indices()
        vocabulary = self.reading.vocabulary
        order = np.argsort(vocabulary.tokens)
        genes = order[np.searchsorted(vocabulary.tokens, used, sorter=order)]
        others = self.part("totals") - np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        ids = vocabulary.gene_ids[genes].astype(object)
        var = pd.DataFrame({"symbol": vocabulary.symbols[genes]}, index=ids)
        if others.any():
            column = sparse.csr_matrix(others[:, None].astype(np.float32))
            counts = sparse.hstack([counts, column], format="csr")
            var.loc[OTHERS] = ""
        return AnnData(
            counts,
            obs=pd.DataFrame(index=self.part("rows").astype(str).astype(object)),
            var=var,
            obsm={Obsm.SPATIAL: np.array(self.part("places"))},
            uns={"source": {k: v for k, v in self.about.items() if v not in (None, "")}},
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Slices to train on; their cells are numbered consecutively, slice after slice.

    Attributes
    ----------
    slices
        At least one, all with cells, and with values in all of them or in none.
    """

    slices: tuple[CorpusSlice, ...]

    def __post_init__(self) -> None:
        """Raise an error for an empty corpus."""
        if not self.slices:
            raise ValueError("A corpus needs at least one slice with cells, found none.")

    @cached_property
    def first_cell(self) -> NDArray[np.int64]:
        """(n_slices + 1,) number of each slice's first cell, and the number of cells."""
        ends = np.cumsum([s.n_cells for s in self.slices])
        return np.concatenate([[0], ends]).astype(np.int64)

    @property
    def n_cells(self) -> int:
        """Number of cells of all slices."""
        return int(self.first_cell[-1])

    @property
    def has_values(self) -> bool:
        """Whether tokens come with values."""
        return self.slices[0].reading.depth_power is not None

    def lengths_of(self, cells: NDArray[np.integer]) -> NDArray[np.int64]:
        """Number of gene tokens of some cells, (m,)."""
        number, rows = self.locate(cells)
        found = np.empty(len(rows), dtype=np.int64)
        for k in np.unique(number):
            own = number == k
            found[own] = self.slices[k].lengths_of(rows[own])
        return found

    def locate(self, cells: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each cell's slice, and its row there."""
        number = np.searchsorted(self.first_cell, cells, side="right") - 1
        return number, np.asarray(cells, dtype=np.int64) - self.first_cell[number]

    def take(self, cells: NDArray[np.integer]) -> RankedTokens:
        """Copy the tokens of some cells, in the order given, into memory."""
        number, rows = self.locate(cells)
        order = np.argsort(number, kind="stable")
        parts = [self.slices[k].take(rows[number == k]) for k in np.unique(number)]
        # Read slice after slice, then put into the requested order.
        return take_cells(RankedTokens.concatenate(parts), np.argsort(order))

    def describe(self, slices: Sequence[int] | NDArray[np.integer]) -> str:
        """Name some slices, each once, for messages."""
        numbers = np.unique(np.asarray(slices, dtype=np.int64))
        names = [repr(self.slices[k].name) for k in numbers[:8]]
        rest = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        return ", ".join(names) + rest


def take_cells(ranked: RankedTokens, rows: NDArray[np.integer]) -> RankedTokens:
    """Copy the tokens of some cells, in the order given."""
    starts, lengths = ranked.offsets[rows], np.diff(ranked.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    values = None if ranked.values is None else ranked.values[entries]
    return RankedTokens(tokens=ranked.tokens[entries], offsets=offsets, values=values)
