"""What frozen embeddings are worth, on arrays: a head's macro-F1, clusters' agreement, and PCA baselines."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.sparsefuncs import mean_variance_axis

from stofm.train import Targets, apply_head, fit_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

#: Stands for a cell without a class.
NO_CLASS = ""
#: Classes with a smaller share of the labelled cells are left out, as in the paper.
SMALLEST_SHARE = 0.01

_COUNTS_PER_CELL = 1e4
#: Share of the fitted cells that tells when to stop.
_HELD_OUT = 0.1
_N_COMPONENTS = 50
#: PCs of more genes than this are those of the genes that vary most.
_MOST_GENES = 3000
_N_NEIGHBORS = 10
_KMEANS_STARTS = 10


def common_classes(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Classes with at least 1 % of the labelled cells, in alphabetical order."""
    names, counts = np.unique(labels[labels != NO_CLASS], return_counts=True)
    common: NDArray[np.str_] = names[counts >= SMALLEST_SHARE * counts.sum()]
    return common


def probe(
    fitted: NDArray[np.floating],
    fitted_labels: NDArray[np.str_],
    tested: NDArray[np.floating],
    tested_labels: NDArray[np.str_],
    *,
    seeds: Sequence[int],
) -> list[float]:
    """Fit the head of :func:`stofm.tl.annotate` to cells of some slices and test it on another.

    A random tenth of the fitted cells tells when to stop. Classes that are rare among the fitted
    cells are left out of fitting and testing.

    Parameters
    ----------
    fitted, tested
        (n, d) embeddings.
    fitted_labels, tested_labels
        (n,) classes; :data:`NO_CLASS` for none.
    seeds
        Of first weights, order, dropout and the choice of held-out cells.

    Returns
    -------
    Macro-F1 over the classes of the tested cells, for each seed.

    Raises
    ------
    ValueError
        Fewer than two classes to fit, or none of them among the tested cells.
    """
    classes = common_classes(fitted_labels)
    use, test = np.isin(fitted_labels, classes), np.isin(tested_labels, classes)
    if len(classes) < 2 or not test.any():
        msg = (
            f"A probe needs two classes or more, and cells of them to test; found the classes "
            f"{classes.tolist()} with {SMALLEST_SHARE:.0%} or more of the fitted cells, and "
            f"{int(test.sum())} tested cells of them. Check the column of labels."
        )
        raise ValueError(msg)
    truth = tested_labels[test]
    inputs = fitted[use].astype(np.float32)
    targets = Targets("classes", np.searchsorted(classes, fitted_labels[use]), len(classes))
    scores = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(inputs))
        held_out, rows = np.split(order, [max(1, int(_HELD_OUT * len(inputs)))])
        head = fit_head(inputs, targets, fitted=rows, held_out=held_out, seed=seed).head
        probabilities = apply_head(head, tested[test].astype(np.float32), "classes")
        predicted = classes[probabilities.argmax(axis=1)]
        score = f1_score(truth, predicted, average="macro", labels=np.unique(truth))
        scores.append(float(score))
    return scores


def cluster(
    features: NDArray[np.floating], labels: NDArray[np.str_], *, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Compare k-means clusters of the cells of a slice with their classes; nothing is fitted to these.

    Parameters
    ----------
    features
        (n, d) embeddings, taken as they are.
    labels
        (n,) classes; cells of rare classes or none are left out. There are as many clusters as
        classes.
    seeds
        Of the starts, ten each.

    Returns
    -------
    ``"ari"`` and ``"nmi"``: adjusted Rand index and normalised mutual information by seed.
    """
    use = np.isin(labels, common_classes(labels))
    truth = labels[use]
    found = [
        KMeans(len(np.unique(truth)), n_init=_KMEANS_STARTS, random_state=seed).fit(features[use])
        for seed in seeds
    ]
    return {
        "ari": [float(adjusted_rand_score(truth, one.labels_)) for one in found],
        "nmi": [float(normalized_mutual_info_score(truth, one.labels_)) for one in found],
    }


def side_by_side(
    first: Sequence[NDArray[np.floating]], second: Sequence[NDArray[np.floating]]
) -> list[NDArray[np.floating]]:
    """Put two representations of the same slices side by side.

    Each is divided by its overall standard deviation over all of them, the root of the mean of
    its columns' variances, so that neither drowns the other.
    """
    scaled = []
    for part in (first, second):
        scale = float(np.sqrt(np.concatenate(part).var(axis=0, dtype=np.float64).mean()))
        scaled.append([values / (scale or 1.0) for values in part])
    return [np.hstack(pair) for pair in zip(*scaled, strict=True)]


def principal_components(slices: Sequence[AnnData]) -> list[NDArray[np.float32]]:
    """50 PCs of log-normalised counts over the genes that all slices have, fitted on all of them.

    A cell's counts, of all its genes, are scaled to 10,000. Of more than 3,000 genes those that
    vary most are taken.
    """
    stacked = sparse.vstack(log_counts(slices)).tocsr()
    if stacked.shape[1] < 2:
        msg = f"The slices have {stacked.shape[1]} genes in common, by name; PCs need two or more."
        raise ValueError(msg)
    if stacked.shape[1] > _MOST_GENES:
        variance = mean_variance_axis(stacked, axis=0)[1]
        stacked = stacked[:, np.sort(np.argsort(-variance, kind="stable")[:_MOST_GENES])]
    pca = PCA(min(_N_COMPONENTS, min(stacked.shape) - 1), svd_solver="arpack", random_state=0)
    scores = pca.fit_transform(stacked).astype(np.float32)
    return np.split(scores, np.cumsum([one.n_obs for one in slices])[:-1])


def log_counts(slices: Sequence[AnnData]) -> list[Any]:
    """Log-normalised counts over the genes that all slices have, by name in alphabetical order.

    A cell's counts, of all its genes, are scaled to 10,000.
    """
    genes = reduce(np.intersect1d, [one.var_names.to_numpy(dtype=str) for one in slices])
    return [_log_normalized(one)[:, _columns(one, genes)] for one in slices]


def _log_normalized(adata: AnnData) -> Any:
    counts = sparse.csr_matrix(adata.X, dtype=np.float64)
    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    return (sparse.diags(_COUNTS_PER_CELL / total) @ counts).log1p().tocsr()


def _columns(adata: AnnData, genes: NDArray[np.str_]) -> NDArray[np.int64]:
    """First column of each gene."""
    names, first = np.unique(adata.var_names.to_numpy(dtype=str), return_index=True)
    return first[np.searchsorted(names, genes)]


def neighbor_means(
    features: NDArray[np.floating],
    coordinates: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
) -> NDArray[np.floating]:
    """Mean over the ten nearest cells of the same slice, the cell itself not among them.

    Parameters
    ----------
    features
        (n, d).
    coordinates
        (n, 2), any unit.
    slices
        Rows of each slice.
    """
    means = np.zeros_like(features)
    for rows in slices:
        if len(rows) < 2:
            continue
        search = NearestNeighbors(n_neighbors=min(_N_NEIGHBORS, len(rows) - 1))
        nearest = search.fit(coordinates[rows]).kneighbors(return_distance=False)
        means[rows] = features[rows][nearest].mean(axis=1)
    return means
