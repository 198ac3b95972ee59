"""How far confidences can be trusted: of cells with a confidence of 0.8, four in five should be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
