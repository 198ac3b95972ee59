"""Scores of predicted values: of each gene or type over the cells, or of each cell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import jensenshannon

Per = Literal["column", "row"]
_Array = NDArray[np.float64]
_Function = Callable[[_Array, _Array], _Array]
_NAMED = (pd.Series, pd.DataFrame)

#: Numbers in a block that is computed in double precision at a time.
_BLOCK = 4_000_000
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
    is nothing to predict, and ``.mean()`` of the Series skips it. 0 where only the predicted ones
    are constant, where SciPy gives NaN: otherwise a method that predicts nothing for the hard
    genes would have them skipped in its mean.

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
    return _score("pearson", _correlation, y_true, y_pred, per, least=2)


def spearman(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Spearman correlation: Pearson's of the ranks, of each column over the rows.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`, also for what is returned and for errors.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.spearman([1.0, 2.0, 4.0], [1.0, 3.0, 4.0]), 3)
    1.0
    """
    from scipy.stats import rankdata

    def of_ranks(true: _Array, predicted: _Array) -> _Array:
        return _correlation(rankdata(true, axis=0), rankdata(predicted, axis=0))

    return _score("spearman", of_ranks, y_true, y_pred, per, least=2)


def rmse(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Root of the mean squared error, of each column over the rows.

    In the unit of the values: highly expressed genes have larger errors. The mean of the columns'
    roots is smaller than the root over all values.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`, also for errors; one value is enough.

    Returns
    -------
    A float for (n,), else a Series, at least 0.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.rmse([1.0, 2.0], [1.0, 4.0]), 3)
    1.414
    """
    return _score("rmse", lambda t, p: np.sqrt(np.mean((t - p) ** 2, axis=0)), y_true, y_pred, per)


def mae(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Mean absolute error, of each column over the rows.

    Where most values are 0, predicting 0 throughout does well.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`, also for errors; one value is enough.

    Returns
    -------
    A float for (n,), else a Series, at least 0.

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.mae([1.0, 2.0], [1.0, 4.0])
    1.0
    """
    return _score("mae", lambda t, p: np.mean(np.abs(t - p), axis=0), y_true, y_pred, per)


def cosine(y_true: Any, y_pred: Any, *, per: Per = "column") -> Any:
    """Cosine similarity, of each column over the rows.

    Parameters
    ----------
    y_true, y_pred, per
        See :func:`pearson`, also for errors.

    Returns
    -------
    A float for (n,), else a Series, from -1 to 1. NaN where the true values are all 0; 0 where only
    the predicted ones are.

    Examples
    --------
    >>> import stofm as st
    >>> round(st.metrics.cosine([1.0, 0.0], [1.0, 1.0]), 3)
    0.707
    """
    return _score("cosine", _cosine, y_true, y_pred, per)


def jensen_shannon(y_true: Any, y_pred: Any, *, per: Per = "row") -> Any:
    """Jensen-Shannon divergence of proportions, of each row (Lin 1991, IEEE TIT 37:145).

    Of base 2, so that the largest value is 1. SciPy's ``jensenshannon`` is its root, of base e;
    papers also differ in whether the types of a spot or the spots of a type are the distribution.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers, none negative; see :func:`pearson`, also for errors. Each
        distribution is divided by its sum.
    per
        ``"row"``: each spot is a distribution over types. ``"column"``: each type, or gene, is a
        distribution over spots.

    Returns
    -------
    A float for (n,), else a Series, at least 0; 0 for equal distributions. NaN where the true
    values are all 0; 1 where only the predicted ones are.

    Examples
    --------
    >>> import stofm as st
    >>> st.metrics.jensen_shannon([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]).tolist()
    [0.0, 1.0]
    """

    def distances(true: _Array, predicted: _Array) -> _Array:
        if (lowest := min(true.min(), predicted.min())) < 0:
            raise ValueError(
                f"Proportions are never negative; found {lowest:g}. Clip them at 0 first."
            )
        with np.errstate(invalid="ignore"):
            found = jensenshannon(true, predicted, base=2.0)
        # NaN where rounding leaves the divergence below 0, too.
        found = np.where(predicted.any(axis=0), np.nan_to_num(found), 1.0).clip(max=1.0)
        return np.where(true.any(axis=0), found, np.nan) ** 2

    return _score("jensen_shannon", distances, y_true, y_pred, per)


def _score(
    name: str, function: _Function, y_true: Any, y_pred: Any, per: Per, *, least: int = 1
) -> Any:
    return score_columns(read_values(y_true, y_pred, per, least=least), function, name)


def read_values(
    y_true: Any, y_pred: Any, per: Per = "column", *, least: int = 1
) -> tuple[_Array, _Array, pd.Index | None]:
    """True and predicted values whose columns are scored, and their names; None for vectors."""
    true = _numbers(y_true, "y_true")
    predicted = _numbers(in_same_order(y_true, y_pred), "y_pred")
    if true.shape != predicted.shape or true.ndim not in (1, 2) or true.size == 0:
        raise ValueError(
            f"y_true has the shape {true.shape} and y_pred {predicted.shape}; expected the same "
            "shape, (n,) or (n, k), with at least one value."
        )
    if per not in ("column", "row"):
        raise ValueError(f"per must be 'column' or 'row', found {per!r}.")
    names = None
    if true.ndim == 1:
        true, predicted = true[:, None], predicted[:, None]
    else:
        frame = next((y for y in (y_true, y_pred) if isinstance(y, pd.DataFrame)), None)
        names = (pd.DataFrame(true) if frame is None else frame).axes[per == "column"]
        if per == "row":
            true, predicted = true.T, predicted.T
    if len(true) < least:
        raise ValueError(
            f"A correlation needs at least {least} values for each {per}; found {len(true)}."
        )
    return true, predicted, names


def _numbers(values: Any, name: str) -> NDArray[Any]:
    if sparse.issparse(values):
        raise TypeError(f"{name} is sparse; pass the columns that you compare as .toarray().")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers; found the type {array.dtype}.")
    if n_bad := int(array.size - np.isfinite(array).sum()):
        raise ValueError(
            f"{n_bad} of {array.size} values of {name} are NaN or infinite; leave them out."
        )
    return array


def in_same_order(first: Any, second: Any) -> Any:
    """`second` in the order of `first` by names, if both are Series or both DataFrames."""
    if not any(isinstance(first, kind) and isinstance(second, kind) for kind in _NAMED):
        return second
    for axis, names in enumerate(first.axes):
        other = second.axes[axis]
        if names.equals(other):
            continue
        unpaired = [*names.symmetric_difference(other), *names[names.duplicated()]]
        if unpaired := [*unpaired, *other[other.duplicated()]]:
            raise ValueError(
                f"The {('rows', 'columns')[axis]} of y_true and y_pred can't be paired by name: "
                f"{unpaired[:3]} are in one of them only, or twice. Select the common ones, or "
                "pass arrays to pair by position."
            )
        second = second.reindex(names, axis=axis)
    return second


def score_columns(
    values: tuple[_Array, _Array, pd.Index | None],
    function: _Function,
    name: str,
) -> Any:
    """Score each column, block by block: a float for vectors, else a Series."""
    true, predicted, names = values
    step = max(1, _BLOCK // len(true))
    parts = []
    for start in range(0, true.shape[1], step):
        block = slice(start, start + step)
        parts.append(function(*(one[:, block].astype(np.float64) for one in (true, predicted))))
    scores = np.concatenate(parts)
    return float(scores[0]) if names is None else pd.Series(scores, index=names, name=name)


def _cosine(true: _Array, predicted: _Array, *, centred: bool = False) -> _Array:
    """Cosine of columns: NaN where the true one is flat, 0 where only the predicted one is."""
    units, flat = [], []
    for values in (true, predicted):
        mean = values.mean(axis=0) * centred
        rest = values - mean
        largest = np.abs(rest).max(axis=0)
        flat.append(largest <= _ROUNDING * np.abs(mean))
        # Squares of very small or large numbers leave the range of floats.
        rest /= np.where(flat[-1], 1.0, largest)
        units.append(np.where(flat[-1], 0.0, rest / (np.linalg.norm(rest, axis=0) + flat[-1])))
    return np.where(flat[0], np.nan, np.clip((units[0] * units[1]).sum(axis=0), -1.0, 1.0))


_correlation = partial(_cosine, centred=True)
