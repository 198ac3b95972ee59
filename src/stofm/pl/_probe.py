"""``stofm.pl.probe``: representations beside each other, and beside principal components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm.pl._figure import FONT_SIZE, Slot, arrange, finish, make_axes, style_axes

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

_LINE_COLOR: Final = "#9aa7b5"
_MEAN_COLOR: Final = "#3b4754"
_BETTER_COLOR: Final = "#2a7f62"
_WORSE_COLOR: Final = "#d1495b"
_WIDTH: Final = 3.6
_ROW_INCHES: Final = 0.32
#: Dots of a representation lie between these heights of its row, one for each slice.
_SPREAD: Final = 0.22
_LABELS: Final = {
    "macro_f1": "macro-F1 on what is left out",
    "accuracy": "accuracy on what is left out",
    "ari": "adjusted Rand index of k-means",
    "nmi": "normalised mutual information of k-means",
    "calibration_error": "expected calibration error",
}


def probe(
    data: Any,
    *,
    measure: str = "macro_f1",
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
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

    Examples
    --------
    >>> import stofm as st
    >>> result = st.tl.probe(adata, label_key="cell_type")  # doctest: +SKIP
    >>> st.pl.probe(result)  # doctest: +SKIP
    """
    if not hasattr(data, "summary") or not hasattr(data, "better_of_pcs"):
        msg = f"Expected what st.tl.probe returns, found {type(data).__name__}."
        raise TypeError(msg)
    summary = data.summary(measure)
    axes, is_new = make_axes(ax, 1, what=measure)
    _draw(axes[0], data, summary, measure)
    if is_new:
        arrange([[Slot(axes[0], _WIDTH, _ROW_INCHES * len(summary))]])
    finish(axes, show=show, save=save)
    return axes[0]


def _draw(ax: Axes, data: Any, summary: Any, measure: str) -> None:
    best = data.better_of_pcs(measure)
    line = summary.loc[best, "mean"]
    means = data.scores.groupby(["representation", "slice"], sort=True)[measure].mean()
    ax.axvline(
        line, lw=0.9, ls="--", color=_LINE_COLOR, zorder=1, label=f"better of the PCs ({best})"
    )
    # The best comes first.
    order = summary["mean"].sort_values(ascending=measure != "calibration_error").index
    for height, name in enumerate(order):
        row, own = summary.loc[name], means[name].to_numpy()
        offsets = np.linspace(-_SPREAD, _SPREAD, len(own)) if len(own) > 1 else np.zeros(1)
        color = _color(row, measure)
        ax.plot(own, height + offsets, "o", ms=3.2, mew=0, alpha=0.55, color=color, zorder=2)
        ax.plot([row["mean"]] * 2, [height - 0.3, height + 0.3], lw=2.0, color=color, zorder=4)
        if row["low"] < row["high"]:
            ends = [line + row["low"], line + row["high"]]
            ax.plot(ends, [height] * 2, lw=1.1, color=color, zorder=3)
    style_axes(ax, x=_LABELS[measure])
    ax.set_yticks(range(len(order)), order, fontsize=FONT_SIZE)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.legend(fontsize=FONT_SIZE - 1.0, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0))


def _color(row: Any, measure: str) -> str:
    low, high = row["low"], row["high"]
    if measure == "calibration_error":
        low, high = -high, -low
    if low > 0:
        return _BETTER_COLOR
    return _WORSE_COLOR if high < 0 else _MEAN_COLOR
