"""Labels of cells as classes to learn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.tables import label_text
from stofm._logging import logger
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.slices import SliceTables


#: What labels that stand for none mean, and smallest share of a class of cells, unless others are
#: asked for. By default such labels are known by their words, not by this list.
MISSING: Final = ("unknown", "unassigned", "other", "nan", "doublet", "low quality")
MIN_SHARE: Final = 0.01
#: Such labels, in lower case and without words for cells; one of marks alone, such as ?, is one too.
_NO_CLASS: Final = re.compile(
    r"(un|not |non ?)(known|assign\w*|annotated|label?led|classifi\w+|determined|defined|identified"
    r"|specified|resolved|mapped|named|typed|available|applicable|clear|certain|sure|decided)( ?\d+)?"
    r"|unk|n ?a|nan|none|null|missing|no (label|call|match|annotation|type)|tbd|indeterminate"
    r"|ambiguous|others?|low ?q(uality|c)?|poor ?quality|(doublet|multiplet)s?( .*)?"
)
_CELLS: Final = re.compile(r"\b(cells?|(cell ?)?types?|clusters?|spots?)\b")
_MARKS: Final = re.compile(r"[^\w+]+|_+")


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes of cells.

    Attributes
    ----------
    classes
        Names in alphabetical order.
    codes
        (n_obs,) number of each cell's class; -1 for none, or one that is left out.
    left_out
        Rare classes that are left out.
    """

    classes: tuple[str, ...]
    codes: NDArray[np.int64]
    left_out: tuple[str, ...]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n_obs,) whether a cell has a class."""
        return self.codes >= 0


def read_labels(
    slices: SliceTables, key: str, *, missing: Collection[object] = (), min_share: float = 0.0
) -> Labels:
    """Read a column of labels, leave out missing ones and rare classes.

    What is left out by default is warned of; what is asked for, or has no label, is told.

    Parameters
    ----------
    slices
        The cells.
    key
        Column of ``obs``.
    missing
        Labels that stand for none, in whatever case, besides NaN and blank ones; with
        :data:`MISSING` itself all that reads like one.
    min_share
        Smallest share of the labelled cells that a class must have.
    """
    if not 0 <= min_share < 1:
        raise ValueError(f"min_share must be from 0 to below 1, found {min_share!r}.")
    labels = read_label_names(slices, key, missing=missing)
    names, counts = np.unique(labels[labels != ""], return_counts=True)
    is_kept = counts >= min_share * counts.sum()
    left_out = tuple(names[~is_kept].tolist())
    if left_out:
        tell = warn if min_share == MIN_SHARE else logger.info
        tell(
            f"Classes of obs[{key!r}] with less than {min_share:.3g} of the labelled cells are left "
            f"out ({counts[~is_kept].sum()} cells): {_some(left_out)}. To learn them too, pass "
            "min_share=0."
        )
    classes, sizes = names[is_kept], counts[is_kept]
    if len(classes) < 2 and left_out:
        raise ValueError(
            f"Of the {len(names)} classes of obs[{key!r}], {len(classes)} have {min_share:.1%} of "
            f"the labelled cells or more; a head needs two. The others are left out: "
            f"{_some(left_out)}. Lower `min_share`, or pass a column with larger classes."
        )
    _check_classes(key, classes, sizes, n_obs=len(labels))
    codes = np.full(len(labels), -1, dtype=np.int64)
    is_kept_cell = np.isin(labels, classes)
    codes[is_kept_cell] = np.searchsorted(classes, labels[is_kept_cell])
    return Labels(tuple(classes.tolist()), codes, left_out)


def read_label_names(
    slices: SliceTables, key: str, *, missing: Collection[object] = ()
) -> NDArray[np.str_]:
    """Read a column of labels as text, (n_obs,), empty for none.

    Parameters
    ----------
    slices, key, missing
        As in :func:`read_labels`.
    """
    if isinstance(missing, str) or not isinstance(missing, Collection):
        raise TypeError(
            f"missing must be a list of labels, such as ['Other'] or []; found {missing!r}."
        )
    labels = np.concatenate(slices.each(lambda table: _read_column(table, key)))
    is_known = _are_known(labels, missing)
    _tell_of_missing(key, labels, is_known, is_default=missing is MISSING)
    if not is_known.any():
        raise ValueError(
            f"None of {len(labels)} cells has a label in obs[{key!r}] (NaN, blanks and "
            f"{list(missing)} count as none). Pass labelled cells."
        )
    known: NDArray[np.str_] = np.where(is_known, labels, "").astype(str)
    return known


def _tell_of_missing(
    key: str, labels: NDArray[np.object_], is_known: NDArray[np.bool_], *, is_default: bool
) -> None:
    """Say how many cells are left out because of their label, or because they have none."""
    n_blank = int((labels == "").sum())
    if n_blank:
        logger.info("%d of %d cells have no label in obs[%r].", n_blank, len(labels), key)
    names, counts = np.unique(labels[~is_known & (labels != "")].astype(str), return_counts=True)
    if not len(names):
        return
    parts = ", ".join(
        f"{name!r} ({n} cells, {n / len(labels):.1%})"
        for name, n in zip(names[:10].tolist(), counts[:10].tolist(), strict=True)
    )
    tell = warn if is_default else logger.info
    tell(
        f"Cells with these labels in obs[{key!r}] are left out, since they stand for none: {parts}. "
        "To learn them as classes, pass missing=[]."
    )


def _some(names: Sequence[str]) -> str:
    """Up to ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_classes(
    key: str,
    classes: NDArray[np.str_],
    sizes: NDArray[np.int64],
    *,
    n_obs: int,
) -> None:
    if len(classes) == 1:
        raise ValueError(
            f"obs[{key!r}] has a single class, {str(classes[0])!r} ({sizes[0]} of {n_obs} cells); a "
            "head needs at least two to tell apart. Pass slices or a column with more."
        )
    if (sizes < 2).any():
        single = classes[sizes < 2].tolist()
        raise ValueError(
            f"These classes of obs[{key!r}] have one cell each: {single}. A class needs two or "
            "more. Raise `min_share`, or add them to `missing`, to leave them out."
        )


def _read_column(adata: AnnData, key: str) -> NDArray[np.object_]:
    """Labels as text, empty for none."""
    if key not in adata.obs:
        columns = [str(name) for name in adata.obs.columns]
        near = difflib.get_close_matches(key, columns, n=3)
        hint = f"did you mean {near}?" if near else f"its columns are {columns[:20]}."
        raise KeyError(f"There is no obs[{key!r}] with labels; {hint}")
    column: pd.Series = adata.obs[key]
    if column.dtype.kind == "f":
        known = column[column.notna()]
        bad = known[~np.isfinite(known) | (known != known.round())]
        if len(bad):
            raise ValueError(
                f"obs[{key!r}] holds {float(bad.iloc[0])}: numbers with fractions or infinite ones are no "
                "classes. Pass a column of labels."
            )
    return label_text(column)


def _are_known(labels: NDArray[np.object_], missing: Collection[object]) -> NDArray[np.bool_]:
    """Whether labels are neither blank nor stand for none."""
    none = {"", *(_plain(str(one)) for one in missing)}
    absent = [label for label in set(labels) if _plain(label) in none]
    if missing is MISSING:
        absent += [label for label in set(labels) if _is_no_class(label)]
    known: NDArray[np.bool_] = ~np.isin(labels, absent)
    return known


def _is_no_class(label: str) -> bool:
    words = _MARKS.sub(" ", label.casefold()).strip()
    kind = " ".join(_CELLS.sub(" ", words).split())
    return not words or bool(_NO_CLASS.fullmatch(kind))


def _plain(label: str) -> str:
    return label.strip().casefold()
