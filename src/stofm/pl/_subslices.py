"""``stofm.pl.subslices`` and ``stofm.pl.virtual_cells``: what ``pp.subslice`` makes of slices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import matplotlib.patheffects as effects
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgba_array
from scipy.spatial import ConvexHull, QhullError, cKDTree

from stofm._edge.colors import distinct_colors
from stofm._edge.tables import read_record, resolve_table
from stofm._keys import Obs, Obsm, Uns
from stofm.pl._colors import Categories, color_categories, stored_colors
from stofm.pl._maps import Look, add_legend, dot, draw_cells, draw_maps, read_panels, round_below
from stofm.pl._style import FONT_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from pandas.core.groupby import DataFrameGroupBy

    from stofm.pl._maps import Panel
    from stofm.pl._style import Save

#: Muted colours (ColorBrewer Set2); a map in the plane rarely needs more than five.
_MUTED: Final = ("#66c2a5", "#fc8d62", "#8da0cb", "#e78ac3", "#a6d854", "#ffd92f", "#e5c494")
_LINE_COLOR, _EDGE_COLOR = "#404040", "#303030"
_NEIGHBORS: Final = 8
_MAX_LABELLED, _MAX_NUMBERED = 40, 30
_WHITE_SHARE: Final = 0.6
#: Square points that all markers of a slice share, and the largest and smallest marker.
_TOTAL_AREA, _MAX_AREA, _MIN_AREA = 6000.0, 400.0, 40.0


def subslices(
    adata: AnnData,
    *,
    library_key: str | None = None,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw the cells in colours that tell neighbouring sub-slices apart, one panel per slice.

    A few colours are used again and again; cells of one colour that do not touch belong to
    different sub-slices. Lines are convex hulls; up to 40 sub-slices of a slice have their number of
    cells written on them.

    Parameters
    ----------
    adata
        AnnData after :func:`stofm.pp.subslice`, or SpatialData.
    ax
        Axes to draw into, one per slice. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several slices.

    Other Parameters
    ----------------
    library_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The slices have not been cut yet, or with other cells; or `library_key` is missing.
    ValueError
        `ax` does not fit the number of slices.

    See Also
    --------
    stofm.pp.subslice : cuts slices.
    stofm.pl.virtual_cells : what lies outside of a sub-slice.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)
    >>> ax = st.pl.subslices(adata, show=False)
    """
    adata = resolve_table(adata, table_key)
    codes = _layout_codes(adata, Obs.SUBSLICE, library_key)
    panels = read_panels(adata, Obsm.COORDINATES, library_key)
    titles = [_counted(panel, _by_code(codes, panel).ngroups, "sub-slice") for panel in panels]

    def fill(ax: Axes, panel: Panel, color: Categories, look: Look) -> None:
        draw_cells(ax, panel, color, look)
        parts = [part.to_numpy() for _, part in _by_code(codes, panel)]
        _draw_outlines(ax, parts)
        if len(parts) <= _MAX_LABELLED:
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
            for places in parts:
                x, y = (places.min(axis=0) + places.max(axis=0)) / 2
                _write(ax, x, y, f"{len(places):,}", FONT_SIZE, bbox=box)

    colors = [_color_subslices(codes, panels)]
    look = Look(ax, ncols, size, show, save, "subslices")
    return draw_maps(panels, colors, look, titles=[titles], fill=fill)


def _layout_codes(adata: AnnData, key: str, library_key: str | None) -> NDArray[np.int64]:
    """Read the sub-slice or virtual cell of each cell: (n_obs,) category codes, -1 for none.

    Without a `library_key`, the record that would name it must be of these cells: there are more
    where slices were joined.
    """
    n_made: Any = (read_record(adata, Uns.SUBSLICE) or {}).get("n_cells")
    record = f"uns['{Uns.STOFM}']['{Uns.SUBSLICE}']"
    needed = {
        f"obs['{key}']": key in adata.obs,
        f"obsm['{Obsm.COORDINATES}']": Obsm.COORDINATES in adata.obsm,
        record: library_key is not None or n_made is not None,
    }
    if missing := [name for name, is_there in needed.items() if not is_there]:
        raise KeyError(
            f"{missing[0]} is missing: call st.tl.embed(adata) or st.pp.subslice(adata) first."
        )
    if library_key is None and adata.n_obs > np.sum(n_made):
        raise KeyError(
            f"{record} is of other cells: of {np.sum(n_made)}; here are {adata.n_obs}. If slices "
            "were joined, pass the column of obs that names them as library_key."
        )
    return np.asarray(adata.obs[key].astype("category").cat.codes, dtype=np.int64)


def _by_code(codes: NDArray[np.int64], panel: Panel) -> DataFrameGroupBy:
    """Places of the cells of each sub-slice or virtual cell."""
    return pd.DataFrame(panel.places, columns=["x", "y"]).groupby(codes[panel.rows])


def _counted(panel: Panel, n_parts: int, what: str) -> str:
    return panel.titled(f"{n_parts} {what}{'' if n_parts == 1 else 's'}")


def _write(ax: Axes, x: float, y: float, text: str, size: float, **options: Any) -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=size, zorder=4, **options)


def _color_subslices(codes: NDArray[np.int64], panels: list[Panel]) -> Categories:
    """A few colours that differ between sub-slices that touch."""
    import igraph

    color = np.zeros(len(codes), dtype=np.int64)
    for panel in panels:
        names, own = np.unique(codes[panel.rows], return_inverse=True)
        # Two touch if a cell of one is among the nearest of a cell of the other.
        k = min(_NEIGHBORS + 1, len(own))
        nearest = cKDTree(panel.places).query(panel.places, k=np.arange(1, k + 1))[1]
        pairs = np.unique(np.stack([np.repeat(own, k), own[nearest].ravel()], axis=1), axis=0)
        graph = igraph.Graph(len(names), pairs.tolist()).simplify()
        color[panel.rows] = np.array(graph.vertex_coloring_greedy("dsatur"))[own]
    n_colors = int(color.max()) + 1
    colors = _MUTED[:n_colors] if n_colors <= len(_MUTED) else distinct_colors(n_colors)
    return Categories("", ("",) * n_colors, colors, color)


def _draw_outlines(ax: Axes, parts: list[NDArray[np.float64]]) -> None:
    for places in parts:
        try:
            corners = places[ConvexHull(places).vertices]
        except (QhullError, ValueError):
            # Fewer than three cells, or cells on a line, have no hull.
            continue
        ax.fill(*corners.T, fill=False, edgecolor=_LINE_COLOR, linewidth=0.7)


def virtual_cells(
    adata: AnnData,
    *,
    library_key: str | None = None,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw each slice's cells in pale colours and its virtual cells on top, one panel per slice.

    A cell has the colour of its virtual cell; a virtual cell's marker lies at the mean position of
    its cells, and its area stands for their number. Up to 30 of a slice are numbered. Colours are kept in
    ``uns["stofm_virtual_cell_colors"]``.

    Parameters
    ----------
    adata
        AnnData after :func:`stofm.pp.subslice`, or SpatialData.
    ax
        Axes to draw into, one per slice. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several slices.

    Other Parameters
    ----------------
    library_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        There are no virtual cells yet, or they were made with other cells; or `library_key` is
        missing.
    ValueError
        `ax` does not fit the number of slices.

    See Also
    --------
    stofm.pp.subslice : finds virtual cells.
    stofm.pl.subslices : the parts that see them.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)
    >>> ax = st.pl.virtual_cells(adata, show=False)
    """
    adata = resolve_table(adata, table_key)
    codes = _layout_codes(adata, Obs.VIRTUAL_CELL, library_key)
    panels = read_panels(adata, Obsm.COORDINATES, library_key)
    color = _color_virtual_cells(adata, codes, panels)
    groups = {panel.name: _group(panel, color) for panel in panels}
    titles = [_counted(panel, len(groups[panel.name]), "virtual cell") for panel in panels]
    most = max([1, *(n for group in groups.values() for n in group["n"])])
    largest = max([1, *(group["n"].sum() for group in groups.values())])
    # Square points of a marker per cell, the same in all panels.
    scale = min(_MAX_AREA / most, _TOTAL_AREA / largest)
    white = (1.0 - _WHITE_SHARE) * to_rgba_array(color.colors)[:, :3] + _WHITE_SHARE
    pale = replace(color, colors=tuple(to_hex(shade) for shade in white))

    def fill(ax: Axes, panel: Panel, pale: Categories, look: Look) -> None:
        draw_cells(ax, panel, pale, look)
        # Large ones first, so that none hides a smaller one.
        group = groups[panel.name].sort_values("n", ascending=False, kind="stable")
        areas = np.maximum(group["n"] * scale, _MIN_AREA)
        shades = [color.colors[code] for code in group.index]
        line: dict[str, Any] = {"edgecolors": _EDGE_COLOR, "linewidths": 0.7, "zorder": 3}
        ax.scatter(group["x"], group["y"], s=areas, c=shades, **line)
        if len(group) <= _MAX_NUMBERED:
            halo = [effects.withStroke(linewidth=1.8, foreground="white")]
            for code, x, y, _ in groups[panel.name].itertuples():
                _write(ax, x, y, color.names[code], FONT_SIZE - 1.5, path_effects=halo)

    def key(ax: Axes, *_: object) -> None:
        sizes = sorted({max(1, int(round_below(most / share))) for share in (1, 2, 5)})
        edge: dict[str, Any] = {"color": "white", "mec": _EDGE_COLOR, "mew": 0.7}
        handles = [dot(float(np.sqrt(max(n * scale, _MIN_AREA))), **edge) for n in sizes]
        names = [f"{n:,}" for n in sizes]
        add_legend(ax, handles, names, title="cells", labelspacing=1.0, handletextpad=0.8)

    look = Look(ax, ncols, size, show, save, "virtual_cells")
    return draw_maps(panels, [pale], look, titles=[titles], fill=fill, key=key)


def _color_virtual_cells(
    adata: AnnData, codes: NDArray[np.int64], panels: list[Panel]
) -> Categories:
    """Use the stored colours, or give the virtual cells of each slice a palette of their own."""
    n_colors = len(adata.obs[Obs.VIRTUAL_CELL].cat.categories)
    if stored_colors(adata, Obs.VIRTUAL_CELL, n_colors):
        return color_categories(adata, Obs.VIRTUAL_CELL)
    palette = np.full(n_colors, "#000000")
    for panel in panels:
        own = np.unique(codes[panel.rows])
        own = own[own >= 0]
        palette[own] = distinct_colors(len(own))
    return color_categories(adata, Obs.VIRTUAL_CELL, palette)


def _group(panel: Panel, color: Categories) -> pd.DataFrame:
    """Mean place and number `n` of cells of a slice's virtual cells, by code."""
    cells = _by_code(color.codes, panel)
    return cells.mean().assign(n=cells.size()).drop(-1, errors="ignore")
