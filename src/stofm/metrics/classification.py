"""Scores of predicted classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm.metrics._inputs import LabelPair, read_labels

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

Classes = Literal["true", "union"]


def accuracy(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Share of cells with the right class.

    High wherever one class dominates; look at :func:`macro_f1` too.

    Parameters
    ----------
    y_true, y_pred
        (n,) classes: list, array, categorical or Series. Two Series are paired by their index,
        all else by position.
    missing
        Labels that stand for none, such as ``["Unknown"]``; NaN and None always do. Cells
        without a true label are left out. A cell without a predicted one counts as wrong.

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
    labels = read_labels(y_true, y_pred, missing)
    return float(np.mean(labels.true == labels.found))


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
        Classes that are averaged over. ``"true"``: those of the cells. ``"union"``: also classes
        that occur in predictions only, each with an F1 of 0, which is scikit-learn's default:
        a single cell that is taken for a class which the slice does not have lowers the mean as
        much as a class that is wrong throughout. Or a list of classes.

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
    labels = read_labels(y_true, y_pred, missing)
    return _f1(labels, _numbers_of(classes, labels), "macro")


def weighted_f1(y_true: Any, y_pred: Any, *, missing: Collection[object] = ()) -> float:
    """Mean over classes of F1, each weighted by its number of cells.

    It follows the large classes as :func:`accuracy` does, and it may lie outside the range of
    precision and recall.

    Parameters
    ----------
    y_true, y_pred, missing
        See :func:`accuracy`.

    Returns
    -------
    From 0 to 1.

    Raises
    ------
    TypeError, ValueError
        See :func:`accuracy`.
    """
    labels = read_labels(y_true, y_pred, missing)
    return _f1(labels, np.unique(labels.true), "weighted")


def _f1(labels: LabelPair, classes: NDArray[np.int64], average: str) -> float:
    from sklearn.metrics import f1_score

    return float(
        f1_score(labels.true, labels.found, labels=classes, average=average, zero_division=0.0)
    )


def _numbers_of(classes: Classes | Collection[object], labels: LabelPair) -> NDArray[np.int64]:
    if isinstance(classes, str):
        if classes not in ("true", "union"):
            msg = f"classes must be 'true', 'union' or a list of classes, found {classes!r}."
            raise ValueError(msg)
        used = labels.true if classes == "true" else np.r_[labels.true, labels.found]
        return np.unique(used[used >= 0])
    known = {name: number for number, name in enumerate(labels.names)}
    unknown = [name for name in classes if name not in known]
    if unknown or not len(classes):
        msg = (
            f"classes holds {unknown or 'nothing'}; expected classes that occur: "
            f"{labels.names[:10].tolist()}."
        )
        raise ValueError(msg)
    return np.unique([known[name] for name in classes])
