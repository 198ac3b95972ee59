"""Axes: made, laid out in inches, framed, and handed back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from stofm._files import local

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel

TITLE_SIZE: Final = 9.0
_TITLE_INCHES: Final = 0.28
_GAP_INCHES: Final = 0.18
#: Backends that write files and cannot show anything.
_FILE_BACKENDS: Final = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})


def make_axes(
    ax: Axes | Sequence[Axes] | None, n_panels: int, *, what: str
) -> tuple[list[Axes], bool]:
    """Return the axes to draw into, and whether they are new (and still to be laid out).

    Raises
    ------
    TypeError
        `ax` holds something else than Axes.
    ValueError
        The number of axes given is not the number of panels, or there are no panels.
    """
    if n_panels == 0:
        msg = f"There is nothing to draw: {what}."
        raise ValueError(msg)
    if ax is None:
        figure = plt.figure()
        # Labels keep axes apart that lie at one place until they are laid out.
        return [figure.add_axes((0, 0, 1, 1), label=f"panel {i}") for i in range(n_panels)], True
    # Of plt.subplots too, which gives them in rows.
    given = np.ravel(np.asarray(ax, dtype=object)).tolist()
    if others := [type(one).__name__ for one in given if not isinstance(one, Axes)]:
        msg = f"ax must be Axes or several of them, found {others[0]}."
        raise TypeError(msg)
    if len(given) != n_panels:
        msg = (
            f"{n_panels} panels are needed ({what}), but ax holds {len(given)}. Pass a list of "
            f"{n_panels} Axes, or none to have a figure made."
        )
        raise ValueError(msg)
    return given, False


def root_figure(ax: Axes) -> Figure:
    """The figure of `ax`, also where `ax` lies in a part of it."""
    return ax.figure.canvas.figure


def frame_panel(ax: Axes, panel: Panel, *, title: str, invert_y: bool) -> None:
    """Set limits, equal aspect and title, and take the axis lines away."""
    (left, bottom), (right, top) = panel.low, panel.high
    ax.set_xlim(left, right)
    ax.set_ylim((top, bottom) if invert_y else (bottom, top))
    ax.set_aspect("equal", adjustable="box")
    ax.set_anchor("N")
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    ax.set_axis_off()


@dataclass(frozen=True)
class Layout:
    """Where panels and legends of a new figure go, in inches.

    A block holds the panels of one colour, its legend to the right of the first row. Blocks of
    one panel stand side by side, others below each other.

    Attributes
    ----------
    size
        (2,) width and height of a panel.
    n_columns
        Panels side by side in a block.
    n_block_columns
        Blocks side by side.
    """

    size: NDArray[np.float64]
    n_columns: int
    n_block_columns: int

    def __post_init__(self) -> None:
        if self.n_columns < 1 or self.n_block_columns < 1:
            msg = f"ncols must be at least 1, found {min(self.n_columns, self.n_block_columns)}."
            raise ValueError(msg)

    @classmethod
    def plan(cls, panels: list[Panel], n_colors: int, n_columns: int) -> Layout:
        """Choose sizes: panels of one area, as wide against their height as the slices are."""
        extents = np.array([panel.high - panel.low for panel in panels])
        ratio = float(np.clip(np.median(extents[:, 0] / extents[:, 1]), 0.4, 2.5))
        side = {1: 4.2, 2: 3.6, 3: 3.2, 4: 3.0}.get(len(panels) * n_colors, 2.7)
        return cls(
            size=np.array([side * np.sqrt(ratio), side / np.sqrt(ratio)]),
            n_columns=min(n_columns, len(panels)),
            n_block_columns=min(n_columns, n_colors) if len(panels) == 1 else 1,
        )

    def block_height(self, n_panels: int) -> float:
        """Height of a block, with titles."""
        n_rows = -(-n_panels // self.n_columns)
        return n_rows * (float(self.size[1]) + _TITLE_INCHES + _GAP_INCHES)

    def apply(self, blocks: list[list[Axes]], sides: list[float]) -> None:
        """Size the figure and place each block's axes; `sides` are the widths of the legends."""
        step = self.size + np.array([_GAP_INCHES, _GAP_INCHES + _TITLE_INCHES])
        side_of = [max(sides[column :: self.n_block_columns]) for column in self._block_columns]
        lefts = np.cumsum([0.0, *(self.n_columns * step[0] + side for side in side_of)])
        height = self.block_height(len(blocks[0]))
        total = np.array([lefts[-1], -(-len(blocks) // self.n_block_columns) * height])
        root_figure(blocks[0][0]).set_size_inches(*total)
        for number, axes in enumerate(blocks):
            block_row, block_column = divmod(number, self.n_block_columns)
            for place, ax in enumerate(axes):
                row, column = divmod(place, self.n_columns)
                left = lefts[block_column] + column * step[0]
                top = total[1] - block_row * height - row * step[1] - _TITLE_INCHES
                ax.set_position((*((left, top - self.size[1]) / total), *(self.size / total)))

    @property
    def _block_columns(self) -> range:
        return range(self.n_block_columns)


@dataclass(frozen=True)
class Slot:
    """Axes of a given width and height in inches, without labels and legends."""

    ax: Axes
    width: float
    height: float


def arrange(rows: list[list[Slot]]) -> None:
    """Place axes in rows, and size the figure, so that labels and legends have room.

    Axes are level at their top. They need their labels and legends, as these are measured.
    """
    figure = root_figure(rows[0][0].ax)
    margins = [[_margins(slot) + _GAP_INCHES / 2 for slot in row] for row in rows]
    widths = [
        sum(slot.width + room[[0, 2]].sum() for slot, room in zip(row, rooms, strict=True))
        for row, rooms in zip(rows, margins, strict=True)
    ]
    above = [max(room[3] for room in rooms) for rooms in margins]
    heights = [
        top + max(slot.height + room[1] for slot, room in zip(row, rooms, strict=True))
        for row, rooms, top in zip(rows, margins, above, strict=True)
    ]
    size = np.array([max(widths), sum(heights)])
    figure.set_size_inches(*size)
    ceiling = size[1]
    for row, rooms, top, height in zip(rows, margins, above, heights, strict=True):
        left = 0.0
        for slot, room in zip(row, rooms, strict=True):
            left += room[0]
            inches = (left, ceiling - top - slot.height, slot.width, slot.height)
            slot.ax.set_position(tuple(np.array(inches) / np.tile(size, 2)))
            left += slot.width + room[2]
        ceiling -= height


def _margins(slot: Slot) -> NDArray[np.float64]:
    """Inches that labels and legends take: (4,) left, bottom, right, top."""
    figure = root_figure(slot.ax)
    size = figure.get_size_inches()
    slot.ax.set_position((0.0, 0.0, slot.width / size[0], slot.height / size[1]))
    figure.draw_without_rendering()
    box = slot.ax.get_tightbbox()
    assert box is not None
    left, bottom, right, top = np.array(box.extents) / figure.dpi
    return np.maximum([-left, -bottom, right - slot.width, top - slot.height], 0.0)


def finish(axes: list[Axes], *, show: bool | None, save: str | Path | None) -> Axes | list[Axes]:
    """Save and show the figure as asked; return the axes, a single one without its list.

    Raises
    ------
    FileNotFoundError
        `save` lies in a folder that is not there.
    """
    if save is not None:
        try:
            root_figure(axes[0]).savefig(local(save), dpi=150, bbox_inches="tight")
        except FileNotFoundError as error:
            msg = f"There is no folder {local(save).parent} for save={str(save)!r}; make it first."
            raise FileNotFoundError(msg) from error
    if _should_show(show=show):
        plt.show()
    return axes[0] if len(axes) == 1 else axes


def _should_show(*, show: bool | None) -> bool:
    if show is not None:
        return show
    from scanpy import settings

    return bool(settings.autoshow) and mpl.get_backend().lower() not in _FILE_BACKENDS
