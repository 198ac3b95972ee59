"""From the cells of one slice to the model's sub-slices (micro and macro scale together)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.spatial import cKDTree

from stofm._arrays import let_go
from stofm._config import check_choice, check_shares, require
from stofm.spatial.plane import (
    canonical_order,
    normalize_coordinates,
    partition_balanced,
    partition_reference,
    spacing,
)
from stofm.spatial.virtual_cells import (
    Clustering,
    Mixing,
    VirtualCells,
    cluster_cells,
    mix_expression_and_place,
    principal_components,
    virtual_cells,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Distance that means "not a neighbour" in dense matrices and is fed to the model.
NO_NEIGHBOR = 100.0
_TIE = 1.0 + 1e-9

NeighborsAmong = Literal["cells", "all_nodes"]
Partition = Literal["balanced", "reference"]
Unit = Literal["diagonal", "spacing"]


class NodeType(IntEnum):
    """Kinds of nodes; the published weights fix the numbers."""

    CELL = 0
    SLICE = 1
    VIRTUAL = 2
    PADDING = 3


@dataclass(frozen=True, kw_only=True)
class SubSliceConfig:
    """How a slice is cut and clustered; part of a model, because its weights depend on it.

    Attributes
    ----------
    n_cells
        Cells of a sub-slice: at most, with the balanced partition.
    partition
        ``"balanced"`` (:func:`~stofm.spatial.partition_balanced`) or ``"reference"``
        (:func:`~stofm.spatial.partition_reference`).
    leiden_resolution
        Resolution of the clustering that gives the virtual cells.
    position_weight
        Weight of position against expression in that clustering, 0 to 1.
    mixing, n_components
        How position and principal components are combined
        (:func:`~stofm.spatial.mix_expression_and_place`), and how many components.
    clustering
        ``"canonical"``: cells are sorted into a canonical order first, so that the order of rows
        does not matter. ``"scanpy"``: file order, and scanpy's labels.
    max_virtual_cells
        Upper limit on virtual cells of a slice; None for no limit (the published code's limit
        of 200 is without effect).
    n_neighbors, neighbors_among
        Which pairs of cells have a distance (:func:`~stofm.spatial.pair_distances`).
    unit
        What distances are measured in. ``"diagonal"``: a hundredth of the slice's, as in the
        published code. ``"spacing"``: that of the sub-slice's cells, the median distance to the
        sixth nearest; this makes dense and sparse slices look alike, and a part of a slice like the
        whole.
    """

    n_cells: int = 1000
    partition: Partition = "balanced"
    leiden_resolution: float = 1.0
    position_weight: float = 0.2
    mixing: Mixing = "concatenate"
    n_components: int = 2
    clustering: Clustering = "canonical"
    max_virtual_cells: int | None = 200
    n_neighbors: int = 50
    neighbors_among: NeighborsAmong = "cells"
    unit: Unit = "diagonal"

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        check_choice(self, "partition", Partition)
        check_choice(self, "mixing", Mixing)
        check_choice(self, "clustering", Clustering)
        check_choice(self, "neighbors_among", NeighborsAmong)
        check_choice(self, "unit", Unit)
        sizes = ("n_cells", "n_components", "n_neighbors", "max_virtual_cells")
        require(self, "must be at least 1", lambda size: size >= 1, *sizes)
        require(self, "must be positive", lambda value: value > 0, "leiden_resolution")
        check_shares(self, "position_weight")
        if self.mixing == "sum" and self.n_components != 2:
            raise ValueError(f"mixing='sum' needs n_components=2, found {self.n_components}.")

    @classmethod
    def reference(cls) -> SubSliceConfig:
        """Rules of SToFM's published code."""
        return cls(
            partition="reference",
            mixing="sum",
            clustering="scanpy",
            max_virtual_cells=None,
            neighbors_among="all_nodes",
        )


@dataclass(frozen=True)
class SliceLayout:
    """How one slice was cut and clustered.

    Attributes
    ----------
    coordinates
        (n, 2) normalised coordinates, model units (the slice's diagonal is 100).
    subslice
        (n,) number of each cell's sub-slice, from 0.
    virtual_cell
        (n,) number of each cell's virtual cell, from 0.
    virtual
        The virtual cells.
    """

    coordinates: NDArray[np.float64]
    subslice: NDArray[np.int64]
    virtual_cell: NDArray[np.int64]
    virtual: VirtualCells

    @property
    def n_subslices(self) -> int:
        """Number of sub-slices."""
        return int(self.subslice.max(initial=-1)) + 1


@dataclass(frozen=True)
class SubSlice:
    """One input of the SE(2) Transformer: slice token, virtual cells, cells, in this order.

    Attributes
    ----------
    coordinates
        (n_nodes, 2) in the unit of the rules; the slice token lies at the origin.
    features
        (n_nodes, d) cell embeddings, float32; zeros for the slice token.
    node_type
        (n_nodes,) values of :class:`~stofm.spatial.NodeType`, int8.
    cell_index
        (n_nodes,) row of the cell in its slice, -1 for nodes that are not cells.
    pairs
        The distances.
    """

    coordinates: NDArray[np.float64]
    features: NDArray[np.float32]
    node_type: NDArray[np.int8]
    cell_index: NDArray[np.int64]
    pairs: PairDistances

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node_type)


def lay_out_slice(
    coordinates: NDArray[np.floating],
    features: NDArray[np.floating],
    config: SubSliceConfig,
    *,
    seed: int = 0,
) -> SliceLayout:
    """Normalise a slice's coordinates, cut it into sub-slices and find its virtual cells.

    Parameters
    ----------
    coordinates
        (n, 2) finite, any unit.
    features
        (n, d) finite cell embeddings.
    config
        The rules.
    seed
        Seed of the clustering.

    Returns
    -------
    The layout. Every cell is in exactly one sub-slice and one virtual cell.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.2.
    """
    xy, features = np.asarray(coordinates, dtype=np.float64), np.asarray(features)
    if len(xy) != len(features):
        raise ValueError(
            f"{len(xy)} coordinates and {len(features)} rows of features; expected as many."
        )
    normalized, by_place = normalize_coordinates(xy), canonical_order(xy, features)
    if config.partition == "reference":
        parts = partition_reference(normalized, config.n_cells)
    else:
        parts = [by_place[p] for p in partition_balanced(normalized[by_place], config.n_cells)]
    subslice = np.empty(len(normalized), dtype=np.int64)
    for number, rows in enumerate(parts):
        subslice[rows] = number
    order = np.arange(len(normalized)) if config.clustering == "scanpy" else by_place
    points = mix_expression_and_place(
        principal_components(features, config.n_components, order=order),
        normalized[order],
        position_weight=config.position_weight,
        mixing=config.mixing,
    )
    let_go(features)
    labels = np.empty(len(normalized), dtype=np.int64)
    labels[order] = cluster_cells(
        points,
        resolution=config.leiden_resolution,
        max_clusters=config.max_virtual_cells,
        seed=seed,
        clustering=config.clustering,
    )
    return SliceLayout(normalized, subslice, labels, virtual_cells(labels, normalized, features))


def build_subslice(
    layout: SliceLayout,
    features: NDArray[np.floating],
    cells: NDArray[np.integer],
    config: SubSliceConfig,
) -> SubSlice:
    """Assemble the nodes of one sub-slice.

    Parameters
    ----------
    layout
        The slice's layout.
    features
        (n, d) cell embeddings of the whole slice.
    cells
        Rows of the sub-slice's cells.
    config
        The rules.
    """
    virtual = layout.virtual
    n_virtual, width = virtual.features.shape
    node_type = np.full(1 + n_virtual + len(cells), NodeType.CELL, dtype=np.int8)
    node_type[0] = NodeType.SLICE
    node_type[1 : 1 + n_virtual] = NodeType.VIRTUAL
    coordinates = np.vstack([np.zeros((1, 2)), virtual.coordinates, layout.coordinates[cells]])
    if config.unit == "spacing":
        coordinates /= spacing(layout.coordinates[cells])
    rows = [np.zeros((1, width), np.float32), virtual.features, np.asarray(features)[cells]]
    return SubSlice(
        coordinates=coordinates,
        features=np.vstack(rows, dtype=np.float32, casting="same_kind"),
        node_type=node_type,
        cell_index=np.concatenate([np.full(1 + n_virtual, -1), cells]).astype(np.int64),
        pairs=pair_distances(
            coordinates,
            node_type,
            n_neighbors=config.n_neighbors,
            neighbors_among=config.neighbors_among,
        ),
    )


def rows_by_subslice(layout: SliceLayout) -> list[NDArray[np.int64]]:
    """Rows of each sub-slice's cells, ascending, in order of the sub-slices' numbers."""
    order = np.argsort(layout.subslice, kind="stable")
    ends = np.cumsum(np.bincount(layout.subslice, minlength=layout.n_subslices))[:-1]
    return np.split(order, ends)


@dataclass(frozen=True)
class PairDistances:
    """Distances at the unordered pairs of nodes that have one.

    All other pairs of distinct nodes hold the model's constant for "not a neighbour", except
    those of the slice token, which hold no distance at all.

    Attributes
    ----------
    rows, columns
        (n_pairs,) node numbers, ``rows < columns``, in ascending order of both.
    distances
        (n_pairs,) distances in model units, float32.
    n_nodes
        Number of nodes of the sub-slice.
    """

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    distances: NDArray[np.float32]
    n_nodes: int


def pair_distances(
    coordinates: NDArray[np.float64],
    node_type: NDArray[np.integer],
    *,
    n_neighbors: int = 50,
    neighbors_among: NeighborsAmong = "cells",
) -> PairDistances:
    """Find the pairs of a sub-slice's nodes that have a distance, and the distances.

    These are pairs with a virtual cell, and pairs of cells one of which is among the other's
    nearest. All cells at the distance of the last neighbour count, so the result does not depend on
    the order of cells or on the orientation of a lattice.

    DISCREPANCY: SToFM's published code breaks such ties by chance, and treats distance 0 as
    "not a neighbour", so that coincident cells are far apart; here distance 0 is a distance.

    Parameters
    ----------
    coordinates
        (n_nodes, 2) model units.
    node_type
        (n_nodes,) values of :class:`~stofm.spatial.NodeType`.
    n_neighbors
        Length k of the published code's neighbour list; k - 1 of its entries are other nodes, and k
        is at most the number of nodes less one.
    neighbors_among
        ``"all_nodes"``: as in the published code, the slice token (at the origin) and virtual cells
        take up entries of a cell's list. ``"cells"``: all entries are cells.

    Returns
    -------
    Distances computed in double precision and stored as float32.
    """
    n_nodes = len(coordinates)
    kind = np.asarray(node_type)
    cells = np.flatnonzero(kind == NodeType.CELL)
    virtual = np.flatnonzero(kind == NodeType.VIRTUAL)
    searched = np.arange(n_nodes) if neighbors_among == "all_nodes" else cells
    first, second = _nearest_pairs(coordinates[searched], min(n_neighbors, n_nodes - 1) - 1)
    first, second = searched[first], searched[second]
    both_cells = (kind[first] == NodeType.CELL) & (kind[second] == NodeType.CELL)

    # Every virtual cell with every cell and every virtual cell.
    with_virtual = np.concatenate([virtual, cells])
    left = np.concatenate([first[both_cells], np.repeat(virtual, len(with_virtual))])
    right = np.concatenate([second[both_cells], np.tile(with_virtual, len(virtual))])
    distinct = left != right
    left, right = left[distinct], right[distinct]
    # Sorting beats np.unique, which hashes integers.
    codes = np.sort(np.minimum(left, right) * n_nodes + np.maximum(left, right))
    codes = codes[np.diff(codes, prepend=-1) != 0]
    rows, columns = np.divmod(codes, n_nodes)
    offset = coordinates[rows] - coordinates[columns]
    return PairDistances(
        rows=rows.astype(np.int32),
        columns=columns.astype(np.int32),
        distances=np.hypot(offset[:, 0], offset[:, 1]).astype(np.float32),
        n_nodes=n_nodes,
    )


def _nearest_pairs(
    points: NDArray[np.float64], n_others: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (i, j) where j is among the `n_others` points nearest to i, ties included."""
    n = len(points)
    n_others = min(n_others, n - 1)
    if n_others <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    tree = cKDTree(points)
    # A lattice has at most 12 points at one distance this near; more are requested if all tie.
    n_asked = min(n, n_others + 1 + 12)
    rows = np.arange(n)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    while len(rows):
        distances, indices = tree.query(points[rows], k=np.arange(1, n_asked + 1))
        # The point itself is among its coincident points, so entry n_others counts from there.
        reach = distances[:, n_others] * _TIE
        unfinished = (distances[:, -1] <= reach) & (n_asked < n)
        near = (distances <= reach[:, None]) & (indices != rows[:, None])
        near &= ~unfinished[:, None]
        found.append((np.repeat(rows, near.sum(axis=1)), indices[near]))
        rows = rows[unfinished]
        n_asked = min(n, 2 * n_asked)
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])
