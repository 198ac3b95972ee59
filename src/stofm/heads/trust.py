"""How far an annotation can be trusted: temperature, novelty, rejection, prediction sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from stofm._arrays import let_go
from stofm.heads.expression import principal_axes
from stofm.nn.prediction_head import ROUNDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bounds of the temperature, and its value without cells to fit it to.
TEMPERATURES: Final = (0.2, 5.0)
#: How firmly the temperature is held to 1: few cells, all of them right or all of them wrong, would
#: draw it without end. A hundred cells or more do as they like.
_PRIOR: Final = 20.0
#: Principal components that distances are measured in, labelled cells of each class that they are
#: measured from, and how many of these count.
_N_COMPONENTS: Final = 20
_MOST_POINTS: Final = 200
_N_NEAREST: Final = 10
#: Quantiles of the held-out labelled cells that novelty is relative to, and share of them above 1.
_RELATIVE_TO: Final = (0.5, 0.9)
_BEYOND: Final = 0.05
#: What is added to the variances within classes, as a share of their mean.
_SHRINKAGE: Final = 1e-2
_CHUNK: Final = 2_048


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

    Embeddings are standardised and projected to principal components, in units of the covariance that
    all classes are taken to share; the distance of a cell is the mean of those from the ten labelled
    cells nearest to it.

    References
    ----------
    Lee et al. 2018, A simple unified framework for detecting out-of-distribution samples (NeurIPS): the
    covariance. Sun et al. 2022, Out-of-distribution detection with deep nearest neighbors (ICML).
    """

    center: NDArray[np.float32]  # (d,) what is taken off
    projection: NDArray[np.float32]  # (d, k) in units of the covariance within classes
    points: NDArray[np.float32]  # (n_points, k) labelled cells there, at most 200 of each class

    @classmethod
    def fit(cls, features: NDArray[np.float32], classes: NDArray[np.int64]) -> Surroundings:
        """Take labelled cells and the covariance within classes, numbers from 0 that all occur.

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
        residuals = scores - (sums / sizes[:, None])[classes]
        within = residuals.T @ residuals / len(residuals)
        ridge = _SHRINKAGE * np.trace(within) / len(within) or 1.0
        root = np.linalg.cholesky(within + ridge * np.eye(len(within)))
        projection = solve_triangular(root, kept.T / scale, lower=True).T
        own = [np.flatnonzero(classes == k) for k in range(len(sizes))]
        chosen = np.concatenate([rows[:: -(-len(rows) // _MOST_POINTS)] for rows in own])
        points = solve_triangular(root, scores[chosen].T, lower=True).T
        return cls(*(one.astype(np.float32) for one in (center, projection, points)))

    def distances(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) mean distance of each embedding from the labelled cells nearest to it."""
        found = np.empty(len(features))
        n_nearest = min(_N_NEAREST, len(self.points))
        for start in range(0, len(features), _CHUNK):
            part = slice(start, start + _CHUNK)
            scores = (features[part] - self.center) @ self.projection
            squares = (scores**2).sum(axis=1)[:, None] + (self.points**2).sum(axis=1)
            squares -= 2 * scores @ self.points.T
            nearest = np.partition(squares, n_nearest - 1, axis=1)[:, :n_nearest]
            found[part] = np.sqrt(np.maximum(nearest, 0.0)).mean(axis=1)
            let_go(features)
        return found


def energy(outputs: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) how little raw outputs of a network, (n, n_classes), support any class.

    References
    ----------
    Liu et al. 2020, Energy-based out-of-distribution detection (NeurIPS).
    """
    return np.asarray(-logsumexp(outputs.astype(np.float64), axis=1))


@dataclass(frozen=True)
class Novelty:
    """How new a cell is: its distance from labelled cells, and its energy.

    Each is taken relative to the held-out labelled cells: 0 is their median and 1 their upper tenth.
    The novelty is the sum, divided so that a twentieth of these cells is above 1. An energy below the
    median counts as the median: networks may be sure of what they have never seen.
    """

    distance: list[float]  # median and upper tenth of the held-out cells
    energy: list[float]  # likewise
    unit: float = 1.0  # what the sum is divided by

    @classmethod
    def fit(cls, distances: NDArray[np.floating], energies: NDArray[np.floating]) -> Novelty:
        """Take the quantiles of held-out labelled cells, (n,) each."""
        ends = [np.quantile(one, _RELATIVE_TO).tolist() for one in (distances, energies)]
        plain = cls(*ends)
        unit = float(np.quantile(plain.of(distances, energies), 1 - _BEYOND))
        return replace(plain, unit=unit if unit > 0 else 1.0)

    def of(
        self, distances: NDArray[np.floating], energies: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """(n,) novelty; of cells without an energy, NaN, by the distance alone."""
        far, unsupported = (
            (values - middle) / ((upper - middle) or 1.0)
            for values, (middle, upper) in ((distances, self.distance), (energies, self.energy))
        )
        return np.asarray((far + np.maximum(np.nan_to_num(unsupported), 0.0)) / self.unit)


@dataclass(frozen=True)
class Rejection:
    """When a cell is called unknown: if its probability is low and it lies far from labelled cells."""

    rate: float  # share of the known cells with the right likeliest class that may be
    measured: float  # share of the held-out known cells that are
    n_cells: int  # number of these
    least_probability: float  # below it the likeliest class is not supported by its probability
    greatest_distance: float  # above it no class is supported by the embedding

    @classmethod
    def fit(
        cls,
        confidence: NDArray[np.floating],
        distances: NDArray[np.float64],
        rate: float,
        is_right: NDArray[np.bool_] | None = None,
    ) -> Rejection:
        """Choose thresholds on held-out known cells, (n,) each.

        The same share of them lies beyond either threshold, as large as can be so that no more
        than `rate` of them lies beyond both. Only those count whose likeliest class `is_right`, all
        by default: the less the head knows of cells that it was not fitted to, the more it rejects.
        """
        every = confidence, distances
        if is_right is not None and is_right.any():
            confidence, distances = confidence[is_right], distances[is_right]
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
        measured = float(((every[0] < least) & (every[1] > greatest)).mean())
        return cls(rate, measured, len(every[0]), least, greatest)

    def rejects(
        self, confidence: NDArray[np.floating], distances: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """(n,) whether cells are unknown."""
        return np.asarray(
            (confidence < self.least_probability) & (distances > self.greatest_distance)
        )


@dataclass(frozen=True)
class PredictionSets:
    """Which classes a cell may have: those with at least so much probability, and the likeliest.

    References
    ----------
    Sadinle, Lei and Wasserman 2019, Least ambiguous set-valued classifiers with bounded error levels
    (J Am Stat Assoc 114:223).
    """

    coverage: float  # share of cells whose class is to be in their set
    least_probability: float  # what a class in a set has at least
    measured: float  # share of the held-out labelled cells whose class is in their set
    mean_size: float  # classes in a set of these cells
    n_cells: int  # number of these cells

    @classmethod
    def fit(
        cls,
        probabilities: NDArray[np.floating],
        classes: NDArray[np.int64],
        slices: NDArray[np.int64],
        coverage: float,
    ) -> PredictionSets:
        """Choose the threshold on held-out labelled cells, (n, n_classes) and (n,).

        For one more cell that is exchangeable with these the coverage holds (split conformal
        prediction); with too few of them all classes are in all sets. `slices` (n,) are numbers of
        whole slices that were held out: cells of one are not exchangeable with those of another, and
        the threshold is that of the slice that needs the lowest.
        """

        def outside(rows: Any) -> int:
            return int(np.floor((1 - coverage) * (len(own[rows]) + 1) + 1e-9))

        own = probabilities[np.arange(len(classes)), classes]
        by_slice = [slices == one for one in np.unique(slices)]
        parts = [slice(None), *(rows for rows in by_slice if outside(rows))]
        least = min(
            float(np.sort(own[rows])[outside(rows) - 1]) if outside(rows) else 0.0 for rows in parts
        )
        sets = cls(coverage, least, 0.0, 0.0, len(own))
        found = sets.of(probabilities)
        measured = float(found[np.arange(len(classes)), classes].mean())
        return replace(sets, measured=measured, mean_size=float(found.sum(axis=1).mean()))

    def of(self, probabilities: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(n, n_classes) whether a class is in the set of a cell."""
        found = np.asarray(probabilities >= self.least_probability)
        found[np.arange(len(found)), probabilities.argmax(axis=1)] = True
        return found
