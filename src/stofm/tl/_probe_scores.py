"""What ``stofm.tl.probe`` leaves out, what a representation is worth there, and the baselines."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from scipy import sparse

from stofm import metrics
from stofm._edge.counts import read_counts
from stofm._edge.expression import log_normalised
from stofm._messages import require_name, warn
from stofm.heads.blocks import N_NEIGHBORS
from stofm.heads.embeddings import counts_layer
from stofm.heads.genes import choose_panel, read_columns, selector
from stofm.heads.network import apply_head, fit_head
from stofm.heads.targets import MIN_SHARE, Targets
from stofm.heads.trust import calibrated_probabilities, fit_temperature, log_scores
from stofm.metrics.labels import Reliability
from stofm.spatial.plane import neighbor_means
from stofm.spatial.splits import leave_out_blocks, split_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.request import SliceTables

#: Stands for a cell without a class.
NO_CLASS: Final = ""
#: Share of the fitted cells that tells when to stop.
_HELD_OUT: Final = 0.1
#: ``"stofm-paper"``: three runs, each with a random fifth of the cells to test, and a random tenth
#: of the others to validate (SToFM, arXiv 2507.11588, section C.2).
Protocol = Literal["stofm-paper"]
_N_RUNS: Final = 3
_TESTED: Final = 0.2
_VALIDATED: Final = 0.1
#: Blocks of a single slice.
_N_BLOCKS: Final = 5
_MOST_NAMED: Final = 10
#: Between the names of what belongs together.
AND: Final = " + "


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


def common_classes(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Classes with at least 1 % of the labelled cells, in alphabetical order."""
    names, counts = np.unique(labels[labels != NO_CLASS], return_counts=True)
    common: NDArray[np.str_] = names[counts >= MIN_SHARE * counts.sum()]
    return common


@dataclass(frozen=True, eq=False)
class Fold:
    """Cells to fit and cells to test, by row.

    `codes` (n_obs,) are the classes of the cells, -1 for none. `fitted` and `tested` cells have a class;
    `labelled` are all labelled cells that are left out, `absent` counts those of them whose class no
    fitted cell has, and `rare` the cells of classes that too few cells to fit have. `held_out` of the
    fitted ones tell when to stop; None for a tenth that each seed draws.
    """

    name: str
    classes: NDArray[np.str_]
    codes: NDArray[np.int64]
    fitted: NDArray[np.int64]
    tested: NDArray[np.int64]
    labelled: NDArray[np.int64]
    absent: dict[str, int]
    rare: dict[str, int]
    held_out: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        labels: NDArray[np.str_],
        fitted: NDArray[np.int64],
        tested: NDArray[np.int64],
        *,
        held_out: NDArray[np.int64] | None = None,
    ) -> Fold:
        """Leave out cells without a class, and classes that are rare among the fitted cells."""
        classes = common_classes(labels[fitted])
        is_known = np.isin(labels, classes)
        labelled = tested[labels[tested] != NO_CLASS]
        absent = labels[labelled][~np.isin(labels[labelled], labels[fitted])]
        to_fit = labels[fitted[(labels[fitted] != NO_CLASS) & ~is_known[fitted]]]
        return cls(
            name,
            classes,
            codes=np.where(is_known, np.searchsorted(classes, labels), -1),
            fitted=fitted[is_known[fitted]],
            tested=tested[is_known[tested]],
            labelled=labelled,
            absent=_counted(absent),
            rare=_counted(to_fit),
            held_out=None if held_out is None else held_out[is_known[held_out]],
        )

    def parts(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that are fitted, and those that tell when to stop."""
        if self.held_out is not None:
            return np.setdiff1d(self.fitted, self.held_out), self.held_out
        n = len(self.fitted)
        order = self.fitted[np.random.default_rng(seed).permutation(n)]
        held_out, rows = np.split(order, [max(1, int(_HELD_OUT * n))])
        return rows, held_out


def _counted(labels: NDArray[np.str_]) -> dict[str, int]:
    names, counts = np.unique(labels, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def plan_folds(
    slices: SliceTables,
    labels: NDArray[np.str_],
    *,
    left_out: str | Sequence[str | tuple[str, ...]] | None,
    spatial_key: str,
) -> list[Fold]:
    """Leave out slices in turn, or blocks if a single slice has labels, (n_obs,) classes.

    `left_out` are names of slices or keys of tables, a tuple of them for those that are left out
    together; None for each slice with labels.
    """
    known = np.flatnonzero(labels != NO_CLASS)
    named = zip(slices.names, slices.rows, strict=True)
    groups = {name: rows for name, rows in named if (labels[rows] != NO_CLASS).any()}
    if left_out is None and len(groups) == 1:
        parts = leave_out_blocks(slices.coordinates(spatial_key)[known], _N_BLOCKS)
        blocks = enumerate(parts, 1)
        folds = [Fold.of(f"block {k}", labels, known[a], known[b]) for k, (a, b) in blocks]
        return _checked(folds)
    if left_out is not None:
        groups = _find(slices, left_out)
    rest = {name: np.setdiff1d(known, rows) for name, rows in groups.items()}
    return _checked([Fold.of(n, labels, rest[n], rows) for n, rows in groups.items()])


def plan_protocol(
    slices: SliceTables, labels: NDArray[np.str_], *, protocol: Protocol, spatial_key: str
) -> list[Fold]:
    """Leave out random cells, as a protocol says, and warn of the leak."""
    codes = np.unique(labels, return_inverse=True)[1] - int(NO_CLASS in labels)
    places = slices.coordinates(spatial_key)
    labelled = [own for rows in slices.rows if len(own := rows[labels[rows] != NO_CLASS])]
    warn(
        f"protocol={protocol!r} tests random cells: their neighbours were fitted, and embeddings of "
        "a cell's surroundings saw both. Scores are higher than those on new slices will be; leave "
        "`protocol` out to test on left-out ones."
    )
    folds = []
    for seed in range(_N_RUNS):
        outer = split_cells(places, labelled, how="random", share=_TESTED, classes=codes, seed=seed)
        rest = [np.intersect1d(rows, outer.fitted) for rows in labelled]
        inner = split_cells(places, rest, how="random", share=_VALIDATED, classes=codes, seed=seed)
        parts = outer.fitted, outer.held_out
        folds.append(Fold.of("random cells", labels, *parts, held_out=inner.held_out))
    return _checked(folds)


def _find(
    slices: SliceTables, left_out: str | Sequence[str | tuple[str, ...]]
) -> dict[str, NDArray[np.int64]]:
    """Rows of what is to be left out, by name."""
    known = dict(zip(slices.names, slices.rows, strict=True))
    for key, place in zip(slices.keys or (), slices.places, strict=False):
        known.setdefault(key, np.arange(place.start, place.stop))
    asked = [left_out] if isinstance(left_out, str) else left_out
    groups = [(one,) if isinstance(one, str) else tuple(one) for one in asked]
    for name in itertools.chain(*groups):
        require_name(name, known, f"left_out names {name!r}, which is no slice.", ValueError)
    rows = [np.unique(np.concatenate([known[name] for name in names])) for names in groups]
    return dict(zip(map(AND.join, groups), rows, strict=True))


def _checked(folds: Sequence[Fold]) -> list[Fold]:
    """Warn of what can't be tested, and take away folds where nothing can."""
    rare: dict[str, int] = {}
    for fold in folds:
        rare |= {name: max(n, rare.get(name, 0)) for name, n in fold.rare.items()}
    if rare:
        more = f" and {len(rare) - _MOST_NAMED} more" if len(rare) > _MOST_NAMED else ""
        some = ", ".join(f"{name} ({n})" for name, n in list(rare.items())[:_MOST_NAMED])
        warn(
            f"Rare classes are neither fitted nor tested (cells to fit): {some}{more}. A class needs "
            f"{MIN_SHARE:.0%} of the cells to fit."
        )
    absent = [f"{name!r} ({n} cells of {f.name})" for f in folds for name, n in f.absent.items()]
    if absent:
        more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
        warn(
            "Classes that no cell outside of what is left out has are not tested: "
            f"{', '.join(absent[:_MOST_NAMED])}{more}."
        )
    usable = [fold for fold in folds if len(fold.classes) > 1 and len(fold.tested)]
    if not usable:
        raise ValueError(
            "Nothing can be tested: that needs two classes with "
            f"{MIN_SHARE:.0%} or more of the cells that are fitted, and cells of them among those "
            "that are left out. Pass more slices, a column with larger classes, or another `left_out`."
        )
    if lost := [fold.name for fold in folds if fold not in usable]:
        warn(
            f"{', '.join(lost[:_MOST_NAMED])} can't be tested: the other cells have fewer than two "
            "classes, or none that is there."
        )
    return usable


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

    A cell's counts, of all its genes, are scaled to the median total of the cells, as scanpy does.
    """
    columns = read_columns(slices)
    genes = choose_panel(columns)
    if len(genes) < 2:
        raise ValueError(
            f"The AnnData have a single gene in common, {genes[0].name!r}; two are needed."
        )
    parts, totals = [], []
    for k, (table, names) in enumerate(zip(slices.tables, columns, strict=True)):
        choice = selector([names.same_gene(gene) for gene in genes], table.n_vars)
        with slices.naming(k):
            for block in read_counts(table, layer=counts_layer(table, layer)):
                totals.append(np.asarray(block.sum(axis=1, dtype=np.float64)).ravel())
                parts.append(sparse.csr_matrix(block @ choice))
    depths = np.concatenate(totals)
    usual = float(np.median(depths[depths > 0])) if depths.any() else 1.0
    return log_normalised(sparse.vstack(parts, format="csr"), depths, target_sum=usual)


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
