"""Coordinates of one slice: the model's frame, and an order that does not depend on the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Length of a slice's bounding-box diagonal in the model's frame.
MODEL_DIAGONAL = 100.0
#: Neighbours of a cell in a hexagonal lattice.
_N_AROUND = 6


def normalize_coordinates(coordinates: NDArray[np.floating]) -> NDArray[np.float64]:
    """Centre a slice and scale its bounding box's diagonal to 100.

    Parameters
    ----------
    coordinates
        (n_cells, 2), any unit.

    Returns
    -------
    (n_cells, 2) in model units: the bounding box's centre is the origin. Cells that all lie
    at one place come out at the origin.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3; scale of the published code.
    """
    xy = np.asarray(coordinates, dtype=np.float64)
    if len(xy) == 0:
        return xy.reshape(0, 2).copy()
    low, high = xy.min(axis=0), xy.max(axis=0)
    diagonal = float(np.hypot(*(high - low)))
    if diagonal == 0.0:
        return np.zeros_like(xy)
    scaled: NDArray[np.float64] = (xy - (high + low) / 2) / diagonal * MODEL_DIAGONAL
    return scaled


def spacing(coordinates: NDArray[np.floating]) -> float:
    """Typical distance of neighbouring cells: the median distance to the sixth nearest.

    Those of a hexagonal lattice lie exactly so far apart.

    Parameters
    ----------
    coordinates
        (n_cells, 2), any unit.

    Returns
    -------
    The distance; 1 where there is none, as for a single cell, or for cells at one place.
    """
    n_asked = min(_N_AROUND + 1, len(coordinates))
    if n_asked < 2:
        return 1.0
    distances = cKDTree(coordinates).query(coordinates, k=[n_asked])[0]
    return float(np.median(distances)) or 1.0


def canonical_order(
    coordinates: NDArray[np.floating], features: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Order cells by place, and cells at one place by their features.

    Clustering and cutting follow this order, so that they give the same result whatever the
    order of the rows. Only cells alike in place and in every feature keep their file order.

    Parameters
    ----------
    coordinates
        (n_cells, 2).
    features
        (n_cells, d).

    Returns
    -------
    (n_cells,) row numbers.
    """
    x, y = coordinates[:, 0], coordinates[:, 1]
    order = np.lexsort((y, x))
    same = (np.diff(x[order]) == 0) & (np.diff(y[order]) == 0)
    shares_place = np.zeros(len(order), dtype=bool)
    shares_place[1:] |= same
    shares_place[:-1] |= same
    if shares_place.any():
        rows = np.sort(order[shares_place])
        keys = (*features[rows].T[::-1], y[rows], x[rows])
        order[shares_place] = rows[np.lexsort(keys)]
    return order
