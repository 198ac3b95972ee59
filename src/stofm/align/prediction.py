"""Expression from the image alone: ridge, retrieval or a network, with a score of each gene."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from stofm import metrics
from stofm._messages import warn
from stofm.heads.genes import GeneColumns
from stofm.heads.network import apply_head, fit_head
from stofm.heads.targets import Targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.align.aligner import Reference
    from stofm.heads.genes import Gene

    Matrix = NDArray[np.float32]

Method = Literal["ridge", "retrieval", "mlp"]


class Views(NamedTuple):
    """The image of spots: standardised features, and its projections, of the spot beside the niche."""

    image: Matrix
    aligned: Matrix


#: From spots to the expression of some genes, (m, n_genes), by the columns of the reference.
Predictor = Callable[[Views, "NDArray[np.int64]"], "Matrix"]
#: Strengths of ridge that are tried, in units of the mean square of the components of the features.
_STRENGTHS: Final = np.logspace(-1, 3, 9)
#: Genes whose expression is dense at a time.
_GENES_AT_ONCE: Final = 512
#: Reference spots whose mean retrieval gives, and the temperature of their weights.
_N_NEAREST, _TEMPERATURE = 50, 0.1
#: Part of the spots that tells a network when to stop.
_HELD_OUT: Final = 0.1
#: Genes that the strength is chosen by, and parts of a slide that is alone.
_TUNED_BY, _N_PARTS = 200, 4
_LEAST_SPREAD: Final = 1e-3
_ROWS_AT_ONCE: Final = 1024


def find_in_panel(panel: tuple[Gene, ...], genes: Sequence[str] | str | None) -> dict[str, int]:
    """Columns of the reference's expression by the user's names of genes; None for all genes."""
    if not panel:
        raise ValueError(
            "The aligner was made of slides without counts, so it has no expression to predict from: "
            "align slides that have them."
        )
    if genes is None:
        return {gene.name: k for k, gene in enumerate(panel)}
    columns = GeneColumns(panel, ((),) * len(panel))
    asked = [genes] if isinstance(genes, str) else list(genes)
    found = {name: columns.find(name) for name in asked}
    if missing := [name for name, gene in found.items() if gene is None]:
        near = {name: columns.near(name) or "nothing" for name in missing[:3]}
        raise KeyError(
            f"{len(missing)} of {len(asked)} genes are not among the {len(panel)} that all aligned "
            f"slides have; near are: {near}."
        )
    if not asked or len(found) < len(asked):
        raise ValueError("genes must name the genes to predict, each once; None predicts all.")
    return {name: columns.same_gene(gene)[0] for name, gene in found.items() if gene is not None}


def predict(
    reference: Reference,
    query: Views,
    columns: NDArray[np.int64],
    *,
    method: Method,
    seed: int,
) -> tuple[Matrix, pd.DataFrame]:
    """Predict log-normalised expression (m, n_genes) of spots, and score it on left-out groups.

    Scores are means over the groups (donors, or slides), each predicted from the others: columns
    ``pearson`` and ``mse``.
    """
    groups = np.unique(reference.group)
    own = Views(reference.image, reference.aligned_image)
    scores = []
    for group in groups if len(groups) > 1 else ():
        is_out = reference.group == group
        predictor = fit_predictor(reference, np.flatnonzero(~is_out), method, seed)
        scores.append(_score(reference, predictor, own, np.flatnonzero(is_out), columns))
    if not scores:
        warn(
            "Genes have no scores, which take two aligned donors or slides, each predicted from the "
            "other."
        )
        scores = [np.full((2, len(columns)), np.nan)]
    predictor = fit_predictor(reference, np.arange(len(reference.group)), method, seed)
    found = predict_all(predictor, query, columns)
    # Pearson's is not defined where a group lacks a gene.
    known = np.isfinite(scores).sum(axis=0)
    means = np.divide(
        np.nansum(scores, axis=0), known, where=known > 0, out=np.full(known.shape, np.nan)
    )
    return found, pd.DataFrame(means.T, columns=["pearson", "mse"])


def fit_predictor(
    reference: Reference, rows: NDArray[np.int64], method: Method, seed: int
) -> Predictor:
    """Fit a model to some of the reference's spots."""
    fit = {"ridge": _ridge, "retrieval": _retrieval, "mlp": _network}[method]
    return fit(reference, rows, seed)


def predict_all(predictor: Predictor, query: Views, columns: NDArray[np.int64]) -> Matrix:
    """Expression of any number of genes, (m, n_genes)."""
    return np.concatenate([predictor(query, part) for part in _blocks(columns)], axis=1)


def _blocks(columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(columns, -(-len(columns) // _GENES_AT_ONCE))


def _score(
    reference: Reference,
    predictor: Predictor,
    own: Views,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Pearson's correlation and mean squared error of genes, (2, n_genes), over some spots."""
    parts = []
    for block in _blocks(columns):
        true = reference.expression[rows][:, block].toarray()
        found = predictor(Views(*(one[rows] for one in own)), block)
        pearson = metrics.pearson(true, found)
        parts.append(np.stack([pearson, ((found - true) ** 2).mean(axis=0)]))
    return np.concatenate(parts, axis=1)


def _ridge(reference: Reference, rows: NDArray[np.int64], seed: int) -> Predictor:
    """Ridge regression on the image's features; its strength has the least error on left-out groups."""
    x, groups = reference.image[rows].astype(np.float64), reference.group[rows]
    left_out = np.unique(groups)
    if len(left_out) == 1:
        # Rows lie in the order of places: runs of them are parts of the plane.
        groups = np.arange(len(rows)) * _N_PARTS // len(rows)
        left_out = np.unique(groups)
    y = reference.expression[rows][:, _most_variable(reference.expression[rows])].toarray()
    errors = np.zeros(len(_STRENGTHS))
    for group in left_out:
        is_out = groups == group
        solve, mean = _solver(x[~is_out]), y[~is_out].mean(axis=0)
        for k, strength in enumerate(_STRENGTHS):
            found = x[is_out] @ solve(strength, y[~is_out] - mean) + mean
            errors[k] += ((found - y[is_out]) ** 2).sum()
    solve, strength = _solver(x), float(_STRENGTHS[errors.argmin()])

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        own = reference.expression[rows][:, columns].toarray().astype(np.float64)
        mean = own.mean(axis=0)
        found: Matrix = (query.image @ solve(strength, own - mean) + mean).astype(np.float32)
        return found

    return predictor


def _most_variable(values: sparse.csr_matrix) -> NDArray[np.int64]:
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
    return np.argsort(-variance, kind="stable")[:_TUNED_BY]


def _solver(x: NDArray[np.float64]) -> Callable[[float, NDArray[Any]], NDArray[np.float64]]:
    """Weights (d, n_genes) of ridge regression by strength and centred targets."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    unit = (s**2).mean()

    def solve(strength: float, y: NDArray[Any]) -> NDArray[np.float64]:
        shrunk = s / (s**2 + strength * unit)
        weights: NDArray[np.float64] = vt.T @ (shrunk[:, None] * (u.T @ y))
        return weights

    return solve


def _retrieval(reference: Reference, rows: NDArray[np.int64], seed: int) -> Predictor:
    """Weighted mean of the reference spots whose aligned genes are nearest to the aligned image."""
    keys, expression = reference.aligned_genes[rows], reference.expression[rows]
    k = min(_N_NEAREST, len(rows))

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        own = expression[:, columns].toarray()
        found = np.empty((len(query.aligned), len(columns)), dtype=np.float32)
        for start in range(0, len(found), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            # Both halves are unit vectors.
            near = query.aligned[part] @ keys.T / 2
            best = np.argpartition(-near, k - 1, axis=1)[:, :k]
            weights = np.exp(np.take_along_axis(near, best, axis=1) / _TEMPERATURE)
            weights /= weights.sum(axis=1, keepdims=True)
            picked = sparse.csr_matrix(
                (weights.ravel(), best.ravel(), np.arange(0, best.size + 1, k)),
                shape=near.shape,
            )
            found[part] = picked @ own
        return found

    return predictor


def _network(reference: Reference, rows: NDArray[np.int64], seed: int) -> Predictor:
    """Fit a network of two hidden layers to the image's features, one for each block of genes."""
    x = reference.image[rows]
    is_held_out = np.random.default_rng(seed).random(len(rows)) < _HELD_OUT
    fitted, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        y = reference.expression[rows][:, columns].toarray()
        mean, spread = y.mean(axis=0), np.maximum(y.std(axis=0), _LEAST_SPREAD)
        targets = Targets("values", ((y - mean) / spread).astype(np.float32), len(columns))
        head = fit_head(x, targets, fitted=fitted, held_out=held_out, seed=seed).head
        found: Matrix = apply_head(head, query.image, "values") * spread + mean
        return found

    return predictor
