"""What heads are fitted to: labels of cells as classes, proportions, expression; the loss of each."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F

from stofm._edge.expression import log_normalised
from stofm._edge.tables import label_text
from stofm._logging import logger
from stofm._messages import require_name, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.heads.request import SliceTables

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


#: Classes of cells, proportions that sum to 1, or values such as expression.
TargetKind = Literal["classes", "proportions", "values"]


class Labels(NamedTuple):
    """Classes of cells."""

    classes: tuple[str, ...]  # names in alphabetical order
    #: (n_obs,) number of each cell's class; -1 for none, or one that is left out.
    codes: NDArray[np.int64]
    left_out: tuple[str, ...]  # rare classes that are left out

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n_obs,) whether a cell has a class."""
        return self.codes >= 0


def read_labels(
    slices: SliceTables, key: str, *, missing: Collection[object] = (), min_share: float = 0.0
) -> Labels:
    """Read a column of labels; leave out missing ones, and classes of one cell or of too small a share.

    Labels of `missing` stand for none, besides NaN and empty strings; with :data:`MISSING` itself all
    that read like one. What is left out by default is warned of; what is asked for is told.
    """
    labels = read_label_names(slices, key, missing=missing)
    names, counts = np.unique(labels[labels != ""], return_counts=True)
    # Of a single cell none could be held out.
    is_kept = (counts >= min_share * counts.sum()) & (counts > 1)
    left_out, classes, sizes = tuple(names[~is_kept].tolist()), names[is_kept], counts[is_kept]
    parts = [f"{name} ({n})" for name, n in zip(left_out, counts[~is_kept], strict=True)]
    some = ", ".join(parts[:10]) + (f" and {len(parts) - 10} more" * (len(parts) > 10))
    if len(classes) < 2 and left_out:
        raise ValueError(
            f"Of the {len(names)} classes of obs[{key!r}], {len(classes)} have two cells, and "
            f"{min_share:.1%} of the labelled cells, or more; a head needs two. The others are left out: {some}. Lower "
            "`min_share`, or pass a column with larger classes."
        )
    if left_out:
        tell = warn if min_share == MIN_SHARE or (counts == 1).any() else logger.info
        more = (
            f" and a share of {min_share:.3g}; with min_share=0, two cells only"
            if min_share
            else ""
        )
        tell(
            f"Rare classes of obs[{key!r}] are left out (cells): {some}. A class needs two "
            f"cells{more}."
        )
    if len(classes) == 1:
        raise ValueError(
            f"obs[{key!r}] has a single class, {str(classes[0])!r} ({sizes[0]} of {len(labels)} "
            "cells); a head needs at least two to tell apart. Pass slices or a column with more."
        )
    codes = np.where(np.isin(labels, classes), np.searchsorted(classes, labels), -1)
    return Labels(tuple(classes.tolist()), codes, left_out)


def read_label_names(
    slices: SliceTables, key: str, *, missing: Collection[object] = ()
) -> NDArray[np.str_]:
    """Read a column of labels as text, (n_obs,), empty for none; as :func:`read_labels`."""
    if isinstance(missing, str) or not isinstance(missing, Collection):
        raise TypeError(
            f"missing must be a list of labels, such as ['Other'] or []; found {missing!r}."
        )
    labels = np.concatenate(slices.each(lambda table: _read_column(table, key))).astype(str)
    none = {str(one).strip().casefold() for one in missing}
    names, counts = np.unique(labels, return_counts=True)
    absent = {
        name: n
        for name, n in zip(names.tolist(), counts.tolist(), strict=True)
        if name.strip().casefold() in {"", *none} or (missing is MISSING and _is_no_class(name))
    }
    known: NDArray[np.str_] = np.where(np.isin(labels, list(absent)), "", labels)
    if n_blank := absent.pop("", 0):
        logger.info("%d of %d cells have no label in obs[%r].", n_blank, len(labels), key)
    if absent:
        parts = ", ".join(
            f"{name!r} ({n} cells, {n / len(labels):.1%})" for name, n in [*absent.items()][:10]
        )
        tell = warn if missing is MISSING else logger.info
        tell(
            f"Cells with these labels in obs[{key!r}] are left out, since they stand for none: "
            f"{parts}. To learn them as classes, pass missing=[]."
        )
    if not (known != "").any():
        raise ValueError(
            f"None of {len(labels)} cells has a label in obs[{key!r}] (NaN, blanks and "
            f"{list(missing)} count as none). Pass labelled cells."
        )
    return known


def _read_column(adata: AnnData, key: str) -> NDArray[np.object_]:
    """Labels as text, empty for none."""
    require_name(key, adata.obs, f"There is no obs[{key!r}] with labels.")
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


def _is_no_class(label: str) -> bool:
    words = _MARKS.sub(" ", label.casefold()).strip()
    kind = " ".join(_CELLS.sub(" ", words).split())
    return not words or bool(_NO_CLASS.fullmatch(kind))


@dataclass(frozen=True, eq=False)
class Targets:
    """What is known of cells."""

    kind: TargetKind  # what the values are
    #: Classes: int64 (n,) numbers from 0, with -1 for none. Else float32 (n, n_outputs), with NaN
    #: in rows of which nothing is known.
    values: Any
    n_outputs: int  # classes, cell types or genes
    #: (n_outputs,) weight of each class in the loss; None for 1.
    class_weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n,) whether anything is known of a row."""
        if self.kind == "classes":
            return np.asarray(self.values >= 0)
        return np.asarray(np.isfinite(self.values).all(axis=1))

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Targets of some rows: int64 (n_rows,), or float32 (n_rows, n_outputs)."""
        dtype = np.int64 if self.kind == "classes" else np.float32
        return torch.from_numpy(np.ascontiguousarray(self.values[rows], dtype=dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpressionTargets(Targets):
    """Log-normalised expression, (n, n_genes), sparse; taken standardised by gene."""

    #: (n_outputs,) what is taken off each gene, and what it is divided by.
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    #: (n,) cells with counts among the inputs; of others nothing is known.
    has_counts: NDArray[np.bool_]

    @classmethod
    def of(
        cls, slices: SliceTables, counts: Sequence[sparse.csr_matrix], genes: Sequence[str]
    ) -> ExpressionTargets:
        """``log1p(10,000 x count / total)``, with mean and deviation of each gene.

        The totals are those of the tables, which have the input genes alone; `counts` are of the
        `genes` to learn, for each table. Genes of which the cells tell nothing are refused.
        """
        totals = [np.asarray(t.X.sum(axis=1, dtype=np.float64)).ravel() for t in slices.tables]
        values = sparse.vstack(list(map(log_normalised, counts, totals)), format="csr")
        has_counts = np.concatenate(totals) > 0
        known = values[has_counts]
        if not known.shape[0]:
            raise ValueError(
                "No cell has any count in the genes that are read, so there is nothing to learn from."
            )
        low, high = (np.asarray(one.todense()).ravel() for one in (known.min(0), known.max(0)))
        examples = [gene for gene, flat in zip(genes, low == high, strict=True) if flat]
        if len(examples) == len(genes):
            raise ValueError(
                f"All {len(genes)} genes to impute are constant over the training cells, for example "
                f"{examples[:3]}: there is nothing to learn. Choose other genes."
            )
        if examples:
            warn(
                f"{len(examples)} of {len(genes)} genes are constant over the training cells and "
                f"will be imputed as such, which says nothing, for example {examples[:3]}. Leave "
                "them out of `genes`."
            )
        mean = np.asarray(known.mean(axis=0, dtype=np.float64)).ravel()
        squares = np.asarray(known.multiply(known).mean(axis=0, dtype=np.float64)).ravel()
        variance = squares - mean**2
        scale = np.sqrt(np.where(variance <= 1e-10 * np.maximum(squares, 1.0), 1.0, variance))
        return cls(
            "values",
            values,
            len(genes),
            mean=mean.astype(np.float32),
            scale=scale.astype(np.float32),
            has_counts=has_counts,
        )

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n,) whether the expression of a cell is known."""
        return self.has_counts

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Standardised expression of some rows, float32 (n_rows, n_outputs)."""
        values = np.asarray(self.values[rows].toarray(), dtype=np.float32)
        values -= self.mean
        values /= self.scale
        return torch.from_numpy(values)


def head_loss(
    outputs: Float[Tensor, "n d_output"],
    targets: Tensor,
    kind: TargetKind,
    class_weights: Float[Tensor, " d_output"] | None = None,
) -> tuple[Tensor, float]:
    """Compare a head's raw outputs with what :meth:`Targets.take` gives.

    Classes: cross-entropy, weighted by class. Proportions: cross-entropy of the softmax against
    them, least where both are equal. Values: squared error, mean over the columns. Returns the sum
    over the rows, with gradient, and the number of rows or the sum of their weights.
    """
    if kind == "classes":
        total = F.cross_entropy(outputs, targets, class_weights, reduction="sum")
        if class_weights is not None:
            return total, float(class_weights[targets].sum())
    elif kind == "proportions":
        total = -(targets * F.log_softmax(outputs, dim=1)).sum()
    else:
        total = F.mse_loss(outputs, targets, reduction="sum") / outputs.shape[1]
    return total, float(len(outputs))
