"""From the cells of one slice to the model's sub-slices (micro and macro scale together)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stofm._config import check_choice, check_shares, require
from stofm.spatial.coordinates import (
    canonical_order,
    normalize_coordinates,
    partition_balanced,
    partition_reference,
    spacing,
)
from stofm.spatial.pairs import NeighborsAmong, NodeType, PairDistances, pair_distances
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

Partition = Literal["balanced", "reference"]
Unit = Literal["diagonal", "spacing"]


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
        Weight of place against expression in that clustering, 0 to 1.
    mixing, n_components
        How place and principal components are put together
        (:func:`~stofm.spatial.mix_expression_and_place`), and how many components.
    clustering
        ``"canonical"``: cells are put in an order of their own first, so that the order of rows
        does not matter. ``"scanpy"``: file order, and scanpy's labels.
    max_virtual_cells
        Upper limit on virtual cells of a slice; None for no limit (the published code's limit
        of 200 is without effect).
    n_neighbors, neighbors_among
        Which pairs of cells have a distance (:func:`~stofm.spatial.pair_distances`).
    unit
        What distances are measured in. ``"diagonal"``: a hundredth of the slice's, as in the
        published code. ``"spacing"``: that of the sub-slice's cells, the median distance to the
        sixth nearest; so dense and sparse slices look alike, and a part of a slice like the whole.
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
            msg = f"mixing='sum' needs n_components=2, found {self.n_components}."
            raise ValueError(msg)

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
        (n_nodes,) row of the cell in its slice, -1 for nodes that are no cell.
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
        msg = f"{len(xy)} coordinates and {len(features)} rows of features; expected as many."
        raise ValueError(msg)
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
        principal_components(features[order], config.n_components),
        normalized[order],
        position_weight=config.position_weight,
        mixing=config.mixing,
    )
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
    """Put together the nodes of one sub-slice.

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
