"""Regions of tissue as clusters of embeddings, over one slice or many, and how they nest."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.linalg import solve_triangular

from stofm._arrays import SideBySide, let_go, spacious, spans
from stofm.spatial.plane import canonical_order, nearest_neighbors
from stofm.spatial.virtual_cells import (
    leading_axes,
    leiden,
    mean_of_rows,
    number_by_size,
    umap_weights,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Centering = Literal["slice", "none"]

_N_COMPONENTS = 20
#: What is used beside an embedding repeats much of it, and what they share comes first.
_N_COMPONENTS_BESIDE = 10
#: Neighbours of a cell in the graph for Leiden, the cell itself counted.
_N_NEIGHBORS = 15
#: Starts of the mixture, on a sample of at most this many embeddings. The likeliest continues on
#: all of them, until the log-likelihood of a cell gains less than the last tolerance in a round.
_N_STARTS = 40
_MAX_AT_START = 5_000
_TOLERANCES = (1e-3, 1e-5)
_MAX_ROUNDS = 300
_N_KMEANS_STARTS = 10
#: Added to variances, as a share of the total variance.
_REGULARIZATION = 1e-6
#: Of more distinct embeddings than this a sample is clustered, so that time is linear in the cells.
_MAX_CLUSTERED = 50_000
_CHUNK = 65_536
# Warning filters are shared by all threads, and scikit-learn changes them too.
_turn = threading.Lock()


@dataclass(frozen=True)
class DomainSpace:
    """The space that domains are found in, the same whatever the order of the rows.

    `order` (n,) are the rows in canonical order, slice by slice and by features. `point` (n,) is the
    point of each cell in that order; cells of a slice with the same features share one. `scores`
    (n_points, k) are principal components with a total variance of 1.
    """

    order: NDArray[np.int64]
    point: NDArray[np.int64]
    scores: NDArray[np.float64]

    def to_rows(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bring labels of points to the cells' own order."""
        found = np.empty(len(self.order), dtype=np.int64)
        found[self.order] = labels[self.point]
        return found


def find_levels(
    features: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    *,
    beside: Sequence[NDArray[np.floating]] = (),
    coordinates: NDArray[np.float64] | None = None,
    n_domains: int | None,
    resolution: float,
    coarser: Sequence[int],
    smooth: int,
    centering: Centering,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Find the domains of slices, which together have all rows, and the coarser levels.

    See :func:`stofm.tl.domains`. Domains are smoothed only if there are coordinates.
    """
    space = domain_space(features, slices, centering=centering, beside=beside)
    labels = find_domains(space, n_domains=n_domains, resolution=resolution, seed=seed)
    if coordinates is not None:
        labels = smooth_domains(labels, coordinates, features, slices, smooth)
    return [labels, *merge_domains(space, labels, coarser)]


def domain_space(
    features: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    *,
    centering: Centering = "slice",
    beside: Sequence[NDArray[np.floating]] = (),
) -> DomainSpace:
    """Reduce embeddings (n, d) to the principal components that domains are found in.

    These are 20, or 10 of an embedding with others beside it: arrays with the same rows, which get
    the same total variance. ``centering="slice"`` subtracts each slice's mean first, and with it
    what sets slices apart.
    """
    values = SideBySide((features, *beside))
    ordered = _ordered(values, slices)
    order, (n, width) = np.concatenate(ordered), values.shape
    is_new = np.ones(n, dtype=bool)
    # Moments of all cells, and of the points.
    sums, squares, of_points = (np.zeros(width) for _ in range(3))
    products = np.zeros((width, width))
    centers, starts = [], np.cumsum([0, *map(len, ordered)])
    for rows, found in zip(ordered, np.split(is_new, starts[1:-1]), strict=True):
        parts = spans(len(rows), width)
        own_rows = [rows[part] for part in parts]
        is_centered = centering == "slice"
        centers.append(mean_of_rows(values, own_rows) if is_centered else np.zeros(width))
        for part in parts:
            own = values[rows[part]]
            last = values[rows[[max(part.start - 1, 0)]]]
            found[part] = (own != np.vstack([last, own[:-1]])).any(axis=1)
            found[0] = True
            centered = own - centers[-1]
            sums += centered.sum(axis=0)
            squares += (centered**2).sum(axis=0)
            centered = centered[found[part]]
            of_points += centered.sum(axis=0)
            products += centered.T @ centered
    n_points = int(is_new.sum())
    variances, mean = squares / n - (sums / n) ** 2, of_points / n_points
    scale = np.ones(width)
    if beside:
        edges = np.cumsum([one.shape[1] for one in values.parts])[:-1]
        for share, block in zip(np.split(scale, edges), np.split(variances, edges), strict=True):
            share /= np.sqrt(max(block.sum(), 0.0)) or 1.0
    n_components = min(_N_COMPONENTS_BESIDE if beside else _N_COMPONENTS, width)
    products = (products - n_points * np.outer(mean, mean)) * np.outer(scale, scale)
    axes = scale[:, None] * leading_axes(products, n_components)
    scores = np.concatenate(
        [
            (values[rows[part]] - (center + mean)) @ axes
            for rows, center in zip(ordered, centers, strict=True)
            for part in spans(len(rows), width)
        ]
    )[is_new]
    spread = np.sqrt(scores.var(axis=0).sum())
    return DomainSpace(order, np.cumsum(is_new) - 1, scores / spread if spread > 0 else scores)


def _ordered(values: SideBySide, slices: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Rows of each slice in canonical order, by the first and the last column before the others."""
    ends = np.concatenate([values[part][:, [0, -1]] for part in spans(*values.shape)])
    return [rows[canonical_order(ends[rows], values, rows)] for rows in slices]


def directions(
    features: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    *,
    centering: Centering = "slice",
) -> NDArray[np.float32]:
    """Embeddings (n, d) less their slice's mean, or that of all cells, scaled to unit length.

    The means don't depend on the order of the cells.
    """
    values = SideBySide((features.astype(np.float32, copy=False),))
    found, ordered = spacious(values.shape), _ordered(values, slices)
    for rows in ordered if centering == "slice" else [np.concatenate(ordered)]:
        parts = [rows[part] for part in spans(len(rows), features.shape[1])]
        mean = mean_of_rows(values, parts)
        for part in parts:
            own = (values[part] - mean).astype(np.float32)
            lengths = np.linalg.norm(own, axis=1, keepdims=True)
            found[part] = own / np.where(lengths > 0, lengths, np.float32(1.0))
            let_go(found)
    return found


def find_domains(
    space: DomainSpace,
    *,
    n_domains: int | None = None,
    resolution: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Cluster cells into domains: (n,) labels from 0 by falling size.

    `n_domains` is the number of components of a Gaussian mixture with one covariance for all (model
    EEE of mclust 5, Scrucca et al. 2016), the likeliest of 40 starts on up to 5,000 cells. With None,
    Leiden clusters at `resolution` on the neighbour graph.
    """
    if n_domains is not None and n_domains > len(space.scores):
        raise ValueError(
            f"n_domains is {n_domains}, but only {len(space.scores)} embeddings are different."
        )
    from sklearn.exceptions import ConvergenceWarning

    with _turn, warnings.catch_warnings():
        # After this many rounds hardly any cell changes its domain.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = (
            _leiden_domains(space.scores, resolution, seed)
            if n_domains is None
            else _mixture_domains(space.scores, n_domains, seed)
        )
    return number_by_size(space.to_rows(labels))


def _sample(n_points: int, most: int, seed: int) -> NDArray[np.int64]:
    if n_points <= most:
        return np.arange(n_points)
    return np.sort(np.random.default_rng(seed).choice(n_points, most, replace=False))


def _mixture_domains(scores: NDArray[np.float64], n_domains: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    if n_domains == 1:
        return np.zeros(len(scores), dtype=np.int64)
    fitted = scores[_sample(len(scores), _MAX_CLUSTERED, seed)]
    tried = fitted[_sample(len(fitted), max(_MAX_AT_START, n_domains), seed)]
    options: dict[str, Any] = {
        "covariance_type": "tied",
        "tol": _TOLERANCES[0],
        "reg_covar": _REGULARIZATION,
        "max_iter": _MAX_ROUNDS,
        "warm_start": True,
    }
    mixtures = [
        GaussianMixture(n_domains, random_state=int(start), **options).fit(tried)
        for start in np.random.default_rng(seed).integers(0, 2**31, _N_STARTS)
    ]
    likeliest = max(mixtures, key=lambda mixture: float(mixture.lower_bound_))
    # It continues from its current state.
    labels = likeliest.set_params(tol=_TOLERANCES[1]).fit(fitted).predict(scores)
    if len(np.unique(labels)) < n_domains:
        # A component may be the likeliest for no cell; k-means leaves no domain empty.
        means = KMeans(n_domains, n_init=_N_KMEANS_STARTS, random_state=seed)
        labels = means.fit(fitted).predict(scores)
    return np.asarray(labels, dtype=np.int64)


def _leiden_domains(scores: NDArray[np.float64], resolution: float, seed: int) -> NDArray[np.int64]:
    from sklearn.neighbors import NearestNeighbors

    n_points = len(scores)
    if n_points <= 2:
        return np.zeros(n_points, dtype=np.int64)
    chosen = _sample(n_points, _MAX_CLUSTERED, seed)
    n_neighbors = min(_N_NEIGHBORS, len(chosen))
    search = NearestNeighbors(n_neighbors=n_neighbors - 1, algorithm="brute").fit(scores[chosen])
    distances, indices = search.kneighbors()
    own = np.arange(len(chosen))
    weights = umap_weights(
        np.column_stack([own, indices]), np.column_stack([np.zeros(len(chosen)), distances])
    )
    labels = leiden(weights, resolution=resolution, seed=seed)
    if len(chosen) == n_points:
        return labels
    chunks = (search.kneighbors(scores[rows], return_distance=False) for rows in _chunks(n_points))
    every = np.concatenate([_most_frequent(labels[near], labels[near[:, 0]]) for near in chunks])
    every[chosen] = labels
    return every


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]


def _most_frequent(votes: NDArray[np.int64], preferred: NDArray[np.int64]) -> NDArray[np.int64]:
    """Most frequent label of each row; in a tie the preferred one, then the smallest."""
    n, n_labels = len(votes), int(max(votes.max(), preferred.max())) + 1
    cells = np.arange(n)[:, None] * n_labels + votes
    counts = 2 * np.bincount(cells.ravel(), minlength=n * n_labels).reshape(n, n_labels)
    counts[np.arange(n), preferred] += 1
    found: NDArray[np.int64] = counts.argmax(axis=1)
    return found


def smooth_domains(
    labels: NDArray[np.int64],
    coordinates: NDArray[np.float64],
    features: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    n_neighbors: int,
) -> NDArray[np.int64]:
    """Give each cell the most frequent domain among itself and its nearest neighbours in the plane.

    Neighbours are of the same slice; the cell itself is not counted among `n_neighbors`. In a tie a
    cell keeps its own domain if it is among them, else it takes the smallest. Cells at the same
    position are ordered by their features.
    """
    smoothed = labels.copy()
    for rows in slices:
        # Among neighbours at the same distance, the search takes the first.
        ordered = rows[canonical_order(coordinates[rows], features, rows)]
        nearest, _ = nearest_neighbors(coordinates[ordered], n_neighbors + 1)
        own = labels[ordered]
        for part in _chunks(len(ordered)):
            smoothed[ordered[part]] = _most_frequent(own[nearest[part]], own[part])
    return number_by_size(smoothed)


def merge_domains(
    space: DomainSpace, labels: NDArray[np.int64], counts: Sequence[int]
) -> list[NDArray[np.int64]]:
    """Merge domains into fewer and fewer, so that coarser domains hold whole finer ones.

    Ward's rule (1963) on the domains' means, weighted by their numbers of cells, in units of the
    covariance within domains: the two whose merger adds least to it are merged. `counts` are
    decreasing numbers of domains; one that is not below that of `labels` returns `labels`.
    """
    if not counts:
        return []
    own, scores = labels[space.order], space.scores[space.point]
    sizes = np.bincount(own).astype(np.float64)
    sums = np.stack([np.bincount(own, column) for column in scores.T], axis=1)
    means = sums / sizes[:, None]
    within = (scores.T @ scores - sums.T @ means) / len(own)
    root = np.linalg.cholesky(within + _REGULARIZATION * np.eye(len(within)))
    means = solve_triangular(root, means.T, lower=True).T
    target = np.arange(len(sizes))
    levels = []
    for count in counts:
        while len(alive := np.unique(target)) > max(count, 1):
            weight = 1 / (1 / sizes[alive, None] + 1 / sizes[None, alive])
            cost = weight * ((means[alive, None] - means[None, alive]) ** 2).sum(axis=-1)
            cost[np.tril_indices(len(alive))] = np.inf
            kept, gone = alive[list(np.unravel_index(cost.argmin(), cost.shape))]
            means[kept] = np.average(means[[kept, gone]], axis=0, weights=sizes[[kept, gone]])
            sizes[kept] += sizes[gone]
            target[target == gone] = kept
        levels.append(labels if len(alive) == len(target) else number_by_size(target[labels]))
    return levels
