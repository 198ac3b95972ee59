"""The reliability curve: accuracy over confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm.pl._draw import FONT_SIZE
from stofm.pl._panels import TITLE_SIZE, Slot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stofm.metrics.labels import Reliability

_INCHES: Final = 2.6
_COLOR: Final = "#3b4754"
_DIAGONAL_COLOR: Final = "#9aa7b5"


def draw_reliability(ax: Axes, curve: Reliability) -> Slot:
    """Draw accuracy over confidence; return the place that it needs."""
    ax.plot([0, 1], [0, 1], "--", lw=0.8, color=_DIAGONAL_COLOR, zorder=1)
    ax.errorbar(
        curve.confidence, curve.accuracy, yerr=curve.spread, fmt="o-", ms=3.5, lw=1.2,
        elinewidth=0.8, color=_COLOR, zorder=2,
    )  # fmt: skip
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.02)
    ticks = np.linspace(0.0, 1.0, 6)
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.tick_params(labelsize=FONT_SIZE - 1.0)
    ax.set_xlabel("confidence", fontsize=FONT_SIZE)
    ax.set_ylabel("share of cells that are right", fontsize=FONT_SIZE)
    title = f"expected calibration error {curve.error:.3f}"
    ax.set_title(title, fontsize=TITLE_SIZE, pad=4.0)
    ax.spines[["top", "right"]].set_visible(False)
    return Slot(ax, _INCHES, _INCHES)
