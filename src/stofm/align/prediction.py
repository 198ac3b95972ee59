"""Expression from the image alone, by several methods, with a score of each gene."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

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

Method = Literal["ridge", "aligned", "retrieval", "mlp"]


class Views(NamedTuple):
    """The image of spots: standardised features, and its projections, of the spot beside the niche."""

    image: Matrix
    aligned_image: Matrix


#: From spots to the expression of some genes, (m, n_genes), by their columns in the reference.
Predictor = Callable[[Views, "NDArray[np.int64]"], "Matrix"]
#: Strengths of ridge that are tried, in units of the mean square of the components of the features.
_STRENGTHS: Final = np.logspace(-1, 3, 9)
#: Genes whose expression is dense at a time.
_GENES_AT_ONCE: Final = 512
#: Reference spots whose mean retrieval gives, and the temperature of their weights.
_N_NEAREST, _TEMPERATURE = 50, 0.1
#: Part of the spots that tells a network when to stop.
_HELD_OUT: Final = 0.1
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
    scores = []
    for group in groups if len(groups) > 1 else ():
        is_out = reference.group == group
        predictor = fit_predictor(reference.at(~is_out), method, seed)
        scores.append(_score(reference.at(is_out), predictor, columns))
    if not scores:
        warn(
            "Genes have no scores, which take two aligned donors or slides, each predicted from the "
            "other."
        )
        scores = [np.full((2, len(columns)), np.nan)]
    found = predict_all(fit_predictor(reference, method, seed), query, columns)
    # Pearson's is not defined where a group lacks a gene.
    known = np.isfinite(scores).sum(axis=0)
    means = np.divide(
        np.nansum(scores, axis=0), known, where=known > 0, out=np.full(known.shape, np.nan)
    )
    return found, pd.DataFrame(means.T, columns=["pearson", "mse"])


def fit_predictor(reference: Reference, method: Method, seed: int) -> Predictor:
    """Fit a model to the reference's spots."""
    if method == "ridge":
        return _ridge(reference, "image")
    if method == "aligned":
        models = [_ridge(reference, view) for view in Views._fields]
        return lambda query, columns: np.mean([one(query, columns) for one in models], axis=0)
    return _retrieval(reference) if method == "retrieval" else _network(reference, seed)


def predict_all(predictor: Predictor, query: Views, columns: NDArray[np.int64]) -> Matrix:
    """Expression of any number of genes, (m, n_genes)."""
    return np.concatenate([predictor(query, part) for part in _blocks(columns)], axis=1)


def _blocks(columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(columns, -(-len(columns) // _GENES_AT_ONCE))


def _score(
    truth: Reference, predictor: Predictor, columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Pearson's correlation and mean squared error of genes, (2, n_genes)."""
    parts = []
    for block in _blocks(columns):
        true = truth.expression[:, block].toarray()
        found = predictor(Views(truth.image, truth.aligned_image), block)
        parts.append([metrics.pearson(true, found), ((found - true) ** 2).mean(axis=0)])
    return np.concatenate(parts, axis=1)


def _ridge(reference: Reference, view: str) -> Predictor:
    """Ridge regression on a view of the image.

    Each gene has the strength with the least error of spots that are left out one by one.
    """
    x = getattr(reference, view).astype(np.float64)
    middle, n = x.mean(axis=0), len(x)
    u, s, vt = np.linalg.svd(x - middle, full_matrices=False)
    unit = (s**2).mean() or 1.0
    shares = s**2 / (s**2 + unit * _STRENGTHS[:, None])
    # What is left of a spot's error when it takes part in the fit.
    left = np.maximum(1 - 1 / n - shares @ (u**2).T, np.finfo(float).eps)

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        y = reference.expression[:, columns].toarray().astype(np.float64)
        mean = y.mean(axis=0)
        y -= mean
        z = u.T @ y
        errors = [
            (((y - u @ (share[:, None] * z)) / own[:, None]) ** 2).sum(axis=0)
            for share, own in zip(shares, left, strict=True)
        ]
        strength = unit * _STRENGTHS[np.argmin(errors, axis=0)]
        weights = vt.T @ (z * s[:, None] / (s[:, None] ** 2 + strength))
        found: Matrix = ((getattr(query, view) - middle) @ weights + mean).astype(np.float32)
        return found

    return predictor


def _retrieval(reference: Reference) -> Predictor:
    """Weighted mean of the reference spots whose aligned genes are nearest to the aligned image."""
    k = min(_N_NEAREST, len(reference.group))

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        own = reference.expression[:, columns].toarray()
        found = np.empty((len(query.aligned_image), len(columns)), dtype=np.float32)
        for start in range(0, len(found), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            # Both halves are unit vectors.
            near = query.aligned_image[part] @ reference.aligned_genes.T / 2
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


def _network(reference: Reference, seed: int) -> Predictor:
    """Fit a network of two hidden layers to the image's features, one for each block of genes."""
    is_held_out = np.random.default_rng(seed).random(len(reference.group)) < _HELD_OUT
    fitted, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def predictor(query: Views, columns: NDArray[np.int64]) -> Matrix:
        y = reference.expression[:, columns].toarray()
        mean, spread = y.mean(axis=0), np.maximum(y.std(axis=0), _LEAST_SPREAD)
        targets = Targets("values", ((y - mean) / spread).astype(np.float32), len(columns))
        head = fit_head(reference.image, targets, fitted=fitted, held_out=held_out, seed=seed).head
        found: Matrix = apply_head(head, query.image, "values") * spread + mean
        return found

    return predictor
