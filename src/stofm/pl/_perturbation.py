"""``stofm.pl.perturbation``: how far an edit moves cells, in the tissue and by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.pl._colors import Categories, Values, value_limits
from stofm.pl._maps import Look, draw_maps, read_panels
from stofm.pl._style import style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from stofm.pl._style import Save

_ROLES: Final = {
    "edited": "#d1495b",
    "neighbor": "#edae49",
    "far": "#7fb3d5",
    "out_of_reach": "#d9d9d9",
    "not_in_input": "#8d6a9f",
    "removed": "#2b2b2b",
}
_LABELS: Final = {
    "l2": "shift (log10 of L2)",
    "cosine": "shift (log10 of cosine)",
    "towards": "shift towards the goal",
}
_POINT_COLOR, _LINE_COLOR = "#9aa7b5", "#2a7f62"
_CHART_INCHES: Final = (3.0, 2.4)
_N_BINS: Final = 12
#: Cells of the chart that are drawn as points.
_MOST_POINTS: Final = 5_000


def perturbation(
    adata: Any,
    effect: Any,
    *,
    shift: Literal["l2", "cosine", "towards"] = "l2",
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    cmap: str | Colormap | None = None,
    vmin: float | str | None = "p1",
    vmax: float | str | None = "p99",
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw who was edited, how far each cell moved, and how that falls with distance.

    Maps of the roles and of the shift, one each per slice, and a chart of the shift of cells that were
    not edited by their distance to the nearest edited one: each cell, and the median with the quarters
    around it. Shifts are sensitivities of a model, not sizes of a biological effect.

    Parameters
    ----------
    adata
        The AnnData or SpatialData that was edited.
    effect
        What :func:`stofm.tl.perturb` returned.
    shift
        ``"l2"`` and ``"cosine"`` on a logarithmic scale, cells that do not move in grey; or
        ``"towards"``, the approach to the goal, if there was one.
    ax
        Axes to draw into: twice as many as slices, and one. None: a new figure.

    Returns
    -------
    The list of the Axes: roles, shifts, chart.

    Other Parameters
    ----------------
    cmap, vmin, vmax
        Colour map of the shift and its ends: a number, a percentile such as ``"p99"``, or None for the
        extreme. None for the colour map: ``"viridis"``, or ``"RdBu_r"`` around 0 for ``"towards"``.
    library_key, spatial_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        There is no such shift, or coordinates are missing.
    ValueError
        The effect is of other cells.

    See Also
    --------
    stofm.tl.perturb : edits cells and measures the effect.
    stofm.tl.screen : many genes, one by one.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60, seed=0)
    >>> effect = st.tl.perturb(adata, remove=True, cells=adata.obs_names[:9], null=0)
    >>> axes = st.pl.perturbation(adata, effect, show=False)
    """
    adata = resolve_table(adata, table_key)
    cells = effect.cells
    if not cells.index.equals(adata.obs_names):
        raise ValueError(
            f"The effect is of {len(cells)} cells that are not those of adata ({adata.n_obs}), or "
            "stand in another order: pass the table that was given to st.tl.perturb."
        )
    if shift not in cells or shift not in _LABELS:
        there = [name for name in _LABELS if name in cells]
        raise KeyError(f"The effect has no shift {shift!r}; it has {there}.")
    values = _scaled(cells[shift], shift)
    low, high = value_limits(values, vmin, vmax)
    if shift == "towards":
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
        cmap = cmap or "RdBu_r"
    role = cells["role"]
    names = tuple(str(name) for name in role.cat.categories)
    colors = [
        Categories(
            "role", names, tuple(map(_ROLES.__getitem__, names)), role.cat.codes.to_numpy(int)
        ),
        Values(_LABELS[shift], values, low, high, cmap or "viridis"),
    ]
    look = Look(ax, ncols, size, show, save, "perturbation")
    return draw_maps(
        read_panels(adata, spatial_key, library_key),
        colors,
        look,
        others=[lambda chart: _draw_decay(chart, cells, shift)],
        what="maps",
    )


def _scaled(column: pd.Series, shift: str) -> NDArray[np.float64]:
    """What is drawn of a shift; NaN for cells that do not move, where the scale is logarithmic."""
    values = np.asarray(column, dtype=np.float64)
    if shift == "towards":
        return values
    found = np.full(len(values), np.nan)
    np.log10(values, out=found, where=values > 0)
    return found


def _draw_decay(ax: Axes, cells: pd.DataFrame, shift: str) -> tuple[float, float]:
    """Chart of the shift by distance, of cells that were not edited."""
    distance = cells["distance"].to_numpy()
    values = cells[shift].to_numpy(dtype=np.float64)
    is_drawn = cells["role"].isin(["neighbor", "far"]).to_numpy() & np.isfinite(values)
    if shift != "towards":
        is_drawn &= values > 0
        ax.set_yscale("log")
    x, y = distance[is_drawn], values[is_drawn]
    step = max(1, len(x) // _MOST_POINTS)
    ax.scatter(
        x[::step], y[::step], s=2.0, c=_POINT_COLOR, alpha=0.4, linewidths=0, rasterized=True
    )
    n_bins = min(_N_BINS, len(x) // 8)
    if n_bins:
        parts = np.array_split(np.argsort(x, kind="stable"), n_bins)
        middles = [float(np.median(x[part])) for part in parts]
        low, middle, high = np.array([np.quantile(y[part], [0.25, 0.5, 0.75]) for part in parts]).T
        ax.fill_between(middles, low, high, color=_LINE_COLOR, alpha=0.25, linewidth=0)
        ax.plot(middles, middle, color=_LINE_COLOR, linewidth=1.4)
    label = {"l2": "shift (L2)", "cosine": "shift (cosine)"}.get(shift, _LABELS[shift])
    style_axes(
        ax, title="Cells that were not edited", x="distance to the nearest edited cell", y=label
    )
    return _CHART_INCHES
