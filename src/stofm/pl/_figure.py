"""Axes: made, laid out in inches, framed, and handed back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

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

TITLE_SIZE: Final = 9.0
FONT_SIZE: Final = 8.0
_TITLE_INCHES: Final = 0.28
_GAP_INCHES: Final = 0.18
#: Backends that write files and cannot show anything.
_FILE_BACKENDS: Final = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})


def make_axes(
    ax: Axes | Sequence[Axes] | None, n_panels: int, *, what: str
) -> tuple[list[Axes], bool]:
    """Return the axes to draw into, and whether they are new (and still to be laid out)."""
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


def style_axes(ax: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give a chart its title, labels, small ticks and two spines."""
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    ax.set_xlabel(x, fontsize=FONT_SIZE)
    ax.set_ylabel(y, fontsize=FONT_SIZE)
    ax.tick_params(labelsize=FONT_SIZE - 1.0)
    ax.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Layout:
    """Where panels and legends of a new figure go, in inches.

    A block holds the panels (`size`, in inches) of one colour, its legend to the right of the
    first row. Blocks of one panel stand side by side, others below each other.
    """

    size: NDArray[np.float64]
    n_panels: int
    n_blocks: int
    ncols: int

    def __post_init__(self) -> None:
        if self.ncols < 1:
            msg = f"ncols must be at least 1, found {self.ncols}."
            raise ValueError(msg)

    @property
    def n_columns(self) -> int:
        """Panels side by side in a block."""
        return min(self.ncols, self.n_panels)

    @property
    def n_block_columns(self) -> int:
        """Blocks side by side."""
        return min(self.ncols, self.n_blocks) if self.n_panels == 1 else 1

    @property
    def height(self) -> float:
        """Height of a block, with titles."""
        n_rows = -(-self.n_panels // self.n_columns)
        return n_rows * (float(self.size[1]) + _TITLE_INCHES + _GAP_INCHES)

    def apply(self, blocks: list[list[Axes]], sides: list[float]) -> None:
        """Size the figure and place each block's axes; `sides` are the widths of the legends."""
        step = self.size + np.array([_GAP_INCHES, _GAP_INCHES + _TITLE_INCHES])
        n = self.n_block_columns
        widths = [self.n_columns * step[0] + max(sides[column::n]) for column in range(n)]
        lefts = np.cumsum([0.0, *widths])
        total = np.array([lefts[-1], -(-len(blocks) // n) * self.height])
        root_figure(blocks[0][0]).set_size_inches(*total)
        for number, axes in enumerate(blocks):
            for place, ax in enumerate(axes):
                row, column = divmod(place, self.n_columns)
                left = lefts[number % n] + column * step[0]
                top = total[1] - number // n * self.height - row * step[1] - _TITLE_INCHES
                ax.set_position((*((left, top - self.size[1]) / total), *(self.size / total)))


class Slot(NamedTuple):
    """Axes of a given width and height in inches, without labels and legends."""

    ax: Axes
    width: float
    height: float


def arrange(rows: list[list[Slot]]) -> None:
    """Place axes in rows, and size the figure, so that labels and legends have room.

    Axes are level at their top. They need their labels and legends, as these are measured.
    """
    figure = root_figure(rows[0][0].ax)
    places = []
    width = depth = 0.0
    for row in rows:
        rooms = [_margins(slot, figure) + _GAP_INCHES / 2 for slot in row]
        top = depth + max(room[3] for room in rooms)
        left = 0.0
        for slot, room in zip(row, rooms, strict=True):
            places.append((slot, left + room[0], top + slot.height))
            left += slot.width + room[0] + room[2]
            depth = max(depth, top + slot.height + room[1])
        width = max(width, left)
    figure.set_size_inches(width, depth)
    for slot, left, bottom in places:
        box = np.array([left, depth - bottom, slot.width, slot.height])
        slot.ax.set_position(tuple(box / (width, depth, width, depth)))


def _margins(slot: Slot, figure: Figure) -> NDArray[np.float64]:
    """Inches that labels and legends take: (4,) left, bottom, right, top."""
    size = figure.get_size_inches()
    slot.ax.set_position((0.0, 0.0, slot.width / size[0], slot.height / size[1]))
    figure.draw_without_rendering()
    box = slot.ax.get_tightbbox()
    assert box is not None
    left, bottom, right, top = np.array(box.extents) / figure.dpi
    return np.maximum([-left, -bottom, right - slot.width, top - slot.height], 0.0)


def finish(axes: list[Axes], *, show: bool | None, save: str | Path | None) -> Axes | list[Axes]:
    """Save and show the figure as asked; return the axes, a single one without its list."""
    if save is not None:
        try:
            root_figure(axes[0]).savefig(local(save), dpi=150, bbox_inches="tight")
        except FileNotFoundError as error:
            msg = f"There is no folder {local(save).parent} for save={str(save)!r}; make it first."
            raise FileNotFoundError(msg) from error
    if show is None:
        from scanpy import settings

        show = bool(settings.autoshow) and mpl.get_backend().lower() not in _FILE_BACKENDS
    if show:
        plt.show()
    return axes[0] if len(axes) == 1 else axes
