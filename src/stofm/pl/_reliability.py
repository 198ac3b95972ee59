"""The reliability curve: of cells with a confidence of 0.8, four in five should be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm.pl._draw import FONT_SIZE
from stofm.pl._panels import TITLE_SIZE, Slot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_INCHES: Final = 2.6
_COLOR: Final = "#3b4754"
_DIAGONAL_COLOR: Final = "#9aa7b5"


@dataclass(frozen=True)
class Reliability:
    """Bins of equally many cells, by confidence.

    Attributes
    ----------
    confidence, accuracy
        (n_bins,) means.
    n_cells
        (n_bins,) cells of each.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    n_cells: NDArray[np.int64]

    @classmethod
    def of(
        cls, confidence: NDArray[np.float64], is_right: NDArray[np.bool_], n_bins: int
    ) -> Reliability:
        """Bin the cells (n,); there are fewer bins if there are fewer cells."""
        order = np.argsort(confidence, kind="stable")
        bins = np.array_split(order, min(n_bins, len(order)))
        return cls(
            confidence=np.array([confidence[rows].mean() for rows in bins]),
            accuracy=np.array([is_right[rows].mean() for rows in bins]),
            n_cells=np.array([len(rows) for rows in bins]),
        )

    @property
    def error(self) -> float:
        """Expected calibration error: mean over cells of the bins' distance from the diagonal."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.n_cells))

    @property
    def spread(self) -> NDArray[np.float64]:
        """Standard error (n_bins,) of the accuracy, of a binomial with one cell added to each."""
        share = (self.accuracy * self.n_cells + 1.0) / (self.n_cells + 2.0)
        return np.sqrt(share * (1.0 - share) / (self.n_cells + 2.0))


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
