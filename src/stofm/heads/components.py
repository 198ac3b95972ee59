"""Principal components of log-normalised expression, that heads read beside embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse
from scipy.linalg import eigh

from stofm._edge.counts import read_counts
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.vocabulary import embedded_vocabulary
from stofm.heads.embeddings import counts_layer
from stofm.heads.gene_columns import Gene, GeneColumns, choose_panel, selector
from stofm.heads.targets import TARGET_SUM, log_normalised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.inputs import Inputs
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections

#: Genes that enter the components: those that vary most.
_MOST_GENES: Final = 2000
#: Cells that the components are found from; of more, every second or third one is taken.
_MOST_CELLS: Final = 20_000
#: With a smaller share of what the components are made of, cells have no components.
_LEAST_MEASURED: Final = 0.1
#: Variance of noise where genes are missing, as a share of the last component's.
_NOISE: Final = 0.1
_ROWS_AT_ONCE: Final = 4096
#: Labelled slices whose mean lies so far from that of all, in shares of the variance, when cells of
#: a class are compared: replicates in the benchmark have at most 0.06, patients whose expression
#: can't be compared up to 0.43.
_FAR: Final = 0.15
#: The mean of fewer cells says too little.
_FEW_CELLS: Final = 20
#: Components with a smaller variance, or a smaller share of the first one's, are rounding.
_LEAST_VARIANCE: Final = 1e-9
_LEAST_SHARE: Final = 1e-6


def principal_axes(
    values: sparse.csr_matrix, n_components: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Find principal components of a sparse matrix without making it dense.

    Returns what is taken off, (n_genes,), the axes, (n_genes, k), each column with its largest entry
    positive, and the variances along them, (k,), the largest first.
    """
    n, n_genes = values.shape
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
    covariance: NDArray[Any] = np.zeros((n_genes, n_genes))
    for start in range(0, n, _ROWS_AT_ONCE):
        part = values[start : start + _ROWS_AT_ONCE].toarray() - mean
        covariance += part.T @ part
    first = max(0, n_genes - n_components)
    variances, axes = eigh(covariance / n, subset_by_index=(first, n_genes - 1))
    axes = axes[:, ::-1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    return mean, axes * np.where(largest < 0, -1.0, 1.0), variances[::-1]


@dataclass(frozen=True)
class ComponentsEntries:
    """What components add to config.json; see :class:`ExpressionComponents`."""

    genes: tuple[tuple[str, str], ...]
    by_slice: bool


@dataclass(frozen=True, eq=False)
class ExpressionComponents:
    """Genes, and how their counts become components.

    Attributes
    ----------
    genes
        All genes that the labelled cells were measured for.
    shares
        (n_genes,) of all their counts; sums to 1.
    chosen
        (m,) numbers of the genes that enter the components.
    mean
        (m,) their mean log-normalised expression.
    axes
        (m, k) principal axes.
    variances
        (k,) along them.
    by_slice
        Whether each slice's mean is taken off, because labelled slices differ in more than their
        composition.
    """

    genes: tuple[Gene, ...]
    shares: NDArray[np.float32]
    chosen: NDArray[np.int64]
    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    variances: NDArray[np.float32]
    by_slice: bool = False

    @classmethod
    def fit(
        cls, counts: sparse.csr_matrix, genes: Sequence[Gene], n_components: int
    ) -> ExpressionComponents:
        """Find the components of the counts of labelled cells, in an order that does not depend on the file."""
        sums = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
        values = log_normalised(counts)
        mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
        squares = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
        chosen = np.sort(np.argsort(mean**2 - squares, kind="stable")[:_MOST_GENES])
        n_components = max(1, min(n_components, counts.shape[0] - 1))
        mean, axes, variances = principal_axes(values[:, chosen], n_components)
        is_kept = variances > max(_LEAST_SHARE * variances[0], _LEAST_VARIANCE)
        if not is_kept.any():
            msg = (
                f"The expression of {len(genes)} genes is the same in all {counts.shape[0]} labelled "
                "cells that have them. Are these raw counts? n_components=0 reads embeddings alone."
            )
            raise ValueError(msg)
        return cls(
            genes=tuple(genes),
            shares=(sums / max(sums.sum(), 1.0)).astype(np.float32),
            chosen=chosen.astype(np.int64),
            mean=mean.astype(np.float32),
            axes=np.ascontiguousarray(axes[:, is_kept], dtype=np.float32),
            variances=variances[is_kept].astype(np.float32),
        )

    def read(
        self,
        adata: AnnData,
        columns: GeneColumns,
        *,
        layer: str | None,
        least_measured: float = _LEAST_MEASURED,
    ) -> NDArray[np.float32] | None:
        """Components of the cells of an AnnData, (n_obs, k), whose counts are read block by block.

        Where it lacks genes, components are those that are expected given the others: the mean of
        probabilistic principal component analysis. None if those that are there make up a smaller share
        of the components' variance than `least_measured`.
        """
        found = [columns.same_gene(gene) for gene in self.genes]
        is_there = np.array([bool(own) for own in found])
        weights = (self.axes**2) @ self.variances
        measured = weights[is_there[self.chosen]].sum() / max(float(weights.sum()), 1e-30)
        if measured < least_measured:
            warn(
                f"{is_there.sum()} of the {len(self.genes)} genes whose expression the head reads "
                "are there, too few: cells are judged without their expression. A head that is "
                "fitted to the shared genes is more accurate."
            )
            return None
        choice = selector(found, adata.n_vars)
        target = TARGET_SUM * float(self.shares[is_there].sum(dtype=np.float64))
        known = is_there[self.chosen]
        genes = self.chosen[known]
        axes = self.axes if known.all() else self._expectation(known)
        offset = self.mean[known] @ axes
        parts = []
        for block in read_counts(adata, layer=layer):
            counts = sparse.csr_matrix(block @ choice)
            values = log_normalised(counts, target_sum=target)[:, genes]
            parts.append((values @ axes - offset).astype(np.float32))
        return np.concatenate(parts)

    def _expectation(self, known: NDArray[np.bool_]) -> NDArray[np.float32]:
        """What to multiply known genes with, (n_known, k), to expect components of a cell.

        Tipping and Bishop 1999, Probabilistic principal component analysis (J R Stat Soc B 61:611).
        """
        axes = self.axes[known].astype(np.float64)
        variances = self.variances.astype(np.float64)
        inner = axes.T @ axes + np.diag(_NOISE * variances[-1] / variances)
        return np.ascontiguousarray(np.linalg.solve(inner, axes.T).T, dtype=np.float32)

    def centered(
        self, scores: NDArray[np.float32], slices: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Take off the mean of each slice, but of one of a few cells, if that is how the components are read.

        `scores` are from :meth:`read`; NaN for cells without.
        """
        if not self.by_slice:
            return scores
        found = scores.copy()
        for own in slices:
            rows = own[np.isfinite(scores[own, 0])]
            if len(rows) >= _FEW_CELLS:
                found[rows] -= _mean(scores, rows).astype(np.float32)
        return found

    def to_entries(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What a head's files hold: an entry of config.json, and arrays."""
        names = ("shares", "chosen", "mean", "axes", "variances")
        arrays = {f"expression.{name}": getattr(self, name) for name in names}
        genes = [[gene.name, gene.id] for gene in self.genes]
        return {"genes": genes, "by_slice": self.by_slice}, arrays

    @classmethod
    def from_entries(
        cls, entries: ComponentsEntries, arrays: Mapping[str, NDArray[Any]]
    ) -> ExpressionComponents:
        """Read what :meth:`to_entries` returned."""
        names = ("shares", "chosen", "mean", "axes", "variances")
        genes = tuple(Gene(name, id_) for name, id_ in entries.genes)
        own = {name: arrays[f"expression.{name}"] for name in names}
        return cls(genes, **own, by_slice=entries.by_slice)

    def __post_init__(self) -> None:
        """Check how the arrays fit together."""
        m, k = len(self.chosen), len(self.variances)
        expected = {"shares": (len(self.genes),), "mean": (m,), "axes": (m, k)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                msg = f"expression.{name} must be {shape}, found {getattr(self, name).shape}"
                raise ValueError(msg)
        if m and not 0 <= self.chosen.min() <= self.chosen.max() < len(self.genes):
            msg = f"expression.chosen must name some of {len(self.genes)} genes"
            raise ValueError(msg)
        if (self.variances <= 0).any() or (self.shares < 0).any():
            msg = "expression.variances must be positive, and expression.shares not negative"
            raise ValueError(msg)


def fit_components(
    sections: Sections,
    rows: NDArray[np.int64],
    columns: Sequence[GeneColumns],
    genes: Sequence[Gene],
    layers: Sequence[str | None],
    n_components: int,
    classes: NDArray[np.int64] | None = None,
) -> tuple[ExpressionComponents, NDArray[np.float32]]:
    """Find components of the labelled cells' expression, and those of all cells, (n_obs, k).

    Parameters
    ----------
    sections
        The cells; each table has some that are labelled.
    rows
        Labelled cells, in an order that does not depend on the file.
    columns, layers
        Of each table, the names of its columns, and the layer with raw counts, None for ``X``.
    genes
        Genes that all tables have.
    n_components
        Most components.
    classes
        (n_obs,) classes, so that slices are compared class by class; None for one.
    """
    kept = rows[:: -(-len(rows) // _MOST_CELLS)]
    parts = list(zip(sections.tables, columns, layers, strict=True))
    blocks = []
    for k, ((table, own, layer), place) in enumerate(zip(parts, sections.places, strict=True)):
        with sections.naming(k):
            blocks.append(_panel_rows(table, own, genes, layer, kept - place.start))
    stacked = sparse.vstack(blocks, format="csr", dtype=np.float32)
    components = ExpressionComponents.fit(
        stacked[np.argsort(np.argsort(kept))], genes, n_components
    )
    read = [
        components.read(table, own, layer=layer, least_measured=0.0) for table, own, layer in parts
    ]
    scores = np.concatenate([part for part in read if part is not None])
    if _differ(scores, rows, sections.slices.rows, classes, components.variances):
        logger.info(
            "Labelled slices differ in more than their composition: components of expression are "
            "centred by slice."
        )
        components = replace(components, by_slice=True)
    return components, components.centered(scores, sections.slices.rows)


def _differ(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    slices: Sequence[NDArray[np.int64]],
    classes: NDArray[np.int64] | None,
    variances: NDArray[np.float32],
) -> bool:
    """Whether a labelled slice's mean is far from that of all, cells of a class compared."""
    if len(slices) < 2:
        return False
    codes = np.zeros(len(scores), dtype=np.int64) if classes is None else classes
    shifts = np.zeros_like(scores)
    for code in np.unique(codes[rows]):
        own = rows[codes[rows] == code]
        shifts[own] = scores[own] - _mean(scores, own).astype(np.float32)
    labelled = (np.intersect1d(own, rows) for own in slices)
    means = [_mean(shifts, own) for own in labelled if len(own) >= _FEW_CELLS]
    return any(float(mean @ mean) > _FAR * float(variances.sum()) for mean in means)


def _mean(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of some rows; sorted, so that their order does not change a bit."""
    mean: NDArray[np.float64] = np.sort(scores[rows], axis=0).mean(axis=0, dtype=np.float64)
    return mean


def _panel_rows(
    adata: AnnData,
    columns: GeneColumns,
    genes: Sequence[Gene],
    layer: str | None,
    rows: NDArray[np.int64],
) -> sparse.csr_matrix:
    """Counts of some genes in those of some rows that the table has, in its order."""
    choice = selector([columns.same_gene(gene) for gene in genes], adata.n_vars)
    wanted = np.zeros(adata.n_obs, dtype=bool)
    wanted[rows[(rows >= 0) & (rows < adata.n_obs)]] = True
    parts, start = [], 0
    for block in read_counts(adata, layer=layer):
        parts.append(block[wanted[start : start + block.shape[0]]] @ choice)
        start += block.shape[0]
    return sparse.vstack(parts, format="csr")


def read_expression(
    components: ExpressionComponents, sections: Sections, inputs: Inputs, layer: str | None
) -> Inputs:
    """Add components of the cells' expression; NaN, and a warning, in tables that lack genes or counts."""
    scores = np.full((len(inputs.features), components.axes.shape[1]), np.nan, dtype=np.float32)
    vocabulary = embedded_vocabulary()
    for k, (table, place) in enumerate(zip(sections.tables, sections.places, strict=True)):
        columns = GeneColumns.read(table, vocabulary, must_map=False)
        try:
            with sections.naming(k):
                known = components.read(table, columns, layer=counts_layer(table, layer))
        except (KeyError, ValueError) as error:
            _warn_of(error, table.n_obs)
            continue
        if known is not None:
            scores[place] = known
    return replace(inputs, expression=components.centered(scores, sections.slices.rows))


def add_expression(
    sections: Sections,
    inputs: Inputs,
    rows: NDArray[np.int64],
    options: FitOptions,
    *,
    classes: NDArray[np.int64] | None = None,
) -> tuple[Inputs, ExpressionComponents | None]:
    """Find components of the labelled cells' expression, and add those of their tables' cells.

    What can't be read is an error if components are asked for, and else worth a warning.

    Parameters
    ----------
    rows
        Labelled cells, in an order that does not depend on the file.
    classes
        (n_obs,) classes of the cells; None if they have none.
    """
    n_components, layer = options.components_beside(inputs.use_rep), options.reading.layer
    if not n_components:
        return inputs, None
    # Tables without labels have no say in what is read.
    known = np.zeros(sections.n_obs, dtype=bool)
    known[rows] = True
    own, places = sections.of_tables(
        [k for k, place in enumerate(sections.places) if known[place].any()]
    )
    vocabulary = embedded_vocabulary()
    try:
        columns = [GeneColumns.read(table, vocabulary, must_map=False) for table in own.tables]
        layers = [counts_layer(table, layer) for table in own.tables]
        components, found = fit_components(
            own,
            np.searchsorted(places, rows),
            columns,
            choose_panel(columns, ()).inputs,
            layers,
            n_components,
            None if classes is None else classes[places],
        )
    except (KeyError, ValueError) as error:
        if options.n_components is not None:
            raise
        _warn_of(error, sections.n_obs)
        return inputs, None
    scores = np.full((sections.n_obs, found.shape[1]), np.nan, dtype=np.float32)
    scores[places] = found
    return replace(inputs, expression=scores), components


def _warn_of(error: Exception, n_obs: int) -> None:
    warn(f"{n_obs} cells are judged without their expression: {error.args[0]}")
