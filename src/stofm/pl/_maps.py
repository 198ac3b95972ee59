"""Maps of one or several colours: framed, given their keys, laid out, and filled with cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stofm.pl._draw import add_key, draw_cells, marker_area
from stofm.pl._panels import Layout, frame_panel, make_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from stofm.pl._slices import Panel
    from stofm.pl._style import Categories, Values


def draw_maps(
    panels: list[Panel],
    colors: Sequence[Categories | Values],
    *,
    titles: Sequence[Sequence[str]] | None = None,
    shared: Values | None = None,
    ncols: int,
    size: float | None,
    invert_y: bool,
    ax: Axes | Sequence[Axes] | None,
    what: str = "colours",
) -> list[Axes]:
    """Draw each colour on each slice.

    Parameters
    ----------
    titles
        Of each colour's panels. None: the colour's, or with several slices the slice's name.
    shared
        The scale that all colours have, and what its one colour bar is called. None: each has
        a key of its own.
    what
        What the colours are, for the message about axes that do not fit.

    Returns
    -------
    The axes, colour by colour.
    """
    counted = f"{len(panels)} slices x {len(colors)} {what}"
    axes, is_new = make_axes(ax, len(panels) * len(colors), what=counted)
    blocks = [axes[i : i + len(panels)] for i in range(0, len(axes), len(panels))]
    if titles is None:
        titles = [
            [panel.name if len(panels) > 1 else color.key for panel in panels] for color in colors
        ]
    for block, names in zip(blocks, titles, strict=True):
        for panel_ax, panel, name in zip(block, panels, names, strict=True):
            frame_panel(panel_ax, panel, title=name, invert_y=invert_y)
    layout = Layout.plan(panels, len(colors), ncols)
    sides = _add_keys(blocks, panels, colors, layout, shared)
    if is_new:
        layout.apply(blocks, sides)
    for block, color in zip(blocks, colors, strict=True):
        for panel_ax, panel in zip(block, panels, strict=True):
            fill_map(panel_ax, panel, color, size)
    return axes


def _add_keys(
    blocks: list[list[Axes]],
    panels: list[Panel],
    colors: Sequence[Categories | Values],
    layout: Layout,
    shared: Values | None,
) -> list[float]:
    """Draw the legends and colour bars; return each block's width beside the panels, inches."""
    rows = np.concatenate([panel.rows for panel in panels])
    height = layout.block_height(len(panels))
    sides = [0.0] * len(colors)
    if shared is not None:
        # At the end of the first row.
        number = layout.n_block_columns - 1
        key_ax = blocks[number][layout.n_columns - 1]
        sides[number] = add_key(key_ax, shared, rows, title=shared.key, height=height)
        return sides
    for number, (block, color) in enumerate(zip(blocks, colors, strict=True)):
        title = color.key if len(panels) > 1 else ""
        key_ax = block[layout.n_columns - 1]
        sides[number] = add_key(key_ax, color, rows, title=title, height=height)
    return sides


def fill_map(ax: Axes, panel: Panel, color: Categories | Values, size: float | None) -> None:
    """Draw a slice's cells, at a size that fits the panel unless one is given."""
    draw_cells(ax, panel, color, area=marker_area(ax, panel) if size is None else size)
