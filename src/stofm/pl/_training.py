"""``stofm.pl.training``: loss parts over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from stofm._files import local, read_table
from stofm.pl._panels import TITLE_SIZE, finish, make_axes, root_figure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

#: Columns of a history that are no losses.
_NO_LOSSES: Final = frozenset(
    {
        "stage",
        "split",
        "epoch",
        "step",
        "learning_rate",
        "gradient_norm",
        "cells",
        "tokens",
        "seconds",
    }
)
_TRAIN_COLOR: Final = "#9aa7b5"
_MEAN_COLOR: Final = "#3b4754"
_HELD_OUT_COLOR: Final = "#d1495b"
_PANEL_INCHES: Final = (2.9, 2.2)
#: Rows of the training loss that the line is a running mean of, as a share of all.
_SMOOTHED_SHARE: Final = 0.05


def training(
    data: Any,
    parts: str | Sequence[str] | None = None,
    *,
    x: str = "step",
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw how the losses fell, one panel for each stage and loss part.

    Training losses are points with their running mean; those on held-out slices are a line, the
    lowest of each stage's loss is marked.

    Parameters
    ----------
    data
        What :func:`stofm.tl.train` returns, its history, or the folder of a run, which may still
        be going on.
    parts
        Loss parts to draw, or ``"loss"``, their weighted sum; None for all that there are.
    x
        Column of the history for the horizontal axis: ``"step"``, ``"cells"``, ``"tokens"`` or
        ``"seconds"``.
    ax
        Axes to draw into, as many as there are panels. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write.

    Returns
    -------
    The Axes, or the list of them if there are several panels: stage after stage, ``"loss"`` first.

    Raises
    ------
    FileNotFoundError
        The folder holds no history.
    KeyError
        The history has no such loss part or column.
    ValueError
        The history is empty, or `ax` does not fit the number of panels.

    Examples
    --------
    >>> import stofm as st
    >>> st.pl.training("run")  # doctest: +SKIP
    """
    history = _read(data)
    if x not in ("step", "cells", "tokens", "seconds"):
        msg = f"x must be 'step', 'cells', 'tokens' or 'seconds', found {x!r}."
        raise KeyError(msg)
    panels = list(_panels(history, parts))
    if not panels:
        msg = "No stage of the history has these loss parts; leave `parts` out to see all."
        raise ValueError(msg)
    names = ", ".join(f"{panel.stage}: {panel.part}" for panel in panels)
    axes, is_new = make_axes(ax, len(panels), what=names)
    for panel_ax, panel in zip(axes, panels, strict=True):
        _draw(panel_ax, panel, x)
    axes[0].legend(fontsize=7, frameon=False)
    if is_new:
        _arrange(axes, panels)
    return finish(axes, show=show, save=save)


@dataclass(frozen=True)
class _Panel:
    """One loss part of one stage."""

    stage: str
    part: str
    train: pd.DataFrame
    held_out: pd.DataFrame


def _read(data: Any) -> pd.DataFrame:
    history = getattr(data, "history", data)
    if isinstance(history, str | Path):
        file = local(history) / "history.csv"
        if not file.is_file():
            msg = f"There is no {file}; pass the folder of a run (out_dir of st.tl.train)."
            raise FileNotFoundError(msg)
        history = read_table(file)
    if not isinstance(history, pd.DataFrame):
        msg = (
            "Expected what st.tl.train returns, its history, or the folder of a run, found "
            f"{type(data).__name__}."
        )
        raise TypeError(msg)
    if history.empty:
        msg = "The history has no rows yet; they come with the first steps of training."
        raise ValueError(msg)
    return history


def _panels(history: pd.DataFrame, parts: str | Sequence[str] | None) -> Iterator[_Panel]:
    known = [name for name in history.columns if name not in _NO_LOSSES]
    known.sort(key=lambda name: name != "loss")
    wanted = known if parts is None else [parts] if isinstance(parts, str) else list(parts)
    if unknown := [name for name in wanted if name not in known]:
        msg = f"The history has no loss part {unknown[0]!r}; it has {known}."
        raise KeyError(msg)
    for stage in history["stage"].unique():
        rows = history[history["stage"] == stage]
        for part in wanted:
            present = rows[rows[part].notna()]
            if len(present):
                is_train = present["split"] == "train"
                yield _Panel(str(stage), part, present[is_train], present[~is_train])


def _draw(ax: Axes, panel: _Panel, x: str) -> None:
    train, held_out = panel.train, panel.held_out
    if len(train):
        ax.plot(train[x], train[panel.part], ".", ms=2.5, color=_TRAIN_COLOR, zorder=1)
        window = max(1, round(_SMOOTHED_SHARE * len(train)))
        mean = train[panel.part].rolling(window, center=True, min_periods=1).mean()
        ax.plot(train[x], mean, lw=1.2, color=_MEAN_COLOR, label="training", zorder=2)
    if len(held_out):
        values = held_out[panel.part].to_numpy()
        places = held_out[x].to_numpy()
        color = _HELD_OUT_COLOR
        ax.plot(places, values, "o-", ms=3, lw=1.2, color=color, label="held out", zorder=3)
        if panel.part == "loss":
            best = int(np.argmin(values))
            ax.plot(places[best], values[best], "*", ms=9, color=color, zorder=4)
    ax.set_title(f"{panel.stage}: {panel.part}".replace("_", " "), fontsize=TITLE_SIZE, pad=4.0)
    ax.set_xlabel(x, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _arrange(axes: list[Axes], panels: list[_Panel]) -> None:
    """One row for each stage, in a figure as large as that takes."""
    stages = list(dict.fromkeys(panel.stage for panel in panels))
    rows = [[a for a, p in zip(axes, panels, strict=True) if p.stage == stage] for stage in stages]
    cell = np.add(_PANEL_INCHES, (0.55, 0.65))
    size = cell * [max(len(row) for row in rows), len(rows)]
    root_figure(axes[0]).set_size_inches(*size)
    for number, row in enumerate(rows):
        for place, ax in enumerate(row):
            corner = np.array([place * cell[0] + 0.45, size[1] - (number + 1) * cell[1] + 0.4])
            ax.set_position((*(corner / size), *(np.array(_PANEL_INCHES) / size)))
