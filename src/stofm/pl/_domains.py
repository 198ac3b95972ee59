"""``stofm.pl.domains``: regions of tissue with their outlines, beside annotated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from stofm import metrics
from stofm._edge.colors import fill_colors
from stofm._edge.tables import resolve_table
from stofm._keys import Obs, Obsm
from stofm._messages import require_name
from stofm.pl._colors import NO_VALUE_COLOR, Categories, category_names, resolve_colors
from stofm.pl._maps import Look, draw_maps
from stofm.pl._tissue import AUTO, Around, open_tissue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

    from stofm.pl._colors import Categories, Values
    from stofm.pl._maps import LegendLoc
    from stofm.pl._style import Save


def domains(
    adata: AnnData,
    *,
    truth_key: str | None = None,
    key: str = Obs.DOMAIN,
    outlines: bool = True,
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    spatial_key: str = Obsm.SPATIAL,
    img_key: str | None = AUTO,
    alpha_img: float = 1.0,
    crop_coord: Sequence[float] | None = None,
    groups: str | Sequence[str] | None = None,
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
    """Draw domains with their outlines, over the tissue's image if there is one.

    Beside them stand annotated regions, or the domains of another method, if `truth_key` names
    them. A domain then takes the colour of the region that it matches: pairs are chosen so that as
    many cells as can be lie in a region and its domain. Colours are kept in
    ``uns[f"{key}_colors"]``.

    Parameters
    ----------
    adata
        AnnData with domains, such as of :func:`stofm.tl.domains`, or SpatialData.
    truth_key
        Column of ``obs`` with regions to compare with. The title then has the adjusted Rand index
        over the cells that have one.
    key
        Column of ``obs`` with the domains.
    outlines
        Draw lines between domains. They follow the most frequent domain around each cell, so that
        single cells have none. With ``alpha=0`` they lie on the tissue alone.
    title
        Titles of the panels, those of `truth_key` first. None: names of columns and slices.
    ax
        Axes to draw into, one for each slice, regions first. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    library_key, library_id, spatial_key, img_key, alpha_img, crop_coord, groups, na_color, alpha, size
        As in :func:`stofm.pl.spatial`.
    legend_loc, ncols, microns_per_unit, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The domains, the regions, the coordinates or a slice is missing.
    ValueError
        No cell has a region, or `ax` or `title` does not fit the number of panels.

    See Also
    --------
    stofm.tl.domains : finds domains.
    stofm.pl.annotation : learned labels.
    stofm.metrics.ari : the agreement in the title.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60)
    >>> st.tl.domains(adata, n_domains=4)
    >>> regions, domains = st.pl.domains(adata, truth_key="region", show=False)
    """
    data, adata = adata, resolve_table(adata, table_key)
    text = f"There is no obs[{key!r}]: st.tl.domains(adata) writes it."
    require_name(key, adata.obs, text)
    names = category_names(adata.obs[key])
    shown, called = [key], {}
    if truth_key is not None:
        text = f"There is no obs[{truth_key!r}]: pass the column with the regions."
        require_name(truth_key, adata.obs, text)
        shown, truth = [truth_key, key], category_names(adata.obs[truth_key])
        is_known = truth.notna() & names.notna()
        if not is_known.any():
            raise ValueError(f"No cell has both obs[{truth_key!r}] and obs[{key!r}].")
        ari = metrics.ari(truth[is_known].astype(str), names[is_known].astype(str))
        called[key] = f"{key} (ARI {ari:.2f})"
    around = Around(
        img_key, alpha_img, library_id, crop_coord, microns_per_unit, key if outlines else None
    )
    with open_tissue(data, table_key, spatial_key, library_key, around) as (panels, tissue):
        look = Look(ax, ncols, size, show, save, "domains", tissue, title, legend_loc, alpha)
        colors: list[Categories | Values] = []
        palette: dict[str, str] | None = None
        for one in shown:
            in_it = set(category_names(adata.obs[one]).cat.categories)
            own: Any = [group for group in np.atleast_1d(groups or []) if group in in_it] or None
            if own is None and one == key:
                own = groups  # Refused there, with the nearest names.
            if one == key and truth_key is not None:
                palette = _matching_colors(adata, key, colors[0])
            colors += resolve_colors(adata, one, palette=palette, groups=own, na_color=na_color)
        titles = [[panel.titled(called.get(one, one)) for panel in panels] for one in shown]
        return draw_maps(panels, colors, look, titles=titles, what="columns")


def _matching_colors(adata: AnnData, key: str, regions: Any) -> dict[str, str]:
    """Colours of domains: those of the regions that they match, others for the rest."""
    column = category_names(adata.obs[key])
    truth = category_names(adata.obs[regions.key])
    overlap = pd.crosstab(column, truth).reindex(
        index=column.cat.categories, columns=list(regions.names), fill_value=0
    )
    domain, region = linear_sum_assignment(overlap.to_numpy(), maximize=True)
    pairs = [pair for pair in zip(domain, region, strict=True) if overlap.iloc[pair] > 0]
    known = {str(overlap.index[d]): regions.colors[r] for d, r in pairs}
    # A colour of a region that no domain matches stays free of meaning for the others.
    spare = {
        f"region {name}": shade for name, shade in zip(regions.names, regions.colors, strict=True)
    }
    names = list(map(str, column.cat.categories))
    return dict(zip(names, fill_colors(names, {**spare, **known}), strict=True))
