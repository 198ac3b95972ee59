"""What all pictures share: axes in inches, how they are laid out, saved and shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from stofm._files import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: A file to write, True for one in scanpy's folder of figures, or None for what scanpy's settings say.
Save = str | Path | bool | None

TITLE_SIZE, FONT_SIZE = 9.0, 8.0
_GAP_INCHES: Final = 0.18
#: Backends that write files and cannot show anything.
_FILE_BACKENDS: Final = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})
#: Dots per inch of a saved figure, where scanpy's settings say nothing.
_DPI: Final = 150


def make_axes(
    ax: Axes | Sequence[Axes] | None,
    n_panels: int,
    size: tuple[float, float],
    *,
    what: str,
    ncols: int = 1,
) -> tuple[list[Axes], bool]:
    """Return the axes to draw into, and whether they are new: of that size, inches, not yet placed."""
    if n_panels == 0:
        raise ValueError(f"There is nothing to draw: {what}.")
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, found {ncols}.")
    if ax is None:
        figure = plt.figure()
        # Labels keep axes apart that lie at one place until they are laid out.
        made = [figure.add_axes((0, 0, 1, 1), label=f"panel {i}") for i in range(n_panels)]
        for one in made:
            set_inches(one, *size)
        return made, True
    # Of plt.subplots too, which gives them in rows.
    given = np.ravel(np.asarray(ax, dtype=object)).tolist()
    if others := [type(one).__name__ for one in given if not isinstance(one, Axes)]:
        raise TypeError(f"ax must be Axes or several of them, found {others[0]}.")
    if len(given) != n_panels:
        raise ValueError(f"{n_panels} panels are needed ({what}), but ax holds {len(given)}.")
    return given, False


def root_figure(ax: Axes) -> Figure:
    """The figure of `ax`, also where `ax` lies in a part of it."""
    return ax.figure.canvas.figure


def set_inches(ax: Axes, width: float, height: float) -> None:
    """Give axes that are not yet placed a size."""
    figure_width, figure_height = root_figure(ax).get_size_inches()
    ax.set_position((0.0, 0.0, width / figure_width, height / figure_height))


def style_axes(ax: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give a chart its title, labels, small ticks and two spines."""
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    ax.set_xlabel(x, fontsize=FONT_SIZE)
    ax.set_ylabel(y, fontsize=FONT_SIZE)
    ax.tick_params(which="both", labelsize=FONT_SIZE - 1.0)
    ax.spines[["top", "right"]].set_visible(False)


def in_rows(axes: Sequence[Axes], ncols: int) -> list[Sequence[Axes]]:
    """Axes side by side, `ncols` in a row."""
    return [axes[start : start + ncols] for start in range(0, len(axes), ncols)]


def arrange(*grids: Sequence[Sequence[Axes]]) -> None:
    """Place rows of axes, and size the figure so that labels and legends have room.

    The axes keep their size. In a grid columns are aligned; grids lie below each other.
    """
    figure = root_figure(grids[0][0][0])
    places: list[tuple[Axes, float, float, NDArray[np.float64]]] = []
    width = depth = 0.0
    for rows in grids:
        rooms = np.zeros((len(rows), max(map(len, rows)), 3, 2))
        for room, row in zip(rooms, rows, strict=True):
            room[: len(row)] = [_room(ax) for ax in row]
        across, down = rooms[..., 0].max(axis=0), rooms[..., 1].max(axis=1)
        lefts = np.cumsum(across.sum(axis=1)) - across[:, 1:].sum(axis=1)
        tops = depth + np.cumsum(down.sum(axis=1)) - down[:, 1:].sum(axis=1)
        for top, room, row in zip(tops, rooms, rows, strict=True):
            places += zip(row, lefts, [top] * len(row), room[:, 1], strict=False)
        width, depth = max(width, across.sum()), depth + down.sum()
    figure.set_size_inches(width, depth)
    for ax, left, top, (own_width, own_height) in places:
        bottom = depth - top - own_height
        ax.set_position((left / width, bottom / depth, own_width / width, own_height / depth))


def _room(ax: Axes) -> NDArray[np.float64]:
    """Inches (3, 2), across and down: before the axes, of the axes, and after them."""
    figure = root_figure(ax)
    size = ax.get_position(original=True).size * figure.get_size_inches()
    box = ax.get_tightbbox()
    assert box is not None
    left, bottom, right, top = np.array(box.extents) / figure.dpi
    rooms = np.array([[-left, top - size[1]], size, [right - size[0], -bottom]])
    rooms[[0, 2]] = np.maximum(rooms[[0, 2]], 0.0) + _GAP_INCHES / 2
    return rooms


def finish(axes: list[Axes], *, show: bool | None, save: Save, name: str) -> Axes | list[Axes]:
    """Save and show the figure as asked; return the axes, a single one without its list.

    Without a file the figure is saved where scanpy's settings put it, under `name`.
    """
    from scanpy import settings

    if save is None or isinstance(save, bool):
        file = Path(settings.figdir) / f"{name}{settings.plot_suffix}.{settings.file_format_figs}"
        wanted = bool(settings.autosave) if save is None else save
        if wanted:
            file.parent.mkdir(parents=True, exist_ok=True)
    else:
        file, wanted = local(save), True
    if wanted:
        # scanpy takes "figure" for what matplotlib would; ours are laid out for this size.
        dpi = mpl.rcParams["savefig.dpi"]
        try:
            root_figure(axes[0]).savefig(
                file, dpi=_DPI if dpi == "figure" else dpi, bbox_inches="tight"
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no folder {file.parent} for save={str(save)!r}; make it first."
            ) from error
    if show is None:
        show = bool(settings.autoshow) and mpl.get_backend().lower() not in _FILE_BACKENDS
    if show:
        plt.show()
    return axes[0] if len(axes) == 1 else axes
