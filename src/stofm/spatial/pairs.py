"""Distances between the nodes of a sub-slice, kept at the pairs that have one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from numpy.typing import NDArray


NeighborsAmong = Literal["cells", "all_nodes"]

#: Distance that stands for "not a neighbour" in dense matrices and is fed to the model.
NO_NEIGHBOR = 100.0
_TIE = 1.0 + 1e-9


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

    Those are pairs with a virtual cell, and pairs of cells one of which is among the other's
    nearest. Cells as far away as the last neighbour all count, so that the result does not
    depend on the order of cells or on how a lattice lies in the plane.

    DISCREPANCY: SToFM's published code decides such ties by chance, and treats distance 0 as
    "not a neighbour", so that coincident cells are far apart; here distance 0 is a distance.

    Parameters
    ----------
    coordinates
        (n_nodes, 2) model units.
    node_type
        (n_nodes,) values of :class:`~stofm.spatial.NodeType`.
    n_neighbors
        Length k of the published code's neighbour list; k - 1 of its places go to other nodes,
        and k is cut to the number of nodes less one.
    neighbors_among
        ``"all_nodes"``: as in the published code the slice token (at the origin) and virtual
        cells take up places of a cell's list. ``"cells"``: its places all go to cells.

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
    # A lattice has at most 12 points at one distance this near; more are asked for if all tie.
    n_asked = min(n, n_others + 1 + 12)
    rows = np.arange(n)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    while len(rows):
        distances, indices = tree.query(points[rows], k=np.arange(1, n_asked + 1))
        # The point itself is among its coincident points: place n_others counts from there.
        reach = distances[:, n_others] * _TIE
        unfinished = (distances[:, -1] <= reach) & (n_asked < n)
        near = (distances <= reach[:, None]) & (indices != rows[:, None])
        near &= ~unfinished[:, None]
        found.append((np.repeat(rows, near.sum(axis=1)), indices[near]))
        rows = rows[unfinished]
        n_asked = min(n, 2 * n_asked)
    return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])


class NodeType(IntEnum):
    """Kinds of nodes; the published weights fix the numbers."""

    CELL = 0
    SLICE = 1
    VIRTUAL = 2
    PADDING = 3
