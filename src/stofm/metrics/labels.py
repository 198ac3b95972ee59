"""Scores of predicted classes, of their confidence, and of clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from stofm.metrics.values import in_same_order

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import ArrayLike, NDArray


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
    true, found = _read_labels(y_true, y_pred, missing)
    return float(np.mean(true == found))


def macro_f1(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Mean of F1, the harmonic mean of precision and recall, over the classes that the cells have.

    Each class weighs the same however few cells it has, and one that is never predicted counts 0.
    Classes that are only predicted do not count; scikit-learn counts them as 0 by default.

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
    >>> st.metrics.macro_f1(["a", "a", "b"], ["a", "a", "c"])
    0.5
    """
    return _f1(y_true, y_pred, missing, "macro")


def weighted_f1(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Mean over classes of F1, each weighted by its number of cells.

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
    return _f1(y_true, y_pred, missing, "weighted")


def _f1(y_true: Any, y_pred: Any, missing: Collection[object], average: str) -> float:
    from sklearn.metrics import f1_score

    true, found = _read_labels(y_true, y_pred, missing)
    own = np.unique(true)
    return float(f1_score(true, found, labels=own, average=average, zero_division=0.0))


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


def nmi(y_true: Any, clusters: Any, *, missing: Collection[object] = ()) -> float:
    """Normalised mutual information of two groupings.

    The information is divided by the arithmetic mean of the two entropies; scikit-learn took the
    geometric mean before version 0.22. Not corrected for chance: it rises with the number of
    clusters, even of random ones. Compare groupings with the same number of clusters only, or use :func:`ami`.

    Parameters
    ----------
    y_true, clusters, missing
        See :func:`ari`, also for errors.

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

    return float(normalized_mutual_info_score(*_read_clusters(y_true, clusters, missing)))


def ami(y_true: Any, clusters: Any, *, missing: Collection[object] = ()) -> float:
    """Mutual information of two groupings, corrected for chance.

    Small classes weigh more than in :func:`ari` (Vinh, Epps and Bailey 2010, JMLR 11:2837).

    Parameters
    ----------
    y_true, clusters, missing
        See :func:`ari`, also for errors.

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

    return float(adjusted_mutual_info_score(*_read_clusters(y_true, clusters, missing)))


def silhouette(features: ArrayLike, labels: Any, *, missing: Collection[object] = ()) -> float:
    """Mean over cells of how much nearer a cell is to its own group than to the next.

    Parameters
    ----------
    features
        (n, d) embeddings; distances between them are Euclidean, and computed for all pairs.
    labels, missing
        Groups of the cells, as in :func:`accuracy`, also for errors; cells without one are left out.

    Returns
    -------
    From -1 to 1.

    Raises
    ------
    ValueError
        There is one group, or each cell is one; or `features` do not fit `labels`, or are not finite.

    Examples
    --------
    >>> import stofm as st
    >>> float(st.metrics.silhouette([[0.0], [0.0], [1.0], [1.0]], ["a", "a", "b", "b"]))
    1.0
    """
    from sklearn.metrics import silhouette_score

    known = _to_series(labels, missing).notna()
    return float(
        silhouette_score(np.asarray(features)[known], _read_labels(labels, labels, missing)[0])
    )


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
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the labels of cells with a true one, -1 for no prediction."""
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
    codes = pd.factorize(pd.concat([true, found], ignore_index=True))[0]
    return codes[: len(true)], codes[len(true) :]


def _read_clusters(
    y_true: Any, clusters: Any, missing: Collection[object]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of clusters, which have names of their own; each cell must be in one."""
    true, found = _read_labels(y_true, clusters, missing, are_clusters=True)
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
