"""``stofm.pl.subslices``: how slices are cut into sub-slices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.patches import Polygon
from scipy.spatial import ConvexHull, QhullError, cKDTree

from stofm._edge.tables import resolve_table
from stofm._keys import Obs, Obsm
from stofm.pl._draw import FONT_SIZE, draw_cells, marker_area
from stofm.pl._panels import Layout, finish, frame_panel, make_axes
from stofm.pl._slices import layout_codes, read_panels
from stofm.pl._style import Categories, distinct_colors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel

#: Muted colours (ColorBrewer Set2); a map in the plane rarely needs more than five.
_MUTED: Final = ("#66c2a5", "#fc8d62", "#8da0cb", "#e78ac3", "#a6d854", "#ffd92f", "#e5c494")
_LINE_COLOR: Final = "#404040"
_NEIGHBORS: Final = 8
_MAX_LABELLED: Final = 40


def subslices(
    adata: AnnData,
    *,
    library_key: str | None = None,
    outlines: bool = True,
    labels: bool | None = None,
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the cells in colours that tell neighbouring sub-slices apart, one panel per slice.

    A few colours are used again and again; cells of one colour that do not touch belong to
    different sub-slices.

    Parameters
    ----------
    adata
        AnnData after :func:`stofm.pp.subslice`, or SpatialData.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with, if any.
    outlines
        Draw the convex hull of each sub-slice.
    labels
        Write the number of cells onto each sub-slice. None: where a slice has at most 40.
    size
        Area of a point in square points. None: fitted to the distance between cells.
    ncols
        Panels side by side.
    invert_y
        Let y grow downwards, as in images.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, one per slice. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write (150 dpi, points as pixels in vector formats).

    Returns
    -------
    The Axes, or the list of them if there are several slices.

    Raises
    ------
    KeyError
        The slices have not been cut yet, or with other cells; or `library_key` is missing.
    ValueError
        `ax` does not fit the number of slices.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)  # doctest: +SKIP
    >>> ax = st.pl.subslices(adata)  # doctest: +SKIP
    """
    adata = resolve_table(adata, table_key)
    codes = layout_codes(adata, Obs.SUBSLICE, library_key)
    panels = read_panels(adata, Obsm.COORDINATES, library_key)
    axes, is_new = make_axes(ax, len(panels), what=f"{len(panels)} slices")
    for panel_ax, panel in zip(axes, panels, strict=True):
        n_subslices = len(np.unique(codes[panel.rows]))
        count = f"{n_subslices} sub-slice{'' if n_subslices == 1 else 's'}"
        title = f"{panel.name}: {count}" if panel.name else count
        frame_panel(panel_ax, panel, title=title, invert_y=invert_y)
    if is_new:
        Layout.plan(panels, 1, ncols).apply([axes], [0.0])
    color = _color_subslices(codes, panels)
    for panel_ax, panel in zip(axes, panels, strict=True):
        area = marker_area(panel_ax, panel) if size is None else size
        draw_cells(panel_ax, panel, color, area=area)
        parts = _parts(codes, panel)
        if outlines:
            _draw_outlines(panel_ax, parts)
        if labels or (labels is None and len(parts) <= _MAX_LABELLED):
            _write_sizes(panel_ax, parts)
    return finish(axes, show=show, save=save)


def _color_subslices(codes: NDArray[np.int64], panels: list[Panel]) -> Categories:
    """Give each cell the colour number of its sub-slice."""
    color = np.zeros(len(codes), dtype=np.int64)
    for panel in panels:
        names, own = np.unique(codes[panel.rows], return_inverse=True)
        color[panel.rows] = color_map(_adjacency(panel.places, own, len(names)))[own]
    n_colors = int(color.max()) + 1
    colors = _MUTED[:n_colors] if n_colors <= len(_MUTED) else tuple(distinct_colors(n_colors))
    return Categories("", ("",) * n_colors, colors, color)


def color_map(neighbors: list[set[int]]) -> NDArray[np.int64]:
    """Number the nodes of a graph so that neighbours differ, with few numbers.

    The node with the most different colours around it comes next, and takes the lowest number
    that is free there (Brélaz 1979, DSATUR).

    Parameters
    ----------
    neighbors
        Neighbours of each node.

    Returns
    -------
    (n_nodes,) numbers from 0.
    """
    color = np.full(len(neighbors), -1, dtype=np.int64)
    around: list[set[int]] = [set() for _ in neighbors]
    waiting = set(range(len(neighbors)))
    while waiting:
        node = max(waiting, key=lambda i: (len(around[i]), len(neighbors[i]), -i))
        waiting.remove(node)
        taken = around[node]
        color[node] = next(number for number in range(len(taken) + 1) if number not in taken)
        for other in neighbors[node]:
            around[other].add(int(color[node]))
    return color


def _adjacency(
    places: NDArray[np.float64], part: NDArray[np.int64], n_parts: int
) -> list[set[int]]:
    """Sub-slices that touch: a cell of one is among the nearest of a cell of the other."""
    k = min(_NEIGHBORS + 1, len(places))
    nearest = cKDTree(places).query(places, k=np.arange(1, k + 1))[1]
    pairs = np.stack([np.repeat(part, k), part[nearest].ravel()], axis=1)
    neighbors: list[set[int]] = [set() for _ in range(n_parts)]
    for first, second in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).tolist():
        neighbors[first].add(second)
        neighbors[second].add(first)
    return neighbors


def _parts(codes: NDArray[np.int64], panel: Panel) -> list[NDArray[np.float64]]:
    """Places of each sub-slice's cells."""
    own = codes[panel.rows]
    order = np.argsort(own, kind="stable")
    return np.split(panel.places[order], np.flatnonzero(np.diff(own[order])) + 1)


def _draw_outlines(ax: Axes, parts: list[NDArray[np.float64]]) -> None:
    for places in parts:
        try:
            corners = places[ConvexHull(places).vertices]
        except (QhullError, ValueError):
            # Fewer than three cells, or cells on a line, have no hull.
            continue
        ax.add_patch(
            Polygon(corners, closed=True, fill=False, edgecolor=_LINE_COLOR, linewidth=0.7)
        )


def _write_sizes(ax: Axes, parts: list[NDArray[np.float64]]) -> None:
    for places in parts:
        x, y = (places.min(axis=0) + places.max(axis=0)) / 2
        ax.text(
            x,
            y,
            f"{len(places):,}",
            ha="center",
            va="center",
            fontsize=FONT_SIZE,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )
