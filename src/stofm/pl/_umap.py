"""``stofm.pl.umap``: the embedding in two dimensions, through scanpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._draw import add_key
from stofm.pl._panels import TITLE_SIZE, Layout, finish, make_axes
from stofm.pl._style import NO_VALUE_COLOR, Categories, Values, resolve_color

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._style import Palette

_UMAP: Final = "X_umap"
_SIDE_INCHES: Final = 3.4


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

    The points are drawn by :func:`scanpy.pl.embedding`, with the colours and beside the legends
    of :func:`stofm.pl.spatial`.

    Parameters
    ----------
    adata
        AnnData with ``obsm["X_umap"]``, or SpatialData.
    color
        Column of ``obs``, gene of ``var_names``, or several. None: one plain colour.
    layer
        Layer to read genes from; None: ``X``.
    palette
        Colours of the categories: the name of a colour map ("tab20"), a list or cycler in their
        order, or a colour for each by name. Replaces those in ``uns``.
    cmap, vmin, vmax
        Colour map of values and its ends: a number, a percentile such as ``"p99"``, or None for
        the extreme.
    size
        Area of a point in square points. None: scanpy's, from the number of cells.
    ncols
        Panels side by side.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, as many as there are colours. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write (150 dpi, points as pixels in vector formats).

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
        raise KeyError(_missing_umap(adata))
    keys = [color] if color is None or isinstance(color, str) else list(color)
    colors = [
        resolve_color(adata, key, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax)
        for key in keys
    ]
    axes, is_new = make_axes(ax, len(colors), what=f"{len(colors)} colours")
    layout = Layout(np.array([_SIDE_INCHES, _SIDE_INCHES]), 1, min(ncols, len(colors)))
    sides = []
    for panel_ax, shown in zip(axes, colors, strict=True):
        _draw_embedding(panel_ax, adata.obsm[_UMAP], shown, size)
        panel_ax.set_title(shown.key, fontsize=TITLE_SIZE, pad=4.0)
        rows = np.arange(adata.n_obs)
        sides.append(add_key(panel_ax, shown, rows, title="", height=_SIDE_INCHES))
    if is_new:
        layout.apply([[panel_ax] for panel_ax in axes], sides)
    return finish(axes, show=show, save=save)


def _draw_embedding(
    ax: Axes, places: NDArray[np.floating], color: Categories | Values, size: float | None
) -> None:
    """Have scanpy draw the points, from a table of their own: it changes the one it is given."""
    import anndata as ad
    import scanpy as sc

    names = pd.RangeIndex(len(places)).astype(str)
    table = ad.AnnData(obs=pd.DataFrame(index=names), obsm={_UMAP: np.asarray(places)})
    na_color = NO_VALUE_COLOR
    if isinstance(color, Values):
        table.obs[color.key] = color.values
    elif color.key:
        table.obs[color.key] = pd.Categorical.from_codes(color.codes, list(color.names))
        table.uns[f"{color.key}_colors"] = list(color.colors)
    else:
        na_color = color.colors[0]
    scale = (
        {"cmap": color.cmap, "vmin": color.vmin, "vmax": color.vmax}
        if isinstance(color, Values)
        else {}
    )
    sc.pl.embedding(
        table,
        _UMAP,
        color=color.key or None,
        size=size,
        na_color=na_color,
        frameon=False,
        legend_loc="none",
        colorbar_loc=None,
        ax=ax,
        show=False,
        **scale,
    )
    for points in ax.collections:
        points.set_rasterized(True)


def _missing_umap(adata: AnnData) -> str:
    steps = [
        f"sc.pp.neighbors(adata, use_rep='{Obsm.X}')",
        "sc.tl.umap(adata)",
    ]
    if Obsm.X not in adata.obsm:
        steps.insert(0, "st.tl.embed(adata)")
    return f"obsm['{_UMAP}'] is missing: call {'; '.join(steps)} first."
