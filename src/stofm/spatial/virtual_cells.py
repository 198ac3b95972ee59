"""Clusters over expression and place, and the virtual cells at their means (the macro scale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stofm.spatial.clustering import Clustering, leiden, merge_clusters
from stofm.spatial.neighbor_graph import nearest_neighbors, umap_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mixing = Literal["sum", "concatenate"]

_CHUNK = 65_536


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
    features: NDArray[np.floating], n_components: int = 2
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

    Returns
    -------
    (n, n_components) scores.
    """
    n, d = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((d, d))
    for start in range(0, n, _CHUNK):
        covariance += _products(features[start : start + _CHUNK] - mean)
    loadings = np.linalg.eigh(covariance)[1][:, ::-1][:, :n_components]
    largest = np.abs(loadings).argmax(axis=0)
    loadings = loadings * np.where(loadings[largest, np.arange(loadings.shape[1])] < 0, -1.0, 1.0)
    scores = np.zeros((n, n_components))
    for start in range(0, n, _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores[rows, : loadings.shape[1]] = (features[rows] - mean) @ loadings
    return scores


def _products(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    products: NDArray[np.float64] = rows.T @ rows
    return products


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
        Weight of place, from 0 to 1.

        DISCREPANCY: a comment in SToFM's published code calls the same number the weight of
        expression; its computation, which this follows, applies it to place.
    mixing
        ``"sum"``: the elementwise sum of the published code (k must be 2), in which a component
        and an axis that have nothing to do with one another are added. ``"concatenate"``:
        the parts side by side, so that distance grows with either.

    Returns
    -------
    (n, 2) for ``"sum"``, (n, 2 + k) for ``"concatenate"``.
    """
    place = position_weight * _by_largest_norm(coordinates)
    expression = (1.0 - position_weight) * _by_largest_norm(scores)
    if mixing == "sum":
        return place + expression
    return np.hstack([place, expression])


def _by_largest_norm(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(matrix, dtype=np.float64)
    largest = float(np.linalg.norm(values, axis=1).max(initial=0.0))
    return values / largest if largest > 0 else values


def cluster_cells(
    points: NDArray[np.float64],
    *,
    resolution: float = 1.0,
    n_neighbors: int = 10,
    max_clusters: int | None = 200,
    seed: int = 0,
    clustering: Clustering = "canonical",
) -> NDArray[np.int64]:
    """Cluster cells by Leiden on their exact neighbour graph with UMAP's weights.

    Parameters
    ----------
    points
        (n, k) matrix to cluster, rows in canonical order.
    resolution
        Leiden resolution.
    n_neighbors
        Neighbours of a cell, the cell itself counted.
    max_clusters
        Upper limit on the number of clusters; None for no limit.
    seed, clustering
        See :func:`~stofm.spatial.leiden`.

    Returns
    -------
    (n,) labels from 0, without gaps; by falling size of the cluster with ``"canonical"``.
    """
    n = len(points)
    if n <= 2:
        return np.zeros(n, dtype=np.int64)
    weights = umap_weights(*nearest_neighbors(points, n_neighbors))
    labels = leiden(weights, resolution=resolution, seed=seed, clustering=clustering)
    if max_clusters is not None:
        labels = merge_clusters(
            weights, labels, points, resolution=resolution, max_clusters=max_clusters, seed=seed
        )
    return labels if clustering == "scanpy" else _by_falling_size(labels)


def _by_falling_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    sizes = np.bincount(labels)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[labels]


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
    # A column at a time: a copy of all features in double precision would be the largest array.
    means = [
        np.column_stack([np.bincount(labels, weights=column) for column in values.T]) / sizes
        for values in (coordinates, features)
    ]
    return VirtualCells(coordinates=means[0], features=means[1].astype(np.float32))
