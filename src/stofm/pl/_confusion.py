"""The confusion matrix of an annotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm.pl._draw import FONT_SIZE
from stofm.pl._panels import TITLE_SIZE, Slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_CMAP: Final = "Blues"
_MIN_INCHES, _MAX_INCHES, _CLASS_INCHES = 2.2, 5.0, 0.28
#: Fields are numbered up to so many classes, from this share of a row on.
_MAX_NUMBERED: Final = 30
_MIN_SHARE: Final = 0.005
_DARK: Final = 0.55
_LINE_COLOR: Final = "#e4e8ec"


def count_pairs(
    true: NDArray[np.object_],
    found: NDArray[np.object_],
    rows: Sequence[str],
    columns: Sequence[str],
) -> NDArray[np.int64]:
    """Numbers of cells (n_rows, n_columns) by true class and annotation."""
    row_of = {name: number for number, name in enumerate(rows)}
    column_of = {name: number for number, name in enumerate(columns)}
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(counts, ([row_of[name] for name in true], [column_of[name] for name in found]), 1)
    return counts


def draw_confusion(
    ax: Axes,
    counts: NDArray[np.int64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    as_counts: bool,
    title: str,
) -> Slot:
    """Draw the matrix, each row shaded by its shares; return the place that it needs.

    Parameters
    ----------
    counts
        (n_rows, n_columns) cells by true class and annotation.
    as_counts
        Write numbers of cells into the fields, else percent of the row.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    ax.imshow(shares, cmap=_CMAP, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    inches = float(np.clip(_CLASS_INCHES * max(counts.shape), _MIN_INCHES, _MAX_INCHES))
    field = inches / max(counts.shape)
    size = float(np.clip(field * 26, 4.5, FONT_SIZE))
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    named = [f"{name} ({total:,})" for name, total in zip(rows, totals[:, 0], strict=True)]
    ax.set_yticks(range(len(rows)), named, fontsize=size)
    _draw_grid(ax, counts.shape)
    ax.set_xlabel("annotation", fontsize=FONT_SIZE)
    ax.set_ylabel("truth (cells)", fontsize=FONT_SIZE)
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    if max(counts.shape) <= _MAX_NUMBERED:
        _write_fields(ax, counts if as_counts else np.rint(100 * shares), shares, size)
    return Slot(ax, field * counts.shape[1], field * counts.shape[0])


def _draw_grid(ax: Axes, shape: tuple[int, ...]) -> None:
    """Lines between the fields, through minor ticks without length."""
    ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=_LINE_COLOR, linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _write_fields(
    ax: Axes, values: NDArray[np.floating | np.integer], shares: NDArray[np.float64], size: float
) -> None:
    for row, column in np.argwhere(shares >= _MIN_SHARE):
        ax.text(
            column, row, f"{values[row, column]:.0f}", ha="center", va="center",
            fontsize=size - 1.0, color="white" if shares[row, column] > _DARK else "black",
        )  # fmt: skip
