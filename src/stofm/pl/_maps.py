"""Maps of slices: framed, given legends and colour bars, laid out, and filled with cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba_array
from matplotlib.lines import Line2D
from mpl_toolkits.axes_grid1.anchored_artists import (  # type: ignore[import-untyped]
    AnchoredSizeBar,
)

from stofm._logging import logger
from stofm.pl._colors import NO_VALUE_COLOR, NO_VALUE_LABEL, Categories, Values
from stofm.pl._figure import FONT_SIZE, TITLE_SIZE, Layout, make_axes, root_figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from stofm.pl._panels import Panel

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
_COLORBAR_INCHES: Final = 0.8
_LEGEND_GAP_INCHES: Final = 0.25
_LEGEND_ROW_INCHES: Final = 0.168
_MIN_LEGEND_ROWS: Final = 12
_MAX_LEGEND_ENTRIES: Final = 120
#: Diameter of a point against the distance between cells.
_FILL: Final = 0.9
_MIN_DIAMETER, _MAX_DIAMETER, _ALONE_DIAMETER = 0.5, 14.0, 9.0
_POINTS_PER_INCH: Final = 72.0


@dataclass(frozen=True)
class Look:
    """What the caller says of all maps: columns, area of a point, direction of y, and axes."""

    ncols: int
    size: float | None
    invert_y: bool
    ax: Axes | Sequence[Axes] | None

    def layout(self, panels: list[Panel], n_blocks: int = 1) -> Layout:
        """Choose sizes: panels of one area, as wide against their height as the slices are."""
        extents = np.array([panel.high - panel.low for panel in panels])
        ratio = float(np.clip(np.median(extents[:, 0] / extents[:, 1]), 0.4, 2.5))
        side = {1: 4.2, 2: 3.6, 3: 3.2, 4: 3.0}.get(len(panels) * n_blocks, 2.7)
        size = np.array([side * np.sqrt(ratio), side / np.sqrt(ratio)])
        return Layout(size, len(panels), n_blocks, self.ncols)


def draw_cells(
    ax: Axes, panel: Panel, color: Categories | Values, size: float | None, marker: str = "o"
) -> None:
    """Scatter a slice's cells, fitted to their distance unless a size is given.

    High values lie on top, cells without a value or category below. Points stay pixels in a
    vector file.
    """
    if isinstance(color, Categories):
        codes = color.codes[panel.rows]
        order = np.argsort(codes >= 0, kind="stable")
        look: dict[str, Any] = {"c": to_rgba_array([*color.colors, NO_VALUE_COLOR])[codes[order]]}
    else:
        values = color.values[panel.rows]
        order = np.argsort(np.nan_to_num(values, nan=-np.inf), kind="stable")
        look = {
            "c": values[order],
            "cmap": mpl.colormaps.get_cmap(color.cmap).with_extremes(bad=NO_VALUE_COLOR),
            "norm": Normalize(color.vmin, color.vmax),
            "plotnonfinite": True,
        }
    if size is None:
        diameter = _FILL * panel.spacing * points_per_unit(ax, panel)
        diameter = np.clip(diameter, _MIN_DIAMETER, _MAX_DIAMETER)
        size = float(diameter if panel.spacing else _ALONE_DIAMETER) ** 2
    x, y = panel.places[order].T
    ax.scatter(x, y, s=size, marker=marker, linewidths=0, rasterized=True, **look)


def points_per_unit(ax: Axes, panel: Panel) -> float:
    """Points on the page of one unit of the coordinates."""
    window = ax.get_window_extent()
    width, height = panel.high - panel.low
    pixels = min(window.width / width, window.height / height)
    return float(pixels / root_figure(ax).dpi * _POINTS_PER_INCH)


def dot(size: float, **options: Any) -> Line2D:
    """A marker for a legend."""
    return Line2D([], [], linestyle="", marker="o", markersize=size, **options)


def add_legend(ax: Axes, handles: list[Line2D], names: list[str], **options: Any) -> float:
    """Put a legend to the right of `ax`; return its width with a gap, inches."""
    legend = ax.legend(handles, names, **{**_LEGEND_STYLE, **options})
    box = legend.get_tightbbox()
    return 0.0 if box is None else float(box.width) / root_figure(ax).dpi + _LEGEND_GAP_INCHES


def add_key(ax: Axes, color: Categories | Values, title: str, height: float) -> float:
    """Put the legend, of `height` inches at most, or colour bar beside `ax`; return its width."""
    if isinstance(color, Values):
        _add_colorbar(ax, color, title)
        return _COLORBAR_INCHES
    codes = np.unique(color.codes)
    entries = [(color.names[code], color.colors[code]) for code in codes if code >= 0]
    if not color.key or len(entries) > _MAX_LEGEND_ENTRIES:
        if color.key:
            text = "No legend for %r: %d categories would not be readable."
            logger.info(text, color.key, len(entries))
        return 0.0
    if -1 in codes:
        entries.append((NO_VALUE_LABEL, NO_VALUE_COLOR))
    n_rows = max(_MIN_LEGEND_ROWS, int(height / _LEGEND_ROW_INCHES) - bool(title))
    return add_legend(
        ax,
        [dot(6.0, markeredgewidth=0, color=shade) for _, shade in entries],
        [name for name, _ in entries],
        title=title or None,
        ncols=-(-len(entries) // n_rows),
        labelspacing=0.3,
    )


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
    bar.ax.set_title(title, fontsize=FONT_SIZE, loc="left", pad=6.0)


def frame_maps(
    axes: list[Axes], panels: list[Panel], titles: Sequence[str], *, invert_y: bool
) -> None:
    """Set limits, equal aspect and titles, and take the axis lines away."""
    for ax, panel, title in zip(axes, panels, titles, strict=True):
        (left, bottom), (right, top) = panel.low, panel.high
        ax.set_xlim(left, right)
        ax.set_ylim((top, bottom) if invert_y else (bottom, top))
        ax.set_aspect("equal", adjustable="box")
        ax.set_anchor("N")
        ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
        ax.set_axis_off()


def draw_maps(
    panels: list[Panel],
    colors: Sequence[Categories | Values],
    look: Look,
    *,
    titles: Sequence[Sequence[str]] | None = None,
    shared: Values | None = None,
    fill: Callable[[Axes, Panel, Any, float | None], None] = draw_cells,
    key: Callable[[Axes, Any, str, float], float] = add_key,
    place: Callable[[list[list[Axes]], Layout], None] | None = None,
    what: str = "",
) -> list[Axes]:
    """Draw each colour on each slice; return the axes, colour by colour.

    Parameters
    ----------
    titles
        Of each colour's panels. None: the colour's, or with several slices the slice's name.
    shared
        The scale that all colours have, for one colour bar. None: each has a key of its own.
    fill, key
        Draw into a panel, and beside the last panel of a block's first row.
    place
        Lay out axes that were given, once they have their keys.
    what
        What the colours are, for the message about axes that do not fit.
    """
    several = len(panels) > 1
    counted = f"{len(panels)} slices" + (f" x {len(colors)} {what}" if what else "")
    axes, is_new = make_axes(look.ax, len(panels) * len(colors), what=counted)
    blocks = [axes[i : i + len(panels)] for i in range(0, len(axes), len(panels))]
    # Where other panels stand beside the maps, these keep their size.
    layout = look.layout(panels, len(colors) if place is None else 1)
    if titles is None:
        titles = [[one.name if several else color.key for one in panels] for color in colors]
    sides = [0.0] * len(colors)
    keyed = dict(enumerate(colors)) if shared is None else {layout.n_block_columns - 1: shared}
    for number, block in enumerate(blocks):
        frame_maps(block, panels, titles[number], invert_y=look.invert_y)
        if number in keyed:
            title = keyed[number].key if several else ""
            key_ax = block[layout.n_columns - 1]
            sides[number] = key(key_ax, keyed[number], title, layout.height)
    if is_new:
        layout.apply(blocks, sides)
    elif place is not None:
        place(blocks, layout)
    for block, color in zip(blocks, colors, strict=True):
        for ax, panel in zip(block, panels, strict=True):
            fill(ax, panel, color, look.size)
    return axes


def add_scale_bar(ax: Axes, microns_per_unit: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel's width."""
    if not microns_per_unit > 0:
        msg = f"microns_per_unit must be above 0, found {microns_per_unit!r}."
        raise ValueError(msg)
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


def round_below(value: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is not above `value`."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))
