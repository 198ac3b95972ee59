"""Pies at the places of spots, as polygons that are made and drawn together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba_array

from stofm.pl._style import NO_VALUE_COLOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

#: Smaller parts of a pie could not be seen.
_MIN_SHARE: Final = 0.002
#: Parts up to these shares of the circle have so many points on their arc.
_ARC_SHARES: Final = (1 / 16, 1 / 4)
_ARC_POINTS: Final = (4, 9, 33)


def draw_pies(
    ax: Axes,
    places: NDArray[np.float64],
    shares: NDArray[np.float64],
    colors: Sequence[str],
    *,
    radius: float,
) -> None:
    """Draw a pie at each place, clockwise from the top; what lacks to 1 is light grey.

    Parameters
    ----------
    places
        (n, 2) centres.
    shares
        (n, k) of each pie, none negative, rows summing to 1 at most.
    radius
        Of a pie, unit of `places`.
    """
    # The top of the page is at low y where y grows downwards.
    scale = np.array([radius, -radius if ax.yaxis_inverted() else radius])
    whole = _wedges(places, np.zeros(len(places)), np.ones(len(places)), _ARC_POINTS[-1], scale)
    _add_polygons(ax, whole, NO_VALUE_COLOR)
    table = to_rgba_array(list(colors))
    ends = np.cumsum(shares, axis=1)
    spot, part = np.nonzero(shares > _MIN_SHARE)
    share, stop = shares[spot, part], ends[spot, part]
    size = np.searchsorted(_ARC_SHARES, share)
    for number, n_points in enumerate(_ARC_POINTS):
        rows = size == number
        start = stop[rows] - share[rows]
        shapes = _wedges(places[spot[rows]], start, stop[rows], n_points, scale)
        _add_polygons(ax, shapes, table[part[rows]])


def _add_polygons(ax: Axes, shapes: NDArray[np.float64], colors: Any) -> None:
    # An edge of the same colour closes the seams that anti-aliasing leaves.
    polygons = PolyCollection(
        list(shapes), facecolors=colors, edgecolors="face", linewidths=0.1, rasterized=True
    )
    ax.add_collection(polygons, autolim=False)


def _wedges(
    centers: NDArray[np.float64],
    start: NDArray[np.float64],
    stop: NDArray[np.float64],
    n_points: int,
    scale: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Corners (n, n_points + 1, 2) of the parts from `start` to `stop`, in turns."""
    turns = start[:, None] + (stop - start)[:, None] * np.linspace(0.0, 1.0, n_points)
    angles = 2.0 * np.pi * turns
    arc = scale * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return np.concatenate([centers[:, None], centers[:, None] + arc], axis=1)
