"""Initial gene embeddings: random, from co-expression, or from a table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from scipy import sparse

from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.gene_table import GeneTable, require_suffix
from stofm.nn.batch import GeneBag
from stofm.spatial.virtual_cells import principal_components

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from stofm.corpus.reader import Corpus
    from stofm.genes import RankedTokens
    from stofm.nn import CellEncoder, Stofm

    #: Sets first weights from the training slices.
    Initializer = Callable[[Corpus, Stofm], object]

#: Values other than a table.
WORDS: Final = ("random", "coexpression")
#: Share of the vocabulary that may be missing from a table without a warning.
_MOST_LACKING: Final = 0.5
#: Number of cells whose genes are gathered at a time.
_CELLS_AT_ONCE: Final = 10_000
#: A gene's scale is at least this share of the median gene's: rare genes are mostly noise.
_SMALLEST_SCALE = 0.1


def require_gene_embeddings(gene_embeddings: str | PathLike[str]) -> None:
    """Raise an error for a value that is neither a known word nor the name of a table."""
    if gene_embeddings not in WORDS:
        words = ", ".join(map(repr, WORDS))
        require_suffix(gene_embeddings, f"gene_embeddings must be {words} or a table")


def read_gene_embeddings(gene_embeddings: str | PathLike[str]) -> str | GeneTable:
    """Read the table of gene embeddings; words such as ``"random"`` are returned as they are."""
    require_gene_embeddings(gene_embeddings)
    return str(gene_embeddings) if gene_embeddings in WORDS else GeneTable.read(gene_embeddings)


def make_initializer(
    gene_embeddings: str | GeneTable, model: Stofm, *, seed: int
) -> Initializer | None:
    """Return a function that sets a model's initial gene embeddings; None to leave them."""
    if gene_embeddings == "random":
        return None
    if not isinstance(gene_embeddings, GeneTable):
        return partial(initialize_from_coexpression, seed=seed)
    tokens, values = _embeddings_of(gene_embeddings, model)

    def put_in(_: Corpus, model: Stofm) -> None:
        words = model.cell_encoder.gene_embeddings.weight
        with torch.no_grad():
            words[torch.from_numpy(tokens.astype(np.int64))] = torch.from_numpy(values).to(words)

    return put_in


def _embeddings_of(table: GeneTable, model: Stofm) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens that are in a table, and their embeddings.

    These are the table's rows less their mean or, if the table is wider than embeddings, the first
    principal components of the rows. Their spread is that of the embeddings of a new model.
    """
    encoder, vocabulary = model.cell_encoder, model.vocabulary
    width = encoder.gene_embeddings.weight.shape[1]
    if table.width < width:
        raise ValueError(
            f"{table.file} has {table.width} numbers for each gene, and gene embeddings have {width}. "
            "Lower that (d_gene of the cell encoder, or d_hidden where that is not set), or take a "
            "wider table."
        )
    rows = table.rows_of(vocabulary)
    found = table.values[rows[rows >= 0]]
    if table.width > width:
        values = principal_components(found, width)
    else:
        values = found - found.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(np.mean(values**2)))
    if not spread > 0:
        raise ValueError(
            f"{table.file} has the same numbers for all genes of the model, which tell nothing."
        )
    values *= float(encoder.bert.config.initializer_range) / spread
    n_lacking = vocabulary.n_genes - len(values)
    tell = warn if n_lacking > _MOST_LACKING * vocabulary.n_genes else logger.info
    tell(
        f"{len(values)} of the model's {vocabulary.n_genes} genes begin with embeddings from "
        f"{table.file}; the other {n_lacking}, which it lacks, keep theirs."
    )
    return vocabulary.tokens[rows >= 0], values.astype(np.float32)


def initialize_from_coexpression(corpus: Corpus, model: Stofm, *, seed: int = 0) -> None:
    """Set the gene embeddings of a model that pools, in place.

    The first half of their numbers are factors of log(1 + value x median), in which genes count by
    their variance, as in principal components. The second half are factors of log(1 + value), in
    which rare genes count more. Pooled sums then have mean 0 over the slices. If BERT is narrower
    than gene embeddings, it gets the first factors.
    """
    encoder = model.cell_encoder
    if not encoder.config.pooled:
        raise ValueError(
            "gene_embeddings='coexpression' sets what is pooled over a cell's genes, and this cell "
            "encoder pools nothing: set cell_encoder.pooled to true."
        )
    slices = [one.ranked for one in corpus.slices]
    n_tokens, width = encoder.gene_embeddings.weight.shape
    medians = encoder.medians.numpy()
    halves = [
        coexpression_factors(slices, n_tokens, width // 2, scaling=scaling, scale=scale, seed=seed)
        for scale, scaling in ((medians, 0.0), (np.ones_like(medians), 0.5))
    ]
    table = np.hstack(halves)
    with torch.no_grad():
        encoder.gene_embeddings.weight.copy_(torch.from_numpy(table))
        encoder.gene_offset.zero_()
        means = torch.stack([_mean_sums(encoder, one) for one in slices])
        encoder.gene_offset.copy_(means.mean(dim=0))
        if encoder.config.projects_genes:
            # Spread like BERT's own, so that positions and values have the usual weight.
            spread = float(np.sqrt(np.mean(table[table.any(axis=1)] ** 2)))
            ratio = float(encoder.bert.config.initializer_range) / spread
            projection = encoder.gene_projection.weight
            projection.copy_(torch.eye(*projection.shape) * ratio)


def _mean_sums(encoder: CellEncoder, ranked: RankedTokens) -> torch.Tensor:
    """Mean of a slice's pooled sums, (d_gene,)."""
    weights = encoder.lay_out(torch.float32, torch.from_numpy(np.unique(ranked.tokens)).long())
    total = torch.zeros(encoder.config.gene_width, dtype=torch.float64)
    for start in range(0, ranked.n_cells, _CELLS_AT_ONCE):
        rows = np.arange(start, min(start + _CELLS_AT_ONCE, ranked.n_cells))
        total += encoder.pool(GeneBag.from_ranked(ranked, rows), weights).double().sum(dim=0)
    return total / ranked.n_cells


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

    With x the values log(1 + value x scale) of a slice, each gene's less its mean over the slice
    and divided by its standard deviation to the power of `scaling`, the factors W maximise the
    variance of x W, averaged over slices with the square root of their number of cells as weight.
    `scaling` 1 gives all genes the same variance; 0 leaves them as they are, so that the most
    variable genes count most. `scale` (n_tokens,) may be the genes' medians, which turns values
    into counts. A gene counts over the slices where it occurs. W is found by power iteration on
    sparse products: no matrix of genes x genes or dense matrix of cells x genes is made.

    Returns (n_tokens, n_factors) weights of the genes, in order of decreasing variance: a cell's
    factors are the sum over its genes of log(1 + value x scale) x weight, less the slice's mean.
    """
    scale = np.ones(n_tokens, dtype=np.float32) if scale is None else scale
    moments = [_moments(_values(ranked, scale)) for ranked in slices]
    weights = np.sqrt([float(ranked.n_cells) for ranked in slices])
    seen = sum(w * (mean > 0) for w, (mean, _) in zip(weights, moments, strict=True))
    variance = sum(w * own for w, (_, own) in zip(weights, moments, strict=True))
    deviation = np.sqrt(variance / np.maximum(seen, 1e-12))
    if (n_genes := int((deviation > 0).sum())) < n_factors:
        raise ValueError(
            f"Found {n_genes} genes that vary within slices for {n_factors} factors; there must be "
            "as many. Lower the width of gene embeddings (d_gene of the cell encoder, or d_hidden where "
            "that is not set), or use gene_embeddings='random'."
        )
    smallest = _SMALLEST_SCALE * np.median(deviation[deviation > 0])
    inverse = np.where(seen > 0, np.maximum(deviation, smallest) ** -scaling, 0.0)

    start = np.random.default_rng(seed).standard_normal((n_tokens, n_factors))
    factors: NDArray[np.float64] = np.linalg.qr(start * (seen > 0)[:, None])[0]
    for _ in range(iterations):
        product = np.zeros((n_tokens, n_factors))
        for ranked, (mean, _variance), weight in zip(slices, moments, weights, strict=True):
            scaled = factors * inverse[:, None]
            product += weight * _covariance_product(_values(ranked, scale), mean, scaled)
        product *= (inverse / np.maximum(seen, 1e-12))[:, None]
        factors = np.linalg.svd(product, full_matrices=False)[0]
    # The weight of largest magnitude of each factor is positive.
    largest = np.take_along_axis(factors, np.abs(factors).argmax(axis=0)[None], axis=0)
    factors = factors * np.where(largest < 0, -1.0, 1.0)
    logger.info(f"Co-expression of {n_genes} genes over {len(slices)} slices: {n_factors} factors.")
    return (inverse[:, None] * factors).astype(np.float32)


def _values(ranked: RankedTokens, scale: NDArray[np.float32]) -> sparse.csr_matrix:
    """Values log(1 + value x scale) of a slice, (n_cells, n_tokens)."""
    if ranked.values is None:
        raise ValueError(
            "Co-expression needs the values of the tokens, and they have none: prepare the slices "
            "for a model with cell_encoder.pooled = true."
        )
    logs = np.log1p(ranked.values * scale[ranked.tokens])
    shape = (ranked.n_cells, len(scale))
    return sparse.csr_matrix((logs, ranked.tokens, ranked.offsets), shape=shape)


def _moments(values: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each gene over a slice."""
    n_cells, n_tokens = values.shape
    mean = np.bincount(values.indices, weights=values.data, minlength=n_tokens) / n_cells
    squares = values.data.astype(np.float64) ** 2
    square = np.bincount(values.indices, weights=squares, minlength=n_tokens) / n_cells
    return mean, np.maximum(square - mean**2, 0.0)


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
