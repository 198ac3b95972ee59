"""``stofm.pl.deconvolution`` and ``stofm.pl.imputation``: maps of types and of imputed genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgba_array

from stofm._config import check_one_of
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.pl._colors import (
    NO_VALUE_COLOR,
    Categories,
    Values,
    choose_colors,
    read_frame,
    value_limits,
)
from stofm.pl._gene_prediction import compare_maps
from stofm.pl._maps import Look, add_key, draw_maps, points_per_unit, read_panels
from stofm.pl._tissue import AUTO, Around, open_tissue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._colors import Palette
    from stofm.pl._maps import LegendLoc, Panel
    from stofm.pl._style import Save

Kind = Literal["maps", "pies"]

#: Legend's name of the types that are not chosen.
_OTHERS: Final = "others"
#: Diameter of a pie against the distance between spots.
_PIE_FILL: Final = 0.96
#: By so much proportions in single precision may sum to more than 1.
_ROUNDING: Final = 1e-3
#: Above so many spots in a slice pies are smaller than what the eye resolves on a page.
_MAX_PIES: Final = 4000
#: Smaller parts of a pie could not be seen.
_MIN_SHARE: Final = 0.002
_ARC_POINTS: Final = 33


def deconvolution(
    adata: AnnData,
    *,
    types: str | Sequence[str] | None = None,
    key: str = Obsm.DECONVOLUTION,
    kind: Kind = "maps",
    shared: bool = False,
    palette: Palette | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = 0.0,
    vmax: float | str | None = "p99",
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    spatial_key: str = Obsm.SPATIAL,
    img_key: str | None = AUTO,
    alpha_img: float = 1.0,
    crop_coord: Sequence[float] | None = None,
    outlines: str | None = None,
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
        One colour scale for all maps, so that frequent and rare types can be compared. False:
        each type has its own, so that rare ones can be seen.
    palette
        Colours of the types in pies: the name of a colour map ("tab20"), a list or cycler in the
        order of the DataFrame's columns, or a colour for each by name. None: those in
        ``uns[f"{key}_colors"]``, or the default ones.
    ax
        Axes to draw into, as many as there are panels, type by type. None: a new figure.
    title
        Titles of the panels, type by type. None: types and slices.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    cmap, vmin, vmax
        Colour map of the maps and its ends: a number, a percentile such as ``"p99"``, or None
        for the extreme.
    size
        Area of a point in square points, or of a pie. None: fitted to the distance between
        spots.
    na_color
        Colour of spots without proportions in maps.
    library_key, library_id, spatial_key, img_key, alpha_img, crop_coord, outlines, alpha, legend_loc
        As in :func:`stofm.pl.spatial`; `alpha` is that of maps.
    ncols, microns_per_unit, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The proportions, a type, the coordinates or a slice's column is missing.
    TypeError
        ``obsm[key]`` is no DataFrame.
    ValueError
        `kind` is neither, what pies are to be drawn of are no proportions, or `ax` does not fit
        the number of panels.

    See Also
    --------
    stofm.tl.deconvolve : estimates the proportions.
    stofm.pl.annotation : one type per cell.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(200, 40, technology="visium")
    >>> ax = st.pl.deconvolution(adata, key="proportions", kind="pies", show=False)
    """
    data, adata = adata, resolve_table(adata, table_key)
    check_one_of("kind", kind, get_args(Kind))
    chosen = read_frame(adata, key, types, "deconvolve(adata, head=head)", "type")
    names, values = list(chosen), chosen.to_numpy()
    around = Around(img_key, alpha_img, library_id, crop_coord, microns_per_unit, outlines)
    with open_tissue(data, table_key, spatial_key, library_key, around) as (panels, tissue):
        look = Look(ax, ncols, size, show, save, "deconvolution", tissue, title, legend_loc, alpha)
        if kind == "pies":
            every = read_frame(adata, key, None, "deconvolve(adata, head=head)", "type")
            _require_proportions(every.to_numpy(), key)

            def fill(ax: Axes, panel: Panel, color: Categories, look: Look) -> None:
                _draw_pies(ax, panel, values[panel.rows], color.colors[: len(names)], look.size)

            def legend(ax: Axes, color: Categories, _: str) -> None:
                add_key(ax, color, "")

            color = _color_types(adata, key, list(every), names, palette)
            titles = [[panel.name for panel in panels]]
            return draw_maps(panels, [color], look, titles=titles, fill=fill, key=legend)
        limits = value_limits(values, vmin, vmax) if shared else None
        colors = [
            Values(name, one, *(limits or value_limits(one, vmin, vmax)), cmap, to_hex(na_color))
            for name, one in zip(names, values.T, strict=True)
        ]
        whole = Values("", values, *limits, cmap) if limits else None
        titles = [[panel.titled(name) for panel in panels] for name in names]
        return draw_maps(panels, colors, look, titles=titles, shared=whole, what="types")


def imputation(
    adata: AnnData,
    gene: str | Sequence[str],
    *,
    measured: AnnData | None = None,
    layer: str | None = None,
    key: str = Obsm.IMPUTED,
    shared: bool = False,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw a gene as it was measured beside what was imputed, with their correlation.

    Measured counts are normalised for the picture as :func:`stofm.tl.impute` normalises them, to
    ``log1p(10,000 x count / total)``, with the total over the genes that the head used, which the
    record of `key` names; without a record over the genes of `adata` that were not imputed; over
    all of `measured` if it has none of these. The AnnData stays as it is. The correlation is
    Pearson's over the cells of the panel. A gene that was not measured has its imputed map only.

    Parameters
    ----------
    adata
        AnnData with imputed genes, such as of :func:`stofm.tl.impute`, or SpatialData.
    gene
        Gene among the columns of ``obsm[key]``, or several.
    measured
        AnnData of the same cells, found by ``obs_names``, with the gene's raw counts; cells that
        it lacks are light grey. None: `adata`.
    layer
        Layer of `measured` with raw counts; None: ``X``.
    key
        Entry of ``obsm`` with a DataFrame of imputed genes.
    shared
        One colour scale for both maps of a gene: imputed values vary less than measured ones,
        and look pale in it. False: each map has its own.
    ax
        Axes to draw into, gene by gene, measured first, one for each slice. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    cmap, vmin, vmax, library_key, spatial_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The imputed values, the gene, the layer, the coordinates or a slice's column is missing;
        or `measured` is given and lacks the gene.
    TypeError
        ``obsm[key]`` is no DataFrame.
    ValueError
        The measured values are no raw counts, `measured` has none of the cells or some twice, or
        `ax` does not fit the number of panels.

    See Also
    --------
    stofm.tl.impute : imputes genes.
    stofm.pl.gene_prediction : genes predicted from the image.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> values = np.log1p(adata[:, "GFAP"].X.toarray())
    >>> adata.obsm["stofm_imputed"] = pd.DataFrame(values, adata.obs_names, ["GFAP"])
    >>> measured, imputed = st.pl.imputation(adata, "GFAP", show=False)
    >>> measured.get_title()
    'GFAP, measured'
    """
    adata = resolve_table(adata, table_key)
    imputed = read_frame(adata, key, gene, "impute(adata, head=head)", "gene")
    panels = read_panels(adata, spatial_key, library_key)
    limits: dict[str, Any] = {"shared": shared, "cmap": cmap, "vmin": vmin, "vmax": vmax}
    colors, titles = compare_maps(
        adata, imputed, panels, "imputed", key=key, measured=measured, layer=layer, **limits
    )
    # An even number of columns keeps the two maps of a gene beside each other.
    look = Look(ax, max(2, ncols - ncols % 2), size, show, save, "imputation")
    return draw_maps(panels, colors, look, titles=titles, what=f"maps of {list(imputed)}")


def _require_proportions(values: NDArray[np.float64], key: str) -> None:
    low, high = np.nanmin(values, initial=0.0), np.nanmax(np.nansum(values, axis=1), initial=0.0)
    if low < 0.0 or high > 1.0 + _ROUNDING:
        raise ValueError(
            f"Pies need proportions of at least 0 that sum to 1 at most; obsm[{key!r}] goes down to "
            f"{low:.4g} and sums to {high:.4g} in a row. Draw it with kind='maps'."
        )


def _color_types(
    adata: AnnData, key: str, names: list[str], chosen: list[str], palette: Palette | None
) -> Categories:
    """Colours of the chosen types and, last, of the others; one row of each, for the legend."""
    shades = dict(zip(names, choose_colors(adata, key, tuple(names), palette), strict=True))
    if len(chosen) < len(names):
        shades[_OTHERS] = NO_VALUE_COLOR
        chosen = [*chosen, _OTHERS]
    colors = tuple(shades[name] for name in chosen)
    return Categories(key, tuple(chosen), colors, np.arange(len(chosen)))


def _draw_pies(
    ax: Axes,
    panel: Panel,
    shares: NDArray[np.float64],
    colors: Sequence[str],
    size: float | None,
) -> None:
    """Draw a pie at each place, clockwise from the top; what lacks to 1 is light grey."""
    if len(panel.rows) > _MAX_PIES:
        text = f"{len(panel.rows)} pies are too small to be read; use kind='maps'."
        logger.info("%s", panel.titled(text))
    if size is None:
        # A spot alone gets a pie of a tenth of the panel.
        radius = _PIE_FILL / 2 * (panel.spacing or 0.1 * float((panel.high - panel.low).max()))
    else:
        radius = float(np.sqrt(size)) / 2 / points_per_unit(ax, panel)
    n = len(panel.rows)
    _add_wedges(ax, panel.places, np.zeros(n), np.ones(n), radius, NO_VALUE_COLOR)
    spot, part = np.nonzero(shares > _MIN_SHARE)
    share, stop = shares[spot, part], np.cumsum(shares, axis=1)[spot, part]
    shades = to_rgba_array(list(colors))[part]
    _add_wedges(ax, panel.places[spot], stop - share, stop, radius, shades)


def _add_wedges(
    ax: Axes,
    centers: NDArray[np.float64],
    start: NDArray[np.float64],
    stop: NDArray[np.float64],
    radius: float,
    colors: Any,
) -> None:
    """Draw the parts of pies (n,) from `start` to `stop`, in turns, as polygons."""
    turns = start[:, None] + (stop - start)[:, None] * np.linspace(0.0, 1.0, _ARC_POINTS)
    angles = 2.0 * np.pi * turns
    # The top of the page is at low y.
    arc = centers[:, None] + [radius, -radius] * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    # An edge of the same colour closes the seams that anti-aliasing leaves.
    polygons = PolyCollection(
        list(np.concatenate([centers[:, None], arc], axis=1)), facecolors=colors,
        edgecolors="face", linewidths=0.1, rasterized=True,
    )  # fmt: skip
    ax.add_collection(polygons, autolim=False)
