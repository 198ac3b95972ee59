"""Expression as an aligner reads it: log-normalised, averaged over niches, scaled by slide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse
from scipy.linalg import eigh

from stofm._edge.expression import log_normalised
from stofm._keys import Obsm
from stofm._messages import warn
from stofm.align.inputs import read_reps
from stofm.align.network import LEVELS
from stofm.heads.genes import choose_panel, read_columns, read_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.align.inputs import Spots
    from stofm.heads.genes import Gene, GeneColumns
    from stofm.heads.request import SliceTables

    Matrix = NDArray[np.float32]

#: Genes that enter: those that vary most within slides.
_MOST_GENES: Final = 1000
#: Smallest spread that a gene's log-normalised expression is divided by.
_LEAST_SPREAD: Final = 0.05
_ROWS_AT_ONCE: Final = 4096
#: With a smaller share of the genes that the aligner reads, a slide is refused, or warned of.
_LEAST_SHARE, _LOW_SHARE = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class GeneBranch:
    """How genes become features.

    Attributes
    ----------
    kind
        ``"pca"``, ``"mlp"``, or ``"obsm"``: entries of obsm are read instead.
    panel
        Genes that all slides have, whose counts are a spot's total; none with ``"obsm"``, if there
        are no counts.
    chosen
        (m,) numbers of those that enter.
    axes
        For each level (m, k) principal axes of scaled expression; none but for ``"pca"``.
    factors
        What features of spots and of niches are multiplied with, so that they have a size of 1.
    reps, origins
        Entries of obsm, and the models that made them.
    """

    kind: str
    panel: tuple[Gene, ...] = ()
    chosen: NDArray[np.int64] | None = None
    axes: dict[str, Matrix] | None = None
    factors: tuple[float, float] = (1.0, 1.0)
    reps: tuple[str, ...] = ()
    origins: tuple[dict[str, str], ...] = ()

    @classmethod
    def fit(
        cls,
        genes: str | Sequence[str],
        slices: SliceTables,
        spots: Spots,
        *,
        layer: str | None,
        n_components: int,
    ) -> tuple[GeneBranch, dict[str, Matrix], sparse.csr_matrix | None]:
        """Find how genes are read; gives the features, and log-normalised expression (n, n_panel)."""
        reps = (
            () if genes in ("pca", "mlp") else (genes,) if isinstance(genes, str) else tuple(genes)
        )
        reps = (Obsm.X_CELL, Obsm.X) if reps == ("stofm",) else reps
        if len(reps) > 2:
            raise ValueError(
                "genes must be 'pca', 'mlp', 'stofm', an entry of obsm, or two of them, for the spot "
                f"and the niche; found {genes!r}."
            )
        panel: tuple[Gene, ...] = ()
        values: Any = None
        if not reps or all(table.n_vars for table in slices.tables):
            columns = read_columns(slices)
            panel = choose_panel(columns)
            values = read_expression(panel, slices, columns, spots, layer)
        if reps:
            features, origins = read_reps(slices, spots, reps, ())
            return cls("obsm", panel, reps=reps, origins=tuple(origins)), features, values
        chosen = _most_variable(values, spots)
        axes = None
        if genes == "pca":
            axes = {
                level: _axes(own, spots, n_components)
                for level, own in _levels(values[:, chosen], spots)
            }
        branch = cls(str(genes), panel, chosen, axes)
        found = branch._of_expression(values, spots)
        sizes = [max(float(np.sqrt((one**2).mean())), 1e-6) for one in found.values()]
        branch = replace(branch, factors=(1 / sizes[0], 1 / sizes[1]))
        return branch, branch._of_expression(values, spots), values

    def read(self, slices: SliceTables, spots: Spots, layer: str | None) -> dict[str, Matrix]:
        """Features of genes by branch."""
        if self.reps:
            return read_reps(slices, spots, self.reps, self.origins)[0]
        columns = read_columns(slices)
        for own, (who, _) in zip(columns, slices.called, strict=True):
            missing = [g.name for g in self.panel if not own.same_gene(g)]
            share = 1 - len(missing) / len(self.panel)
            found = (
                f"{who} has {share:.0%} of the {len(self.panel)} genes that the aligner reads; missing "
                f"are, for example, {missing[:3]}."
            )
            if share < _LEAST_SHARE:
                raise ValueError(
                    f"{found} At least {_LEAST_SHARE:.0%} are needed. Pass modality='image' to do "
                    "without genes, or align slides whose genes are the same."
                )
            if share < _LOW_SHARE:
                warn(f"{found} These count as average, and its representation differs.")
        values = read_expression(self.panel, slices, columns, spots, layer)
        return self._of_expression(values, spots)

    def _of_expression(self, values: sparse.csr_matrix, spots: Spots) -> dict[str, Matrix]:
        found = {}
        levels = _levels(values[:, self.chosen], spots)
        for (level, own), factor in zip(levels, self.factors, strict=True):
            parts = []
            for part in spots.parts:
                scaled, mean = _scaled(own[part])
                if self.axes is not None:
                    scaled, mean = scaled @ self.axes[level], mean @ self.axes[level]
                parts.append(np.asarray(scaled - mean))
            found[f"{level}_genes"] = np.concatenate(parts).astype(np.float32) * factor
        return found


def read_expression(
    panel: Sequence[Gene],
    slices: SliceTables,
    columns: Sequence[GeneColumns],
    spots: Spots,
    layer: str | None,
) -> sparse.csr_matrix:
    """``log1p(10,000 x count / total)`` of genes, (n, n_panel); totals are those of the genes."""
    counts = []
    for k, (table, own) in enumerate(zip(slices.tables, columns, strict=True)):
        with slices.naming(k):
            counts.append(read_genes(table, [own.same_gene(gene) for gene in panel], layer))
    stacked = sparse.vstack(counts, format="csr", dtype=np.float32)
    return log_normalised(stacked[spots.rows])


def _levels(values: sparse.csr_matrix, spots: Spots) -> Any:
    """Expression by level."""
    return zip(LEVELS, (values, spots.niche_means(values)), strict=True)


def _moments(values: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
    squares = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
    return mean, np.sqrt(np.maximum(squares - mean**2, 0.0))


def _scaled(values: sparse.csr_matrix) -> tuple[Any, NDArray[np.float64]]:
    """Expression of a slide divided by each gene's spread, and what is to be taken off it."""
    mean, spread = _moments(values)
    factors = 1.0 / np.maximum(spread, _LEAST_SPREAD)
    return values @ sparse.diags(factors), mean * factors


def _most_variable(values: sparse.csr_matrix, spots: Spots) -> NDArray[np.int64]:
    """Numbers of the genes whose variance within slides, on average over them, is largest."""
    variances = [_moments(values[part])[1] ** 2 for part in spots.parts]
    order = np.argsort(-np.mean(variances, axis=0), kind="stable")
    return np.sort(order[:_MOST_GENES])


def _axes(values: sparse.csr_matrix, spots: Spots, n_components: int) -> Matrix:
    """Principal axes (m, k) of expression that is scaled slide by slide."""
    m = values.shape[1]
    covariance = np.zeros((m, m))
    for part in spots.parts:
        scaled, mean = _scaled(values[part])
        for start in range(0, scaled.shape[0], _ROWS_AT_ONCE):
            block = scaled[start : start + _ROWS_AT_ONCE].toarray() - mean
            covariance += block.T @ block
    first = max(0, m - min(n_components, m, len(spots) - 1))
    axes = eigh(covariance, subset_by_index=(min(first, m - 1), m - 1))[1][:, ::-1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    return np.ascontiguousarray(axes * np.where(largest < 0, -1.0, 1.0), dtype=np.float32)
