"""Scores of predicted values: of each gene or type over the cells, or of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import rel_entr

from stofm.metrics._inputs import Per, ValuePair, read_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Spread, relative to the mean, below which only rounding tells values apart.
_ROUNDING = 1e-13


def pearson(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Pearson correlation, of each column over the rows.

    Blind to scale and offset: see :func:`rmse` too. The mean over genes is not the correlation
    of all values at once, which mostly tells that some genes are higher than others.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers, rows being cells and columns genes or types: array, Series or
        DataFrame. Two DataFrames are paired by the names of their rows and columns, two Series
        by their index, all else by position.
    per
        ``"column"``: a score for each gene or type. ``"row"``: one for each cell.

    Returns
    -------
    A float for (n,), else a Series, from -1 to 1. NaN where the true values are constant: there
    is nothing to predict, and ``.mean()`` of the Series leaves it out. 0 where only the
    predicted ones are constant, where SciPy gives NaN: else a method that predicts nothing
    for the hard genes would have them left out of its mean.

    Raises
    ------
    TypeError
        Values are sparse, or no numbers.
    ValueError
        Shapes or names differ, values are not finite, or there are fewer than two to correlate.

    Examples
    --------
    >>> import numpy as np
    >>> import stofm as st
    >>> true = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    >>> st.metrics.pearson(true, 2 * true + 1).round(6).tolist()
    [1.0, nan]
    """
    return _to_correlate(y_true, y_pred, per).score(_pearson, per, "pearson")


def spearman(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Spearman correlation: Pearson's of the ranks, of each column over the rows.

    Ties share their mean rank. Where most counts are 0, their order in the prediction is not
    scored, and the correlation is low for good predictions too.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`.

    Returns
    -------
    See :func:`pearson`.

    Raises
    ------
    TypeError, ValueError
        See :func:`pearson`.
    """
    return _to_correlate(y_true, y_pred, per).score(_spearman, per, "spearman")


def rmse(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Root of the mean squared error, of each column over the rows.

    In the unit of the values: highly expressed genes have larger errors. The mean of the columns'
    roots is smaller than the root over all values.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`.

    Returns
    -------
    A float for (n,), else a Series, at least 0.

    Raises
    ------
    TypeError, ValueError
        See :func:`pearson`; one value is enough.
    """
    return read_values(y_true, y_pred).score(
        lambda true, predicted: np.sqrt(np.mean((true - predicted) ** 2, axis=0)), per, "rmse"
    )


def mae(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Mean absolute error, of each column over the rows.

    Where most values are 0, predicting 0 throughout does well.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`.

    Returns
    -------
    A float for (n,), else a Series, at least 0.

    Raises
    ------
    TypeError, ValueError
        See :func:`pearson`; one value is enough.
    """
    return read_values(y_true, y_pred).score(
        lambda true, predicted: np.mean(np.abs(true - predicted), axis=0), per, "mae"
    )


def cosine(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Cosine similarity, of each column over the rows.

    Values are not centred: of two non-negative maps without any relation it is well above 0.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`.

    Returns
    -------
    A float for (n,), else a Series, from -1 to 1. NaN where the true values are all 0; 0 where
    only the predicted ones are.

    Raises
    ------
    TypeError, ValueError
        See :func:`pearson`; one value is enough.
    """
    return read_values(y_true, y_pred).score(_cosine, per, "cosine")


def jensen_shannon(
    y_true: Any, y_pred: Any, *, per: Per = "row", base: float = 2.0, root: bool = False
) -> Any:
    """Jensen-Shannon divergence of proportions, of each row.

    Papers differ in three things that all go by this name: the divergence or its root (the
    distance, which SciPy's ``jensenshannon`` gives), the logarithm's base (SciPy's is e), and
    whether the types of a spot or the spots of a type are the distribution.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers, none negative; see :func:`pearson`. Each row is divided by its
        sum.
    per
        ``"row"``: each spot is a distribution over types. ``"column"``: each type, or gene, is a
        distribution over spots.
    base
        Of the logarithm. With 2 the largest value is 1.
    root
        Return the root of the divergence, a distance.

    Returns
    -------
    A float for (n,), else a Series, at least 0; 0 for equal distributions. NaN where the true
    values are all 0; the largest value where only the predicted ones are.

    Raises
    ------
    TypeError, ValueError
        See :func:`pearson`; or a value is negative, or `base` is not above 1.

    References
    ----------
    Lin 1991, Divergence measures based on the Shannon entropy (IEEE Trans Inf Theory 37:145).

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.jensen_shannon([1.0, 0.0], [0.0, 1.0])
    1.0
    """
    if not base > 1.0:
        msg = f"base must be above 1, found {base!r}."
        raise ValueError(msg)
    pair = read_values(y_true, y_pred)
    for values, name in ((pair.true, "y_true"), (pair.predicted, "y_pred")):
        if n_negative := int((values < 0).sum()):
            msg = (
                f"{n_negative} values of {name} are negative, which proportions never are; the "
                f"smallest is {values.min():g}. Clip them at 0 first."
            )
            raise ValueError(msg)

    def divergence(
        true: NDArray[np.float64], predicted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        amount: NDArray[np.float64] = _jensen_shannon(true, predicted) / np.log(base)
        return amount**0.5 if root else amount

    return pair.score(divergence, per, "jensen_shannon")


def _to_correlate(y_true: Any, y_pred: Any, per: Per) -> ValuePair:
    pair = read_values(y_true, y_pred)
    by_row = per == "row" and not pair.is_vector
    n_values = pair.true.shape[1 if by_row else 0]
    if n_values < 2:
        msg = f"A correlation needs at least 2 values for each {per}; found {n_values}."
        raise ValueError(msg)
    return pair


def _pearson(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    directions, flat = zip(*map(_direction, (true, predicted)), strict=True)
    r = np.clip((directions[0] * directions[1]).sum(axis=0), -1.0, 1.0)
    return np.where(flat[0], np.nan, np.where(flat[1], 0.0, r))


def _direction(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Centred columns of unit length, and which columns are constant."""
    mean = values.mean(axis=0)
    centred = values - mean
    # Squares of very small or large numbers leave the range of floats.
    largest = np.abs(centred).max(axis=0)
    is_flat = (np.ptp(values, axis=0) == 0) | (largest <= _ROUNDING * np.abs(mean))
    centred /= np.where(is_flat, 1.0, largest)
    return centred / np.where(is_flat, 1.0, np.linalg.norm(centred, axis=0)), is_flat


def _spearman(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return _pearson(rankdata(true, axis=0), rankdata(predicted, axis=0))


def _cosine(true: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    units, empty = [], []
    for values in (true, predicted):
        largest = np.abs(values).max(axis=0)
        scaled = values / np.where(largest > 0, largest, 1.0)
        units.append(scaled / np.where(largest > 0, np.linalg.norm(scaled, axis=0), 1.0))
        empty.append(largest == 0)
    similarity = np.clip((units[0] * units[1]).sum(axis=0), -1.0, 1.0)
    return np.where(empty[0], np.nan, similarity)


def _jensen_shannon(
    true: NDArray[np.float64], predicted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Divergence in nats."""
    totals = [values.sum(axis=0) for values in (true, predicted)]
    p, q = (
        values / np.where(total > 0, total, 1.0)
        for values, total in zip((true, predicted), totals, strict=True)
    )
    middle = (p + q) / 2
    amount = (rel_entr(p, middle).sum(axis=0) + rel_entr(q, middle).sum(axis=0)) / 2
    amount = np.where(totals[1] > 0, np.clip(amount, 0.0, np.log(2.0)), np.log(2.0))
    return np.where(totals[0] > 0, amount, np.nan)
