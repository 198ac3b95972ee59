"""``stofm.pl.spatial``, ``image`` and ``umap``: cells in the plane, over the tissue, and in a UMAP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._colors import NO_VALUE_COLOR, resolve_colors
from stofm.pl._maps import Look, Panel, draw_maps
from stofm.pl._tissue import AUTO, Around, open_tissue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from stofm.pl._colors import Palette
    from stofm.pl._maps import LegendLoc
    from stofm.pl._style import Save

_UMAP: Final = "X_umap"
#: Square points that all cells of a UMAP share, as in scanpy.
_UMAP_AREA: Final = 120_000


def spatial(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    spatial_key: str = Obsm.SPATIAL,
    img_key: str | None = AUTO,
    alpha_img: float = 1.0,
    crop_coord: Sequence[float] | None = None,
    groups: str | Sequence[str] | None = None,
    outlines: str | None = None,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    na_color: str = NO_VALUE_COLOR,
    alpha: float | None = None,
    size: float | None = None,
    title: str | Sequence[str] | None = None,
    legend_loc: LegendLoc | None = "right margin",
    ncols: int = 4,
    microns_per_unit: float | None = None,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw cells or spots where they lie, over the tissue's image if there is one.

    y grows downwards, as in images and in scanpy and squidpy; ``ax.invert_yaxis()`` turns it.

    There is one panel per slice and colour. Panels of one colour share colours and limits, and one
    legend or colour bar. Slices whose cells lie about equally far apart are drawn at one scale, others
    each at its own. Colours of categories are kept in ``uns[f"{color}_colors"]`` as in scanpy; new ones
    are from thirty that colour-blind readers can tell apart. A scale bar is drawn where the unit of the
    coordinates is known: for Visium from ``uns["spatial"]``, for Xenium and others from
    :func:`stofm.read`. Most calls need `color` and perhaps `library_key`; the rest is looks.

    Parameters
    ----------
    adata
        AnnData with coordinates, or SpatialData.
    color
        Column of ``obs``, gene of ``var_names``, column of a DataFrame in ``obsm`` such as a cell type
        (``"Stromal"``, or ``"stofm_deconvolution:Stromal"`` if several have it), or several. None: one
        plain colour. Cells without a value are light grey, "NA" in the legend.
    layer
        Layer to draw genes from, as it is. None: ``X``, of which raw counts are drawn as
        ``log1p(10,000 x count / total)``; the colour bar says so.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with (:func:`stofm.pp.subslice`), if any.
    library_id
        Slices to draw, in this order. None: all. Where slices are not separated, the entry of
        ``uns["spatial"]`` whose image is drawn.
    groups
        Categories to colour; cells of others look like those without one.
    outlines
        Column of ``obs`` with regions, such as ``"stofm_domain"``, to draw lines between.
    palette
        Colours of the categories: the name of a colour map ("tab20"), a list or cycler in their
        order, or a colour for each by name. Replaces those in ``uns``.
    size
        Area of a point in square points. None: fitted to the distance between cells in each
        panel; smaller over an image, which shows between them.
    title
        Titles of the panels, colour by colour. None: names of the slices or colours.
    legend_loc
        ``"right margin"``, ``"on data"`` for names on the cells, or None for no legend.
    ax
        Axes to draw into, as many as there are panels, colour by colour. None: a new figure.
    save
        File to write (150 dpi unless matplotlib is set otherwise, points as pixels in vector formats).
        True: a file in scanpy's folder of figures (``sc.settings.figdir``), in its format. None: as
        ``sc.settings.autosave`` says.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    spatial_key
        Entry of ``obsm`` with the coordinates; of three columns the first two are used. Images are
        those of ``"spatial"``.
    img_key
        Image of ``uns["spatial"]`` or of the SpatialData: ``"hires"``, ``"lowres"`` or another name.
        ``"auto"``: the larger one, if there is any. None: no image.
    alpha_img
        How opaque the image is.
    crop_coord
        The part to draw: left, right, top and bottom, in coordinates.
    cmap, vmin, vmax
        Colour map of values and its ends: a number, a percentile such as ``"p99"`` over all
        panels, or None for the extreme.
    na_color
        Colour of cells without a category or value.
    alpha
        How opaque points are; 0 shows the tissue alone. None: 1.
    ncols
        Panels side by side.
    microns_per_unit
        Micrometres of one unit of the coordinates, for the scale bar. None: what is known.
    table_key
        Table of a SpatialData.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.

    Raises
    ------
    KeyError
        A key, a gene, a slice or the named image is missing; the message names the nearest ones.
    ValueError
        Coordinates are not finite, no cell lies in `crop_coord`, several DataFrames have the column,
        or `ax` or `title` does not fit the number of panels.

    See Also
    --------
    stofm.pl.image : with an image from a file or an array.
    stofm.pl.domains : regions with their outlines.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_olfactory_bulb_st")
    >>> ax = st.pl.spatial(adata, color="Penk", show=False)
    """
    around = Around(img_key, alpha_img, library_id, crop_coord, microns_per_unit, outlines)
    look = Look(ax, ncols, size, show, save, "spatial", None, title, legend_loc, alpha)
    coloring = {
        "layer": layer, "palette": palette, "cmap": cmap, "vmin": vmin, "vmax": vmax,
        "groups": groups, "na_color": na_color,
    }  # fmt: skip
    return _draw(adata, color, coloring, spatial_key, library_key, table_key, around, look)


def _draw(
    data: Any,
    color: str | Sequence[str] | None,
    coloring: Mapping[str, Any],
    spatial_key: str,
    library_key: str | None,
    table_key: str | None,
    around: Around,
    look: Look,
) -> Axes | list[Axes]:
    with open_tissue(data, table_key, spatial_key, library_key, around) as (panels, tissue):
        colors = resolve_colors(resolve_table(data, table_key), color, **coloring)
        return draw_maps(panels, colors, look._replace(tissue=tissue), what="colours")


def image(
    adata: Any,
    color: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    scale: float | Mapping[str, float] | None = None,
    alpha: float | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw cells or spots over an image of the tissue, which may be a file or an array.

    As :func:`stofm.pl.spatial`, where an image must be there: use it to check an image, and its
    scale, before :func:`stofm.im.embed`.

    Parameters
    ----------
    adata
        AnnData with coordinates, or SpatialData.
    color
        As in :func:`stofm.pl.spatial`.
    image, scale
        An image, and its pixels per unit of the coordinates: see :func:`stofm.im.embed`. None: the
        one in ``uns["spatial"]`` or in the SpatialData.
    ax
        Axes to draw into, as many as there are panels, colour by colour. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    layer, library_key, spatial_key, palette, cmap, vmin, vmax, alpha, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        There is no image or no scale factor, or a key or gene is missing.
    ValueError
        Coordinates are not finite, or `ax` does not fit the number of panels.

    See Also
    --------
    stofm.pl.spatial : the same, with or without an image.
    stofm.im.embed : features of the image.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_olfactory_bulb_st")
    >>> ax = st.pl.image(adata, color="Penk", show=False)
    """
    around = Around(image=image, scale=scale, needs_image=True)
    look = Look(ax, ncols, size, show=show, save=save, name="image", alpha=alpha)
    coloring = {"layer": layer, "palette": palette, "cmap": cmap, "vmin": vmin, "vmax": vmax}
    return _draw(adata, color, coloring, spatial_key, library_key, table_key, around, look)


def umap(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    groups: str | Sequence[str] | None = None,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    na_color: str = NO_VALUE_COLOR,
    alpha: float | None = None,
    size: float | None = None,
    title: str | Sequence[str] | None = None,
    legend_loc: LegendLoc | None = "right margin",
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw the UMAP of the embedding, one panel per colour.

    Points look as in :func:`scanpy.pl.umap`; colours and legends are those of
    :func:`stofm.pl.spatial`.

    Parameters
    ----------
    adata
        AnnData with ``obsm["X_umap"]``, or SpatialData.
    color, layer, groups, palette, title, legend_loc
        As in :func:`stofm.pl.spatial`.
    size
        Area of a point in square points. None: scanpy's, from the number of cells.
    ax
        Axes to draw into, as many as there are colours. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several colours.

    Other Parameters
    ----------------
    cmap, vmin, vmax, na_color, alpha, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        There is no UMAP yet, or a key or gene is missing.
    ValueError
        `ax` does not fit the number of colours.

    See Also
    --------
    scanpy.tl.umap : computes the UMAP.
    stofm.pl.spatial : the same colours in the tissue.

    Examples
    --------
    >>> import scanpy as sc, stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)
    >>> sc.pp.neighbors(adata, use_rep="X_stofm")
    >>> sc.tl.umap(adata)
    >>> ax = st.pl.umap(adata, color="cell_type", show=False)
    """
    adata = resolve_table(adata, table_key)
    if _UMAP not in adata.obsm:
        steps = f"sc.pp.neighbors(adata, use_rep='{Obsm.X}'); sc.tl.umap(adata)"
        if Obsm.X not in adata.obsm:
            steps = f"st.tl.embed(adata); {steps}"
        raise KeyError(f"obsm['{_UMAP}'] is missing: call {steps} first.")
    colors = resolve_colors(
        adata, color, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax,
        groups=groups, na_color=na_color,
    )  # fmt: skip
    places = np.asarray(adata.obsm[_UMAP])[:, :2]
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.05 * (high - low)
    cells = Panel("", np.arange(len(places)), places, 0.0, low - margin, high + margin)
    size = size or _UMAP_AREA / len(places)
    look = Look(
        ax, ncols, size, show, save, "umap", None, title, legend_loc, alpha, ".", invert_y=False
    )
    return draw_maps([cells], colors, look, what="colours")
