"""Exact neighbour graphs in few dimensions, weighted as UMAP weights them, and means over neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stofm.spatial.coordinates import canonical_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MAX_BISECTIONS = 64
_ROWS_AT_ONCE = 65_536
_TOLERANCE = 1e-5
_MIN_BANDWIDTH = 1e-3


def nearest_neighbors(
    points: NDArray[np.float64], n_neighbors: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the nearest of points (n, d), d small, to each of them, itself first and counted.

    Returns indices and Euclidean distances, each (n, n_neighbors), by ascending distance.
    """
    n_neighbors = min(n_neighbors, len(points))
    tree = cKDTree(points, balanced_tree=False)
    distances, indices = tree.query(points, k=np.arange(1, n_neighbors + 1), workers=-1)
    # Coincident points may stand at the front of a point's list, where it shall stand itself.
    rows = np.flatnonzero(indices[:, 0] != np.arange(len(indices)))
    is_own = indices[rows] == rows[:, None]
    # With more coincident points than neighbours the point may be missing: the last makes room.
    column = np.where(is_own.any(axis=1), is_own.argmax(axis=1), indices.shape[1] - 1)
    indices[rows, column] = indices[rows, 0]
    distances[rows, column] = distances[rows, 0]
    indices[rows, 0] = rows
    distances[rows, 0] = 0.0
    return indices, distances


def neighbor_means(
    values: NDArray[np.floating],
    coordinates: NDArray[np.float64],
    slices: Sequence[NDArray[np.int64]],
    n_neighbors: int,
) -> NDArray[np.float32]:
    """Average values (n, d) over the nearest neighbours of each cell, itself not counted.

    Neighbours are of the same slice. A smaller slice has as many as there are, and a cell by itself
    its own values; rows of no slice are NaN. The order of the rows does not matter. On a lattice more
    neighbours may be at the same distance than count; which of them do is then arbitrary.
    """
    means = np.full(values.shape, np.nan, dtype=np.float32)
    for rows in slices:
        ordered = rows[canonical_order(coordinates[rows], values[rows])]
        nearest = nearest_neighbors(coordinates[ordered], n_neighbors + 1)[0]
        nearest = nearest[:, 1:] if len(ordered) > 1 else nearest
        starts = np.arange(0, nearest.size + 1, nearest.shape[1])
        weights = np.full(nearest.size, 1.0 / nearest.shape[1], dtype=np.float32)
        averaging = sp.csr_array((weights, nearest.ravel(), starts), shape=(len(ordered),) * 2)
        own = values[ordered].astype(np.float32, copy=False)
        for start in range(0, len(ordered), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            means[ordered[part]] = averaging[part] @ own
    return means


def umap_weights(indices: NDArray[np.int64], distances: NDArray[np.float64]) -> sp.csr_array:
    """Weight a neighbour graph by UMAP's fuzzy simplicial set: symmetric (n, n) weights, float32.

    A point's nearest neighbour at non-zero distance rho gets weight 1, others
    ``exp(-(d - rho) / sigma)``, with sigma such that a point's weights sum to
    ``log2(n_neighbors)``. The two directions of an edge are joined by the probabilistic sum
    ``a + b - a b``. `indices` and `distances` (n, n_neighbors) have the point itself first.

    References
    ----------
    McInnes, Healy and Melville, UMAP (arXiv 1802.03426), section 3.1.
    """
    n, n_neighbors = indices.shape
    # The first neighbour that is not at the same place; 0 if all are.
    rho = np.where(distances > 0, distances, np.inf).min(axis=1)
    rho[np.isinf(rho)] = 0.0
    excess = np.maximum(distances[:, 1:] - rho[:, None], 0.0)
    sigma = _bandwidths(excess, target=np.log2(n_neighbors))
    floor = np.where(rho > 0, distances.mean(axis=1), distances.mean()) * _MIN_BANDWIDTH
    sigma = np.maximum(sigma, floor)
    # A point whose neighbours all coincide with it has no bandwidth: its weights are 1.
    weights = np.exp(-excess / np.where(sigma > 0, sigma, 1.0)[:, None]).astype(np.float32)

    offsets = np.arange(0, n * (n_neighbors - 1) + 1, n_neighbors - 1)
    directed = sp.csr_array(
        (weights.ravel(), indices[:, 1:].ravel().astype(np.int32), offsets.astype(np.int32)),
        shape=(n, n),
    )
    reverse = directed.T.tocsr()
    return (directed + reverse - directed.multiply(reverse)).tocsr()


def _bandwidths(excess: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Solve ``sum_j exp(-excess_ij / sigma_i) = target`` for all rows at once by bisection."""
    n = len(excess)
    sigma = np.ones(n)
    low, high = np.zeros(n), np.full(n, np.inf)
    active = np.arange(n)
    for _ in range(_MAX_BISECTIONS):
        total = np.exp(-excess[active] / sigma[active, None]).sum(axis=1)
        unsolved = np.abs(total - target) >= _TOLERANCE
        active, total = active[unsolved], total[unsolved]
        if len(active) == 0:
            break
        too_wide = total > target
        high[active[too_wide]] = sigma[active[too_wide]]
        low[active[~too_wide]] = sigma[active[~too_wide]]
        bounded = np.isfinite(high[active])
        middle = (low[active] + np.where(bounded, high[active], 0.0)) / 2
        sigma[active] = np.where(bounded, middle, sigma[active] * 2)
    return sigma
