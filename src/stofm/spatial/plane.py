"""Cells of one slice in the plane: the model's frame, an order of their own, cuts, and neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stofm._arrays import SideBySide, let_go, spacious

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


#: Length of a slice's bounding-box diagonal in the model's frame.
MODEL_DIAGONAL = 100.0
#: Neighbours of a cell in a hexagonal lattice.
_N_AROUND = 6
#: A slice this much narrower than long is a line, which would have endlessly many tiles.
_LINE = 1e-9
_ROWS_AT_ONCE = 8_192


def normalize_coordinates(coordinates: NDArray[np.floating]) -> NDArray[np.float64]:
    """Centre a slice and scale its bounding box's diagonal to 100.

    Parameters
    ----------
    coordinates
        (n_cells, 2), any unit.

    Returns
    -------
    (n_cells, 2) in model units: the bounding box's centre is the origin. Cells that all share one
    position come out at the origin.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3; scale of the published code.
    """
    xy = np.asarray(coordinates, dtype=np.float64)
    if len(xy) == 0:
        return xy.reshape(0, 2).copy()
    low, high = xy.min(axis=0), xy.max(axis=0)
    diagonal = float(np.hypot(*(high - low)))
    return np.asarray((xy - (high + low) / 2) / (diagonal or 1.0) * MODEL_DIAGONAL)


def spacing(coordinates: NDArray[np.floating]) -> float:
    """Typical distance of neighbouring cells: the median distance to the sixth nearest.

    In a hexagonal lattice this is exactly the distance of neighbours. It is 1 if there is none, as
    for a single cell or for cells that share one position.
    """
    n_asked = min(_N_AROUND + 1, len(coordinates))
    if n_asked < 2:
        return 1.0
    distances = cKDTree(coordinates).query(coordinates, k=[n_asked])[0]
    return float(np.median(distances)) or 1.0


def canonical_order(
    coordinates: NDArray[np.floating], features: Any, rows: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Order cells by position, and cells at the same position by their features.

    Clustering and cutting follow this order, so that they give the same result whatever the order
    of the rows. Only cells with the same position and the same features keep their file order.

    Parameters
    ----------
    coordinates
        (n_cells, 2).
    features
        (n_cells, d), or more rows, of which these cells have `rows`; anything that returns rows
        when it is indexed.
    rows
        (n_cells,) rows of `features`; all by default.

    Returns
    -------
    (n_cells,) numbers of the cells.
    """
    x, y = coordinates[:, 0], coordinates[:, 1]
    order = np.lexsort((y, x))
    same = (np.diff(x[order]) == 0) & (np.diff(y[order]) == 0)
    shares_place = np.append(same, False) | np.insert(same, 0, False)
    if shares_place.any():
        tied = np.sort(order[shares_place])
        own = features[tied if rows is None else rows[tied]]
        order[shares_place] = tied[np.lexsort((*own.T[::-1], y[tied], x[tied]))]
    return order


def partition_balanced(coordinates: NDArray[np.float64], n_cells: int) -> list[NDArray[np.int64]]:
    """Cut a slice by medians along the longer side, into parts of nearly equal size.

    The slice becomes ``m = ceil(n / n_cells)`` parts. It is cut across the longer side of its
    bounding box, so that the numbers of cells on both sides are in proportion to the numbers of
    parts that each will become, and so on. Works on lattices, lines and points that coincide,
    because it cuts a sequence of cells and not the plane.

    Parameters
    ----------
    coordinates
        (n, 2), in an order that decides between cells of equal coordinate
        (:func:`~stofm.spatial.canonical_order`).
    n_cells
        Largest number of cells in a part.

    Returns
    -------
    Row numbers of each part, ascending. Each row occurs once; with ``n > n_cells`` each part
    has between ``n_cells / 2`` and `n_cells` rows.
    """
    finished: list[NDArray[np.int64]] = []
    n = len(coordinates)
    # A stack instead of recursion: (rows, number of parts that they become).
    pending = [(np.arange(n), -(-n // n_cells))] if n else []
    while pending:
        rows, n_parts = pending.pop()
        if n_parts == 1:
            finished.append(np.sort(rows))
            continue
        xy = coordinates[rows]
        longer = int(np.ptp(xy[:, 1]) > np.ptp(xy[:, 0]))
        in_order = rows[np.lexsort((rows, xy[:, 1 - longer], xy[:, longer]))]
        n_left = round(len(rows) * ((n_parts // 2) / n_parts))
        pending.append((in_order[n_left:], n_parts - n_parts // 2))
        pending.append((in_order[:n_left], n_parts // 2))
    return finished


def partition_reference(coordinates: NDArray[np.float64], n_cells: int) -> list[NDArray[np.int64]]:
    """Cut a slice into square tiles, as SToFM's published code does.

    A slice of at most `n_cells` cells is one sub-slice. A tile with at least twice `n_cells`
    cells is cut into equal parts in file order and not by position, so the result depends on the
    order of the rows, and a part has 1 to ``2 n_cells - 1`` cells.

    DISCREPANCY: the published code loses cells that rounding puts beyond the last tile;
    here they belong to the last tile. A slice of zero width or height, where the published code
    divides by zero, is cut along its other side.

    Parameters
    ----------
    coordinates
        (n, 2) normalised coordinates in file order.
    n_cells
        Intended number of cells.

    Returns
    -------
    Row numbers of each part: tiles with x as the outer and y as the inner loop, rows ascending.
    """
    n = len(coordinates)
    if n <= n_cells:
        return [np.arange(n)] if n else []
    low = coordinates.min(axis=0)
    width, height = coordinates.max(axis=0) - low
    n_tiles = n // n_cells + 1
    if min(width, height) > _LINE * max(width, height):
        side = float(np.sqrt(width * height / n_tiles))
    else:
        side = float(max(width, height)) / n_tiles or 1.0
    numbers = (int(width / side) + 1, int(height // side) + 1)
    # Compared with the edges as the rule states them: dividing by `side` rounds differently.
    column, row = (
        np.searchsorted(start + np.arange(1, number) * side, values, side="right")
        for start, number, values in zip(low, numbers, coordinates.T, strict=True)
    )
    tile = column * numbers[1] + row
    by_tile = np.argsort(tile, kind="stable")
    ends = np.flatnonzero(np.diff(tile[by_tile])) + 1
    parts: list[NDArray[np.int64]] = []
    for rows in np.split(by_tile, ends):
        parts.extend(np.array_split(rows, max(1, len(rows) // n_cells)))
    return parts


def nearest_neighbors(
    points: NDArray[np.float64], n_neighbors: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the nearest of points (n, d), d small, to each of them, itself first and counted.

    Returns indices and Euclidean distances, each (n, n_neighbors), by ascending distance.
    """
    n_neighbors = min(n_neighbors, len(points))
    tree = cKDTree(points, balanced_tree=False)
    distances, indices = tree.query(points, k=np.arange(1, n_neighbors + 1), workers=-1)
    # Coincident points may come first in a point's list, where the point itself belongs.
    rows = np.flatnonzero(indices[:, 0] != np.arange(len(indices)))
    is_own = indices[rows] == rows[:, None]
    # With more coincident points than neighbours the point may be missing: it replaces the last.
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

    Neighbours are of the same slice. In a smaller slice all others count, and a cell alone keeps
    its own values; rows of no slice are NaN. The order of the rows does not matter. On a lattice
    more neighbours may be at the same distance than count; which of them do is then arbitrary.
    """
    values = SideBySide((values.astype(np.float32, copy=False),)).together()
    means = spacious(values.shape)
    for rows in slices:
        ordered = rows[canonical_order(coordinates[rows], values, rows)]
        nearest = nearest_neighbors(coordinates[ordered], n_neighbors + 1)[0]
        nearest = ordered[nearest[:, 1:] if len(ordered) > 1 else nearest]
        starts = np.arange(0, nearest.size + 1, nearest.shape[1])
        weights = np.full(nearest.size, 1.0 / nearest.shape[1], dtype=np.float32)
        shape = (len(ordered), len(values))
        averaging = sp.csr_array((weights, nearest.ravel(), starts), shape=shape)
        for start in range(0, len(ordered), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            means[ordered[part]] = averaging[part] @ values
            let_go(values)
            let_go(means)
    return means
