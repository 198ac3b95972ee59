"""Cutting one slice into sub-slices of about `n_cells` cells (the micro scale)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: A slice this much narrower than long is a line, whose tiles would be without number.
_LINE = 1e-9


def partition_balanced(coordinates: NDArray[np.float64], n_cells: int) -> list[NDArray[np.int64]]:
    """Cut a slice by medians along the longer side, into parts of nearly equal size.

    The slice is to become ``m = ceil(n / n_cells)`` parts. It is cut across the longer side of
    its bounding box so that the two halves hold cells in the proportion of the parts that each
    is to become, and so on. Works on lattices, lines and points that coincide, because it cuts
    a sequence of cells and not the plane.

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
    # A stack in place of recursion: (rows, number of parts they are to become).
    pending = [(np.arange(n), -(-n // n_cells))] if n else []
    while pending:
        rows, n_parts = pending.pop()
        if n_parts == 1:
            finished.append(np.sort(rows))
            continue
        left, right = _cut(coordinates, rows, share=(n_parts // 2) / n_parts)
        pending.append((right, n_parts - n_parts // 2))
        pending.append((left, n_parts // 2))
    return finished


def _cut(
    coordinates: NDArray[np.float64], rows: NDArray[np.int64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split `rows` across the longer side of their bounding box, `share` of them first."""
    xy = coordinates[rows]
    axis = int(np.ptp(xy[:, 1]) > np.ptp(xy[:, 0]))
    in_order = rows[np.lexsort((rows, xy[:, 1 - axis], xy[:, axis]))]
    n_left = round(len(rows) * share)
    return in_order[:n_left], in_order[n_left:]


def partition_reference(coordinates: NDArray[np.float64], n_cells: int) -> list[NDArray[np.int64]]:
    """Cut a slice into square tiles, as SToFM's published code does.

    A slice of at most `n_cells` cells is one sub-slice. A tile with at least twice `n_cells`
    cells is cut into equal parts in file order and not by place, so the result depends on the
    order of the rows, and a part has 1 to ``2 n_cells - 1`` cells.

    DISCREPANCY: cells that rounding puts beyond the last tile get lost in the published code;
    here they belong to the last tile. A slice of zero width or height, where the published code
    divides by zero, is cut along its other side.

    Parameters
    ----------
    coordinates
        (n, 2) normalised coordinates in file order.
    n_cells
        Number of cells aimed at.

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
    n_columns = int(width / side) + 1
    n_rows = int(height // side) + 1
    tile = _tile(coordinates[:, 0], low[0], side, n_columns) * n_rows
    tile += _tile(coordinates[:, 1], low[1], side, n_rows)

    by_tile = np.argsort(tile, kind="stable")
    ends = np.flatnonzero(np.diff(tile[by_tile])) + 1
    parts: list[NDArray[np.int64]] = []
    for rows in np.split(by_tile, ends):
        parts.extend(np.array_split(rows, max(1, len(rows) // n_cells)))
    return parts


def _tile(values: NDArray[np.float64], low: float, side: float, n_tiles: int) -> NDArray[np.int64]:
    """Number of the half-open tile ``[low + i side, low + (i + 1) side)`` of each value."""
    # Compared with the edges as the rule states them: dividing by `side` rounds differently.
    edges = low + np.arange(1, n_tiles) * side
    return np.searchsorted(edges, values, side="right")
