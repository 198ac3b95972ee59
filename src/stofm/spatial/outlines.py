"""Lines between regions of tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import QhullError, Voronoi

from stofm.spatial.domains import smooth_domains
from stofm.spatial.plane import spacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Neighbours whose most frequent region a cell is drawn with: single cells get no line.
_SMOOTHED: Final = 12
#: Cells that are farther apart have a gap between them, in spacings of the cells.
_FAR: Final = 4.0
#: At the margin of the tissue a line ends so far from the middle between its cells, in spacings.
_OVER: Final = 1.2


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
    try:
        found = Voronoi(places)
    except QhullError:
        return none  # All cells lie on a line.
    pairs, ends = found.ridge_points, np.asarray(found.ridge_vertices)
    reach = _FAR * spacing(places)
    middles = places[pairs].mean(axis=1)
    is_near = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1) <= reach
    is_border = (smooth[pairs[:, 0]] != smooth[pairs[:, 1]]) & is_near & (ends >= 0).all(axis=1)
    lines, middles = found.vertices[ends[is_border]], middles[is_border, None]
    # At the margin of the tissue the edges go far out.
    ways = lines - middles
    lengths = np.linalg.norm(ways, axis=2, keepdims=True)
    lines = middles + ways * np.minimum(1.0, _OVER * reach / _FAR / np.maximum(lengths, 1e-300))
    return np.asarray(lines + coordinates.mean(axis=0))
