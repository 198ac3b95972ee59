"""``stofm.pl.describe``: a page for a region, with a map and what it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._messages import require_name
from stofm.pl._colors import NO_VALUE_COLOR, Categories, color_categories
from stofm.pl._maps import Look, draw_cells, draw_map, map_inches, read_panels
from stofm.pl._style import (
    FONT_SIZE,
    TITLE_SIZE,
    arrange,
    finish,
    in_rows,
    make_axes,
    set_inches,
    style_axes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

    from stofm.pl._style import Save

#: Charts of a page: title, list of facts, what is named, its length, and what the axis says.
_CHARTS: Final = (
    ("Composition", "composition", "type", "share", "share of the region"),
    ("Neighbours", "neighbors", "region", "share", "share of contacts with other regions"),
    ("Markers", "markers", "gene", "log2_fold_change", "log2 fold change"),
    ("Gene sets", "gene_sets", "set", "genes", "markers in the set"),
    ("Variable genes within", "spatially_variable_genes", "gene", "morans_i", "Moran's I"),
)
_CHART_WIDTH, _BAR_INCHES, _MOST_BARS, _MOST_LETTERS, _PER_ROW = 1.7, 0.19, 12, 26, 3
_BAR_COLOR, _REGION_COLOR = "#7f8c9b", "#d1495b"


def describe(
    adata: Any,
    description: Any,
    region: str,
    *,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw the page of one region: where it lies, its types, neighbours, markers and patterns.

    Maps, a panel for each slice, show the region in its colour and all other cells in grey; below
    are bars for each list of the description that is not empty, the longest 12 of each.

    Parameters
    ----------
    adata
        AnnData that was described, or SpatialData.
    description
        What :func:`stofm.tl.describe` returned for it.
    region
        Name of the region.
    ax
        Axes to draw into: one for each slice, then one for each list. None: a new figure.

    Returns
    -------
    The Axes, maps first.

    Other Parameters
    ----------------
    library_key, spatial_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The description has no such region, or `adata` not its column.
    ValueError
        `ax` does not fit the number of panels.

    See Also
    --------
    stofm.tl.describe : makes the description.
    stofm.pl.report : an interactive page of a slice.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> description = st.tl.describe(adata, "region", label_key="cell_type")
    >>> axes = st.pl.describe(adata, description, "L1", show=False)
    """
    adata = resolve_table(adata, table_key)
    region = str(region)
    require_name(region, description.regions, f"The description has no region {region!r}.")
    groupby = description.about["groupby"]
    text = f"There is no obs[{groupby!r}], of which the description is."
    require_name(groupby, adata.obs, text)
    panels = read_panels(adata, spatial_key, library_key)
    facts = description.regions[region]
    charts = [chart for chart in _CHARTS if facts[chart[1]]]
    color = _highlight(adata, groupby, region)
    axes, is_new = make_axes(
        ax,
        len(panels) + len(charts),
        map_inches(panels, len(panels)),
        what=f"{len(panels)} slices and {len(charts)} charts",
        ncols=ncols,
    )
    look = Look(ax, ncols, size, show, save, "describe")
    maps, below = axes[: len(panels)], axes[len(panels) :]
    for one, panel in zip(maps, panels, strict=True):
        draw_map(one, panel, color, panel.name, look, draw_cells)
    head = f"region {region}: {facts['n_cells']:,} cells, {facts['share']:.1%}"
    maps[0].set_title(f"{head}\n{panels[0].name}".strip(), fontsize=TITLE_SIZE, pad=4.0)
    for one, (title, name, label, length, axis) in zip(below, charts, strict=True):
        inches = _draw_bars(one, facts[name][:_MOST_BARS], label, length)
        style_axes(one, title=title, x=axis)
        if is_new:
            set_inches(one, *inches)
    if is_new:
        grids = [in_rows(maps, ncols), in_rows(below, _PER_ROW)]
        arrange(*(grid for grid in grids if grid))
    return finish(axes, show=show, save=save, name=look.name)


def _highlight(adata: AnnData, groupby: str, region: str) -> Categories:
    """The region in its colour, all other cells as such without a category."""
    colors = color_categories(adata, groupby)
    number = colors.names.index(region)
    shade = colors.colors[number] if colors.colors[number] != NO_VALUE_COLOR else _REGION_COLOR
    codes = np.where(colors.codes == number, 0, -1)
    return Categories(groupby, (region,), (shade,), codes)


def _draw_bars(
    ax: Axes, rows: Sequence[Mapping[str, Any]], label: str, length: str
) -> tuple[float, float]:
    """Draw a bar for each row, the first on top; return width and height in inches."""
    values = [row[length] if np.isscalar(row[length]) else len(row[length]) for row in rows]
    names = [str(row[label]) for row in rows]
    short = [
        name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…" for name in names
    ]
    places = np.arange(len(rows))
    ax.barh(places, values, height=0.7, color=_BAR_COLOR)
    ax.set_yticks(places, short, fontsize=FONT_SIZE - 1.0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    return _CHART_WIDTH, max(3, len(rows)) * _BAR_INCHES
