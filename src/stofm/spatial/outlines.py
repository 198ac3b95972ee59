"""Lines between regions of tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import Voronoi

from stofm.spatial.domains import smooth_domains
from stofm.spatial.plane import spacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Neighbours whose most frequent region a cell is drawn with: single cells get no line.
_SMOOTHED: Final = 12
#: Cells that are farther apart have a gap between them, in spacings of the cells.
_FAR: Final = 4.0
#: Distance of the points around, in sizes of the tissue.
_AROUND: Final = 10.0
#: At the margin of the tissue edges go far out: ends that are farther from the middle between two
#: cells than the one, in spacings, are put to the other.
_OVER, _MARGIN = 1.2, 0.6


def region_borders(
    coordinates: NDArray[np.float64], regions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Lines, (n_lines, 2, 2), between neighbouring cells of different regions.

    They are the edges between such cells of the Voronoi diagram of `coordinates`, (n_cells, 2), in
    its unit, and none is longer than the gap that separates pieces of tissue. `regions`, (n_cells,), are
    numbers, -1 for none; first each cell takes the most frequent one around it.
    """
    none = np.empty((0, 2, 2))
    if len(coordinates) < 4:
        return none
    whole = [np.arange(len(coordinates))]
    places = coordinates - coordinates.mean(axis=0)
    smooth = smooth_domains(regions + 1, places, places, whole, min(_SMOOTHED, len(places) - 1))
    if np.linalg.matrix_rank(places) < 2:
        return none  # All cells lie on a line.
    # With points far around them, edges at the margin of the tissue have two ends.
    around = _AROUND * np.ptp(places, axis=0).max() * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    found = Voronoi(np.concatenate([places, around]))
    pairs, ends = found.ridge_points, np.asarray(found.ridge_vertices)
    is_inner = (pairs < len(places)).all(axis=1)
    pairs, ends = pairs[is_inner], ends[is_inner]
    reach = _FAR * spacing(places)
    middles = places[pairs].mean(axis=1)
    is_near = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1) <= reach
    is_border = (smooth[pairs[:, 0]] != smooth[pairs[:, 1]]) & is_near & (ends >= 0).all(axis=1)
    lines, middles = found.vertices[ends[is_border]], middles[is_border, None]
    ways = lines - middles
    lengths = np.linalg.norm(ways, axis=2, keepdims=True) / (reach / _FAR)
    is_out = lengths > _OVER
    lines = middles + ways * np.where(is_out, _MARGIN / np.where(is_out, lengths, 1.0), 1.0)
    return np.asarray(lines + coordinates.mean(axis=0))
