"""``stofm.pl.spatial``: cells in the plane, one panel per slice and colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._draw import add_scale_bar
from stofm.pl._maps import draw_maps
from stofm.pl._panels import finish
from stofm.pl._slices import read_panels
from stofm.pl._style import resolve_color

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from stofm.pl._style import Palette


def spatial(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    microns_per_unit: float | None = None,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw cells or spots where they lie, one panel per slice and colour.

    Panels of one colour share colours and limits, and one legend or colour bar. Slices whose
    cells lie about equally far apart are drawn at one scale, others each at its own. Colours of
    categories are kept in ``uns[f"{color}_colors"]``, as scanpy keeps them, and used again.

    Parameters
    ----------
    adata
        AnnData with coordinates, or SpatialData.
    color
        Column of ``obs``, gene of ``var_names``, or several. None: one plain colour. Cells
        without a value are light grey, "NA" in the legend.
    layer
        Layer to read genes from; None: ``X``.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with (:func:`stofm.pp.subslice`), if any.
    spatial_key
        Entry of ``obsm`` with the coordinates; of three columns the first two are used.
    palette
        Colours of the categories: the name of a colour map ("tab20"), a list or cycler in their
        order, or a colour for each by name. Replaces those in ``uns``.
    cmap, vmin, vmax
        Colour map of values and its ends: a number, a percentile such as ``"p99"`` over all
        panels, or None for the extreme.
    size
        Area of a point in square points. None: fitted to the distance between cells in each
        panel.
    ncols
        Panels side by side.
    invert_y
        Let y grow downwards, as in images and in scanpy and squidpy; False for coordinates with
        y upwards.
    microns_per_unit
        Micrometres of one unit of the coordinates; draws a scale bar below each panel.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, as many as there are panels, colour by colour. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write (150 dpi, points as pixels in vector formats).

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Raises
    ------
    KeyError
        A key or gene is missing; the message names the nearest ones.
    ValueError
        Coordinates are not finite, or `ax` does not fit the number of panels.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> ax = st.pl.spatial(adata, color="cell_type", show=False)
    """
    adata = resolve_table(adata, table_key)
    panels = read_panels(adata, spatial_key, library_key)
    keys = [color] if color is None or isinstance(color, str) else list(color)
    colors = [
        resolve_color(adata, key, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax)
        for key in keys
    ]
    axes = draw_maps(panels, colors, ncols=ncols, size=size, invert_y=invert_y, ax=ax)
    if microns_per_unit is not None:
        for panel_ax in axes:
            add_scale_bar(panel_ax, microns_per_unit)
    return finish(axes, show=show, save=save)
