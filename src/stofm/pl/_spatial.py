"""``stofm.pl.spatial`` and ``stofm.pl.umap``: cells in the plane, and in that of the embedding."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from mpl_toolkits.axes_grid1.anchored_artists import (  # type: ignore[import-untyped]
    AnchoredSizeBar,
)

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._maps import Look, Panel, draw_cells, draw_maps, read_panels, round_below
from stofm.pl._style import FONT_SIZE, resolve_colors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from stofm.pl._style import Palette

_UMAP: Final = "X_umap"
#: Square points that all cells of a UMAP share, as in scanpy.
_UMAP_AREA: Final = 120_000


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
    colors = resolve_colors(
        adata, color, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax
    )

    def fill(ax: Axes, panel: Panel, color: Any, size: float | None) -> None:
        draw_cells(ax, panel, color, size)
        if microns_per_unit is not None:
            _add_scale_bar(ax, microns_per_unit)

    look = Look(ax, ncols, size, invert_y, show, save)
    return draw_maps(panels, colors, look, fill=fill, what="colours")


def _add_scale_bar(ax: Axes, microns_per_unit: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel's width."""
    if not microns_per_unit > 0:
        raise ValueError(f"microns_per_unit must be above 0, found {microns_per_unit!r}.")
    x_range = abs(np.diff(ax.get_xlim()).item())
    microns = round_below(0.25 * x_range * microns_per_unit)
    bar = AnchoredSizeBar(
        ax.transData,
        microns / microns_per_unit,
        f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm",
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=ax.transAxes,
        pad=0.0,
        borderpad=0.2,
        sep=2,
        frameon=False,
        size_vertical=0.006 * x_range,
        fontproperties={"size": FONT_SIZE},
    )
    ax.add_artist(bar)


def umap(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the UMAP of the embedding, one panel per colour.

    Points look as in :func:`scanpy.pl.umap`; colours and legends are those of
    :func:`stofm.pl.spatial`.

    Parameters
    ----------
    adata
        AnnData with ``obsm["X_umap"]``, or SpatialData.
    color
        Column of ``obs``, gene of ``var_names``, or several. None: one plain colour.
    layer
        Layer to read genes from; None: ``X``.
    size
        Area of a point in square points. None: scanpy's, from the number of cells.
    ax
        Axes to draw into, as many as there are colours. None: a new figure.
    palette, cmap, vmin, vmax, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Returns
    -------
    The Axes, or the list of them if there are several colours.

    Raises
    ------
    KeyError
        There is no UMAP yet, or a key or gene is missing.
    ValueError
        `ax` does not fit the number of colours.

    Examples
    --------
    >>> import scanpy as sc, stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> sc.pp.neighbors(adata, use_rep="X_stofm")  # doctest: +SKIP
    >>> sc.tl.umap(adata)  # doctest: +SKIP
    >>> ax = st.pl.umap(adata, color="cell_type")  # doctest: +SKIP
    """
    adata = resolve_table(adata, table_key)
    if _UMAP not in adata.obsm:
        steps = f"sc.pp.neighbors(adata, use_rep='{Obsm.X}'); sc.tl.umap(adata)"
        if Obsm.X not in adata.obsm:
            steps = f"st.tl.embed(adata); {steps}"
        raise KeyError(f"obsm['{_UMAP}'] is missing: call {steps} first.")
    colors = resolve_colors(
        adata, color, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax
    )
    places = np.asarray(adata.obsm[_UMAP])[:, :2]
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.05 * (high - low)
    cells = Panel("", np.arange(len(places)), places, 0.0, low - margin, high + margin)
    size = size or _UMAP_AREA / len(places)
    look = Look(ax, ncols, size, invert_y=False, show=show, save=save)
    return draw_maps([cells], colors, look, fill=partial(draw_cells, marker="."), what="colours")
