"""What is drawn into a panel: cells, legend, colour bar, scale bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from mpl_toolkits.axes_grid1.anchored_artists import (  # type: ignore[import-untyped]
    AnchoredSizeBar,
)

from stofm._logging import logger
from stofm.pl._panels import root_figure
from stofm.pl._style import NO_VALUE_COLOR, NO_VALUE_LABEL, Categories, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel

FONT_SIZE: Final = 8.0
#: Beside the panel, level with its top, without a frame.
LEGEND_STYLE: Final[dict[str, Any]] = {
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


def marker_area(ax: Axes, panel: Panel) -> float:
    """Return the scatter size (square points) at which neighbouring cells just about touch."""
    if panel.spacing == 0.0:
        return _ALONE_DIAMETER**2
    diameter = _FILL * panel.spacing * points_per_unit(ax, panel)
    return float(np.clip(diameter, _MIN_DIAMETER, _MAX_DIAMETER)) ** 2


def points_per_unit(ax: Axes, panel: Panel) -> float:
    """Points on the page of one unit of the coordinates."""
    window = ax.get_window_extent()
    width, height = panel.high - panel.low
    pixels = min(window.width / width, window.height / height)
    return float(pixels / root_figure(ax).dpi * _POINTS_PER_INCH)


def draw_cells(ax: Axes, panel: Panel, color: Categories | Values, *, area: float) -> None:
    """Scatter a slice's cells; they stay pixels in a vector file."""
    position = np.full(int(panel.rows.max()) + 1, -1)
    position[panel.rows] = np.arange(len(panel.rows))
    rows = color.draw_order(panel.rows)
    x, y = panel.places[position[rows]].T
    if isinstance(color, Categories):
        ax.scatter(x, y, s=area, c=color.rgba(rows), linewidths=0, rasterized=True)
        return
    cmap = mpl.colormaps.get_cmap(color.cmap).with_extremes(bad=NO_VALUE_COLOR)
    norm = Normalize(color.vmin, color.vmax)
    ax.scatter(
        x, y, s=area, c=color.values[rows], cmap=cmap, norm=norm, plotnonfinite=True, linewidths=0,
        rasterized=True,
    )  # fmt: skip


def add_key(
    ax: Axes, color: Categories | Values, rows: NDArray[np.int64], *, title: str, height: float
) -> float:
    """Put the legend or colour bar to the right of `ax`; return its width in inches.

    Parameters
    ----------
    rows
        Rows that are drawn; categories that none of them has are left out.
    title
        Title of the legend or colour bar.
    height
        Inches that the legend should keep to.
    """
    if isinstance(color, Values):
        _add_colorbar(ax, color, title)
        return _COLORBAR_INCHES
    if not color.key:
        return 0.0
    legend = _add_legend(ax, color, rows, title=title, height=height)
    return 0.0 if legend is None else legend_width(ax, legend)


def legend_width(ax: Axes, legend: Legend) -> float:
    """Width of a legend with the gap to what comes next, inches."""
    box = legend.get_tightbbox()
    return 0.0 if box is None else float(box.width) / root_figure(ax).dpi + _LEGEND_GAP_INCHES


def _add_colorbar(ax: Axes, color: Values, title: str) -> None:
    mappable = ScalarMappable(Normalize(color.vmin, color.vmax), color.cmap)
    bar_ax = ax.inset_axes((1.03, 0.15, 0.03, 0.7))
    bar = root_figure(ax).colorbar(mappable, cax=bar_ax, extend=color.extend, extendfrac=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT_SIZE, length=2, width=0.6)
    bar.ax.set_title(title, fontsize=FONT_SIZE, loc="left", pad=6.0)


def _add_legend(
    ax: Axes, color: Categories, rows: NDArray[np.int64], *, title: str, height: float
) -> Legend | None:
    present = np.unique(color.codes[rows])
    entries = [(color.names[code], color.colors[code]) for code in present if code >= 0]
    if len(entries) > _MAX_LEGEND_ENTRIES:
        logger.info(
            "No legend for %r: %d categories would not be readable.", color.key, len(entries)
        )
        return None
    if -1 in present:
        entries.append((NO_VALUE_LABEL, NO_VALUE_COLOR))
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=6.0, markeredgewidth=0, color=shade)
        for _, shade in entries
    ]
    n_rows = max(_MIN_LEGEND_ROWS, int(height / _LEGEND_ROW_INCHES) - bool(title))
    return ax.legend(
        handles,
        [name for name, _ in entries],
        title=title or None,
        ncols=-(-len(entries) // n_rows),
        labelspacing=0.3,
        **LEGEND_STYLE,
    )


def add_scale_bar(ax: Axes, microns_per_unit: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel's width.

    Raises
    ------
    ValueError
        `microns_per_unit` is not above 0.
    """
    if not microns_per_unit > 0:
        msg = f"microns_per_unit must be above 0, found {microns_per_unit!r}."
        raise ValueError(msg)
    x_range = abs(np.diff(ax.get_xlim()).item())
    microns = round_below(0.25 * x_range * microns_per_unit)
    label = f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm"
    bar = AnchoredSizeBar(
        ax.transData,
        microns / microns_per_unit,
        label,
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
