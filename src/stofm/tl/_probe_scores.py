"""What a representation is worth on a left-out slice, and the baselines to compare it with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm import metrics
from stofm._edge.counts import read_counts
from stofm.genes import embedded_vocabulary
from stofm.heads.blocks import N_NEIGHBORS
from stofm.heads.embeddings import counts_layer
from stofm.heads.gene_columns import GeneColumns, choose_panel, selector
from stofm.heads.network import apply_head, fit_head
from stofm.heads.targets import Targets, log_normalised
from stofm.heads.trust import calibrated_probabilities, fit_temperature, log_scores
from stofm.metrics.labels import Reliability
from stofm.spatial.neighbor_graph import neighbor_means
from stofm.tl._probe_folds import Fold, common_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.slices import SliceTables

_KMEANS_STARTS: Final = 10
#: Bins of equally many cells that confidence and accuracy are compared in.
_N_BINS: Final = 10
#: Strengths of logistic regression, of which cells that are held out choose.
_STRENGTHS: Final = (0.003, 0.03, 0.3)
_MOST_ROUNDS: Final = 100
_TOLERANCE: Final = 1e-3

#: Baselines.
PCS: Final = "PCs"
PCS_AND_NEIGHBORS: Final = "PCs + neighbours"
LOG_COUNTS: Final = "log counts"
_N_COMPONENTS: Final = 50
#: Of more genes than this those that vary most are read.
_MOST_GENES: Final = 3000


def score_head(features: NDArray[np.float32], fold: Fold, *, seed: int) -> dict[str, float]:
    """Fit the paper's head to the fitted cells and score it on the tested ones.

    Macro-F1 is over the classes of the tested cells; the calibration error has a temperature that
    is fitted to the held-out cells.
    """
    rows, held_out = fold.parts(seed)
    targets = Targets("classes", fold.codes, len(fold.classes))
    head = fit_head(features, targets, fitted=rows, held_out=held_out, seed=seed).head
    found, known = (
        apply_head(head, features[own], "classes").astype(np.float64)
        for own in (fold.tested, held_out)
    )
    temperature = fit_temperature(log_scores(known), fold.codes[held_out])
    calibrated = calibrated_probabilities(log_scores(found), temperature)
    return _score(found.argmax(axis=1), calibrated.max(axis=1), fold)


def score_regression(values: sparse.csr_matrix, fold: Fold) -> dict[str, float]:
    """Do the same with logistic regression on log-normalised counts, (n_obs, n_genes).

    The strength of the penalty is that with the least loss on the cells that are held out with
    seed 0; stronger ones come first, and none is tried after the loss has risen.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows, held_out = fold.parts(0)
    model = LogisticRegression(max_iter=_MOST_ROUNDS, tol=_TOLERANCE, warm_start=True)
    best, found = np.inf, np.zeros((len(fold.tested), len(fold.classes)))
    with warnings.catch_warnings():
        # Scores on held-out cells no longer change in the last rounds.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in _STRENGTHS:
            model.set_params(C=strength).fit(values[rows], fold.codes[rows])
            # All fitted cells of a class may be held out.
            known = np.zeros((len(held_out), len(fold.classes)))
            known[:, model.classes_] = model.predict_proba(values[held_out])
            loss = -log_scores(known)[np.arange(len(known)), fold.codes[held_out]].mean()
            if loss >= best:
                break
            best = loss
            found[:, model.classes_] = model.predict_proba(values[fold.tested])
    return _score(found.argmax(axis=1), found.max(axis=1), fold)


def _score(
    found: NDArray[np.int64], confidence: NDArray[np.floating], fold: Fold
) -> dict[str, float]:
    true = fold.codes[fold.tested]
    curve = Reliability.of(confidence.astype(np.float64), found == true, _N_BINS)
    return {
        "accuracy": metrics.accuracy(true, found),
        "macro_f1": metrics.macro_f1(true, found),
        "calibration_error": curve.error,
    }


def score_clusters(
    features: NDArray[np.float32], labels: NDArray[np.str_], *, seed: int
) -> dict[str, float]:
    """Compare k-means clusters of cells with their classes; nothing is fitted to these.

    There are as many clusters as classes; cells of rare classes or none are left out. NaN if there
    is a single class.
    """
    from sklearn.cluster import KMeans

    classes = common_classes(labels)
    if len(classes) < 2:
        return {"ari": np.nan, "nmi": np.nan}
    use = np.isin(labels, classes)
    clusters = KMeans(len(classes), n_init=_KMEANS_STARTS, random_state=seed).fit(features[use])
    return {
        "ari": metrics.ari(labels[use], clusters.labels_),
        "nmi": metrics.nmi(labels[use], clusters.labels_),
    }


def side_by_side(parts: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Put representations of the same cells side by side, (n, d) each.

    If there are several, each is divided by the root of the mean of its columns' variances, so
    that none drowns the others.
    """
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0], dtype=np.float32)
    scales = [float(np.sqrt(part.var(axis=0, dtype=np.float64).mean())) or 1.0 for part in parts]
    scaled = [part / scale for part, scale in zip(parts, scales, strict=True)]
    return np.hstack(scaled).astype(np.float32, copy=False)


def log_counts(slices: SliceTables, *, layer: str | None = None) -> sparse.csr_matrix:
    """Log-normalised counts of the genes that all tables have, (n_obs, n_genes).

    A cell's counts, of all its genes, are scaled to 10,000.
    """
    vocabulary = embedded_vocabulary()
    columns = slices.each(lambda table: GeneColumns.read(table, vocabulary, must_map=False))
    genes = choose_panel(columns, ()).inputs
    if len(genes) < 2:
        raise ValueError(
            f"The AnnData have a single gene in common, {genes[0].name!r}; two are needed."
        )
    own = iter(columns)

    def read(table: AnnData) -> sparse.csr_matrix:
        names = next(own)
        choice = selector([names.same_gene(gene) for gene in genes], table.n_vars)
        parts = []
        for block in read_counts(table, layer=counts_layer(table, layer)):
            totals = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            parts.append(log_normalised(sparse.csr_matrix(block @ choice), totals))
        return sparse.vstack(parts, format="csr")

    return sparse.vstack(slices.each(read), format="csr")


def most_variable(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Of more than 3,000 genes those that vary most."""
    from sklearn.utils.sparsefuncs import mean_variance_axis

    if values.shape[1] <= _MOST_GENES:
        return values
    variance = mean_variance_axis(values, axis=0)[1]
    chosen = np.sort(np.argsort(-variance, kind="stable")[:_MOST_GENES])
    return sparse.csr_matrix(values[:, chosen])


def principal_components(values: sparse.csr_matrix) -> NDArray[np.float32]:
    """50 principal components of sparse values, (n_obs, 50), which are not made dense."""
    from sklearn.decomposition import PCA

    n_components = min(_N_COMPONENTS, min(values.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=0)
    scores: NDArray[np.float32] = pca.fit_transform(values.astype(np.float64)).astype(np.float32)
    return scores


def with_neighbors(
    components: NDArray[np.float32], slices: SliceTables, *, spatial_key: str
) -> NDArray[np.float32]:
    """Components beside their means over the ten nearest cells of the same slice."""
    means = neighbor_means(components, slices.coordinates(spatial_key), slices.rows, N_NEIGHBORS)
    return side_by_side([components, means])
