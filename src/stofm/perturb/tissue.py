"""All slices of a table: edits of their genes, cells and edges, and the embeddings after them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stofm._logging import counter
from stofm.corpus.reader import take_cells
from stofm.genes import RankedTokens
from stofm.perturb.edit import Detached, Edit
from stofm.perturb.engine import Embedded, UneditedSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from stofm.nn import Stofm

#: Change of a gene: it is deleted, put first, or set to a count.
GeneChange = Literal["delete", "first"] | float
#: Whether virtual cells, clusters and sub-slices stay, or follow an edit.
Recompute = Literal["micro", "macro"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Tissue:
    """The cells of a table, before any edit.

    Rows are counted over all slices, also in edits.
    """

    model: Stofm
    ranked: RankedTokens  # tokens of the n cells, not truncated to what the model keeps
    #: Gives the tokens of some rows, ascending, with the counts of some genes, by token, set.
    recount: Callable[[NDArray[np.int64], Mapping[int, float]], RankedTokens]
    coordinates: NDArray[np.float64]  # (n, 2), any unit
    slices: Sequence[NDArray[np.int64]]  # rows of each
    seed: int  # of the clustering
    device: torch.device
    show_progress_bar: bool = False

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.ranked.n_cells

    @cached_property
    def wholes(self) -> dict[int, UneditedSlice]:
        """Slices that are laid out already, by number."""
        return {}

    @cached_property
    def panel(self) -> NDArray[np.int32]:
        """Tokens of the genes that occur in the table."""
        return np.unique(self._kept(self.ranked).tokens)

    def whole(self, number: int) -> UneditedSlice:
        """A slice, encoded and laid out on first use."""
        if number not in self.wholes:
            rows = self.slices[number]
            self.wholes[number] = UneditedSlice.of(
                self.model,
                self._kept(take_cells(self.ranked, rows)),
                self.coordinates[rows],
                seed=self.seed,
                device=self.device,
                panel=self.panel,
            )
        return self.wholes[number]

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unedited embeddings of some cells, (m, d_embedding)."""
        width = self.model.config.se2_transformer.d_embedding
        found = np.empty((len(rows), width), dtype=np.float32)
        for number, own in enumerate(self.slices):
            is_here = np.isin(rows, own)
            if is_here.any():
                places = np.searchsorted(own, rows[is_here])
                found[is_here] = self.whole(number).embeddings[places]
        return found

    def embed(self, edits: Sequence[Edit], recompute: Recompute) -> Iterator[Embedded]:
        """Embed the cells that edits reach, slice by slice: see :meth:`UneditedSlice.embed`."""
        for number, rows in enumerate(self.slices):
            own = [self._within(edit, rows) for edit in edits]
            touching = [e for e, edit in enumerate(own) if edit is not None]
            if not touching:
                continue
            local = [edit for edit in own if edit is not None]
            whole = self.whole(number)
            if recompute == "micro":
                embed, total, unit = whole.embed, whole.layout.n_subslices, "sub-slice"
            else:
                embed, total, unit = partial(_anew, whole), len(local), "edit"
            with counter(total, "embed edits", unit, show=self.show_progress_bar) as advance:
                for one in embed(local, advance):
                    yield replace(one, edit=touching[one.edit], rows=rows[one.rows])

    def _within(self, edit: Edit, rows: NDArray[np.int64]) -> Edit | None:
        """The part of an edit in one slice, by that slice's rows; None if there is none."""
        cells, removed = _places(edit.cells, rows), _places(edit.removed, rows)
        if len(removed) == len(rows):
            raise ValueError(
                f"The edit removes all {len(rows)} cells of a slice, so nothing is left to "
                "embed. Select fewer `cells`."
            )
        tokens, coordinates, detached = edit.tokens, edit.coordinates, edit.detached
        if coordinates is not None:
            coordinates = coordinates[rows]
            is_same = np.array_equal(coordinates, self.coordinates[rows])
            coordinates = None if is_same else coordinates
        if detached is not None:
            receivers = None if detached.receivers is None else detached.receivers[rows]
            detached = replace(detached, senders=detached.senders[rows], receivers=receivers)
            is_same = not detached.senders.any() or (receivers is not None and not receivers.any())
            detached = None if is_same else detached
        is_same = not len(removed) and (tokens is None or not len(cells))
        if is_same and coordinates is None and detached is None:
            return None
        return Edit(
            cells=cells,
            tokens=None if tokens is None else lambda some: tokens(rows[some]),
            removed=removed,
            coordinates=coordinates,
            detached=detached,
        )

    # Genes

    @cached_property
    def n_read(self) -> int:
        """Largest number of a cell's tokens that affect the embedding."""
        encoder, kept = self.model.config.cell_encoder, self.model.config.max_tokens
        return kept if encoder.pooled else min(kept, encoder.max_positions - 1)

    def inputs(self, rows: NDArray[np.int64]) -> sparse.csc_array:
        """Which genes are in the input of which cells, (len(rows), n_tokens)."""
        read = take_cells(self.ranked, rows).head(self.n_read)
        entries = (np.ones(len(read.tokens), dtype=bool), (cells_of(read), read.tokens))
        shape = (len(rows), self.model.vocabulary.n_tokens)
        return sparse.csc_array(sparse.coo_array(entries, shape=shape))

    def edit_genes(
        self,
        changes: Mapping[int, GeneChange],
        cells: NDArray[np.int64],
        inputs: sparse.csc_array,
    ) -> Edit:
        """Change genes, by token, in those of the given cells that have one of them in their input.

        Genes that are put first or get a count are changed in all cells. Deleting leaves the values of
        other genes as they are; a count changes the total, and so all values. `inputs` are those of
        `cells`.
        """
        counts = {gene: float(x) for gene, x in changes.items() if not isinstance(x, str)}
        deleted = np.array([gene for gene, x in changes.items() if x == "delete"], dtype=np.int64)
        first = [gene for gene, x in changes.items() if x == "first"]
        is_edited = np.full(len(cells), bool(first) or any(counts.values()))
        for gene in changes:
            is_edited[_entries(inputs, gene)] = True

        def tokens(rows: NDArray[np.int64]) -> RankedTokens:
            found = self.recount(rows, counts) if counts else take_cells(self.ranked, rows)
            found = delete(found, deleted) if len(deleted) else found
            for gene in reversed(first):
                found = put_first(found, gene)
            return self._kept(found)

        return Edit(cells=cells[is_edited], tokens=tokens)

    def _kept(self, ranked: RankedTokens) -> RankedTokens:
        return ranked.head(self.model.config.max_tokens)

    # Cells and edges

    def replace_cells(
        self, cells: NDArray[np.int64], donors: NDArray[np.int64], rng: np.random.Generator
    ) -> Edit:
        """Give each cell the genes of a randomly drawn donor cell."""
        donor = np.arange(self.n_cells)
        donor[cells] = rng.choice(donors, len(cells))
        return Edit(
            cells=cells, tokens=lambda rows: self._kept(take_cells(self.ranked, donor[rows]))
        )

    def move_cells(self, cells: NDArray[np.int64], by: Sequence[float]) -> Edit:
        """Move cells by (x, y)."""
        coordinates = self.coordinates.copy()
        coordinates[cells] += by
        return Edit(cells=cells, coordinates=coordinates)

    def shuffle_cells(
        self, cells: NDArray[np.int64], groups: NDArray[np.integer], rng: np.random.Generator
    ) -> Edit:
        """Shuffle the positions of cells within each slice and each of the groups (n,)."""
        coordinates = self.coordinates.copy()
        number = np.empty(self.n_cells, dtype=np.int64)
        for k, rows in enumerate(self.slices):
            number[rows] = k
        # Cells of a group are adjacent in both orders, which differ within it.
        mixed = rng.permutation(cells)
        before = cells[np.lexsort((groups[cells], number[cells]))]
        after = mixed[np.lexsort((groups[mixed], number[mixed]))]
        coordinates[after] = self.coordinates[before]
        return Edit(cells=cells, coordinates=coordinates)

    def detach_cells(self, receivers: NDArray[np.int64], senders: NDArray[np.int64]) -> Edit:
        """Hide some cells from others."""
        masks = np.zeros((2, self.n_cells), dtype=bool)
        masks[0, senders] = masks[1, receivers] = True
        return Edit(cells=receivers, detached=Detached(senders=masks[0], receivers=masks[1]))

    @cached_property
    def nearest(self) -> list[NDArray[np.int64]]:
        """For each slice, the rows of the cells near each cell, (n_cells, k)."""
        found = []
        for rows in self.slices:
            k = min(self.model.config.subslice.n_neighbors, len(rows))
            tree = cKDTree(self.coordinates[rows])
            found.append(rows[tree.query(self.coordinates[rows], k=np.arange(1, k + 1))[1]])
        return found

    def neighbors(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Other cells that have one of `cells` among the model's number of nearest cells."""
        is_one = np.zeros(self.n_cells, dtype=bool)
        is_one[cells] = True
        has_one = np.zeros(self.n_cells, dtype=bool)
        for rows, near in zip(self.slices, self.nearest, strict=True):
            has_one[rows] = is_one[near].any(axis=1)
        return np.flatnonzero(has_one & ~is_one)

    def distances(self, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Distance of each cell to the nearest of `cells` in its slice, (n,); NaN where none is."""
        found = np.full(self.n_cells, np.nan)
        for rows in self.slices:
            own = np.intersect1d(rows, cells)
            if len(own):
                found[rows] = cKDTree(self.coordinates[own]).query(self.coordinates[rows])[0]
        return found


def _entries(inputs: sparse.csc_array, gene: int) -> NDArray[np.int64]:
    """Rows that have a gene."""
    found: NDArray[np.int64] = inputs.indices[inputs.indptr[gene] : inputs.indptr[gene + 1]]
    return found


def _places(cells: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of `cells` in `rows`, which are ascending, for those that are there."""
    found = np.minimum(np.searchsorted(rows, cells), len(rows) - 1)
    kept: NDArray[np.int64] = found[rows[found] == cells]
    return kept


def _anew(
    whole: UneditedSlice, edits: Sequence[Edit], on_done: Callable[[int], object]
) -> Iterator[Embedded]:
    """Embed a slice after each edit, with new sub-slices and clusters."""
    for number, edit in enumerate(edits):
        edited = whole.after(edit)
        kept = np.setdiff1d(np.arange(whole.n_cells), edit.removed)
        values = edited.embeddings
        if edit.detached is not None:
            values = values.copy()
            for one in edited.embed([Edit(detached=edit.detached)]):
                values[one.rows] = one.after
        yield Embedded(number, kept, whole.embeddings[kept], values)
        on_done(1)


def cells_of(ranked: RankedTokens) -> NDArray[np.int64]:
    """Row of each token's cell, (n_tokens_in_all,)."""
    return np.repeat(np.arange(ranked.n_cells), np.diff(ranked.offsets))


def delete(ranked: RankedTokens, genes: NDArray[np.integer]) -> RankedTokens:
    """Remove tokens from all lists; the values of the others stay."""
    kept = ~np.isin(ranked.tokens, genes)
    lengths = np.bincount(cells_of(ranked)[kept], minlength=ranked.n_cells)
    values = None if ranked.values is None else ranked.values[kept]
    return RankedTokens(ranked.tokens[kept], np.concatenate([[0], np.cumsum(lengths)]), values)


def put_first(ranked: RankedTokens, gene: int) -> RankedTokens:
    """Put a token in front of all lists, with the value of the token that was first.

    In an empty list its value is 1, a typical count of the gene.
    """
    rest = delete(ranked, np.array([gene]))
    starts = rest.offsets[:-1]
    leads: dict[str, Any] = {"values": None}
    if ranked.values is not None and rest.values is not None:
        padded = np.append(ranked.values, np.float32(1.0))
        places = np.where(ranked.n_tokens > 0, ranked.offsets[:-1], len(padded) - 1)
        leads = {"values": np.insert(rest.values, starts, padded[places])}
    tokens = np.insert(rest.tokens, starts, np.int32(gene))
    return RankedTokens(tokens, rest.offsets + np.arange(len(rest.offsets)), **leads)
