"""Sub-slices with cells hidden and moved, what is to be recovered of them, and batches of these.

All random numbers come from a generator that the caller makes, one per sub-slice, so that what is
hidden depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from stofm.nn import SubSliceBatch
from stofm.spatial import NodeType, PairDistances
from stofm.spatial.plane import neighbor_means
from stofm.train.masked_genes import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from numpy.random import Generator
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.nn import TokenBatch
    from stofm.spatial import SubSlice
    from stofm.train.config import SpatialMasking
    from stofm.train.masked_genes import MaskedGenes


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
    visible_nodes, surroundings
        (n_visible,) cells that are not hidden, and (n_visible, d_cell) float32, the mean of the
        original features of the cells nearest to each, before any moved; none if not asked for.
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


@dataclass(frozen=True)
class MaskedSubSliceBatch(Batch):
    """Input of the objectives on sub-slices.

    A node's place is its number counted through the padded sub-slices.

    Attributes
    ----------
    subslices
        What the SE(2) Transformer sees, but for the learned vector in place of hidden features.
    hidden_places
        (n_hidden,) nodes whose features are hidden.
    target_places, target_features
        (n_targets,) nodes whose features are to be recovered, and (n_targets, d_cell) these.
    pair_batch, pair_rows, pair_columns
        (n_pairs,) the sub-slice and the two nodes in it of pairs whose distance is to be recovered.
    pair_distances
        (n_pairs,) these distances, model units.
    visible_places, surroundings
        (n_visible,) cells that are not hidden, and (n_visible, d_cell) the mean original features
        around each; none if not asked for.
    sampled, sampled_places
        Token lists of the cells that are embedded anew, in groups of like length, and (n_sampled,)
        where these cells' embeddings go, group after group; None if there are none.
    genes
        The groups with hidden genes; empty if masked genes are not trained along.
    """

    subslices: SubSliceBatch
    hidden_places: Int[Tensor, " hidden"]
    target_places: Int[Tensor, " targets"]
    target_features: Float[Tensor, "targets d_cell"]
    pair_batch: Int[Tensor, " pairs"]
    pair_rows: Int[Tensor, " pairs"]
    pair_columns: Int[Tensor, " pairs"]
    pair_distances: Float[Tensor, " pairs"]
    visible_places: Int[Tensor, " visible"]
    surroundings: Float[Tensor, "visible d_cell"]
    sampled: tuple[TokenBatch, ...] = ()
    sampled_places: Int[Tensor, " sampled"] | None = None
    genes: tuple[MaskedGenes, ...] = ()

    @classmethod
    def from_masked(
        cls, masked: Sequence[MaskedSubSlice], *, node_multiple: int = 1
    ) -> MaskedSubSliceBatch:
        """Pad masked sub-slices, at least one, into one batch.

        `node_multiple` is that of :meth:`stofm.nn.SubSliceBatch.from_subslices`.
        """
        subslices = SubSliceBatch.from_subslices(
            [part.subslice for part in masked], node_multiple=node_multiple
        )
        n_nodes = subslices.pairs.n_nodes
        n_pairs = [len(part.pair_rows) for part in masked]

        def places(nodes: Sequence[NDArray[np.int64]]) -> Tensor:
            return _joined([b * n_nodes + own for b, own in enumerate(nodes)])

        return cls(
            subslices=subslices,
            hidden_places=places([part.hidden_nodes for part in masked]),
            target_places=places([part.target_nodes for part in masked]),
            target_features=_joined([part.target_features for part in masked]),
            pair_batch=torch.from_numpy(np.repeat(np.arange(len(masked)), n_pairs)),
            pair_rows=_joined([part.pair_rows for part in masked]),
            pair_columns=_joined([part.pair_columns for part in masked]),
            pair_distances=_joined([part.pair_distances for part in masked]),
            visible_places=places([part.visible_nodes for part in masked]),
            surroundings=_joined([part.surroundings for part in masked]),
        )

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int((self.subslices.cell_index >= 0).sum())

    @property
    def n_tokens(self) -> int:
        """Number of nodes, and of tokens of the cells that are embedded anew."""
        n_tokens = sum(int(group.is_real.sum()) for group in self.sampled)
        return sum(self.subslices.pairs.n_real) + n_tokens


def _joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
