"""``stofm.pl.virtual_cells``: the virtual cells over the cells that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.lines import Line2D

from stofm._edge.tables import resolve_table
from stofm._keys import Obs, Obsm
from stofm.pl._draw import (
    FONT_SIZE,
    LEGEND_STYLE,
    draw_cells,
    legend_width,
    marker_area,
    round_below,
)
from stofm.pl._panels import Layout, finish, frame_panel, make_axes
from stofm.pl._slices import layout_codes, read_panels
from stofm.pl._style import (
    Categories,
    distinct_colors,
    mix_with_white,
    resolve_color,
    stored_colors,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel

_WHITE_SHARE: Final = 0.6
_MAX_NUMBERED: Final = 30
#: Square points that all markers of a slice share, and the largest and smallest marker.
_TOTAL_AREA: Final = 6000.0
_MAX_AREA: Final = 400.0
_MIN_AREA: Final = 40.0
_EDGE_COLOR: Final = "#303030"


def virtual_cells(
    adata: AnnData,
    *,
    library_key: str | None = None,
    labels: bool | None = None,
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw each slice's cells in pale colours and its virtual cells on top, one panel per slice.

    A cell has the colour of its virtual cell; a virtual cell's marker lies at the mean place of
    its cells, and its area stands for their number. Colours are kept in
    ``uns["stofm_virtual_cell_colors"]``.

    Parameters
    ----------
    adata
        AnnData after :func:`stofm.pp.subslice`, or SpatialData.
    library_key
        Column of ``obs`` that separates slices. None: the one that the virtual cells were made
        with, if any.
    labels
        Write the number of each virtual cell. None: where a slice has at most 30.
    size
        Area of a cell's point in square points. None: fitted to the distance between cells.
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
        There are no virtual cells yet, or they were made with other cells; or `library_key` is
        missing.
    ValueError
        `ax` does not fit the number of slices.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)  # doctest: +SKIP
    >>> ax = st.pl.virtual_cells(adata)  # doctest: +SKIP
    """
    adata = resolve_table(adata, table_key)
    codes = layout_codes(adata, Obs.VIRTUAL_CELL, library_key)
    panels = read_panels(adata, Obsm.COORDINATES, library_key)
    color = _color_virtual_cells(adata, codes, panels)
    pale = replace(color, colors=tuple(mix_with_white(color.colors, _WHITE_SHARE)))
    groups = [_group(panel, color) for panel in panels]
    axes, is_new = make_axes(ax, len(panels), what=f"{len(panels)} slices")
    for panel_ax, panel, group in zip(axes, panels, groups, strict=True):
        count = f"{len(group.names)} virtual cell{'' if len(group.names) == 1 else 's'}"
        title = f"{panel.name}: {count}" if panel.name else count
        frame_panel(panel_ax, panel, title=title, invert_y=invert_y)
    layout = Layout.plan(panels, 1, ncols)
    area_per_cell = _area_per_cell(groups)
    side = _add_size_legend(axes[layout.n_columns - 1], groups, area_per_cell)
    if is_new:
        layout.apply([axes], [side])
    for panel_ax, panel, group in zip(axes, panels, groups, strict=True):
        area = marker_area(panel_ax, panel) if size is None else size
        draw_cells(panel_ax, panel, pale, area=area)
        _draw_markers(panel_ax, group, area_per_cell)
        if labels or (labels is None and len(group.names) <= _MAX_NUMBERED):
            _write_numbers(panel_ax, group)
    return finish(axes, show=show, save=save)


@dataclass(frozen=True)
class _Group:
    """The virtual cells of one slice: names, colours, places (n, 2), numbers of cells (n,)."""

    names: list[str]
    colors: list[str]
    places: NDArray[np.float64]
    n_cells: NDArray[np.int64]


def _color_virtual_cells(
    adata: AnnData, codes: NDArray[np.int64], panels: list[Panel]
) -> Categories:
    """Use the stored colours, or give the virtual cells of each slice a palette of their own."""
    key = Obs.VIRTUAL_CELL
    n_colors = len(adata.obs[key].cat.categories)
    palette = None
    if stored_colors(adata, key, n_colors) is None:
        palette = ["#000000"] * n_colors
        for panel in panels:
            own = np.unique(codes[panel.rows])
            own = own[own >= 0]
            for code, shade in zip(own, distinct_colors(len(own)), strict=True):
                palette[code] = shade
    color = resolve_color(adata, key, palette=palette)
    assert isinstance(color, Categories)
    return color


def _group(panel: Panel, color: Categories) -> _Group:
    own = color.codes[panel.rows]
    codes, member, n_cells = np.unique(own[own >= 0], return_inverse=True, return_counts=True)
    sums = [
        np.bincount(member, weights=axis, minlength=len(codes)) for axis in panel.places[own >= 0].T
    ]
    return _Group(
        names=[color.names[code] for code in codes],
        colors=[color.colors[code] for code in codes],
        places=np.stack(sums, axis=1) / n_cells[:, None],
        n_cells=n_cells,
    )


def _area_per_cell(groups: list[_Group]) -> float:
    """Square points of a marker per cell, the same in all panels."""
    largest = max(group.n_cells.max(initial=1) for group in groups)
    total = max(group.n_cells.sum() for group in groups)
    return float(min(_MAX_AREA / largest, _TOTAL_AREA / max(total, 1)))


def _marker_areas(
    n_cells: NDArray[np.int64] | list[int], area_per_cell: float
) -> NDArray[np.float64]:
    return np.maximum(np.asarray(n_cells) * area_per_cell, _MIN_AREA)


def _draw_markers(ax: Axes, group: _Group, area_per_cell: float) -> None:
    # Large ones first, so that none hides a smaller one.
    order = np.argsort(-group.n_cells, kind="stable")
    ax.scatter(
        group.places[order, 0],
        group.places[order, 1],
        s=_marker_areas(group.n_cells[order], area_per_cell),
        c=[group.colors[i] for i in order],
        edgecolors=_EDGE_COLOR,
        linewidths=0.7,
        zorder=3,
    )


def _write_numbers(ax: Axes, group: _Group) -> None:
    halo = [effects.withStroke(linewidth=1.8, foreground="white")]
    for name, (x, y) in zip(group.names, group.places, strict=True):
        ax.text(
            x, y, name, ha="center", va="center", fontsize=FONT_SIZE - 1.5, zorder=4,
            path_effects=halo,
        )  # fmt: skip


def _add_size_legend(ax: Axes, groups: list[_Group], area_per_cell: float) -> float:
    """Show what the markers' areas stand for; return the legend's width in inches."""
    largest = max(int(group.n_cells.max(initial=1)) for group in groups)
    sizes = sorted({max(1, int(round_below(largest / share))) for share in (1, 2, 5)})
    handles = [
        Line2D(
            [], [], linestyle="", marker="o", markersize=float(np.sqrt(area)), color="white",
            markeredgecolor=_EDGE_COLOR, markeredgewidth=0.7,
        )
        for area in _marker_areas(sizes, area_per_cell)
    ]  # fmt: skip
    legend = ax.legend(
        handles,
        [f"{size:,}" for size in sizes],
        title="cells",
        labelspacing=1.0,
        **{**LEGEND_STYLE, "handletextpad": 0.8},
    )
    return legend_width(ax, legend)
