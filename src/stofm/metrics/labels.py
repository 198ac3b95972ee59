"""Scores of predicted classes, of their confidence, and of clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from stofm.metrics.values import in_same_order

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import ArrayLike, NDArray

Classes = Literal["true", "union"]
Average = Literal["arithmetic", "geometric", "min", "max"]


def accuracy(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Share of cells with the right class: high wherever one class dominates.

    Parameters
    ----------
    y_true, y_pred
        (n,) classes: list, array, categorical or Series. Two Series are paired by their index,
        all else by position.
    missing
        Labels treated as missing, such as ``["Unknown"]``, besides NaN and None. Cells without a
        true label are left out; a cell without a predicted one counts as wrong.

    Returns
    -------
    From 0 to 1.

    Raises
    ------
    TypeError
        Text on one side and numbers on the other.
    ValueError
        Lengths or indices differ, or no cell has a true label.

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.accuracy(["a", "a", "b", None], ["a", "b", "b", "b"])
    0.6666666666666666
    """
    true, found, _ = _read_labels(y_true, y_pred, missing)
    return float(np.mean(true == found))


def macro_f1(
    y_true: Any,
    y_pred: Any,
    *,
    classes: Classes | Collection[object] = "true",
    missing: Collection[object] = (),
) -> float:
    """Mean over classes of F1, the harmonic mean of precision and recall.

    Each class weighs the same however few cells it has, and one that is never predicted counts 0.

    Parameters
    ----------
    y_true, y_pred, missing
        See :func:`accuracy`.
    classes
        Classes to average over. ``"true"``: those of the cells. ``"union"``: also classes that
        are only predicted, each with an F1 of 0, as in scikit-learn by default; a single cell
        assigned to an absent class then lowers the mean as much as a class that is wrong
        throughout. Or a list of classes.

    Returns
    -------
    From 0 to 1.

    Raises
    ------
    TypeError, ValueError
        See :func:`accuracy`; or `classes` is empty or holds a class that no cell has.

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.macro_f1(["a", "a", "b"], ["a", "a", "c"])
    0.5
    """
    true, found, names = _read_labels(y_true, y_pred, missing)
    if classes == "true":
        scored = np.unique(true)
    elif classes == "union":
        scored = np.unique(np.r_[true, found[found >= 0]])
    elif isinstance(classes, str) or not len(classes) or not set(classes) <= set(names):
        raise ValueError(
            f"classes must be 'true', 'union' or a list of classes that occur ({names[:10]}), "
            f"found {classes!r}."
        )
    else:
        scored = np.unique([names.index(name) for name in classes])
    return _f1(true, found, scored, "macro")


def weighted_f1(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Mean over classes of F1, each weighted by its number of cells.

    Like :func:`accuracy` it follows the large classes. It may lie outside the range of precision
    and recall.

    Parameters
    ----------
    y_true, y_pred, missing
        See :func:`accuracy`, also for errors.

    Returns
    -------
    From 0 to 1.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.weighted_f1(["a", "a", "b"], ["a", "a", "c"]), 3)
    0.667
    """
    true, found, _ = _read_labels(y_true, y_pred, missing)
    return _f1(true, found, np.unique(true), "weighted")


def ari(y_true: Any, clusters: Any, *, missing: Collection[object] = ()) -> float:
    """Adjusted Rand index: pairs of cells on which two groupings agree, corrected for chance.

    Names of clusters do not matter. Pairs grow with the square of a class, so large classes
    decide (Hubert and Arabie 1985, J Classif 2:193).

    Parameters
    ----------
    y_true, clusters
        (n,) classes and clusters: list, array, categorical or Series. Two Series are paired by
        their index, all else by position.
    missing
        Labels treated as missing, besides NaN and None. Cells without a true class are left out.

    Returns
    -------
    1 for equal groupings, about 0 for independent ones, down to -0.5.

    Raises
    ------
    ValueError
        Lengths or indices differ, no cell has a class, or one with a class has no cluster.

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.ari(["a", "a", "b", "b"], [1, 1, 0, 0])
    1.0
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_read_clusters(y_true, clusters, missing)))


def nmi(
    y_true: Any,
    clusters: Any,
    *,
    average: Average = "arithmetic",
    missing: Collection[object] = (),
) -> float:
    """Normalised mutual information of two groupings.

    Not corrected for chance: it rises with the number of clusters, even of random ones. Compare
    groupings with the same number of clusters only, or use :func:`ami`.

    Parameters
    ----------
    y_true, clusters, missing
        See :func:`ari`, also for errors.
    average
        Mean of the two entropies to divide by. Papers differ: scikit-learn took the geometric
        mean before version 0.22.

    Returns
    -------
    From 0 to 1.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.nmi(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.8
    """
    from sklearn.metrics import normalized_mutual_info_score

    pair = _read_clusters(y_true, clusters, missing)
    return float(normalized_mutual_info_score(*pair, average_method=average))


def ami(
    y_true: Any,
    clusters: Any,
    *,
    average: Average = "arithmetic",
    missing: Collection[object] = (),
) -> float:
    """Mutual information of two groupings, corrected for chance.

    Small classes weigh more than in :func:`ari` (Vinh, Epps and Bailey 2010, JMLR 11:2837).

    Parameters
    ----------
    y_true, clusters, average, missing
        See :func:`nmi`.

    Returns
    -------
    1 for equal groupings, about 0, sometimes slightly below, for independent ones.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.ami(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.571
    """
    from sklearn.metrics import adjusted_mutual_info_score

    pair = _read_clusters(y_true, clusters, missing)
    return float(adjusted_mutual_info_score(*pair, average_method=average))


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

    With mean distances a to its own group and b to the nearest other one, a cell scores
    ``(b - a) / max(a, b)``; the only cell of a group scores 0. It favours round groups of equal
    width, and depends on the scale and number of features: do not compare embeddings with it.

    Parameters
    ----------
    features
        (n, d) embedding.
    labels
        (n,) groups. Cells without one are left out.
    metric
        Distance, by scikit-learn's name.
    n_sampled
        Number of random cells to score; None: all. Time grows with the square of the cells:
        10,000 take seconds, 100,000 minutes.
    seed
        Seed of the sample.
    missing
        Labels treated as missing, besides NaN and None.

    Returns
    -------
    From -1 to 1.

    Raises
    ------
    ValueError
        Shapes differ, features are not finite, or there are fewer than two groups, or as many
        as cells.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.silhouette([[0.0], [0.1], [5.0], [5.1]], ["a", "a", "b", "b"]), 2)
    0.98
    """
    from sklearn.metrics import silhouette_score

    values = np.asarray(features)
    if values.ndim != 2 or len(values) != len(labels):
        raise ValueError(
            f"Expected features (n, d) and n labels, found {values.shape} and {len(labels)}."
        )
    groups, _, _ = _read_labels(labels, labels, missing)
    values = values[_to_series(labels, missing).notna()]
    sample = {"sample_size": n_sampled, "random_state": seed}
    return float(silhouette_score(values, groups, metric=metric, **sample))


class Reliability(NamedTuple):
    """Mean confidence, accuracy and number of cells of bins of equally many cells, (n_bins,) each.

    Of cells with a confidence of 0.8, four in five should be right.
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
        found = [(confidence[rows].mean(), is_right[rows].mean(), len(rows)) for rows in bins]
        return cls(*map(np.array, zip(*found, strict=True)))

    @property
    def error(self) -> float:
        """Expected calibration error: mean over cells of the bins' distance from the diagonal."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.n_cells))

    @property
    def spread(self) -> NDArray[np.float64]:
        """Standard error (n_bins,) of the accuracy, of a binomial with one cell added to each."""
        share = (self.accuracy * self.n_cells + 1.0) / (self.n_cells + 2.0)
        return np.sqrt(share * (1.0 - share) / (self.n_cells + 2.0))


def _read_labels(
    y_true: Any, y_pred: Any, missing: Collection[object], *, are_clusters: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Any]]:
    """Numbers of the labels of cells with a true one, -1 for no prediction, and the labels' names."""
    true, found = _to_series(y_true, missing), _to_series(in_same_order(y_true, y_pred), missing)
    if len(true) != len(found):
        raise ValueError(
            f"y_true has {len(true)} labels and y_pred {len(found)}; give one of each per cell."
        )
    known = true.notna()
    if not known.any():
        raise ValueError(
            f"None of {len(true)} cells has a true label; NaN, None and {list(missing)} are none."
        )
    true, found = true[known], found[known]
    examples = [labels.dropna().unique().tolist() for labels in (true, found)]
    kinds = [{isinstance(label, str) for label in labels} for labels in examples]
    if not are_clusters and kinds[1] and kinds[0] != kinds[1]:
        raise TypeError(
            f"Labels must be of one kind: y_true holds {examples[0][:3]}, y_pred "
            f"{examples[1][:3]}. Convert both with .astype(str)."
        )
    codes, names = pd.factorize(pd.concat([true, found], ignore_index=True))
    return codes[: len(true)], codes[len(true) :], list(names)


def _read_clusters(
    y_true: Any, clusters: Any, missing: Collection[object]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of clusters, which have names of their own; each cell must be in one."""
    true, found, _ = _read_labels(y_true, clusters, missing, are_clusters=True)
    if n_without := int((found < 0).sum()):
        raise ValueError(
            f"{n_without} of {len(found)} cells with a class have no cluster; leave them out."
        )
    return true, found


def _to_series(labels: Any, missing: Collection[object]) -> pd.Series:
    """Labels by position, None where there is none."""
    if np.ndim(labels) != 1:
        raise ValueError(f"Give one label per cell; found the shape {np.shape(labels)}.")
    series = pd.Series(labels).astype(object).reset_index(drop=True)
    return series.where(series.notna() & ~series.isin(list(missing)), None)


def _f1(
    true: NDArray[np.int64], found: NDArray[np.int64], classes: NDArray[np.int64], average: str
) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(true, found, labels=classes, average=average, zero_division=0.0))
