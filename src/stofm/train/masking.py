"""Cells with hidden genes, sub-slices with hidden and moved cells, and batches of these.

All random numbers come from generators that the caller makes, one per cell or sub-slice, so that
what is hidden depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from stofm.nn import SubSliceBatch, TokenBatch
from stofm.nn.batch import Tensors
from stofm.spatial import NodeType, PairDistances
from stofm.spatial.plane import neighbor_means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.genes import GeneVocabulary
    from stofm.spatial import SubSlice
    from stofm.train.config import SpatialMasking, TokenMasking

#: A gene of a cell is one number: the cell, and in these lower bits the token.
_TOKEN_BITS = 32


def drop_genes(
    batch: TokenBatch, share: float, *, pad_token: int, rngs: Sequence[Generator]
) -> TokenBatch:
    """Leave out a share of each cell's genes at random, as a panel that measures fewer genes would.

    The remaining genes move up to their ranks among themselves and keep their values: the total
    count that values are relative to is assumed to be known. The number left out is rounded down,
    so that a cell with genes keeps at least one.
    """
    genes = _Genes.of(batch)
    is_dropped = np.zeros(len(genes.keys), dtype=bool)
    for start, end, rng in zip(genes.starts[:-1], genes.starts[1:], rngs, strict=True):
        n_genes = end - start
        is_dropped[start + rng.permutation(n_genes)[: int(share * n_genes)]] = True
    kept = batch.is_real.clone()
    kept[genes.at] = torch.from_numpy(~is_dropped[genes.of_entry])
    order = torch.argsort(~kept, dim=1, stable=True)
    is_real = kept.gather(1, order)

    def moved_up(entries: Tensor | None, blank: int = 0) -> Any:
        return None if entries is None else entries.gather(1, order).masked_fill(~is_real, blank)

    return TokenBatch(
        tokens=moved_up(batch.tokens, pad_token),
        is_real=is_real,
        values=moved_up(batch.values),
    )


class _Genes(NamedTuple):
    """The genes of cells, each once per cell, sorted by cell and token."""

    at: tuple[NDArray[np.intp], ...]  # where the lists have genes: (entries,) each
    keys: NDArray[np.int64]  # (genes,) of cell and token, ascending
    starts: NDArray[np.int64]  # (cells + 1,) first gene of each cell
    of_entry: NDArray[np.intp]  # (entries,) which gene each entry is

    @classmethod
    def of(cls, batch: TokenBatch) -> _Genes:
        is_gene = batch.is_real.numpy().copy()
        is_gene[:, 0] = False  # <cls>
        at = np.nonzero(is_gene)
        entries = (at[0] << _TOKEN_BITS) + batch.tokens.numpy()[at].astype(np.int64)
        keys, of_entry = np.unique(entries, return_inverse=True)
        starts = np.searchsorted(keys, np.arange(len(is_gene) + 1) << _TOKEN_BITS)
        return cls(at, keys, starts, of_entry)


@dataclass(frozen=True)
class MaskedGenes(Tensors):
    """Cells with hidden genes, and which genes these are."""

    tokens: TokenBatch  # what the cell encoder sees
    #: Positions to recover, counted over all lists, including padding.
    places: Int[Tensor, " targets"]
    labels: Int[Tensor, " targets"]  # their genes' tokens
    measured: Int[Tensor, " genes"]  # tokens of all genes that occur in these cells, each once

    @classmethod
    def build(
        cls,
        cells: TokenBatch,
        rngs: Sequence[Generator],
        *,
        masking: TokenMasking,
        vocabulary: GeneVocabulary,
    ) -> MaskedGenes:
        """Hide genes of cells, given as token lists on the CPU, with one generator per cell.

        A gene that occurs twice in a list (``duplicates="keep"``) is hidden at both positions. A
        hidden gene's position and value stay.
        """
        genes = _Genes.of(cells)
        replacement = genes.keys & ((1 << _TOKEN_BITS) - 1)
        is_chosen = np.zeros(len(replacement), dtype=bool)
        for start, end, rng in zip(genes.starts[:-1], genes.starts[1:], rngs, strict=True):
            n_genes = end - start
            n_chosen = min(n_genes, max(1, round(masking.share * n_genes))) if masking.share else 0
            chosen = start + rng.permutation(n_genes)[:n_chosen]
            lot = rng.random(n_chosen)
            is_mask = lot < masking.mask_share
            is_random = ~is_mask & (lot < masking.mask_share + masking.random_share)
            replacement[chosen[is_mask]] = vocabulary.mask
            if is_random.any():
                random = rng.choice(vocabulary.tokens, int(is_random.sum()))
                replacement[chosen[is_random]] = random
            is_chosen[chosen] = True
        tokens = cells.tokens.clone()
        tokens[genes.at] = torch.from_numpy(replacement[genes.of_entry]).to(tokens.dtype)
        is_target = torch.zeros(tokens.shape, dtype=torch.bool)
        is_target[genes.at] = torch.from_numpy(is_chosen[genes.of_entry])
        return cls(
            tokens=replace(cells, tokens=tokens),
            places=is_target.flatten().nonzero()[:, 0],
            labels=cells.tokens[is_target],
            measured=torch.unique(cells.tokens[:, 1:][cells.is_real[:, 1:]]),
        )


@dataclass(frozen=True)
class CellBatch(Tensors):
    """Input of the objective of the cell encoder: cells with hidden genes, and two views of each."""

    genes: MaskedGenes
    views: tuple[TokenBatch, TokenBatch]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.views[0].tokens)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of these cells, each counted once."""
        return int(self.genes.tokens.is_real.sum())


@dataclass(frozen=True, eq=False)
class MaskedSubSlice:
    """A sub-slice with hidden and moved cells, and what is to be recovered.

    In `subslice`, hidden features are 0 if a learned vector replaces them; coordinates, which the
    model does not use, are the original ones. The rest is as in :class:`MaskedSubSliceBatch`;
    hidden targets come before kept ones, and pairs are listed in both directions.
    """

    subslice: SubSlice
    hidden_nodes: NDArray[np.int64]
    target_nodes: NDArray[np.int64]
    target_features: NDArray[np.float32]
    pair_rows: NDArray[np.int64]
    pair_columns: NDArray[np.int64]
    pair_distances: NDArray[np.float32]
    visible_nodes: NDArray[np.int64]
    surroundings: NDArray[np.float32]


class Draw(NamedTuple):
    """Random choices for one sub-slice: positions among its cells, in the order drawn."""

    masked: NDArray[np.int64]
    kept: NDArray[np.int64]
    moved: NDArray[np.int64]
    kept_pairs: NDArray[np.int64]
    noise: NDArray[np.float64]  # (len(moved), 2) standard normal


def draw(n_cells: int, masking: SpatialMasking, rng: Generator) -> Draw:
    """Draw which cells of a sub-slice are hidden and moved, and how far.

    Of n cells, ``int(share x n)`` are in a group. If that is none, there is one with probability
    share x n, so that cells in tiny sub-slices take part as often as others. DISCREPANCY: the
    published code leaves such sub-slices as they are.
    """

    def size(share: float) -> int:
        expected = share * n_cells
        return int(expected) if expected >= 1 else int(rng.random() < expected)

    masked, kept = size(masking.masked), size(masking.kept)
    moved, kept_pairs = size(masking.moved), size(masking.kept_pairs)
    # In a tiny sub-slice, disjoint groups may need more cells than there are.
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

    A moved cell has exact distances, from its new position, to all nodes but the slice token, near
    or far. The distances to recover are the original ones between cells, one of which was moved or
    kept for it, as far as the sub-slice lists them: distances between cells that are not neighbours
    are never asked for. With `n_surrounding`, the mean over that many nearest cells around each
    visible cell is to be recovered too.
    """
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masked, kept, moved = cells[drawn.masked], cells[drawn.kept], cells[drawn.moved]
    features = subslice.features.copy()
    features[masked] = 0.0 if masking.mask_value == "learned" else masking.mask_value
    targets = np.concatenate([masked, kept])
    coordinates = subslice.coordinates.astype(np.float64)
    spacing = _mean_spacing(subslice.coordinates[cells])
    coordinates[moved] += masking.noise_spacings * spacing * drawn.noise
    pairs, is_cell = subslice.pairs, subslice.node_type == NodeType.CELL
    asked = _have_one_of(pairs, moved, cells[drawn.kept_pairs])
    asked &= is_cell[pairs.rows] & is_cell[pairs.columns]
    rows, columns = pairs.rows[asked], pairs.columns[asked]
    visible, surroundings = cells[:0], features[:0]
    if n_surrounding:
        around = subslice.features[cells], subslice.coordinates[cells].astype(np.float64)
        means = neighbor_means(*around, [np.arange(len(cells))], n_surrounding)
        is_visible = ~np.isin(cells, masked)
        visible, surroundings = cells[is_visible], means[is_visible]
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
        visible_nodes=visible,
        surroundings=surroundings,
    )


def _mean_spacing(cells: NDArray[np.floating]) -> float:
    """Mean spacing of cells: the side of the square that each occupies."""
    if not len(cells):
        return 0.0
    width, height = np.ptp(cells, axis=0).tolist()
    if min(width, height) > 0:
        return math.sqrt(width * height / len(cells))
    # Cells on a line parallel to an axis cover no area, but have a spacing along it.
    return float(max(width, height)) / len(cells)


def _have_one_of(pairs: PairDistances, *nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs contain at least one of these nodes."""
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
    # The pairs that stay are in order, and so are those of one moved cell: a stable sort merges
    # them.
    order = np.argsort(rows * np.int64(pairs.n_nodes) + columns, kind="stable")
    return PairDistances(
        rows=rows[order], columns=columns[order], distances=distances[order], n_nodes=pairs.n_nodes
    )


@dataclass(frozen=True)
class MaskedSubSliceBatch(Tensors):
    """Input of the objectives on sub-slices.

    A node's place is its number, counted over all padded sub-slices.
    """

    #: Input of the SE(2) Transformer, except for the learned vector in place of hidden features.
    subslices: SubSliceBatch
    hidden_places: Int[Tensor, " hidden"]  # nodes whose features are hidden
    #: Nodes whose features are to be recovered, and those features.
    target_places: Int[Tensor, " targets"]
    target_features: Float[Tensor, "targets d_cell"]
    #: Sub-slice, its two nodes and their original distance (model units) of the pairs to recover.
    pair_batch: Int[Tensor, " pairs"]
    pair_rows: Int[Tensor, " pairs"]
    pair_columns: Int[Tensor, " pairs"]
    pair_distances: Float[Tensor, " pairs"]
    #: Cells that are not hidden, and the mean original features around each; none if they are not
    #: to be recovered.
    visible_places: Int[Tensor, " visible"]
    surroundings: Float[Tensor, "visible d_cell"]
    #: Token lists of the cells that are embedded again, in groups of similar length, and where
    #: these cells' embeddings go, group after group; None if there are none.
    sampled: tuple[TokenBatch, ...] = ()
    sampled_places: Int[Tensor, " sampled"] | None = None

    @classmethod
    def from_masked(
        cls, masked: Sequence[MaskedSubSlice], *, node_multiple: int = 1
    ) -> MaskedSubSliceBatch:
        """Pad masked sub-slices, at least one, into one batch."""
        subslices = SubSliceBatch.from_subslices(
            [part.subslice for part in masked], node_multiple=node_multiple
        )
        starts = range(0, len(masked) * subslices.pairs.n_nodes, subslices.pairs.n_nodes)

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(part, name) for part in masked]))

        def places(name: str) -> Tensor:
            parts = zip(starts, masked, strict=True)
            return torch.from_numpy(np.concatenate([k + getattr(part, name) for k, part in parts]))

        pairs = ("pair_rows", "pair_columns", "pair_distances")
        tensors: dict[str, Any] = {
            name: joined(name) for name in (*pairs, "target_features", "surroundings")
        }
        tensors |= {
            f"{kind}_places": places(f"{kind}_nodes") for kind in ("hidden", "target", "visible")
        }
        n_pairs = [len(part.pair_rows) for part in masked]
        batch = torch.from_numpy(np.repeat(np.arange(len(masked)), n_pairs))
        return cls(subslices=subslices, pair_batch=batch, **tensors)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int((self.subslices.cell_index >= 0).sum())

    @property
    def n_tokens(self) -> int:
        """Number of nodes, and of tokens of the cells that are encoded again."""
        n_tokens = sum(int(group.is_real.sum()) for group in self.sampled)
        return sum(self.subslices.pairs.n_real) + n_tokens
