"""``stofm.pl.deconvolution``: the cell types of spots, as a map of each or as pies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pandas as pd

from stofm._edge.records import frame_names
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.pl._draw import add_key, points_per_unit
from stofm.pl._maps import draw_maps
from stofm.pl._panels import Layout, finish, frame_panel, make_axes
from stofm.pl._pies import draw_pies
from stofm.pl._slices import read_panels
from stofm.pl._style import (
    NO_VALUE_COLOR,
    Categories,
    Values,
    choose_colors,
    nearest_names,
    value_limits,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel
    from stofm.pl._style import Palette

Kind = Literal["maps", "pies"]

#: Legend's name of the types that are not chosen.
_OTHERS: Final = "others"
#: Diameter of a pie against the distance between spots.
_PIE_FILL: Final = 0.96
#: By so much proportions in single precision may sum to more than 1.
_ROUNDING: Final = 1e-3
#: Above so many spots in a slice pies are smaller than what the eye resolves on a page.
_MAX_PIES: Final = 4000


def deconvolution(
    adata: AnnData,
    *,
    types: str | Sequence[str] | None = None,
    key: str = Obsm.DECONVOLUTION,
    kind: Kind = "maps",
    shared: bool = True,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = 0.0,
    vmax: float | str | None = "p99",
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw the proportions of cell types, each type as a map, or a pie at each spot.

    Pies can be read up to a few thousand spots; above 4,000 in a slice they are drawn all the
    same, and a line of the log says so.

    Parameters
    ----------
    adata
        AnnData with proportions, such as of :func:`stofm.tl.deconvolve`, or SpatialData.
    types
        Types to draw, in this order; in pies the others are grey. None: all.
    key
        Entry of ``obsm`` with a DataFrame of types. Maps of ``"stofm_deconvolution_std"`` show
        where the proportions are uncertain.
    kind
        ``"maps"``: one panel per type and slice. ``"pies"``: one panel per slice.
    shared
        One colour scale for all maps, so that frequent and rare types can be told apart. False:
        each type has its own, so that rare ones can be seen.
    palette
        Colours of the types in pies: the name of a colour map ("tab20"), a list or cycler in the
        order of the DataFrame's columns, or a colour for each by name. None: those in
        ``uns[f"{key}_colors"]``, or the default ones.
    cmap, vmin, vmax
        Colour map of the maps and its ends: a number, a percentile such as ``"p99"``, or None
        for the extreme.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with, if any.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    size
        Area of a point in square points, or of a pie. None: fitted to the distance between
        spots.
    ncols
        Panels side by side.
    invert_y
        Let y grow downwards, as in images.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, as many as there are panels, type by type. None: a new figure.
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
        The proportions, a type, the coordinates or a slice's column is missing.
    TypeError
        ``obsm[key]`` is no DataFrame.
    ValueError
        `kind` is neither, what pies are to be drawn of are no proportions, or `ax` does not fit
        the number of panels.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(200, 40, technology="visium")
    >>> ax = st.pl.deconvolution(adata, key="proportions", kind="pies", show=False)
    """
    adata = resolve_table(adata, table_key)
    if kind not in get_args(Kind):
        msg = f"kind must be one of {list(get_args(Kind))}, found {kind!r}."
        raise ValueError(msg)
    proportions = _read(adata, key)
    chosen = _choose(proportions, types, key)
    panels = read_panels(adata, spatial_key, library_key)
    look: dict[str, Any] = {"ncols": ncols, "size": size, "invert_y": invert_y, "ax": ax}
    if kind == "pies":
        _require_proportions(proportions, key)
        color = _color_types(adata, key, proportions, chosen, palette)
        axes = _draw_pies(panels, proportions[chosen].to_numpy(), color, **look)
    else:
        limits = (
            value_limits(proportions[chosen].to_numpy(), vmin, vmax) if shared else (vmin, vmax)
        )
        colors = [_color_map(proportions[[name]], name, cmap, limits) for name in chosen]
        whole = _color_map(proportions[chosen], "", cmap, limits) if shared else None
        titles = [
            [f"{panel.name}: {name}" if panel.name else name for panel in panels] for name in chosen
        ]
        axes = draw_maps(panels, colors, titles=titles, shared=whole, what="types", **look)
    return finish(axes, show=show, save=save)


def _read(adata: AnnData, key: str) -> pd.DataFrame:
    """Read proportions as a DataFrame of floats, its columns named by text."""
    if key not in adata.obsm:
        near = nearest_names(key, adata.obsm)
        msg = (
            f"There is no obsm[{key!r}]: st.tl.deconvolve(adata, head=head) writes it, or pass "
            f"`key`.{near}"
        )
        raise KeyError(msg)
    stored = adata.obsm[key]
    if not isinstance(stored, pd.DataFrame):
        msg = (
            f"obsm[{key!r}] must be a DataFrame with a column for each type, found "
            f"{type(stored).__name__}. Name them: "
            f"pd.DataFrame(adata.obsm[{key!r}], index=adata.obs_names, columns=types)."
        )
        raise TypeError(msg)
    return stored.set_axis(frame_names(adata, key), axis=1).astype(np.float64)


def _choose(proportions: pd.DataFrame, types: str | Sequence[str] | None, key: str) -> list[str]:
    names = list(proportions.columns)
    chosen = names if types is None else [types] if isinstance(types, str) else list(types)
    for name in chosen:
        if name not in names:
            msg = f"obsm[{key!r}] has no type {name!r}.{nearest_names(name, names)}"
            raise KeyError(msg)
    if not chosen:
        msg = f"There are no types to draw; obsm[{key!r}] has {names[:10]}."
        raise ValueError(msg)
    return chosen


def _color_map(
    values: pd.DataFrame, name: str, cmap: str | Colormap, limits: tuple[float | str | None, ...]
) -> Values:
    """Colour of the spots by one type, or the scale that several share."""
    flat = values.to_numpy().ravel()
    return Values(name, flat, *value_limits(flat, *limits), cmap)


def _require_proportions(proportions: pd.DataFrame, key: str) -> None:
    values = proportions.to_numpy()
    low, high = np.nanmin(values, initial=0.0), np.nanmax(np.nansum(values, axis=1), initial=0.0)
    if low < 0.0 or high > 1.0 + _ROUNDING:
        msg = (
            f"Pies need proportions of at least 0 that sum to 1 at most; obsm[{key!r}] goes down to "
            f"{low:.4g} and sums to {high:.4g} in a row. Draw it with kind='maps'."
        )
        raise ValueError(msg)


def _color_types(
    adata: AnnData,
    key: str,
    proportions: pd.DataFrame,
    chosen: list[str],
    palette: Palette | None,
) -> Categories:
    """Colours of the chosen types and, last, of the others; one row of each, for the legend."""
    names = tuple(proportions.columns)
    shades = dict(zip(names, choose_colors(adata, key, names, palette), strict=True))
    if len(chosen) < len(names):
        shades[_OTHERS] = NO_VALUE_COLOR
        chosen = [*chosen, _OTHERS]
    colors = tuple(shades[name] for name in chosen)
    return Categories(key, tuple(chosen), colors, np.arange(len(chosen)))


def _draw_pies(
    panels: list[Panel],
    shares: NDArray[np.float64],
    color: Categories,
    *,
    ncols: int,
    size: float | None,
    invert_y: bool,
    ax: Axes | Sequence[Axes] | None,
) -> list[Axes]:
    axes, is_new = make_axes(ax, len(panels), what=f"{len(panels)} slices")
    for panel_ax, panel in zip(axes, panels, strict=True):
        frame_panel(panel_ax, panel, title=panel.name, invert_y=invert_y)
    layout = Layout.plan(panels, 1, ncols)
    side = add_key(
        axes[layout.n_columns - 1], color, np.arange(len(color.names)), title="",
        height=layout.block_height(len(panels)),
    )  # fmt: skip
    if is_new:
        layout.apply([axes], [side])
    for panel_ax, panel in zip(axes, panels, strict=True):
        if len(panel.rows) > _MAX_PIES:
            logger.info(
                "%d pies%s are too small to be read; kind='maps' shows as many spots.",
                len(panel.rows),
                f" of {panel.name!r}" if panel.name else "",
            )
        if size is None:
            # A spot alone gets a pie of a tenth of the panel.
            radius = _PIE_FILL / 2 * (panel.spacing or 0.1 * float((panel.high - panel.low).max()))
        else:
            radius = float(np.sqrt(size)) / 2 / points_per_unit(panel_ax, panel)
        part = shares[panel.rows]
        colors = color.colors[: part.shape[1]]
        draw_pies(panel_ax, panel.places, part, colors, radius=radius)
    return axes
