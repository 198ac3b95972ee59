"""What is hidden from the networks: genes of a cell, cells of a sub-slice and where they lie.

All random numbers come from generators that the caller makes, one per cell or sub-slice, so that
what is hidden depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from stofm.nn import GeneBag, TokenBatch
from stofm.spatial import NodeType, PairDistances
from stofm.spatial.neighbor_graph import neighbor_means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.spatial import SubSlice
    from stofm.train.config import SpatialMasking, TokenMasking


def mask_tokens(
    batch: TokenBatch,
    masking: TokenMasking,
    *,
    mask_token: int,
    gene_tokens: NDArray[np.integer],
    rngs: Sequence[Generator],
) -> tuple[TokenBatch, Tensor]:
    """Hide genes of cells.

    A gene that stands twice in a list (``duplicates="keep"``) is hidden at both places. A hidden
    gene's position and value stay; ``is_hidden`` takes it out of the sum over all genes.

    Parameters
    ----------
    batch
        Token lists, on the CPU; not changed.
    masking
        How much to hide.
    mask_token
        Token of ``<mask>``.
    gene_tokens
        Tokens from which random genes are taken.
    rngs
        One generator per cell.

    Returns
    -------
    The lists with genes hidden, and which positions are to be recovered (cells, length).

    Raises
    ------
    ValueError
        The generators are not as many as the cells, or there are no genes to take at random.
    """
    _check_generators(batch, rngs)
    if masking.random_share > 0 and not len(gene_tokens):
        msg = "random_share is positive but gene_tokens is empty; pass the vocabulary's tokens."
        raise ValueError(msg)
    at, genes = _genes_of_lists(batch)
    replacement = genes.tokens.copy()
    is_chosen = np.zeros(len(genes.tokens), dtype=bool)
    is_hidden = np.zeros(len(genes.tokens), dtype=bool)
    for cell, rng in enumerate(rngs):
        n_genes = genes.starts[cell + 1] - genes.starts[cell]
        n_chosen = min(n_genes, max(1, round(masking.share * n_genes))) if masking.share else 0
        chosen = genes.starts[cell] + rng.permutation(n_genes)[:n_chosen]
        lot = rng.random(n_chosen)
        is_random = (lot >= masking.mask_share) & (lot < masking.mask_share + masking.random_share)
        replacement[chosen[lot < masking.mask_share]] = mask_token
        if is_random.any():
            replacement[chosen[is_random]] = rng.choice(gene_tokens, int(is_random.sum()))
        is_chosen[chosen] = True
        is_hidden[chosen] = lot < masking.mask_share + masking.random_share

    tokens = batch.tokens.numpy().copy()
    tokens[at] = replacement[genes.of_entry]
    hidden, is_target = (
        torch.from_numpy(_spread(is_so[genes.of_entry], at, tokens.shape))
        for is_so in (is_hidden, is_chosen)
    )
    return replace(batch, tokens=torch.from_numpy(tokens), is_hidden=hidden), is_target


def drop_genes(
    batch: TokenBatch, share: float, *, pad_token: int, rngs: Sequence[Generator]
) -> TokenBatch:
    """Leave out genes at random, as a panel that measures fewer genes would.

    The genes that remain move up to the ranks that they have among themselves, with their values
    as they were: the total count that values are relative to is taken to be known.

    Parameters
    ----------
    batch
        Token lists, on the CPU; not changed.
    share
        Share of each cell's genes to leave out, at least 0 and less than 1; rounded down, so
        that a cell with genes keeps at least one.
    pad_token
        Token of padding.
    rngs
        One generator per cell.

    Raises
    ------
    ValueError
        The share is out of range, or the generators are not as many as the cells.
    """
    _check_generators(batch, rngs)
    if not 0 <= share < 1:
        msg = f"The share of genes to leave out must be at least 0 and below 1, found {share}."
        raise ValueError(msg)
    at, in_lists = _genes_of_lists(batch)
    genes = in_lists if batch.bag is None else _genes_of_bag(batch.bag, len(batch.tokens))
    is_dropped = np.zeros(len(genes.tokens), dtype=bool)
    for start, end, rng in zip(genes.starts[:-1], genes.starts[1:], rngs, strict=True):
        n_genes = end - start
        is_dropped[start + rng.permutation(n_genes)[: int(share * n_genes)]] = True

    is_gone = np.isin(in_lists.keys, genes.keys[is_dropped])[in_lists.of_entry]
    kept = batch.is_real & ~torch.from_numpy(_spread(is_gone, at, batch.is_real.shape))
    order = torch.argsort(~kept, dim=1, stable=True)
    is_real = kept.gather(1, order)

    def moved_up(entries: Tensor, blank: int) -> Tensor:
        return entries.gather(1, order).masked_fill(~is_real, blank)

    return TokenBatch(
        tokens=moved_up(batch.tokens, pad_token),
        is_real=is_real,
        values=None if batch.values is None else moved_up(batch.values, 0),
        bag=None if batch.bag is None else _take(batch.bag, ~is_dropped[genes.of_entry]),
        is_hidden=None if batch.is_hidden is None else moved_up(batch.is_hidden, 0),
    )


def _check_generators(batch: TokenBatch, rngs: Sequence[Generator]) -> None:
    if len(rngs) != len(batch.tokens):
        msg = f"{len(rngs)} generators for {len(batch.tokens)} cells; expected one per cell."
        raise ValueError(msg)


class _Genes(NamedTuple):
    """The genes of cells, each once per cell, by cell and token."""

    keys: NDArray[np.int64]  # (genes,) of cell and token, ascending
    starts: NDArray[np.int64]  # (cells + 1,) first gene of each cell
    of_entry: NDArray[np.intp]  # (entries,) which gene each entry is

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self.keys & _LARGEST

    @classmethod
    def of(cls, cells: NDArray[np.intp], tokens: NDArray[np.int64], n_cells: int) -> _Genes:
        keys, of_entry = np.unique((cells << _TOKEN_BITS) + tokens, return_inverse=True)
        starts = np.searchsorted(keys, np.arange(n_cells + 1) << _TOKEN_BITS)
        return cls(keys, starts, of_entry)


_TOKEN_BITS = 32
_LARGEST = (1 << _TOKEN_BITS) - 1


def _genes_of_lists(batch: TokenBatch) -> tuple[tuple[NDArray[np.intp], ...], _Genes]:
    """Where the lists have genes, and which."""
    is_gene = batch.is_real.numpy().copy()
    is_gene[:, 0] = False  # <cls>
    at = np.nonzero(is_gene)
    return at, _Genes.of(at[0], batch.tokens.numpy()[at].astype(np.int64), len(is_gene))


def _genes_of_bag(bag: GeneBag, n_cells: int) -> _Genes:
    lengths = np.diff(bag.offsets.numpy(), append=len(bag.tokens))
    return _Genes.of(np.repeat(np.arange(n_cells), lengths), bag.tokens.numpy(), n_cells)


def _spread(
    is_so: NDArray[np.bool_], at: tuple[NDArray[np.intp], ...], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    spread = np.zeros(shape, dtype=bool)
    spread[at] = is_so
    return spread


def _take(bag: GeneBag, kept: NDArray[np.bool_]) -> GeneBag:
    before = np.concatenate([[0], np.cumsum(kept)])
    chosen = torch.from_numpy(kept)
    return GeneBag(
        tokens=bag.tokens[chosen],
        offsets=torch.from_numpy(before[bag.offsets.numpy()]),
        values=bag.values[chosen],
    )


@dataclass(frozen=True, eq=False)
class MaskedSubSlice:
    """A sub-slice with cells hidden and moved, and what is to be recovered.

    Attributes
    ----------
    subslice
        What the model sees. Hidden features are 0 if a learned vector goes there. Coordinates,
        which the model does not read, are the original ones.
    hidden_nodes
        (n_hidden,) nodes whose features are hidden.
    target_nodes
        (n_targets,) nodes whose features are to be recovered: hidden ones first, then kept ones.
    target_features
        (n_targets, d_cell) float32, their original features.
    pair_rows, pair_columns
        (n_pairs,) nodes of the pairs whose distance is to be recovered, in both directions.
    pair_distances
        (n_pairs,) float32, their original distances, model units.
    visible
        What is asked of the cells that are not hidden; None for nothing.
    """

    subslice: SubSlice
    hidden_nodes: NDArray[np.int64]
    target_nodes: NDArray[np.int64]
    target_features: NDArray[np.float32]
    pair_rows: NDArray[np.int64]
    pair_columns: NDArray[np.int64]
    pair_distances: NDArray[np.float32]
    visible: VisibleCells | None = None


class VisibleCells(NamedTuple):
    """Cells of a sub-slice that are not hidden, and what is to be told from them."""

    nodes: NDArray[np.int64]
    features: NDArray[np.float32]
    #: Mean of the original features of the cells nearest to each, before any moved.
    surroundings: NDArray[np.float32]


class Draw(NamedTuple):
    """The random part of masking a sub-slice: places among its cells, in the order drawn."""

    masked: NDArray[np.int64]
    kept: NDArray[np.int64]
    moved: NDArray[np.int64]
    kept_pairs: NDArray[np.int64]
    noise: NDArray[np.float64]  # (len(moved), 2) standard normal


def draw(n_cells: int, masking: SpatialMasking, rng: Generator) -> Draw:
    """Draw which cells of a sub-slice are hidden and moved, and how far.

    Of n cells, ``int(share x n)`` are in a group. Where that is none, there is one with
    probability share x n, so that cells in tiny sub-slices take part as often as others.
    DISCREPANCY: the published code leaves such sub-slices as they are.
    """

    def size(share: float) -> int:
        expected = share * n_cells
        return int(expected) if expected >= 1 else int(rng.random() < expected)

    masked, kept = size(masking.masked), size(masking.kept)
    moved, kept_pairs = size(masking.moved), size(masking.kept_pairs)
    # In a tiny disjoint sub-slice the groups may ask for more cells than there are.
    order = rng.permutation(n_cells)
    features, order = order[: masked + kept], order[masked + kept :]
    if not masking.disjoint:
        order = rng.permutation(n_cells)
    places = order[: moved + kept_pairs]
    noise = rng.standard_normal((len(places[:moved]), 2))
    return Draw(features[:masked], features[masked:], places[:moved], places[moved:], noise)


def apply(
    subslice: SubSlice, drawn: Draw, masking: SpatialMasking, *, n_surrounding: int = 0
) -> MaskedSubSlice:
    """Hide and move the drawn cells of a sub-slice.

    A moved cell has exact distances, from where it now lies, to all nodes but the slice token,
    be they near or far. The distances to recover are the original ones between cells, one of
    which was moved or kept for it, as far as the sub-slice lists them: how far two cells lie
    apart that are no neighbours is nowhere asked. With `n_surrounding`, what lies around cells
    that are not hidden is asked too: the mean over so many nearest cells.
    """
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masked, kept, moved = cells[drawn.masked], cells[drawn.kept], cells[drawn.moved]
    features = subslice.features.copy()
    features[masked] = 0.0 if masking.mask_value == "learned" else masking.mask_value
    targets = np.concatenate([masked, kept])
    coordinates = subslice.coordinates.astype(np.float64)
    spacing = _mean_spacing(subslice.coordinates[cells])
    coordinates[moved] += masking.noise_spacings * spacing * drawn.noise
    pairs = subslice.pairs
    asked = _have_one_of(pairs, moved, cells[drawn.kept_pairs])
    is_cell = subslice.node_type == NodeType.CELL
    asked &= is_cell[pairs.rows] & is_cell[pairs.columns]
    rows, columns = pairs.rows[asked], pairs.columns[asked]
    return MaskedSubSlice(
        subslice=replace(
            subslice, features=features, pairs=_moved_pairs(subslice, coordinates, moved)
        ),
        hidden_nodes=masked,
        target_nodes=targets,
        target_features=subslice.features[targets],
        pair_rows=np.concatenate([rows, columns]).astype(np.int64),
        pair_columns=np.concatenate([columns, rows]).astype(np.int64),
        pair_distances=np.tile(pairs.distances[asked], 2),
        visible=_visible_cells(subslice, cells, masked, n_surrounding) if n_surrounding else None,
    )


def _visible_cells(
    subslice: SubSlice, cells: NDArray[np.int64], masked: NDArray[np.int64], n_surrounding: int
) -> VisibleCells:
    features = subslice.features[cells]
    places = subslice.coordinates[cells].astype(np.float64)
    means = neighbor_means(features, places, [np.arange(len(cells))], n_surrounding)
    is_visible = ~np.isin(cells, masked)
    return VisibleCells(cells[is_visible], features[is_visible], means[is_visible])


def _mean_spacing(cells: NDArray[np.floating]) -> float:
    """Mean spacing of cells: the side of the square that each has to itself."""
    if not len(cells):
        return 0.0
    width, height = np.ptp(cells, axis=0).tolist()
    if min(width, height) > 0:
        return math.sqrt(width * height / len(cells))
    # Cells on a line parallel to an axis have no area, but a spacing along it.
    return float(max(width, height)) / len(cells)


def _have_one_of(pairs: PairDistances, *nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs have at least one of some nodes."""
    is_one = np.zeros(pairs.n_nodes, dtype=bool)
    is_one[np.concatenate(nodes)] = True
    found: NDArray[np.bool_] = is_one[pairs.rows] | is_one[pairs.columns]
    return found


def _moved_pairs(
    subslice: SubSlice, coordinates: NDArray[np.float64], moved: NDArray[np.int64]
) -> PairDistances:
    """Distances of the sub-slice after some of its cells moved to `coordinates`."""
    pairs = subslice.pairs
    stays = ~_have_one_of(pairs, moved)
    others = np.flatnonzero(subslice.node_type != NodeType.SLICE)
    first, second = np.repeat(moved, len(others)), np.tile(others, len(moved))
    # Of two moved cells once, and not with itself.
    new = ~np.isin(second, moved) | (first < second)
    first, second = first[new], second[new]
    offset = coordinates[first] - coordinates[second]
    moved_distances = np.hypot(offset[:, 0], offset[:, 1]).astype(np.float32)
    rows = np.concatenate([pairs.rows[stays], np.minimum(first, second).astype(np.int32)])
    columns = np.concatenate([pairs.columns[stays], np.maximum(first, second).astype(np.int32)])
    distances = np.concatenate([pairs.distances[stays], moved_distances])
    # What stays is in order and so are the pairs of one moved cell: a stable sort merges them.
    order = np.argsort(rows * np.int64(pairs.n_nodes) + columns, kind="stable")
    return PairDistances(
        rows=rows[order], columns=columns[order], distances=distances[order], n_nodes=pairs.n_nodes
    )
