"""Principal components of log-normalised expression, that heads read beside embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from stofm._edge.expression import log_normalised
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.embeddings import MADE_BY_EMBED
from stofm.heads.genes import Gene, choose_panel, gene_blocks, read_columns, read_genes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.genes import GeneColumns
    from stofm.heads.request import Request, SliceTables

#: Components beside embeddings of a model: a panel of some hundred genes has hardly more that matter.
_N_COMPONENTS: Final = 150
#: Genes that enter the components: those that vary most.
_MOST_GENES: Final = 2000
#: Cells that the components are found from; of more, every second or third one is taken.
_MOST_CELLS: Final = 20_000
#: Cells have no components if what they measure makes up a smaller share of these.
_LEAST_MEASURED: Final = 0.1
#: Variance of noise where genes are missing, as a share of the last component's.
_NOISE: Final = 0.1
_ROWS_AT_ONCE: Final = 4096
#: Fields that a head keeps with its weights.
_ARRAYS: Final = ("shares", "chosen", "mean", "axes", "variances")
#: Labelled slices whose mean lies so far from that of all, in shares of the variance, when cells of
#: a class are compared: replicates in the benchmark have at most 0.06, patients whose expression
#: can't be compared up to 0.43.
_FAR: Final = 0.15
#: The mean of fewer cells says too little.
_FEW_CELLS: Final = 20
#: Components with a smaller share of the first one's variance are rounding.
_LEAST_SHARE: Final = 1e-6


def principal_axes(
    values: Any, n_components: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Principal components of an array or a CSR matrix, (n, d), which is not made dense.

    Returns the mean, (d,), the axes, (d, k), each with its largest entry positive, and the variances
    along them, (k,), the largest first.
    """
    n, d = values.shape
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
    covariance: NDArray[Any] = np.zeros((d, d))
    for start in range(0, n, _ROWS_AT_ONCE):
        part = values[start : start + _ROWS_AT_ONCE]
        part = (part.toarray() if sparse.issparse(part) else part) - mean
        covariance += part.T @ part
    first = max(0, d - n_components)
    # Of many small steps, in which threads would wait for each other.
    with threadpool_limits(1, user_api="blas"):
        variances, axes = eigh(covariance / n, subset_by_index=(first, d - 1))
    axes = axes[:, ::-1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    return mean, axes * np.where(largest < 0, -1.0, 1.0), variances[::-1]


@dataclass(frozen=True, eq=False)
class ExpressionComponents:
    """Genes, and how their counts become components."""

    genes: tuple[Gene, ...]  # all genes that the labelled cells were measured for
    shares: NDArray[np.float32]  # (n_genes,) of all their counts; sums to 1
    chosen: NDArray[np.int64]  # (m,) numbers of the genes that enter the components
    mean: NDArray[np.float32]  # (m,) their mean log-normalised expression
    #: (m, k) principal axes, and the (k,) variances along them.
    axes: NDArray[np.float32]
    variances: NDArray[np.float32]
    target_sum: float  # total to which a cell's counts are scaled before the logarithm
    #: Whether each slice's mean is taken off, since labelled slices differ in more than their
    #: composition.
    by_slice: bool = False

    @classmethod
    def fit(
        cls, counts: sparse.csr_matrix, genes: Sequence[Gene], n_components: int
    ) -> ExpressionComponents:
        """Find components of labelled cells' counts, whose order does not depend on the file."""
        sums = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        target_sum = float(np.median(totals[totals > 0])) if (totals > 0).any() else 1.0
        values = log_normalised(counts, target_sum=target_sum)
        mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
        squares = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
        chosen = np.sort(np.argsort(mean**2 - squares, kind="stable")[:_MOST_GENES])
        n_components = max(1, min(n_components, counts.shape[0] - 1))
        mean, axes, variances = principal_axes(values[:, chosen], n_components)
        is_kept = variances > max(_LEAST_SHARE * variances[0], 1e-9)
        if not is_kept.any():
            raise ValueError(
                f"The expression of {len(genes)} genes is the same in all {counts.shape[0]} labelled "
                "cells that have them. Are these raw counts? n_components=0 reads embeddings alone."
            )
        return cls(
            genes=tuple(genes),
            shares=(sums / max(sums.sum(), 1.0)).astype(np.float32),
            chosen=chosen.astype(np.int64),
            mean=mean.astype(np.float32),
            axes=np.ascontiguousarray(axes[:, is_kept], dtype=np.float32),
            variances=variances[is_kept].astype(np.float32),
            target_sum=target_sum,
        )

    def read(
        self, adata: AnnData, columns: GeneColumns, *, layer: str | None
    ) -> NDArray[np.float32] | None:
        """Components of the cells of an AnnData, (n_obs, k), whose counts are read block by block.

        Where genes are missing, these are the components expected from the others: the mean of
        probabilistic principal component analysis (Tipping and Bishop 1999, J R Stat Soc B 61:611).
        None, with a warning, if nearly all are missing.
        """
        found = [columns.same_gene(gene) for gene in self.genes]
        is_there = np.array([bool(own) for own in found])
        weights = (self.axes**2) @ self.variances
        if weights[is_there[self.chosen]].sum() < _LEAST_MEASURED * weights.sum():
            warn(
                f"{is_there.sum()} of the {len(self.genes)} genes whose expression the head reads "
                "are there, too few: cells are judged without their expression. A head that is "
                "fitted to the shared genes is more accurate."
            )
            return None
        scores, start = np.empty((adata.n_obs, self.axes.shape[1]), dtype=np.float32), 0
        for block in gene_blocks(adata, found, layer):
            scores[start : start + block.shape[0]] = self.of_counts(block, is_there)
            start += block.shape[0]
        return scores

    def of_counts(
        self, counts: sparse.csr_matrix, is_there: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """Components of counts of the genes, (n, n_genes), of which some may not be there."""
        if is_there is None:
            is_there = np.ones(len(self.genes), dtype=bool)
        known = is_there[self.chosen]
        axes = self.axes
        if not known.all():
            # What to multiply known genes with to expect the components of a cell.
            own, variances = axes[known].astype(np.float64), self.variances.astype(np.float64)
            inner = own.T @ own + np.diag(_NOISE * variances[-1] / variances)
            axes = np.ascontiguousarray(np.linalg.solve(inner, own.T).T, dtype=np.float32)
        target = self.target_sum * float(self.shares[is_there].sum(dtype=np.float64))
        values = log_normalised(sparse.csr_matrix(counts), target_sum=target)
        scores = values[:, self.chosen[known]] @ axes - self.mean[known] @ axes
        return np.asarray(scores, dtype=np.float32)

    def centered(
        self, scores: NDArray[np.float32], parts: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Take off the mean of each slice, but of one of a few cells, if that is how they are read.

        `scores`, (n_obs, k), are NaN for cells without.
        """
        if not self.by_slice:
            return scores
        found = scores.copy()
        for own in parts:
            rows = own[np.isfinite(scores[own, 0])]
            if len(rows) >= _FEW_CELLS:
                found[rows] -= _mean(scores, rows)
        return found

    @property
    def entries(self) -> dict[str, Any]:
        """What config.json of a head holds of it."""
        return {name: getattr(self, name) for name in ("genes", "target_sum", "by_slice")}

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a head's file of weights holds of it."""
        return {f"expression.{name}": getattr(self, name) for name in _ARRAYS}

    @classmethod
    def of(
        cls, entries: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> ExpressionComponents:
        """Read what :attr:`entries` and :attr:`arrays` were."""
        fields: dict[str, Any] = {name: arrays[f"expression.{name}"] for name in _ARRAYS}
        fields |= {**entries, "genes": tuple(Gene(*gene) for gene in entries["genes"])}
        return cls(**fields)


def read_expression(
    components: ExpressionComponents, slices: SliceTables, blocks: Blocks, layer: str | None
) -> Blocks:
    """Add components of expression; NaN, and a warning, in tables that lack genes or counts."""
    scores = np.full((slices.n_obs, components.axes.shape[1]), np.nan, dtype=np.float32)
    for k, own in enumerate(read_columns(slices)):
        try:
            with slices.naming(k):
                known = components.read(slices.tables[k], own, layer=layer)
        except (KeyError, ValueError) as error:
            _warn_of(error, slices.tables[k].n_obs)
            continue
        if known is not None:
            scores[slices.places[k]] = known
    return replace(blocks, expression=components.centered(scores, slices.rows))


def add_expression(
    slices: SliceTables,
    blocks: Blocks,
    rows: NDArray[np.int64],
    request: Request,
    classes: NDArray[np.int64] | None,
) -> tuple[Blocks, ExpressionComponents | None]:
    """Find components of the labelled `rows`, in their order, and add those of all cells.

    Tables without labelled cells have a say in nothing, and no components. What can't be read is an
    error if components are asked for, otherwise a warning. Slices are compared class by class, if
    there are `classes`, (n_obs,).
    """
    asked = request.options.n_components
    default = _N_COMPONENTS if set(blocks.use_rep) <= set(MADE_BY_EMBED) else 0
    n_components = default if asked is None else asked
    if not n_components:
        return blocks, None
    kept = rows[:: -(-len(rows) // _MOST_CELLS)]
    labelled = slices.tables_of(rows)
    own = replace(
        slices,
        tables=tuple(slices.tables[k] for k in labelled),
        called=tuple(slices.called[k] for k in labelled),
    )
    places = [slices.places[k] for k in labelled]
    is_kept = np.zeros(slices.n_obs, dtype=bool)
    is_kept[kept] = True
    try:
        names = read_columns(own)
        genes = choose_panel(names)
        counts = []
        for k, table in enumerate(own.tables):
            columns = [names[k].same_gene(gene) for gene in genes]
            with own.naming(k):
                counts.append(read_genes(table, columns, request.layer, is_kept[places[k]]))
        # From the order of the tables to that of the rows.
        stacked = sparse.vstack(counts, format="csr", dtype=np.float32)[
            np.argsort(np.argsort(kept))
        ]
        components = ExpressionComponents.fit(stacked, genes, n_components)
        scores = np.full((slices.n_obs, components.axes.shape[1]), np.nan, dtype=np.float32)
        for table, place, name in zip(own.tables, places, names, strict=True):
            scores[place] = components.read(table, name, layer=request.layer)
    except (KeyError, ValueError) as error:
        if asked is not None:
            raise
        _warn_of(error, slices.n_obs)
        return blocks, None
    codes = np.zeros(slices.n_obs, dtype=np.int64) if classes is None else classes
    if _differ(scores, rows, slices.rows, codes, components.variances):
        logger.info(
            "Labelled slices differ in more than their composition: components of expression are "
            "centred by slice."
        )
        components = replace(components, by_slice=True)
    return replace(blocks, expression=components.centered(scores, slices.rows)), components


def _differ(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    parts: Sequence[NDArray[np.int64]],
    codes: NDArray[np.int64],
    variances: NDArray[np.float32],
) -> bool:
    """Whether a labelled slice's mean is far from that of all, cells of a class compared."""
    shifts = np.zeros_like(scores)
    for code in np.unique(codes[rows]):
        own = rows[codes[rows] == code]
        shifts[own] = scores[own] - _mean(scores, own)
    labelled = [np.intersect1d(own, rows) for own in parts]
    means = [_mean(shifts, own) for own in labelled if len(own) >= _FEW_CELLS]
    return len(means) > 1 and any(mean @ mean > _FAR * variances.sum() for mean in means)


def _mean(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean of some rows; sorted, so that their order does not change a bit."""
    mean = np.sort(scores[rows], axis=0).mean(axis=0, dtype=np.float64)
    return np.asarray(mean, dtype=np.float32)


def _warn_of(error: Exception, n_obs: int) -> None:
    warn(f"{n_obs} cells are judged without their expression: {error.args[0]}")
