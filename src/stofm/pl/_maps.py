"""Maps of slices: which cells a panel shows, and how they, legends and colour bars are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import matplotlib as mpl
import matplotlib.patheffects as effects
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba_array
from matplotlib.lines import Line2D
from scipy.spatial import cKDTree

from stofm._config import check_one_of
from stofm._edge.places import read_coordinates
from stofm._edge.slices import described_column
from stofm._edge.tables import read_record
from stofm._keys import Uns
from stofm._logging import logger
from stofm._messages import require_name
from stofm.pl._colors import NO_VALUE_LABEL, Categories, Values, category_names
from stofm.pl._style import (
    FONT_SIZE,
    TITLE_SIZE,
    arrange,
    finish,
    in_rows,
    make_axes,
    root_figure,
    set_inches,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm.pl._style import Save
    from stofm.pl._tissue import Tissue

#: Slices share a scale if their cells lie about equally far apart (else their units differ), and
#: if none would become tiny.
_MAX_SPACING_RATIO, _MAX_SIZE_RATIO = 1.25, 5.0
_NEIGHBOR, _SAMPLE = 3, 5000
#: Sides of a panel in inches by the number of panels; smaller ones where there are more.
_PANEL_INCHES: Final = {1: 4.2, 2: 3.6, 3: 3.2, 4: 3.0}
_SMALL_INCHES: Final = 2.7
#: Diameter of a point against the distance between cells, and its bounds in points.
_FILL: Final = 0.9
#: The same over an image, which shows between the points.
_FILL_PICTURED: Final = 0.7
_MIN_DIAMETER, _MAX_DIAMETER, _ALONE_DIAMETER = 0.5, 14.0, 9.0
#: Where names of categories stand, as scanpy calls it; None: nowhere.
LegendLoc = Literal["right margin", "on data", "none"]
#: Beside the panel, level with its top, without a frame.
_LEGEND_STYLE: Final[dict[str, Any]] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.02, 1.0),
    "borderaxespad": 0.0,
    "frameon": False,
    "fontsize": FONT_SIZE,
    "title_fontsize": FONT_SIZE,
    "alignment": "left",
    "handletextpad": 0.1,
    "columnspacing": 0.8,
}
_LEGEND_ROW_INCHES, _MIN_LEGEND_ROWS, _MAX_LEGEND_ENTRIES = 0.168, 12, 120
#: So far a legend may reach below its panel.
_BELOW_INCHES: Final = 0.46


@dataclass(frozen=True)
class Panel:
    """The cells of one slice.

    Its `name` ("" if slices are not separated), `rows` of the AnnData, their `places` (n_cells, 2),
    the typical distance between neighbours (0 for a cell alone), and the corners of what is shown.
    """

    name: str
    rows: NDArray[np.int64]
    places: NDArray[np.float64]
    spacing: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def titled(self, text: str) -> str:
        """`text` after the slice's name, if it has one."""
        return f"{self.name}: {text}" if self.name else text


def read_panels(
    adata: AnnData, spatial_key: str, library_key: str | None, placed: AnnData | None = None
) -> list[Panel]:
    """Split the cells into slices.

    Without a `library_key` they are separated by the column that the sub-slices were made with,
    or that the metadata names, if any. `placed` has the coordinates where `adata` has not.
    """
    coordinates = read_coordinates(adata if placed is None else placed, spatial_key)
    members = _members(adata, library_key)
    parts = [coordinates[rows] for rows in members.values()]
    extents = np.array([np.ptp(places, axis=0) for places in parts])
    sizes, spacings = extents.max(axis=1), np.array([_spacing(places) for places in parts])
    if (
        spacings.max() <= _MAX_SPACING_RATIO * spacings.min()
        and sizes.max() <= _MAX_SIZE_RATIO * sizes.min()
    ):
        extents[:] = extents.max(axis=0)
    # A thin slice keeps a visible width.
    halves = np.maximum(extents, 0.1 * extents.max(axis=1, keepdims=True)) / 2
    halves += 0.01 * halves.max(axis=1, keepdims=True) + 0.5 * spacings[:, None]
    halves[halves == 0.0] = 0.5
    centers = [(places.min(axis=0) + places.max(axis=0)) / 2 for places in parts]
    return [
        Panel(name, rows, places, float(spacing), center - half, center + half)
        for (name, rows), places, spacing, center, half in zip(
            members.items(), parts, spacings, centers, halves, strict=True
        )
    ]


def _members(adata: AnnData, library_key: str | None) -> dict[str, NDArray[np.int64]]:
    """Rows of each slice, by name."""
    if library_key is None:
        # As they were embedded, if they were.
        params = (read_record(adata, Uns.SUBSLICE) or {}).get("params")
        library_key = described_column(adata) if params is None else params.get("library_key")
    if not library_key:
        return {"": np.arange(adata.n_obs)}
    require_name(library_key, adata.obs, f"library_key={library_key!r} is not a column of obs.")
    column = category_names(adata.obs[library_key])
    codes = column.cat.codes.to_numpy()
    found = {name: np.flatnonzero(codes == k) for k, name in enumerate(column.cat.categories)}
    found[NO_VALUE_LABEL] = np.flatnonzero(column.isna())
    return {name: rows for name, rows in found.items() if len(rows)}


def _spacing(places: NDArray[np.float64]) -> float:
    """Typical distance between neighbours.

    Of a cell's neighbours the third is taken: on a lattice it is as near as the first, and among
    scattered cells it stands for the mean distance.
    """
    if len(places) == 1:
        return 0.0
    k = min(_NEIGHBOR, len(places) - 1)
    sample = places[:: max(1, len(places) // _SAMPLE)]
    return float(np.median(cKDTree(places).query(sample, k=[k + 1])[0]))


def map_inches(panels: list[Panel], n_panels: int) -> tuple[float, float]:
    """Width and height of each of `n_panels`: of one area, as wide against high as the slices."""
    extents = np.array([panel.high - panel.low for panel in panels])
    root = float(np.sqrt(np.clip(np.median(extents[:, 0] / extents[:, 1]), 0.4, 2.5)))
    side = _PANEL_INCHES.get(n_panels, _SMALL_INCHES)
    return side * root, side / root


def draw_cells(ax: Axes, panel: Panel, color: Categories | Values, look: Look) -> None:
    """Scatter a slice's cells, fitted to their distance unless a size is given.

    High values lie on top, cells without a value or category below. Points stay pixels in a
    vector file.
    """
    if isinstance(color, Categories):
        codes = color.codes[panel.rows]
        order = np.argsort(codes >= 0, kind="stable")
        shades: dict[str, Any] = {"c": to_rgba_array([*color.colors, color.na_color])[codes[order]]}
    else:
        values = color.values[panel.rows]
        order = np.argsort(np.nan_to_num(values, nan=-np.inf), kind="stable")
        shades = {
            "c": values[order],
            "cmap": mpl.colormaps.get_cmap(color.cmap).with_extremes(bad=color.na_color),
            "norm": Normalize(color.vmin, color.vmax),
            "plotnonfinite": True,
        }
    size = look.size
    if size is None:
        fill = _FILL_PICTURED if ax.images else _FILL
        diameter = fill * panel.spacing * points_per_unit(ax, panel)
        diameter = np.clip(diameter, _MIN_DIAMETER, _MAX_DIAMETER)
        size = float(diameter if panel.spacing else _ALONE_DIAMETER) ** 2
    x, y = panel.places[order].T
    drawn: dict[str, Any] = {"s": size, "marker": look.marker, "alpha": look.alpha}
    ax.scatter(x, y, linewidths=0, rasterized=True, **drawn, **shades)


def points_per_unit(ax: Axes, panel: Panel) -> float:
    """Points on the page of one unit of the coordinates."""
    window = ax.get_window_extent()
    width, height = panel.high - panel.low
    return float(min(window.width / width, window.height / height) / root_figure(ax).dpi * 72.0)


def dot(size: float, **options: Any) -> Line2D:
    """A marker for a legend."""
    return Line2D([], [], linestyle="", marker="o", markersize=size, **options)


def add_legend(ax: Axes, handles: list[Line2D], names: Sequence[str], **options: Any) -> None:
    """Put a legend to the right of `ax`."""
    ax.legend(handles, names, **{**_LEGEND_STYLE, **options})


def add_key(ax: Axes, color: Categories | Values, title: str) -> None:
    """Put the legend or colour bar beside `ax`."""
    if isinstance(color, Values):
        _add_colorbar(ax, color, title)
        return
    codes = np.unique(color.codes)
    entries = {color.names[code]: color.colors[code] for code in codes if code >= 0}
    if color.key and len(entries) > _MAX_LEGEND_ENTRIES:
        text = "No legend for %r: %d categories would not be readable."
        logger.info(text, color.key, len(entries))
    if not color.key or len(entries) > _MAX_LEGEND_ENTRIES:
        return
    if -1 in codes:
        entries[color.na_name] = color.na_color
    inches = ax.get_window_extent().height / root_figure(ax).dpi + _BELOW_INCHES
    n_rows = max(_MIN_LEGEND_ROWS, int(inches / _LEGEND_ROW_INCHES) - bool(title))
    handles = [dot(6.0, markeredgewidth=0, color=shade) for shade in entries.values()]
    n_columns = -(-len(entries) // n_rows)
    add_legend(ax, handles, list(entries), title=title or None, ncols=n_columns, labelspacing=0.3)


def _add_colorbar(ax: Axes, color: Values, title: str) -> None:
    finite = color.values[np.isfinite(color.values)]
    beyond = (finite < color.vmin).any() + 2 * (finite > color.vmax).any()
    bar = root_figure(ax).colorbar(
        ScalarMappable(Normalize(color.vmin, color.vmax), color.cmap),
        cax=ax.inset_axes((1.03, 0.15, 0.03, 0.7)),
        extend=("neither", "min", "max", "both")[beyond],
        extendfrac=0.03,
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT_SIZE, length=2, width=0.6)
    text = "\n".join(part for part in (title, color.unit) if part)
    bar.ax.set_title(text, fontsize=FONT_SIZE, loc="left", pad=6.0)


def _write_names(ax: Axes, panel: Panel, color: Categories) -> None:
    """Write the name of each category on the middle of its cells."""
    codes = color.codes[panel.rows]
    halo = [effects.withStroke(linewidth=2.0, foreground="white")]
    for code in np.unique(codes[codes >= 0]):
        x, y = np.median(panel.places[codes == code], axis=0)
        font: dict[str, Any] = {"size": FONT_SIZE, "ha": "center", "va": "center", "zorder": 4}
        ax.text(x, y, color.names[code], path_effects=halo, **font)


class Look(NamedTuple):
    """What the caller says of all maps."""

    ax: Axes | Sequence[Axes] | None
    ncols: int
    size: float | None
    show: bool | None
    save: Save
    #: Function that draws, which names the file.
    name: str
    tissue: Tissue | None = None
    #: Of the maps, colour by colour.
    title: str | Sequence[str] | None = None
    legend_loc: LegendLoc | None = "right margin"
    alpha: float | None = None
    marker: str = "o"
    invert_y: bool = True  # y grows downwards, as in images


def _given_titles(look: Look, n_maps: int, what: str) -> list[str]:
    """The caller's titles of maps, none if there are none; what can't be drawn is refused."""
    check_one_of("legend_loc", look.legend_loc, (*get_args(LegendLoc), None))
    given = [look.title] if isinstance(look.title, str) else list(look.title or ())
    if look.title is not None and len(given) != n_maps:
        raise ValueError(f"{n_maps} titles are needed ({what}), but title holds {len(given)}.")
    return given


def draw_map(
    ax: Axes,
    panel: Panel,
    color: Any,
    title: str,
    look: Look,
    fill: Callable[[Axes, Panel, Any, Look], None],
) -> None:
    """Draw one colour on one slice, between what lies below and above its cells."""
    (left, bottom), (right, top) = panel.low, panel.high
    ax.set_xlim(left, right)
    ax.set_ylim((top, bottom) if look.invert_y else (bottom, top))
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    if look.tissue is not None:
        look.tissue.draw_below(ax, panel)
    fill(ax, panel, color, look)
    if look.tissue is not None:
        look.tissue.draw_above(ax, panel)
    if look.legend_loc == "on data" and isinstance(color, Categories):
        _write_names(ax, panel, color)


def draw_maps(
    panels: list[Panel],
    colors: Sequence[Any],
    look: Look,
    *,
    titles: Sequence[Sequence[str]] | None = None,
    shared: Values | None = None,
    fill: Callable[[Axes, Panel, Any, Look], None] = draw_cells,
    key: Callable[[Axes, Any, str], None] = add_key,
    others: Sequence[Callable[[Axes], tuple[float, float]]] = (),
    what: str = "",
) -> Axes | list[Axes]:
    """Draw each colour on each slice; save, show and return the axes, colour by colour.

    Slices of a colour have rows of their own, and its key stands beside the last panel of the first;
    of a single slice the colours stand side by side. `titles` of a colour are the slices' names, or
    its own if there is one slice. `shared` is the scale that all colours have, for one colour bar.
    `others` draw panels that are no maps, and return their size in inches; they stand below, or beside
    a single slice. `what` is what the colours are, for the message about axes that do not fit.
    """
    n, several = len(panels), len(panels) > 1
    n_maps = n * len(colors)
    what = " x ".join([f"{n} slices"] * several + [f"{len(colors)} {what}"] * bool(what))
    # Where other panels stand beside the maps, these keep their size.
    inches = map_inches(panels, n if others else n_maps)
    given = _given_titles(look, n_maps, what)
    axes, is_new = make_axes(look.ax, n_maps + len(others), inches, what=what, ncols=look.ncols)
    for k, color in enumerate(colors):
        own, names = axes[k * n : (k + 1) * n], [panel.name for panel in panels]
        if titles is not None or not several:
            names = [color.key or panels[0].name] if titles is None else list(titles[k])
        names = given[k * n : (k + 1) * n] if given else names
        for ax, panel, title in zip(own, panels, names, strict=True):
            draw_map(ax, panel, color, title, look, fill)
        is_beside = look.legend_loc == "right margin" or isinstance(color, Values)
        if shared is None and is_beside:
            key(own[min(look.ncols, n) - 1], color, color.key if several else "")
    maps, beside = axes[:n_maps], axes[n_maps:]
    for ax, draw in zip(beside, others, strict=True):
        size = draw(ax)
        if is_new:
            set_inches(ax, *size)
    blocks = in_rows(maps, n) if several else [maps]
    rows = [row for block in blocks for row in in_rows(block, look.ncols)]
    if shared is not None:
        add_key(rows[0][-1], shared, "")
    if is_new:
        below = [[*rows], in_rows(beside, len(others) or 1)]
        arrange(*(grid for grid in (below if several or not others else [[axes]]) if grid))
    return finish(axes, show=look.show, save=look.save, name=look.name)


def round_below(value: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is not above `value`."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))
