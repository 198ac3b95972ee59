"""Gene embeddings from the co-expression of genes over all training slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.nn import Stofm
    from stofm.train.corpus import Corpus

#: A gene's scale is at least this share of the median gene's: rare genes are mostly noise.
_SMALLEST_SCALE = 0.1


def coexpression_factors(
    slices: Sequence[RankedTokens],
    n_tokens: int,
    n_factors: int,
    *,
    iterations: int = 5,
    scaling: float = 0.5,
    scale: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Factorise the co-expression of genes over slices that measure different genes.

    With x the values log(1 + value x scale) of a slice, each gene's less its mean over the slice and
    divided by its standard deviation to the power of `scaling`, the factors W maximise the
    variance of x W, averaged over slices with the square root of their number of cells as weight.
    A gene counts over the slices where it occurs. W is found by power iteration on sparse
    products: nothing of genes x genes or of dense cells x genes is made.

    Parameters
    ----------
    slices
        Ranked tokens with values, slice by slice; one slice is held in memory at a time.
    n_tokens
        Rows of the result: the largest token plus one.
    n_factors
        Number of factors.
    iterations
        Power iterations.
    scaling
        1 gives all genes the same variance, 0 leaves them as they are, so that genes that vary
        most count most.
    scale
        (n_tokens,) what values are multiplied by, such as the genes' medians, which makes counts of
        them; 1 by default.
    seed
        Seed of the first factors.

    Returns
    -------
    (n_tokens, n_factors) weight of each gene in each factor, such that a cell's factors are the
    sum over its genes of log(1 + value x scale) x weight, less the slice's mean; in order of falling
    variance. 0 for tokens that occur nowhere.

    Raises
    ------
    ValueError
        The tokens have no values, or fewer genes vary than there are factors.
    """
    scale = np.ones(n_tokens, dtype=np.float32) if scale is None else scale
    moments = [_moments(_values(ranked, scale)) for ranked in slices]
    weights = np.sqrt([float(ranked.n_cells) for ranked in slices])
    seen = sum(w * (m.mean > 0) for w, m in zip(weights, moments, strict=True))
    variance = sum(w * m.variance for w, m in zip(weights, moments, strict=True))
    deviation = np.sqrt(variance / np.maximum(seen, 1e-12))
    if (n_genes := int((deviation > 0).sum())) < n_factors:
        msg = (
            f"Found {n_genes} genes that vary within slices for {n_factors} factors; there must be "
            "as many. Lower the width of gene embeddings (d_gene of the cell encoder, or d_hidden where "
            "that is not set), or use gene_embeddings='random'."
        )
        raise ValueError(msg)
    smallest = _SMALLEST_SCALE * np.median(deviation[deviation > 0])
    inverse = np.where(seen > 0, np.maximum(deviation, smallest) ** -scaling, 0.0)

    start = np.random.default_rng(seed).standard_normal((n_tokens, n_factors))
    factors: NDArray[np.float64] = np.linalg.qr(start * (seen > 0)[:, None])[0]
    strength = np.zeros(n_factors)
    for _ in range(iterations):
        product = np.zeros((n_tokens, n_factors))
        for ranked, moment, weight in zip(slices, moments, weights, strict=True):
            product += weight * _covariance_product(
                _values(ranked, scale), moment.mean, factors * inverse[:, None]
            )
        product *= (inverse / np.maximum(seen, 1e-12))[:, None]
        factors, strength, _ = np.linalg.svd(product, full_matrices=False)
    kept = (inverse[:, None] * _with_fixed_sign(factors)).astype(np.float32)
    logger.info(
        "Co-expression of %d genes over %d slices: the first of %d factors is %.0f times as strong "
        "as the last.",
        n_genes,
        len(slices),
        n_factors,
        strength[0] / max(strength[-1], 1e-12),
    )
    return kept


def initialize_from_coexpression(corpus: Corpus, model: Stofm, *, seed: int = 0) -> None:
    """Set the gene embeddings of a model that pools, in place.

    The first half of their numbers are factors of log(1 + value x median), in which genes count by
    their variance, as in principal components. The second half are factors of log(1 + value), in which
    rare genes count more, and which are half as large, because these are noisier. Each factor is
    divided by the root of its deviation over the slices: what varies most in all of them, such as the
    depth of sequencing, shall not drown the rest. Pooled sums then have mean 0 over the slices, and
    the first half's have a mean variance of 1. BERT, if it is narrower than gene embeddings, reads the
    first factors.

    Parameters
    ----------
    corpus
        Training slices, with values.
    model
        Its cell encoder must pool (``pooled=True``).
    seed
        See :func:`coexpression_factors`.

    Raises
    ------
    ValueError
        The cell encoder does not pool, or there are too few genes.
    """
    encoder = model.cell_encoder
    if not encoder.config.pooled:
        msg = (
            "gene_embeddings='coexpression' sets what is pooled over a cell's genes, and this cell "
            "encoder pools nothing: set cell_encoder.pooled to true."
        )
        raise ValueError(msg)
    slices = [one.ranked for one in corpus.slices]
    n_tokens, width = encoder.gene_embeddings.weight.shape
    medians = encoder.medians.numpy()
    halves, means = [], []
    for scale, scaling, size in ((medians, 0.0, 1.0), (np.ones_like(medians), 0.5, 0.5)):
        factors = coexpression_factors(
            slices, n_tokens, width // 2, scaling=scaling, scale=scale, seed=seed
        )
        moments = [_pooled_moments(one, scale, factors) for one in slices]
        deviation = np.sqrt(np.mean([m.variance for m in moments], axis=0))
        # Variances become deviations, whose mean is then `size` squared.
        ratio = (size / np.sqrt(deviation.mean() * deviation)).astype(np.float32)
        halves.append(factors * ratio)
        means.append(np.mean([m.mean for m in moments], axis=0) * ratio)
    table = np.hstack(halves)
    with torch.no_grad():
        encoder.gene_embeddings.weight.copy_(torch.from_numpy(table))
        encoder.gene_offset.copy_(torch.from_numpy(np.concatenate(means)))
        if encoder.config.projects_genes:
            # As spread as BERT's own would be, so that positions and values weigh as usual.
            spread = float(np.sqrt(np.mean(table[table.any(axis=1)] ** 2)))
            ratio = float(encoder.bert.config.initializer_range) / spread
            encoder.gene_projection.weight.copy_(
                torch.eye(*encoder.gene_projection.weight.shape) * ratio
            )


def _pooled_moments(
    ranked: RankedTokens, scale: NDArray[np.float32], factors: NDArray[np.float32]
) -> _Moments:
    """Mean and variance of each factor over a slice's cells."""
    pooled = _values(ranked, scale) @ factors
    return _Moments(
        mean=pooled.mean(axis=0, dtype=np.float64), variance=pooled.var(axis=0, dtype=np.float64)
    )


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each gene, or factor, over a slice."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def _values(ranked: RankedTokens, scale: NDArray[np.float32]) -> sparse.csr_matrix:
    """Values log(1 + value x scale) of a slice, (n_cells, n_tokens)."""
    if ranked.values is None:
        msg = (
            "Co-expression needs the values of the tokens, and they have none: prepare the slices "
            "for a model with cell_encoder.pooled = true."
        )
        raise ValueError(msg)
    logs = np.log1p(ranked.values * scale[ranked.tokens])
    shape = (ranked.n_cells, len(scale))
    return sparse.csr_matrix((logs, ranked.tokens, ranked.offsets), shape=shape)


def _moments(values: sparse.csr_matrix) -> _Moments:
    n_cells = values.shape[0]
    columns = values.indices
    size = values.shape[1]
    mean = np.bincount(columns, weights=values.data, minlength=size) / n_cells
    square = np.bincount(columns, weights=values.data.astype(np.float64) ** 2, minlength=size)
    return _Moments(mean=mean, variance=np.maximum(square / n_cells - mean**2, 0.0))


def _covariance_product(
    values: sparse.csr_matrix, mean: NDArray[np.float64], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Covariance of the genes times `factors`, for cells' factors of mean square norm 1.

    So a slice that measures few genes counts as much as one that measures all.
    """
    scores = values @ factors.astype(np.float32)
    scores -= scores.mean(axis=0)
    scores /= max(float(np.sqrt(np.mean((scores**2).sum(axis=1)))), 1e-12)
    product: NDArray[np.float64] = values.T @ scores
    product = product - np.outer(mean, scores.sum(axis=0, dtype=np.float64))
    return product / len(scores)


def _with_fixed_sign(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each factor the weight of largest magnitude is positive."""
    largest = np.abs(factors).argmax(axis=0)
    signs = np.where(factors[largest, np.arange(factors.shape[1])] < 0, -1.0, 1.0)
    signed: NDArray[np.float64] = factors * signs
    return signed
