"""Which cells of a sub-slice are hidden or moved, to recover their embeddings and distances.

All random numbers come from a generator that the caller makes for the sub-slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from stofm.spatial import NodeType, PairDistances
from stofm.spatial.neighbor_graph import neighbor_means
from stofm.train._checks import check_shares, check_sum

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from stofm.spatial import SubSlice


@dataclass(frozen=True, kw_only=True)
class SpatialMasking:
    """What masked cell modelling and pairwise distance recovery change in a sub-slice.

    Slice token and virtual cells never change.

    Attributes
    ----------
    masked
        Share of the cells whose features are hidden and to be recovered.
    kept
        Share of the cells whose features stay visible and are to be recovered.
    moved
        Share of the cells that are moved; their distances to other cells are to be recovered.
    kept_pairs
        Share of the cells that stay in place and whose distances are to be recovered.
    disjoint
        No cell is in two of these groups. Otherwise the first two are drawn independently of the
        last two.
    noise_spacings
        Standard deviation of a move along each axis, in mean spacings of the sub-slice's cells,
        ``sqrt(width x height / n)``.
    mask_value
        What stands in place of hidden features: ``"learned"``, a vector that is trained along,
        or a number in every place.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4. DISCREPANCY: the paper masks 10 % and moves 10 % of
    the cells, disjoint; the published code masks and moves 12 %, keeps 3 % of each, draws the
    two independently and writes -100 into masked features (:meth:`reference`).
    """

    masked: float = 0.10
    kept: float = 0.0
    moved: float = 0.10
    kept_pairs: float = 0.0
    disjoint: bool = True
    noise_spacings: float = 5.0
    mask_value: Literal["learned"] | float = "learned"

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        groups = ("masked", "kept", "moved", "kept_pairs")
        check_shares(self, *groups)
        for together in [groups] if self.disjoint else [groups[:2], groups[2:]]:
            check_sum(self, *together)
        if not (self.noise_spacings >= 0 and math.isfinite(self.noise_spacings)):
            msg = f"noise_spacings must be finite and not negative, found {self.noise_spacings}."
            raise ValueError(msg)
        value: object = self.mask_value
        is_number = isinstance(value, float | int) and math.isfinite(value)
        if not (is_number or value == "learned"):
            msg = f"mask_value must be 'learned' or a finite number, found {value!r}."
            raise ValueError(msg)

    @classmethod
    def reference(cls) -> SpatialMasking:
        """Settings of SToFM's published code."""
        return cls(
            masked=0.12, kept=0.03, moved=0.12, kept_pairs=0.03, disjoint=False, mask_value=-100.0
        )


@dataclass(frozen=True, eq=False)
class Draw:
    """The random part of masking one sub-slice.

    Attributes
    ----------
    masked, kept, moved, kept_pairs
        Places among the sub-slice's cells, from 0, in the order drawn.
    noise
        (len(moved), 2) standard normal.
    """

    masked: NDArray[np.int64]
    kept: NDArray[np.int64]
    moved: NDArray[np.int64]
    kept_pairs: NDArray[np.int64]
    noise: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class VisibleCells:
    """Cells of a sub-slice that are not hidden, and what is to be told from them.

    Attributes
    ----------
    nodes
        (n_visible,) nodes, ascending.
    features
        (n_visible, d_cell) float32, their own.
    surroundings
        (n_visible, d_cell) float32, mean of the original features of the cells nearest to each,
        before any moved.
    """

    nodes: NDArray[np.int64]
    features: NDArray[np.float32]
    surroundings: NDArray[np.float32]


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


def draw(n_cells: int, masking: SpatialMasking, rng: Generator) -> Draw:
    """Draw which cells of a sub-slice are hidden and moved, and how far.

    Of n cells, ``int(share x n)`` are in a group. Where that is none, there is one with
    probability share x n, so that cells in tiny sub-slices take part as often as others.
    DISCREPANCY: the published code leaves such sub-slices as they are.

    Parameters
    ----------
    n_cells
        Cells of the sub-slice.
    masking
        Shares.
    rng
        Generator of the sub-slice.
    """
    masked, kept, moved, kept_pairs = (
        _group_size(share, n_cells, rng)
        for share in (masking.masked, masking.kept, masking.moved, masking.kept_pairs)
    )
    # In a tiny disjoint sub-slice the groups may ask for more cells than there are.
    order = rng.permutation(n_cells)
    features, order = order[: masked + kept], order[masked + kept :]
    if not masking.disjoint:
        order = rng.permutation(n_cells)
    places = order[: moved + kept_pairs]
    return Draw(
        masked=features[:masked],
        kept=features[masked:],
        moved=places[:moved],
        kept_pairs=places[moved:],
        noise=rng.standard_normal((len(places[:moved]), 2)),
    )


def _group_size(share: float, n_cells: int, rng: Generator) -> int:
    expected = share * n_cells
    return int(expected) if expected >= 1 else int(rng.random() < expected)


def apply(
    subslice: SubSlice, drawn: Draw, masking: SpatialMasking, *, n_surrounding: int = 0
) -> MaskedSubSlice:
    """Hide and move the drawn cells of a sub-slice.

    A moved cell has exact distances, from where it now lies, to all nodes but the slice token,
    be they near or far. The distances to recover are the original ones between cells, one of
    which was moved or kept for it, as far as the sub-slice lists them: how far two cells lie
    apart that are no neighbours is nowhere asked.

    Parameters
    ----------
    subslice
        The sub-slice; not changed.
    drawn
        What :func:`draw` gave for its number of cells.
    masking
        How far cells move, and what hides features.
    n_surrounding
        Nearest cells of the sub-slice over which the surroundings of those that are not hidden
        are averaged; 0: nothing is asked of these.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.4.
    """
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masked, kept = cells[drawn.masked], cells[drawn.kept]
    moved = cells[drawn.moved]
    features = subslice.features.copy()
    features[masked] = 0.0 if masking.mask_value == "learned" else masking.mask_value
    targets = np.concatenate([masked, kept])
    sigma = masking.noise_spacings * _mean_spacing(subslice.coordinates[cells])
    coordinates = subslice.coordinates.astype(np.float64)
    coordinates[moved] += sigma * drawn.noise
    asked = _pairs_of(subslice, np.concatenate([moved, cells[drawn.kept_pairs]]))
    return MaskedSubSlice(
        subslice=replace(
            subslice, features=features, pairs=_moved_pairs(subslice, coordinates, moved)
        ),
        hidden_nodes=masked,
        target_nodes=targets,
        target_features=subslice.features[targets],
        pair_rows=np.concatenate([asked.rows, asked.columns]).astype(np.int64),
        pair_columns=np.concatenate([asked.columns, asked.rows]).astype(np.int64),
        pair_distances=np.tile(asked.distances, 2),
        visible=_visible_cells(subslice, masked, n_surrounding) if n_surrounding else None,
    )


def _visible_cells(
    subslice: SubSlice, masked: NDArray[np.int64], n_surrounding: int
) -> VisibleCells:
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    features = subslice.features[cells]
    places = subslice.coordinates[cells].astype(np.float64)
    means = neighbor_means(features, places, [np.arange(len(cells))], n_surrounding)
    is_visible = ~np.isin(cells, masked)
    return VisibleCells(
        nodes=cells[is_visible], features=features[is_visible], surroundings=means[is_visible]
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


def _pairs_of(subslice: SubSlice, nodes: NDArray[np.int64]) -> PairDistances:
    """Listed pairs of cells with at least one of `nodes`."""
    pairs = subslice.pairs
    is_asked = np.zeros(pairs.n_nodes, dtype=bool)
    is_asked[nodes] = True
    is_cell = subslice.node_type == NodeType.CELL
    chosen = is_asked[pairs.rows] | is_asked[pairs.columns]
    chosen &= is_cell[pairs.rows] & is_cell[pairs.columns]
    return PairDistances(
        rows=pairs.rows[chosen],
        columns=pairs.columns[chosen],
        distances=pairs.distances[chosen],
        n_nodes=pairs.n_nodes,
    )


def _moved_pairs(
    subslice: SubSlice, coordinates: NDArray[np.float64], moved: NDArray[np.int64]
) -> PairDistances:
    """Distances of the sub-slice after some of its cells moved to `coordinates`."""
    pairs = subslice.pairs
    is_moved = np.zeros(pairs.n_nodes, dtype=bool)
    is_moved[moved] = True
    stays = ~(is_moved[pairs.rows] | is_moved[pairs.columns])
    others = np.flatnonzero(subslice.node_type != NodeType.SLICE)
    first, second = np.repeat(moved, len(others)), np.tile(others, len(moved))
    # Of two moved cells once, and not with itself.
    new = ~is_moved[second] | (first < second)
    first, second = first[new], second[new]
    offset = coordinates[first] - coordinates[second]
    moved_distances = np.hypot(offset[:, 0], offset[:, 1]).astype(np.float32)
    rows = np.concatenate([pairs.rows[stays], np.minimum(first, second).astype(np.int32)])
    columns = np.concatenate([pairs.columns[stays], np.maximum(first, second).astype(np.int32)])
    distances = np.concatenate([pairs.distances[stays], moved_distances])
    # What stays is in order and so are the pairs of one moved cell: a stable sort merges them.
    order = np.argsort(rows * np.int64(pairs.n_nodes) + columns, kind="stable")
    return PairDistances(
        rows=rows[order],
        columns=columns[order],
        distances=distances[order],
        n_nodes=pairs.n_nodes,
    )
