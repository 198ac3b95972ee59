"""What a representation is worth on a left-out slice, on arrays: a head, clusters, calibration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm import metrics
from stofm.metrics.labels import Reliability
from stofm.tl._annotation_head import log_scores
from stofm.tl._labels import MIN_SHARE
from stofm.train import Targets, apply_head, fit_head
from stofm.train.calibration import calibrated_probabilities, fit_temperature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy import sparse

#: Stands for a cell without a class.
NO_CLASS: Final = ""
#: Share of the fitted cells that tells when to stop.
_HELD_OUT: Final = 0.1
_KMEANS_STARTS: Final = 10
#: Bins of equally many cells that confidence and accuracy are compared in.
_N_BINS: Final = 10
#: Strengths of logistic regression, of which cells that are held out choose.
_STRENGTHS: Final = (0.003, 0.03, 0.3)
_MOST_ROUNDS: Final = 100
_TOLERANCE: Final = 1e-3


def common_classes(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Classes with at least 1 % of the labelled cells, in alphabetical order."""
    names, counts = np.unique(labels[labels != NO_CLASS], return_counts=True)
    common: NDArray[np.str_] = names[counts >= MIN_SHARE * counts.sum()]
    return common


@dataclass(frozen=True, eq=False)
class Fold:
    """Cells to fit and cells to test.

    Attributes
    ----------
    name
        What is left out.
    classes
        Names of the classes, in alphabetical order.
    codes
        (n_obs,) class of each cell; -1 for none.
    fitted, tested
        Rows with a class, ascending.
    held_out
        Those of the fitted rows that tell when to stop; None for a tenth that each seed draws.
    labelled
        Rows of all labelled cells that are left out, also of classes that are not fitted.
    absent
        Numbers of these cells by class, of classes that no labelled cell outside has.
    """

    name: str
    classes: NDArray[np.str_]
    codes: NDArray[np.int64]
    fitted: NDArray[np.int64]
    tested: NDArray[np.int64]
    labelled: NDArray[np.int64]
    absent: dict[str, int]
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
        """Leave out cells without a class, and classes that are rare among the fitted cells.

        Parameters
        ----------
        labels
            (n_obs,) classes; :data:`NO_CLASS` for none.
        fitted, tested, held_out
            Rows, ascending.
        """
        classes = common_classes(labels[fitted])
        codes = np.full(len(labels), -1, dtype=np.int64)
        is_known = np.isin(labels, classes)
        labelled = tested[labels[tested] != NO_CLASS]
        names, counts = np.unique(labels[labelled], return_counts=True)
        is_absent = ~np.isin(names, labels[fitted])
        codes[is_known] = np.searchsorted(classes, labels[is_known])
        return cls(
            name,
            classes,
            codes,
            fitted=fitted[is_known[fitted]],
            tested=tested[is_known[tested]],
            labelled=labelled,
            absent=dict(zip(names[is_absent].tolist(), counts[is_absent].tolist(), strict=True)),
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


def score_head(features: NDArray[np.float32], fold: Fold, *, seed: int) -> dict[str, float]:
    """Fit the paper's head to the fitted cells and score it on the tested ones.

    Parameters
    ----------
    features
        (n_obs, d) representations.
    fold
        The cells.
    seed
        Of first weights, order, dropout and the choice of held-out cells.

    Returns
    -------
    ``"accuracy"``, ``"macro_f1"`` over the classes of the tested cells, and
    ``"calibration_error"``, with a temperature that is fitted to the held-out cells.
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
            known, tested = (
                np.zeros((len(own), len(fold.classes))) for own in (held_out, fold.tested)
            )
            known[:, model.classes_] = model.predict_proba(values[held_out])
            loss = -log_scores(known)[np.arange(len(known)), fold.codes[held_out]].mean()
            if loss >= best:
                break
            tested[:, model.classes_] = model.predict_proba(values[fold.tested])
            best, found = loss, tested
    return _score(found.argmax(axis=1), found.max(axis=1), fold)


def _score(
    found: NDArray[np.int64], confidence: NDArray[np.floating], fold: Fold
) -> dict[str, float]:
    true = fold.codes[fold.tested]
    return {
        "accuracy": metrics.accuracy(true, found),
        "macro_f1": metrics.macro_f1(true, found),
        "calibration_error": Reliability.of(
            confidence.astype(np.float64), found == true, _N_BINS
        ).error,
    }


def score_clusters(
    features: NDArray[np.float32], labels: NDArray[np.str_], *, seed: int
) -> dict[str, float]:
    """Compare k-means clusters of cells with their classes; nothing is fitted to these.

    Parameters
    ----------
    features
        (n, d) representations, taken as they are.
    labels
        (n,) classes; cells of rare classes or none are left out. There are as many clusters as
        classes.
    seed
        Of ten starts.

    Returns
    -------
    ``"ari"`` and ``"nmi"``; NaN if there is a single class.
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
