"""``stofm.pl.influence`` and ``stofm.pl.attention``: who changes whom, and who is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import Bbox

from stofm._edge.tables import resolve_table
from stofm._keys import Obsm, Obsp
from stofm._messages import require_name
from stofm.pl._colors import Values
from stofm.pl._maps import Look, Panel, draw_cells, draw_maps, read_panels
from stofm.pl._style import FONT_SIZE, arrange, finish, make_axes, root_figure, style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

    from stofm.pl._style import Save

_CELL_INCHES: Final = 0.2
_NETWORK_INCHES: Final = 3.2
#: Pairs with a lower false discovery rate are marked, and joined by an arrow.
_RATE: Final = 0.05
#: Arrows of the network at most, those with the highest z.
_MOST_ARROWS: Final = 30
_ARROW_COLOR, _NODE_COLOR = "#b2182b", "#3b4754"
_THIN, _THICK = 0.6, 3.0


def influence(
    data: Any,
    *,
    ax: Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> list[Axes]:
    """Draw which types change which: z of all pairs, and a network of those that stand out.

    In the heat map rows are senders and columns receivers; a dot marks a false discovery rate
    below 0.05, grey a pair with too few cells. In the network an arrow leads from sender to receiver
    of each such pair, up to the 30 with the highest z, and is the wider the higher z.

    Parameters
    ----------
    data
        What :func:`stofm.tl.influence` returns.
    ax
        Two axes to draw into. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write.

    Returns
    -------
    The Axes of heat map and network.

    Raises
    ------
    TypeError
        `data` is something else.
    ValueError
        No pair of types has enough cells, or `ax` does not hold two axes.

    See Also
    --------
    stofm.tl.influence : measures it.
    stofm.pl.attention : what single cells look at.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60, seed=0)
    >>> found = st.tl.influence(adata, groupby="cell_type")
    >>> matrix, network = st.pl.influence(found, show=False)
    """
    pairs = getattr(data, "pairs", None)
    if pairs is None or not {"source", "target", "z", "FDR"} <= set(pairs.columns):
        raise TypeError(f"Expected what st.tl.influence returns, found {type(data).__name__}.")
    if pairs.empty:
        raise ValueError("No pair of types has enough cells; raise `n_max` of st.tl.influence.")
    names = sorted({*pairs["source"], *pairs["target"]})
    side = max(1.2, _CELL_INCHES * len(names))
    axes, is_new = make_axes(ax, 2, (side, side), what="heat map and network")
    heat, network = axes
    _draw_heat_map(heat, pairs, names)
    if is_new:
        width, height = root_figure(network).get_size_inches()
        network.set_position(Bbox([[0, 0], [_NETWORK_INCHES / width, _NETWORK_INCHES / height]]))
    _draw_network(network, pairs, names)
    if is_new:
        arrange([axes])
    finish(axes, show=show, save=save, name="influence")
    return axes


def _draw_heat_map(ax: Axes, pairs: pd.DataFrame, names: list[str]) -> None:
    place = {name: k for k, name in enumerate(names)}
    rows, columns = (pairs[key].map(place).to_numpy() for key in ("source", "target"))
    z = np.full((len(names), len(names)), np.nan)
    z[rows, columns] = pairs["z"]
    end = float(np.nanmax(np.abs(z), initial=1.0, where=np.isfinite(z)))
    image = ax.imshow(z, cmap="RdBu_r", vmin=-end, vmax=end)
    ax.set_facecolor("#d9d9d9")
    is_marked = (pairs["FDR"] < _RATE).to_numpy()
    ax.plot(columns[is_marked], rows[is_marked], "o", ms=2.5, color="black")
    style_axes(ax, title="z of the influence", x="receiver", y="sender")
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    bar = root_figure(ax).colorbar(image, cax=ax.inset_axes((1.04, 0.2, 0.04, 0.6)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1.0, length=2, width=0.6)


def _draw_network(ax: Axes, pairs: pd.DataFrame, names: list[str]) -> None:
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    places = dict(zip(names, np.column_stack([np.cos(angles), np.sin(angles)]), strict=True))
    strongest = pairs[(pairs["FDR"] < _RATE) & (pairs["source"] != pairs["target"])]
    strongest = strongest.nlargest(_MOST_ARROWS, "z")
    most = strongest["z"].max()
    for source, target, z in strongest[["source", "target", "z"]].itertuples(index=False):
        arrow = FancyArrowPatch(
            places[source],
            places[target],
            connectionstyle="arc3,rad=0.15",
            arrowstyle="-|>",
            mutation_scale=8.0,
            shrinkA=4.0,
            shrinkB=4.0,
            linewidth=_THIN + (_THICK - _THIN) * z / most,
            color=_ARROW_COLOR,
            alpha=0.7,
        )
        ax.add_patch(arrow)
    for name, (x, y) in places.items():
        ax.plot(x, y, "o", ms=6, color=_NODE_COLOR)
        side = "left" if x > 0.1 else "right" if x < -0.1 else "center"
        ax.text(1.1 * x, 1.1 * y, name, ha=side, va="center", fontsize=FONT_SIZE - 1.0)
    ax.set_xlim(-1.2, 1.2)
    ax.set_ylim(-1.2, 1.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    title = f"FDR < {_RATE}" if len(strongest) else f"no two types with FDR < {_RATE}"
    ax.set_title(title, fontsize=FONT_SIZE + 1.0)


def attention(
    adata: AnnData,
    cells: str | Sequence[str],
    *,
    key: str = Obsp.ATTENTION,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw where the attention of some cells goes, one panel for each.

    A cross marks the receiver; grey cells get none, or less than those that are stored.

    Parameters
    ----------
    adata
        AnnData after :func:`stofm.tl.attention`, or SpatialData.
    cells
        Name of a receiver in ``adata.obs_names``, or several.
    key
        Entry of ``adata.obsp``.
    ax
        Axes to draw into, one per receiver. None: a new figure.

    Returns
    -------
    The Axes, or the list of them if there are several receivers.

    Other Parameters
    ----------------
    library_key, size, ncols, table_key, show, save
        As in :func:`stofm.pl.spatial`.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates.

    Raises
    ------
    KeyError
        There is no attention yet, or no such cell.
    ValueError
        `cells` are of different slices, or `ax` does not fit their number.

    See Also
    --------
    stofm.tl.attention : stores the weights.
    stofm.pl.influence : which types change which.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 100)
    >>> st.tl.attention(adata)
    >>> ax = st.pl.attention(adata, adata.obs_names[0], show=False)
    """
    adata = resolve_table(adata, table_key)
    if key not in adata.obsp:
        raise KeyError(f"There is no obsp[{key!r}]: call st.tl.attention(adata) first.")
    receivers = [cells] if isinstance(cells, str) else list(cells)
    for name in receivers:
        require_name(name, adata.obs_names, f"There is no cell {name!r}.")
    rows = adata.obs_names.get_indexer(receivers)
    panels = read_panels(adata, spatial_key, library_key)
    own = [panel for panel in panels if np.isin(rows, panel.rows).any()]
    if len(own) > 1:
        raise ValueError(
            f"The cells are of {len(own)} slices, {[panel.name for panel in own]}; draw those of "
            "one slice at a time."
        )
    colors = []
    for name, row in zip(receivers, rows, strict=True):
        weights = adata.obsp[key][[row]].tocoo()
        values = np.full(adata.n_obs, np.nan)
        values[weights.col] = weights.data
        colors.append(Values(name, values, 0.0, float(weights.data.max(initial=1e-6)), "viridis"))
    place = dict(zip(receivers, adata.obsm[spatial_key][rows], strict=True))

    def fill(ax: Axes, panel: Panel, color: Values, look: Look) -> None:
        draw_cells(ax, panel, color, look)
        x, y = place[color.key][:2]
        ax.plot(x, y, "x", ms=7, mew=1.6, color="#b2182b", zorder=3)

    look = Look(ax, ncols, size, show, save, "attention")
    titles = [[f"attention of {name}"] for name in receivers]
    return draw_maps(own, colors, look, titles=titles, fill=fill, what="cells")
