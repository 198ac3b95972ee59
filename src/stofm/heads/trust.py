"""How far predicted classes can be trusted: temperature, and which cells are unlike all classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from stofm.heads.expression import principal_axes
from stofm.nn.prediction_head import ROUNDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bounds of the temperature, and its value without cells to fit it to.
TEMPERATURES: Final = (0.2, 5.0)
#: How firmly the temperature is held to 1: few cells, all of them right or all of them wrong, would
#: draw it without end. A hundred cells or more do as they like.
_PRIOR: Final = 20.0
#: Principal components that distances are measured in: with 20, cells of a class that was left out
#: are found better than with 50, and as well as by their nearest labelled cells.
_N_COMPONENTS: Final = 20
#: What is added to the variances within classes, as a share of their mean.
_SHRINKAGE: Final = 1e-2
_CHUNK: Final = 16_384


def fit_temperature(scores: NDArray[np.floating], classes: NDArray[np.int64]) -> float:
    """Find what to divide scores by so that probabilities are as good as can be.

    `scores`, (n, n_classes), are raw outputs of a head for held-out cells. The temperature has the
    lowest negative log-likelihood, to which that of the temperature is added: its logarithm is
    normal around 0. The fewer cells, the nearer to 1; 1 without cells.

    References
    ----------
    Guo et al. 2017, On calibration of modern neural networks (ICML).
    """
    if not len(scores):
        return 1.0
    values = np.asarray(scores, dtype=np.float64)
    rows = np.arange(len(values))

    def loss(log_temperature: float) -> float:
        likelihood = log_softmax(values / np.exp(log_temperature), axis=1)[rows, classes].sum()
        return _PRIOR * log_temperature**2 / 2 - float(likelihood)

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def calibrated_probabilities(
    scores: NDArray[np.floating], temperature: float
) -> NDArray[np.float32]:
    """Softmax of scores divided by the temperature, (n, n_classes)."""
    values = np.asarray(scores, dtype=np.float32) / np.float32(temperature)
    return np.asarray(softmax(values, axis=1))


def log_scores(probabilities: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scores whose softmax is the probabilities, for a temperature to act on."""
    return np.asarray(np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Where the embeddings of labelled cells lie.

    Embeddings are standardised and projected to principal components; there all classes are taken
    to have one covariance, and the distance is that from the nearest class mean in its units.

    Attributes
    ----------
    center
        (d,) what is taken off.
    projection
        (d, k) onto components in units of the covariance within classes.
    means
        (n_classes, k) means of the classes there.

    References
    ----------
    Lee et al. 2018, A simple unified framework for detecting out-of-distribution samples (NeurIPS).
    """

    center: NDArray[np.float32]
    projection: NDArray[np.float32]
    means: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], classes: NDArray[np.int64]) -> Surroundings:
        """Take class means and the covariance within classes, numbers from 0 that all occur.

        `features`, (n, d), are in an order that does not depend on the file.
        """
        center = features.mean(axis=0, dtype=np.float64)
        values = features - center
        scale = values.std(axis=0)
        scale[scale <= ROUNDING * np.abs(features).max(axis=0)] = np.inf
        values /= scale
        kept = principal_axes(values, _N_COMPONENTS)[1]
        scores = values @ kept
        sizes = np.bincount(classes).astype(np.float64)
        sums = np.stack([np.bincount(classes, column) for column in scores.T], axis=1)
        means = sums / sizes[:, None]
        residuals = scores - means[classes]
        within = residuals.T @ residuals / len(residuals)
        ridge = _SHRINKAGE * np.trace(within) / len(within) or 1.0
        root = np.linalg.cholesky(within + ridge * np.eye(len(within)))
        projection = solve_triangular(root, kept.T / scale, lower=True).T
        means = solve_triangular(root, means.T, lower=True).T
        return cls(*(one.astype(np.float32) for one in (center, projection, means)))

    def distances(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) distance of each embedding from the nearest class mean."""
        found = np.empty(len(features))
        for start in range(0, len(features), _CHUNK):
            part = slice(start, start + _CHUNK)
            scores = (features[part] - self.center) @ self.projection
            squares = (scores**2).sum(axis=1)[:, None] + (self.means**2).sum(axis=1)
            squares -= 2 * scores @ self.means.T
            found[part] = np.sqrt(np.maximum(squares.min(axis=1), 0.0))
        return found


@dataclass(frozen=True)
class Rejection:
    """When a cell is called unknown: if both thresholds are passed.

    Attributes
    ----------
    rate
        Share of known cells that may be.
    measured, n_cells
        Share of the held-out known cells that are, and the number of these.
    least_probability
        Below it the likeliest class is not supported by its probability.
    greatest_distance
        Above it no class is supported by the embedding.
    """

    rate: float
    measured: float
    n_cells: int
    least_probability: float
    greatest_distance: float

    @classmethod
    def fit(
        cls, confidence: NDArray[np.floating], distances: NDArray[np.float64], rate: float
    ) -> Rejection:
        """Choose thresholds on held-out known cells, (n,) each.

        The same share of them lies beyond either threshold, as large as can be so that no more
        than `rate` of them lies beyond both.
        """
        n_cells = len(confidence)
        by_confidence, by_distance = np.sort(confidence), np.sort(-distances)
        # A cell is rejected once the threshold reaches the larger of its two ranks.
        ranks = np.maximum(
            np.searchsorted(by_confidence, confidence, side="right"),
            np.searchsorted(by_distance, -distances, side="right"),
        )
        n_rejected = int(rate * n_cells)
        beyond = np.sort(ranks)[n_rejected] - 1 if n_rejected < n_cells else n_cells - 1
        least, greatest = float(by_confidence[beyond]), float(-by_distance[beyond])
        measured = float(((confidence < least) & (distances > greatest)).mean())
        return cls(rate, measured, n_cells, least, greatest)

    def rejects(
        self, confidence: NDArray[np.floating], distances: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """(n,) whether cells are unknown."""
        return np.asarray(
            (confidence < self.least_probability) & (distances > self.greatest_distance)
        )
