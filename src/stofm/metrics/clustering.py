"""Scores of clusters: against known classes, and in the space that they were found in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm.metrics._inputs import LabelPair, has_label, read_labels

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import ArrayLike

Average = Literal["arithmetic", "geometric", "min", "max"]


def ari(y_true: Any, clusters: Any, *, missing: Collection[object] = ()) -> float:
    """Adjusted Rand index: pairs of cells on which two groupings agree, corrected for chance.

    Names of clusters do not matter. Pairs grow with the square of a class, so large classes
    decide.

    Parameters
    ----------
    y_true, clusters
        (n,) classes and clusters: list, array, categorical or Series. Two Series are paired by
        their index, all else by position.
    missing
        Labels that stand for none, such as ``["Unknown"]``; NaN and None always do. Cells
        without a true class are left out.

    Returns
    -------
    1 for equal groupings, about 0 for independent ones, down to -0.5.

    Raises
    ------
    ValueError
        Lengths or indices differ, no cell has a class, or one with a class has no cluster.

    References
    ----------
    Hubert and Arabie 1985, Comparing partitions (J Classif 2:193).

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.ari(["a", "a", "b", "b"], [1, 1, 0, 0])
    1.0
    """
    from sklearn.metrics import adjusted_rand_score

    pair = _read_clusters(y_true, clusters, missing)
    return float(adjusted_rand_score(pair.true, pair.found))


def nmi(
    y_true: Any,
    clusters: Any,
    *,
    average: Average = "arithmetic",
    missing: Collection[object] = (),
) -> float:
    """Normalised mutual information of two groupings.

    Not corrected for chance: it rises with the number of clusters, also of random ones. Compare
    it only between groupings with the same number of clusters, or take :func:`ami`.

    Parameters
    ----------
    y_true, clusters, missing
        See :func:`ari`.
    average
        Mean of the two entropies that it is divided by. Papers differ: the arithmetic mean is
        scikit-learn's since version 0.22, the geometric mean was before.

    Returns
    -------
    From 0 to 1.

    Raises
    ------
    ValueError
        See :func:`ari`.
    """
    from sklearn.metrics import normalized_mutual_info_score

    pair = _read_clusters(y_true, clusters, missing)
    return float(normalized_mutual_info_score(pair.true, pair.found, average_method=average))


def ami(
    y_true: Any,
    clusters: Any,
    *,
    average: Average = "arithmetic",
    missing: Collection[object] = (),
) -> float:
    """Mutual information of two groupings, corrected for chance.

    Small classes weigh more than in :func:`ari`.

    Parameters
    ----------
    y_true, clusters, missing
        See :func:`ari`.
    average
        See :func:`nmi`.

    Returns
    -------
    1 for equal groupings, about 0, also slightly below, for independent ones.

    Raises
    ------
    ValueError
        See :func:`ari`.

    References
    ----------
    Vinh, Epps and Bailey 2010, Information theoretic measures for clusterings comparison (JMLR
    11:2837).
    """
    from sklearn.metrics import adjusted_mutual_info_score

    pair = _read_clusters(y_true, clusters, missing)
    return float(adjusted_mutual_info_score(pair.true, pair.found, average_method=average))


def silhouette(
    features: ArrayLike,
    labels: Any,
    *,
    metric: str = "euclidean",
    n_sampled: int | None = None,
    seed: int = 0,
    missing: Collection[object] = (),
) -> float:
    """Mean over cells of how much nearer a cell is to its own group than to the next.

    For a cell with mean distance a to its own group and b to the nearest other one it is
    ``(b - a) / max(a, b)``; 0 for the only cell of a group. It favours round groups of equal
    width, and depends on the scale and number of features, so values for different embeddings
    do not compare.

    Parameters
    ----------
    features
        (n, d) embedding.
    labels
        (n,) groups. Cells without one are left out.
    metric
        Distance, by scikit-learn's name.
    n_sampled
        Score a random sample of as many cells. Time grows with the square of the cells: 10,000
        take seconds, 100,000 minutes. By default all cells are taken.
    seed
        Of the sample.
    missing
        Labels that stand for none; NaN and None always do.

    Returns
    -------
    From -1 to 1.

    Raises
    ------
    ValueError
        Shapes differ, features are not finite, or there are fewer than two groups, or as many
        as cells.
    """
    from sklearn.metrics import silhouette_score

    values = np.asarray(features)
    if values.ndim != 2 or len(values) != len(labels):
        msg = (
            f"features has the shape {values.shape} and there are {len(labels)} labels; expected "
            "(n, d) and n labels."
        )
        raise ValueError(msg)
    is_known = has_label(labels, missing)
    values = values[is_known]
    if n_bad := int((~np.isfinite(values)).any(axis=1).sum()):
        msg = f"{n_bad} of {len(values)} cells have NaN or infinite features; leave them out."
        raise ValueError(msg)
    groups = read_labels(labels, labels, missing, compared=False).true
    if n_sampled is not None and n_sampled < len(groups):
        chosen = np.random.default_rng(seed).choice(len(groups), n_sampled, replace=False)
        values, groups = values[chosen], groups[chosen]
    n_groups = len(np.unique(groups))
    if not 2 <= n_groups < len(groups):
        msg = (
            f"The silhouette needs at least 2 groups and fewer than cells; found {n_groups} groups "
            f"of {len(groups)} cells."
        )
        raise ValueError(msg)
    return float(silhouette_score(values, groups, metric=metric))


def _read_clusters(y_true: Any, clusters: Any, missing: Collection[object]) -> LabelPair:
    pair = read_labels(y_true, clusters, missing, compared=False)
    if n_without := int((pair.found < 0).sum()):
        msg = (
            f"{n_without} of {len(pair.found)} cells with a class have no cluster; give each one, "
            "or leave these cells out of both."
        )
        raise ValueError(msg)
    return pair
