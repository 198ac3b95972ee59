"""``stofm.pl.image``: cells and spots over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.transforms import Affine2D

from stofm._edge.images import in_image_space, open_images
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._maps import Look, Panel, draw_cells, draw_maps, read_panels
from stofm.pl._style import resolve_colors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from stofm._edge.images import SliceImage
    from stofm.pl._style import Palette

#: Pixels of a side of the image, about.
_PIXELS: Final = 1500


def image(
    adata: Any,
    color: str | Sequence[str] | None = None,
    *,
    image: Any = None,
    scale: float | Mapping[str, float] | None = None,
    alpha: float = 0.7,
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
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw cells or spots over the image of the tissue, one panel per slice and colour.

    Shows what lies around the cells of the image, at no more pixels than a page can show.

    Parameters
    ----------
    adata
        AnnData with coordinates and an image in ``uns["spatial"]``, or SpatialData.
    color
        Column of ``obs``, gene of ``var_names``, or several. None: one plain colour.
    image, scale
        Another image, and its pixels per unit of the coordinates: see :func:`stofm.im.embed`.
    alpha
        How opaque points are; 0 shows the tissue alone.
    layer, library_key, spatial_key, palette, cmap, vmin, vmax, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.
    ax
        Axes to draw into, as many as there are panels, colour by colour. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Raises
    ------
    KeyError
        There is no image or no scale factor, or a key or gene is missing.
    ValueError
        Coordinates are not finite, or `ax` does not fit the number of panels.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_olfactory_bulb_st")
    >>> ax = st.pl.image(adata, color="Penk", show=False)
    """
    table, placed = resolve_table(adata, table_key), in_image_space(adata, table_key)
    panels = read_panels(placed, spatial_key, library_key)
    colors = resolve_colors(
        table, color, layer=layer, palette=palette, cmap=cmap, vmin=vmin, vmax=vmax
    )
    names = [panel.name for panel in panels]
    with open_images(adata, placed, names, image=image, scale=scale) as images:
        fill = draw_over_tissue(dict(zip(names, images, strict=True)), alpha)
        look = Look(ax, ncols, size, invert_y=True, show=show, save=save)
        return draw_maps(panels, colors, look, fill=fill, what="colours")


def draw_over_tissue(images: Mapping[str, SliceImage], alpha: float) -> Callable[..., None]:
    """Return a function that fills a panel with its slice's image and cells over it."""

    def fill(ax: Axes, panel: Panel, color: Any, size: float | None) -> None:
        _draw_tissue(ax, panel, images[panel.name])
        draw_cells(ax, panel, color, size)
        ax.collections[-1].set_alpha(alpha)

    return fill


def _draw_tissue(ax: Axes, panel: Panel, image: SliceImage) -> None:
    """Draw the part of the image that a panel shows, where the coordinates have it."""
    (left, bottom), (right, top) = panel.low, panel.high
    corners = image.pixels_of(np.array([[x, y] for x in (left, right) for y in (bottom, top)]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    part, extent = image.slide.overview(low, high, _PIXELS)
    # From pixels to coordinates, which may be turned.
    to_units = Affine2D(np.linalg.inv(np.vstack([image.matrix, [0.0, 0.0, 1.0]])))
    limits = ax.axis()
    ax.imshow(part, extent=extent, transform=to_units + ax.transData, aspect="equal", zorder=-1)
    ax.axis(limits)
