"""Clusters over expression and position, and the virtual cells at their means (the macro scale)."""

from __future__ import annotations

import random
import threading
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stofm.spatial.plane import nearest_neighbors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray


Mixing = Literal["sum", "concatenate"]

#: Of more cells than this a sample is clustered, so that time is linear in the cells.
MOST_CLUSTERED: Final = 50_000

#: Rows that are held in double precision at a time.
ROWS_AT_ONCE: Final = 8_192
_MAX_BISECTIONS = 64
_TOLERANCE = 1e-5
_MIN_BANDWIDTH = 1e-3


@dataclass(frozen=True)
class VirtualCells:
    """Virtual cells of one slice: the means of its clusters.

    Attributes
    ----------
    coordinates
        (n_virtual, 2) mean normalised coordinates, model units.
    features
        (n_virtual, d) mean cell embeddings, float32, not scaled to unit length.
    """

    coordinates: NDArray[np.float64]
    features: NDArray[np.float32]

    @property
    def n_virtual(self) -> int:
        """Number of virtual cells."""
        return len(self.coordinates)


def principal_components(
    features: NDArray[np.floating],
    n_components: int = 2,
    *,
    order: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """Scores of the first principal components, deterministic down to their sign.

    The covariance matrix is decomposed in double precision; of each component the loading of
    largest magnitude is positive. Features are centred, not scaled.

    Parameters
    ----------
    features
        (n, d).
    n_components
        Number of components; those beyond d are zero.
    order
        (n,) rows in the order to compute and return them in; all of them are never copied at once.

    Returns
    -------
    (n, n_components) scores.
    """
    n, d = features.shape
    spans = [slice(start, start + ROWS_AT_ONCE) for start in range(0, n, ROWS_AT_ONCE)]
    chunks: Any = spans if order is None else [order[span] for span in spans]
    mean, covariance = mean_of_rows(features, chunks), np.zeros((d, d))
    for rows in chunks:
        centered = features[rows] - mean
        covariance += centered.T @ centered
    loadings = leading_axes(covariance, n_components)
    scores = np.zeros((n, n_components))
    for span, rows in zip(spans, chunks, strict=True):
        scores[span, : loadings.shape[1]] = (features[rows] - mean) @ loadings
    return scores


def mean_of_rows(features: Any, chunks: Iterable[Any]) -> NDArray[np.float64]:
    """Mean of the rows of all chunks, (d,), summed one after another in double precision."""
    total, n = np.zeros((1, features.shape[1])), 0
    for rows in chunks:
        summands = np.vstack([total, features[rows]])
        total, n = np.add.reduce(summands, axis=0, keepdims=True), n + len(summands) - 1
    return np.asarray(total[0] / n)


def leading_axes(covariance: NDArray[np.float64], n_components: int) -> NDArray[np.float64]:
    """First principal axes, (d, k), each with its loading of largest magnitude positive."""
    loadings = np.linalg.eigh(covariance)[1][:, ::-1][:, :n_components]
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(axis=0)[None], axis=0)
    return loadings * np.where(largest < 0, -1.0, 1.0)


def mix_expression_and_place(
    scores: NDArray[np.floating],
    coordinates: NDArray[np.floating],
    *,
    position_weight: float = 0.2,
    mixing: Mixing = "sum",
) -> NDArray[np.float64]:
    """Build the matrix that is clustered.

    Both parts are divided by their own largest row norm, and weighted by `position_weight` w
    and 1 - w.

    Parameters
    ----------
    scores
        (n, k) principal component scores.
    coordinates
        (n, 2) normalised coordinates.
    position_weight
        Weight of position, from 0 to 1.

        DISCREPANCY: a comment in SToFM's published code calls the same number the weight of
        expression; its computation, which this follows, applies it to position.
    mixing
        ``"sum"``: the elementwise sum of the published code (k must be 2), which adds a component
        to an unrelated axis. ``"concatenate"``: the parts side by side, so that distance grows with
        either.

    Returns
    -------
    (n, 2) for ``"sum"``, (n, 2 + k) for ``"concatenate"``.
    """
    parts = []
    for matrix, weight in ((coordinates, position_weight), (scores, 1.0 - position_weight)):
        values = np.asarray(matrix, dtype=np.float64)
        largest = float(np.linalg.norm(values, axis=1).max(initial=0.0))
        parts.append(weight * (values / (largest or 1.0)))
    return np.asarray(sum(parts) if mixing == "sum" else np.hstack(parts))


def umap_weights(indices: NDArray[np.int64], distances: NDArray[np.float64]) -> sp.csr_array:
    """Weight a neighbour graph by UMAP's fuzzy simplicial set: symmetric (n, n) weights, float32.

    A point's nearest neighbour at non-zero distance rho gets weight 1, others
    ``exp(-(d - rho) / sigma)``, with sigma such that a point's weights sum to
    ``log2(n_neighbors)``. The two directions of an edge are joined by the probabilistic sum
    ``a + b - a b``. `indices` and `distances` (n, n_neighbors) have the point itself first.

    References
    ----------
    McInnes, Healy and Melville, UMAP (arXiv 1802.03426), section 3.1.
    """
    n, n_neighbors = indices.shape
    # The first neighbour that is not at the same position; 0 if all are.
    rho = np.where(distances > 0, distances, np.inf).min(axis=1)
    rho[np.isinf(rho)] = 0.0
    excess = np.maximum(distances[:, 1:] - rho[:, None], 0.0)
    sigma = _bandwidths(excess, target=np.log2(n_neighbors))
    floor = np.where(rho > 0, distances.mean(axis=1), distances.mean()) * _MIN_BANDWIDTH
    sigma = np.maximum(sigma, floor)
    # A point whose neighbours all coincide with it has no bandwidth: its weights are 1.
    weights = np.exp(-excess / np.where(sigma > 0, sigma, 1.0)[:, None]).astype(np.float32)

    offsets = np.arange(0, n * (n_neighbors - 1) + 1, n_neighbors - 1)
    directed = sp.csr_array(
        (weights.ravel(), indices[:, 1:].ravel().astype(np.int32), offsets.astype(np.int32)),
        shape=(n, n),
    )
    reverse = directed.T.tocsr()
    return (directed + reverse - directed.multiply(reverse)).tocsr()


def _bandwidths(excess: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Solve ``sum_j exp(-excess_ij / sigma_i) = target`` for all rows at once by bisection."""
    n = len(excess)
    sigma = np.ones(n)
    low, high = np.zeros(n), np.full(n, np.inf)
    active = np.arange(n)
    for _ in range(_MAX_BISECTIONS):
        total = np.exp(-excess[active] / sigma[active, None]).sum(axis=1)
        unsolved = np.abs(total - target) >= _TOLERANCE
        active, total = active[unsolved], total[unsolved]
        if len(active) == 0:
            break
        too_wide = total > target
        high[active[too_wide]] = sigma[active[too_wide]]
        low[active[~too_wide]] = sigma[active[~too_wide]]
        bounded = np.isfinite(high[active])
        middle = (low[active] + np.where(bounded, high[active], 0.0)) / 2
        sigma[active] = np.where(bounded, middle, sigma[active] * 2)
    return sigma


def cluster_cells(
    points: NDArray[np.float64],
    *,
    resolution: float = 1.0,
    n_neighbors: int = 10,
    max_clusters: int | None = 200,
    seed: int = 0,
    clustering: Clustering = "canonical",
) -> NDArray[np.int64]:
    """Cluster points (n, k) by Leiden on their exact neighbour graph with UMAP's weights.

    Rows are in canonical order; the cell itself is counted among its neighbours. Returns (n,)
    labels from 0, without gaps; by falling size of the cluster with ``"canonical"``. Of more than
    50,000 points, it clusters a random sample of that size, and the others join the nearest sampled
    point: finding exact neighbours in ten and more dimensions takes time nearly proportional to the
    square of n.
    """
    n = len(points)
    if n <= 2:
        return np.zeros(n, dtype=np.int64)
    sample = points
    if clustering == "canonical" and n > MOST_CLUSTERED:
        chosen = np.random.default_rng(seed).choice(n, MOST_CLUSTERED, replace=False)
        sample = points[np.sort(chosen)]
    weights = umap_weights(*nearest_neighbors(sample, n_neighbors))
    labels = leiden(weights, resolution=resolution, seed=seed, clustering=clustering)
    if max_clusters is not None:
        labels = merge_clusters(
            weights, labels, sample, resolution=resolution, max_clusters=max_clusters, seed=seed
        )
    if len(sample) < n:
        labels = labels[cKDTree(sample, balanced_tree=False).query(points, workers=-1)[1]]
    return labels if clustering == "scanpy" else number_by_size(labels)


def number_by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber labels from 0, without gaps, by decreasing size."""
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return np.argsort(np.argsort(-sizes, kind="stable"))[codes]


def virtual_cells(
    labels: NDArray[np.integer],
    coordinates: NDArray[np.floating],
    features: NDArray[np.floating],
) -> VirtualCells:
    """Average coordinates and features over each cluster.

    Parameters
    ----------
    labels
        (n,) labels from 0, without gaps.
    coordinates
        (n, 2) normalised coordinates.
    features
        (n, d) cell embeddings.

    Returns
    -------
    The clusters' means, in order of the labels, computed in double precision.
    """
    sizes = np.bincount(labels)[:, None]
    # One column at a time: a copy of all features in double precision would be the largest array.
    means = [
        np.column_stack([np.bincount(labels, weights=column) for column in values.T]) / sizes
        for values in (coordinates, features)
    ]
    return VirtualCells(coordinates=means[0], features=means[1].astype(np.float32))


Clustering = Literal["canonical", "scanpy"]

_MAX_HALVINGS = 20
#: Rounds of our own clustering. Large slices need ever more rounds until no move improves; after
#: ten, modularity is within a few thousandths of that, and time is linear in the edges.
_ROUNDS = 10
_UNTIL_CONVERGED = -1
# igraph has one generator for all threads: those that draw from it take turns.
_turn = threading.Lock()


class _ScanpyNumbers:
    """The random numbers that scanpy passes to igraph, from numpy's legacy generator."""

    def __init__(self, seed: int) -> None:
        # Bound once: igraph asks hundreds of thousands of times.
        state = np.random.RandomState(seed)
        draw, below = state.tomaxint, state.randint
        self.random, self.gauss = state.random_sample, state.normal
        self.getrandbits = lambda n_bits: draw() & ((1 << n_bits) - 1)
        self.randint = lambda low, high: int(below(low, high + 1))


@contextmanager
def _igraph_numbers(generator: random.Random | _ScanpyNumbers) -> Iterator[None]:
    """Let igraph draw from `generator`, and afterwards from Python's module again."""
    import igraph

    with _turn:
        try:
            igraph.set_random_number_generator(generator)
            yield
        finally:
            igraph.set_random_number_generator(random)


def leiden(
    weights: sp.csr_array,
    *,
    resolution: float = 1.0,
    seed: int = 0,
    clustering: Clustering = "canonical",
) -> NDArray[np.int64]:
    """Cluster a symmetric (n, n) weighted graph with an empty diagonal by modularity.

    ``"canonical"`` takes ten rounds, draws from Mersenne Twister and gives igraph each edge once.
    ``"scanpy"`` gives the labels of ``scanpy.tl.leiden(flavor="igraph", n_iterations=-1)``: as many
    rounds as improve, each edge in both directions, numbers from numpy's legacy generator; two to
    four times slower, and more on large slices. Returns (n,) labels from 0, without gaps.

    References
    ----------
    Traag, Waltman and van Eck 2019, From Louvain to Leiden (Sci Rep 9:5233).
    """
    if clustering == "scanpy":
        return _igraph_leiden(weights.tocoo(), resolution, _ScanpyNumbers(seed), _UNTIL_CONVERGED)
    edges = sp.triu(weights, k=1, format="csr").tocoo()
    return _igraph_leiden(edges, resolution, random.Random(seed), _ROUNDS)


def _igraph_leiden(
    edges: sp.coo_array, resolution: float, numbers: random.Random | _ScanpyNumbers, n_rounds: int
) -> NDArray[np.int64]:
    # It imports matplotlib, and takes half a second.
    import igraph

    graph = igraph.Graph(n=edges.shape[0], edges=np.column_stack([edges.row, edges.col]))
    with _igraph_numbers(numbers):
        found = graph.community_leiden(
            objective_function="modularity",
            # A list of Python's numbers would take four times as much memory.
            weights=array("d", edges.data.astype(np.float64).tobytes()),
            resolution=resolution,
            n_iterations=n_rounds,
        )
    return np.asarray(found.membership, dtype=np.int64)


def merge_clusters(
    weights: sp.csr_array,
    labels: NDArray[np.int64],
    points: NDArray[np.float64],
    *,
    resolution: float,
    max_clusters: int,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Merge whole clusters until there are at most `max_clusters`; labels without gaps.

    Clusters are clustered as nodes of the aggregated graph, at half the resolution, a quarter and
    so on, which keeps modularity as the measure and costs almost nothing. Clusters that no edge
    connects are merged last: the smallest cluster into the one with the nearest mean of `points`.
    """
    for _ in range(_MAX_HALVINGS):
        if labels.max() < max_clusters:
            return labels
        resolution /= 2
        member = sp.csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))))
        # Edges inside a cluster become a loop, which modularity counts as they were counted.
        joint = sp.triu(member @ weights @ member.T, format="coo")
        joint.data[joint.row == joint.col] /= 2
        labels = _igraph_leiden(joint, resolution, random.Random(seed), _UNTIL_CONVERGED)[labels]
    return _merge_nearest(labels, points, max_clusters)


def _merge_nearest(
    labels: NDArray[np.int64], points: NDArray[np.float64], max_clusters: int
) -> NDArray[np.int64]:
    sizes = np.bincount(labels).astype(np.float64)
    sums = np.stack([np.bincount(labels, weights=column) for column in points.T], axis=1)
    target = np.arange(len(sizes))
    alive = np.ones(len(sizes), dtype=bool)
    while alive.sum() > max_clusters:
        smallest = int(np.where(alive, sizes, np.inf).argmin())
        alive[smallest] = False
        centres = sums / np.maximum(sizes, 1.0)[:, None]
        gaps = np.linalg.norm(centres - centres[smallest], axis=1)
        nearest = int(np.where(alive, gaps, np.inf).argmin())
        target[target == smallest] = nearest
        sizes[nearest] += sizes[smallest]
        sums[nearest] += sums[smallest]
    _, merged = np.unique(target[labels], return_inverse=True)
    return merged.astype(np.int64)
