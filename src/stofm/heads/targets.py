"""What heads are fitted to: classes, proportions or values, and the loss of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.heads.slices import SliceTables

#: Classes of cells, proportions that sum to 1, or values such as expression.
TargetKind = Literal["classes", "proportions", "values"]
_KINDS = ("classes", "proportions", "values")
#: Counts are scaled to this total before the logarithm.
TARGET_SUM: Final = 10_000.0


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
            raise ValueError(f"kind must be one of {_KINDS}, found {self.kind!r}.")
        shape = np.shape(self.values)
        expected = (shape[0],) if self.kind == "classes" else (shape[0], self.n_outputs)
        if shape != expected:
            raise ValueError(f"Targets of {self.kind} have the shape {shape}; expected {expected}.")
        if self.class_weights is not None and len(self.class_weights) != self.n_outputs:
            raise ValueError(
                f"There are {len(self.class_weights)} class weights for {self.n_outputs} classes."
            )

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


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpressionTargets(Targets):
    """Log-normalised expression, sparse; taken standardised by gene.

    Attributes
    ----------
    mean, scale
        (n_outputs,) what is taken off each gene, and what it is divided by.
    has_counts
        (n,) cells with counts among the inputs; of others nothing is known.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    has_counts: NDArray[np.bool_]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """(n,) whether the expression of a cell is known."""
        return self.has_counts

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Standardised expression of some rows, float32 (n_rows, n_outputs)."""
        values = np.asarray(self.values[rows].toarray(), dtype=np.float32)
        values -= self.mean
        values /= self.scale
        return torch.from_numpy(values)

    def standardised(self, rows: NDArray[np.int64]) -> ExpressionTargets:
        """The same with each gene's mean and standard deviation over some rows.

        A gene that is constant there has the scale 1.
        """
        values = self.values[rows]
        mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
        squares = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
        variance = squares - mean**2
        is_flat = variance <= 1e-10 * np.maximum(squares, 1.0)
        scale = np.sqrt(np.where(is_flat, 1.0, variance))
        return replace(self, mean=mean.astype(np.float32), scale=scale.astype(np.float32))

    def is_constant(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n_outputs,) which genes have the same value in all of some rows."""
        values = self.values[rows].tocsc()
        low = np.asarray(values.min(axis=0).todense()).ravel()
        return np.asarray(low == np.asarray(values.max(axis=0).todense()).ravel())


def expression_targets(
    slices: SliceTables, counts: Sequence[sparse.csr_matrix]
) -> ExpressionTargets:
    """Log-normalised expression: ``log1p(10,000 x count / total)`` with the total of the inputs.

    Parameters
    ----------
    slices
        AnnData of the input genes, from :func:`~stofm.heads.panel.reduce_tables`.
    counts
        Of the target genes, for each of them.
    """
    parts, known = [], []
    for table, wanted in zip(slices.tables, counts, strict=True):
        matrix: Any = table.X
        totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
        parts.append(log_normalised(wanted, totals))
        known.append(totals > 0)
    n_outputs = parts[0].shape[1]
    return ExpressionTargets(
        kind="values",
        values=sparse.vstack(parts, format="csr"),
        n_outputs=n_outputs,
        mean=np.zeros(n_outputs, dtype=np.float32),
        scale=np.ones(n_outputs, dtype=np.float32),
        has_counts=np.concatenate(known),
    )


def log_normalised(
    counts: sparse.csr_matrix,
    totals: NDArray[np.float64] | None = None,
    *,
    target_sum: float = TARGET_SUM,
) -> sparse.csr_matrix:
    """``log1p(target_sum x count / total)`` of each cell; 0 for a cell without counts.

    Parameters
    ----------
    counts
        (n, n_genes).
    totals
        (n,) what counts are divided by; None for their own sums.
    target_sum
        Total to which counts are scaled.
    """
    if totals is None:
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    scaled = counts.data * np.repeat(factors, np.diff(counts.indptr))
    values = np.log1p(scaled).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
