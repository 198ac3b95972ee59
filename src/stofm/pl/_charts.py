"""``stofm.pl.training`` and ``stofm.pl.probe``: charts of losses and of scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from stofm._files import local, read_table
from stofm.pl._style import FONT_SIZE, arrange, finish, make_axes, style_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from stofm.pl._style import Save

#: Columns of a history that are no losses.
_NO_LOSSES: Final = {
    *("stage", "split", "epoch", "step"),
    *("learning_rate", "gradient_norm", "cells", "tokens", "seconds"),
}
_PALE_COLOR, _MEAN_COLOR = "#9aa7b5", "#3b4754"
_GOOD_COLOR, _BAD_COLOR = "#2a7f62", "#d1495b"
_PANEL_INCHES: Final = (2.9, 2.2)
#: Rows of the training loss that the line is a running mean of, as a share of all.
_SMOOTHED_SHARE: Final = 0.05
_PROBE_WIDTH, _ROW_INCHES = 3.6, 0.32
#: Dots of a representation lie between these heights of its row, one for each slice.
_SPREAD: Final = 0.22
_LABELS: Final = {
    "macro_f1": "macro-F1 on what is left out",
    "accuracy": "accuracy on what is left out",
    "ari": "adjusted Rand index of k-means",
    "nmi": "normalised mutual information of k-means",
    "calibration_error": "expected calibration error",
}


def training(
    data: Any,
    parts: str | Sequence[str] | None = None,
    *,
    x: str = "step",
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
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

    See Also
    --------
    stofm.tl.train : makes the history.

    Examples
    --------
    >>> import pandas as pd, stofm as st
    >>> history = pd.DataFrame({"step": [10, 20, 30], "loss": [5.0, 4.1, 3.8]})
    >>> history = history.assign(stage="cell_encoder", split="train")
    >>> ax = st.pl.training(history, show=False)
    >>> axes = st.pl.training("run")  # a run on disk, also while it goes on  # doctest: +SKIP
    """
    history = _read(data)
    if x not in ("step", "cells", "tokens", "seconds"):
        raise KeyError(f"x must be 'step', 'cells', 'tokens' or 'seconds', found {x!r}.")
    panels = _panels(history, parts)
    if not panels:
        raise ValueError(
            "No stage of the history has these loss parts; leave `parts` out to see all."
        )
    names = ", ".join(f"{stage}: {part}" for stage, part, _ in panels)
    axes, is_new = make_axes(ax, len(panels), _PANEL_INCHES, what=names)
    rows: dict[str, list[Axes]] = {}
    for panel_ax, (stage, part, table) in zip(axes, panels, strict=True):
        _draw_losses(panel_ax, part, table, x)
        style_axes(panel_ax, title=f"{stage}: {part}".replace("_", " "), x=x)
        rows.setdefault(stage, []).append(panel_ax)
    axes[0].legend(fontsize=FONT_SIZE - 1.0, frameon=False)
    if is_new:
        arrange(list(rows.values()))
    return finish(axes, show=show, save=save, name="training")


def _read(data: Any) -> pd.DataFrame:
    history = getattr(data, "history", data)
    if isinstance(history, str | Path):
        file = local(history) / "history.csv"
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no {file}; pass the folder of a run (out_dir of st.tl.train)."
            )
        history = read_table(file)
    if not isinstance(history, pd.DataFrame):
        raise TypeError(
            f"Expected a run's folder, history or TrainResult, found {type(data).__name__}."
        )
    if history.empty:
        raise ValueError("The history has no rows yet; they come with the first steps of training.")
    return history


def _panels(
    history: pd.DataFrame, parts: str | Sequence[str] | None
) -> list[tuple[str, str, pd.DataFrame]]:
    """Stage and loss part of each panel, with the rows of the history that have it."""
    known = [name for name in history.columns if name not in _NO_LOSSES]
    known.sort(key=lambda name: name != "loss")
    wanted = known if parts is None else [parts] if isinstance(parts, str) else list(parts)
    if unknown := [name for name in wanted if name not in known]:
        raise KeyError(f"The history has no loss part {unknown[0]!r}; it has {known}.")
    return [
        (str(stage), part, present)
        for stage, rows in history.groupby("stage", sort=False)
        for part in wanted
        if len(present := rows[rows[part].notna()])
    ]


def _draw_losses(ax: Axes, part: str, table: pd.DataFrame, x: str) -> None:
    is_train = table["split"] == "train"
    train, held_out = table[is_train], table[~is_train]
    if len(train):
        ax.plot(train[x], train[part], ".", ms=2.5, color=_PALE_COLOR, zorder=1)
        window = max(1, round(_SMOOTHED_SHARE * len(train)))
        mean = train[part].rolling(window, center=True, min_periods=1).mean()
        ax.plot(train[x], mean, lw=1.2, color=_MEAN_COLOR, label="training", zorder=2)
    if len(held_out):
        look: dict[str, Any] = {"color": _BAD_COLOR, "lw": 1.2}
        ax.plot(held_out[x], held_out[part], "o-", ms=3, label="held out", zorder=3, **look)
        if part == "loss":
            best = held_out.iloc[[held_out[part].to_numpy().argmin()]]
            ax.plot(best[x], best[part], "*", ms=9, zorder=4, **look)


def probe(
    data: Any,
    *,
    measure: str = "macro_f1",
    ax: Axes | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes:
    """Draw the scores of representations, and how far they are from the better of the PCs.

    A dot is a left-out slice, the mean over its seeds; the bar is the mean over slices. The line
    is the better of the PCs, and whiskers are the 95 % interval of the difference to it, see
    :meth:`stofm.tl.ProbeResult.summary`: one that does not cross the line is green where the
    representation is better and red where it is worse.

    Parameters
    ----------
    data
        What :func:`stofm.tl.probe` returns.
    measure
        ``"macro_f1"``, ``"accuracy"``, ``"ari"``, ``"nmi"`` or ``"calibration_error"``.
    ax
        Axes to draw into. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write.

    Returns
    -------
    The Axes.

    Raises
    ------
    TypeError
        `data` is something else.
    ValueError
        There is no such measure.

    See Also
    --------
    stofm.tl.probe : makes the comparison.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> st.tl.embed(adata)
    >>> result = st.tl.probe(adata, label_key="region", seeds=1)
    >>> ax = st.pl.probe(result, show=False)
    """
    if not hasattr(data, "summary") or not hasattr(data, "better_of_pcs"):
        raise TypeError(f"Expected what st.tl.probe returns, found {type(data).__name__}.")
    summary, best = data.summary(measure), data.better_of_pcs(measure)
    size = (_PROBE_WIDTH, _ROW_INCHES * len(summary))
    axes, is_new = make_axes(ax, 1, size, what=measure)
    (chart,) = axes
    line = summary.loc[best, "mean"]
    label = f"better of the PCs ({best})"
    chart.axvline(line, lw=0.9, ls="--", color=_PALE_COLOR, zorder=1, label=label)
    means = data.scores.groupby(["representation", "slice"], sort=True)[measure].mean()
    # The best comes first.
    is_error = measure == "calibration_error"
    order = summary.sort_values("mean", ascending=not is_error).index
    for height, name in enumerate(order):
        row, own = summary.loc[name], means[name].to_numpy()
        offsets = np.linspace(-_SPREAD, _SPREAD, len(own)) if len(own) > 1 else np.zeros(1)
        colors = (_GOOD_COLOR, _BAD_COLOR) if is_error else (_BAD_COLOR, _GOOD_COLOR)
        color = colors[int(row["low"] > 0)] if row["low"] > 0 or row["high"] < 0 else _MEAN_COLOR
        chart.plot(own, height + offsets, "o", ms=3.2, mew=0, alpha=0.55, color=color, zorder=2)
        chart.plot([row["mean"]] * 2, [height - 0.3, height + 0.3], lw=2.0, color=color, zorder=4)
        if row["low"] < row["high"]:
            ends = [line + row["low"], line + row["high"]]
            chart.plot(ends, [height] * 2, lw=1.1, color=color, zorder=3)
    style_axes(chart, x=_LABELS[measure])
    chart.set_yticks(range(len(order)), order, fontsize=FONT_SIZE)
    chart.set_ylim(-0.6, len(order) - 0.4)
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    chart.legend(fontsize=FONT_SIZE - 1.0, frameon=False, **above)
    if is_new:
        arrange([axes])
    finish(axes, show=show, save=save, name="probe")
    return chart
