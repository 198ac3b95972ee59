"""What heads are fitted to: classes, proportions or values, and the loss of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

#: Classes of cells, proportions that sum to 1, or values such as expression.
TargetKind = Literal["classes", "proportions", "values"]
_KINDS = ("classes", "proportions", "values")


@dataclass(frozen=True, eq=False)
class Targets:
    """What is known of cells.

    Attributes
    ----------
    kind
        What the values are.
    values
        Classes: int64 (n,) numbers from 0, with -1 for none. Else float32 (n, n_outputs), with
        NaN in rows of which nothing is known; values may be a scipy CSR matrix.
    n_outputs
        Classes, cell types or genes.
    class_weights
        (n_outputs,) weight of each class in the loss; None for 1.
    """

    kind: TargetKind
    values: Any
    n_outputs: int
    class_weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Check shapes and kinds."""
        if self.kind not in _KINDS:
            msg = f"kind must be one of {_KINDS}, found {self.kind!r}."
            raise ValueError(msg)
        shape = np.shape(self.values)
        expected = (shape[0],) if self.kind == "classes" else (shape[0], self.n_outputs)
        if shape != expected:
            msg = f"Targets of {self.kind} have the shape {shape}; expected {expected}."
            raise ValueError(msg)
        if self.class_weights is not None and len(self.class_weights) != self.n_outputs:
            msg = f"There are {len(self.class_weights)} class weights for {self.n_outputs} classes."
            raise ValueError(msg)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n,) whether anything is known of a row."""
        if self.kind == "classes":
            return np.asarray(self.values >= 0)
        if hasattr(self.values, "tocsr"):
            known = np.ones(len(self), dtype=bool)
            bad = ~np.isfinite(self.values.data)
            known[np.searchsorted(self.values.indptr, np.flatnonzero(bad), side="right") - 1] = (
                False
            )
            return known
        return np.asarray(np.isfinite(self.values).all(axis=1))

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Targets of some rows: int64 (n_rows,), or float32 (n_rows, n_outputs)."""
        values = self.values[rows]
        if self.kind == "classes":
            return torch.from_numpy(np.asarray(values, dtype=np.int64))
        dense = values.toarray() if hasattr(values, "toarray") else values
        return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))


def head_loss(
    outputs: Float[Tensor, "n d_output"],
    targets: Tensor,
    kind: TargetKind,
    class_weights: Float[Tensor, " d_output"] | None = None,
) -> tuple[Tensor, float]:
    """Compare a head's raw outputs with what is known.

    Classes: cross-entropy, weighted by class. Proportions: cross-entropy of the softmax against
    them, least where both are equal. Values: squared error, mean over the columns.

    Parameters
    ----------
    outputs
        From :class:`stofm.nn.PredictionHead`.
    targets
        From :meth:`Targets.take`.
    kind
        What the targets are.
    class_weights
        For classes.

    Returns
    -------
    Sum over the rows, with gradient, and the number of rows or the sum of their weights.
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
