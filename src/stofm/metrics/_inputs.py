"""What the metrics take: labels and values of the same cells, checked and put in one order."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

Per = Literal["column", "row"]

#: Numbers in a block that is computed in double precision at a time.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class LabelPair:
    """True and found labels of the cells that have a true one.

    Attributes
    ----------
    true, found
        (n,) numbers of the labels; -1 in `found` for none.
    names
        Labels by number.
    """

    true: NDArray[np.int64]
    found: NDArray[np.int64]
    names: NDArray[np.object_]


def read_labels(
    y_true: Any, y_pred: Any, missing: Collection[object], *, compared: bool = True
) -> LabelPair:
    """Pair true and predicted labels, and leave out cells without a true one.

    Parameters
    ----------
    y_true, y_pred
        (n,) labels: list, array, categorical or Series. Two Series are paired by their index.
    missing
        Labels that stand for none, besides NaN and None.
    compared
        Whether a label must mean the same in both, so that text and numbers can't be mixed.

    Raises
    ------
    TypeError
        Labels are neither text nor numbers, or text on one side and numbers on the other.
    ValueError
        The lengths or the indices differ, or no cell has a true label.
    """
    if isinstance(y_true, pd.Series) and isinstance(y_pred, pd.Series):
        y_pred = _same_rows(y_true, y_pred)
    true, found = (_label_series(y, name) for y, name in ((y_true, "y_true"), (y_pred, "y_pred")))
    if len(true) != len(found):
        msg = f"y_true has {len(true)} labels and y_pred {len(found)}; give one of each per cell."
        raise ValueError(msg)
    absent = list(missing)
    known = has_label(true, absent)
    if not known.any():
        msg = (
            f"None of {len(true)} cells has a true label (NaN, None and {absent} count as none); "
            "pass labelled cells."
        )
        raise ValueError(msg)
    true, found = true[known], found[known]
    found = found.where(has_label(found, absent), None)
    if compared:
        _refuse_mixed_kinds(true, found)
        codes, names = pd.factorize(pd.concat([true, found], ignore_index=True))
        return LabelPair(codes[: len(true)], codes[len(true) :], np.asarray(names, dtype=object))
    codes, names = pd.factorize(true)
    return LabelPair(codes, pd.factorize(found)[0], np.asarray(names, dtype=object))


def has_label(labels: Any, missing: Collection[object]) -> NDArray[np.bool_]:
    """Whether each cell has a label that does not stand for none."""
    column = pd.Series(labels).astype(object)
    absent: NDArray[np.bool_] = (column.isna() | column.isin(list(missing))).to_numpy()
    return ~absent


def _label_series(labels: Any, name: str) -> pd.Series:
    if np.ndim(labels) != 1:
        msg = f"{name} must hold one label per cell; found the shape {np.shape(labels)}."
        raise ValueError(msg)
    series = pd.Series(labels).astype(object).reset_index(drop=True)
    known = series[series.notna()]
    strange = [x for x in known.unique() if not isinstance(x, (str, numbers.Number, np.bool_))]
    if strange:
        msg = f"Labels must be text or numbers; {name} holds {strange[0]!r}."
        raise TypeError(msg)
    return series


def _refuse_mixed_kinds(true: pd.Series, found: pd.Series) -> None:
    kinds = [{isinstance(x, str) for x in y[y.notna()].unique()} for y in (true, found)]
    if kinds[1] and kinds[0] != kinds[1]:
        examples = [y[y.notna()].unique()[:3].tolist() for y in (true, found)]
        msg = (
            f"Labels must be of one kind: y_true holds {examples[0]}, y_pred {examples[1]}. "
            "Convert both with .astype(str)."
        )
        raise TypeError(msg)


@dataclass(frozen=True)
class ValuePair:
    """True and predicted values in the same order.

    Attributes
    ----------
    true, predicted
        (n, k).
    rows, columns
        Names.
    is_vector
        Whether a single vector was given, so that the score is a single number.
    """

    true: NDArray[Any]
    predicted: NDArray[Any]
    rows: pd.Index
    columns: pd.Index
    is_vector: bool

    def score(
        self,
        function: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
        per: Per,
        name: str,
    ) -> Any:
        """Score each column, or each row, with `function` of two (m, k) blocks.

        Returns
        -------
        A float for a vector, else a Series named `name`.
        """
        if per not in ("column", "row"):
            msg = f"per must be 'column' or 'row', found {per!r}."
            raise ValueError(msg)
        by_row = per == "row" and not self.is_vector
        true, predicted = (self.true.T, self.predicted.T) if by_row else (self.true, self.predicted)
        scores = np.empty(true.shape[1])
        step = max(1, _BLOCK // len(true))
        for start in range(0, len(scores), step):
            block = slice(start, start + step)
            scores[block] = function(
                true[:, block].astype(np.float64), predicted[:, block].astype(np.float64)
            )
        if self.is_vector:
            return float(scores[0])
        return pd.Series(scores, index=self.rows if by_row else self.columns, name=name)


def read_values(y_true: Any, y_pred: Any) -> ValuePair:
    """Pair true and predicted values.

    Parameters
    ----------
    y_true, y_pred
        (n,) or (n, k) numbers: array, Series or DataFrame. Two DataFrames are paired by the names
        of their rows and columns, two Series by their index; all else by position.

    Raises
    ------
    TypeError
        A sparse matrix, or something other than numbers.
    ValueError
        Shapes or names differ, values are not finite, or there are none.
    """
    if isinstance(y_true, pd.Series) and isinstance(y_pred, pd.Series):
        y_pred = _same_rows(y_true, y_pred)
    if isinstance(y_true, pd.DataFrame) and isinstance(y_pred, pd.DataFrame):
        y_pred = _same_columns(y_true, _same_rows(y_true, y_pred))
    true, predicted = _numbers(y_true, "y_true"), _numbers(y_pred, "y_pred")
    if true.shape != predicted.shape or true.ndim not in (1, 2) or true.size == 0:
        msg = (
            f"y_true has the shape {true.shape} and y_pred {predicted.shape}; expected the same "
            "shape, (n,) or (n, k), with at least one value."
        )
        raise ValueError(msg)
    for values, name in ((true, "y_true"), (predicted, "y_pred")):
        if n_bad := int(values.size - np.isfinite(values).sum()):
            msg = (
                f"{n_bad} of {values.size} values of {name} are NaN or infinite; leave those rows "
                "or columns out of both."
            )
            raise ValueError(msg)
    is_vector = true.ndim == 1
    frame = next((y for y in (y_true, y_pred) if isinstance(y, pd.DataFrame)), None)
    if is_vector:
        true, predicted = true[:, None], predicted[:, None]
    return ValuePair(
        true,
        predicted,
        rows=pd.RangeIndex(len(true)) if frame is None else frame.index,
        columns=pd.RangeIndex(true.shape[1]) if frame is None else frame.columns,
        is_vector=is_vector,
    )


def _numbers(values: Any, name: str) -> NDArray[Any]:
    if sparse.issparse(values):
        msg = f"{name} is sparse; pass the columns that you compare as .toarray()."
        raise TypeError(msg)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        msg = f"{name} must hold numbers; found the type {array.dtype}."
        raise TypeError(msg)
    return array


def _same_rows(first: Any, second: Any) -> Any:
    """Put the rows of `second` in the order of `first`."""
    if first.index.equals(second.index):
        return second
    _refuse_unlike_names(first.index, second.index, "rows")
    return second.loc[first.index]


def _same_columns(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Put the columns of `second` in the order of `first`."""
    if first.columns.equals(second.columns):
        return second
    _refuse_unlike_names(first.columns, second.columns, "columns")
    return second[first.columns]


def _refuse_unlike_names(first: pd.Index, second: pd.Index, kind: str) -> None:
    if not (first.is_unique and second.is_unique):
        twice = next(i[i.duplicated()][0] for i in (first, second) if not i.is_unique)
        msg = (
            f"The {kind} of y_true and y_pred differ in order and {twice!r} occurs more than once, "
            f"so they can't be paired by name. Make the names unique, or pass arrays to pair by "
            "position."
        )
        raise ValueError(msg)
    lacks = [first.difference(second, sort=False), second.difference(first, sort=False)]
    if len(lacks[0]) or len(lacks[1]):
        msg = (
            f"{len(lacks[0])} {kind} of y_true are not in y_pred ({lacks[0][:3].tolist()}) and "
            f"{len(lacks[1])} of y_pred not in y_true ({lacks[1][:3].tolist()}). Select the common "
            "ones, or pass arrays to pair by position."
        )
        raise ValueError(msg)
