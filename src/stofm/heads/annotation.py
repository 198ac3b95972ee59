"""Classes of cells: the head of ``stofm.tl.annotate``, how far it can be trusted, what it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from stofm import metrics
from stofm._arrays import let_go
from stofm._edge.colors import colors_of
from stofm._edge.observations import cell_digests
from stofm._edge.tables import all_or_nothing
from stofm._keys import Label, Obs, Obsm
from stofm._logging import logger
from stofm.heads.expression import principal_axes
from stofm.heads.fitting import fit
from stofm.heads.head import Head
from stofm.heads.network import row_order
from stofm.heads.targets import Targets, read_labels
from stofm.nn.prediction_head import ROUNDING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import Labels
    from stofm.spatial import Split

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT: Final = 100
_CONFIDENCE = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)
#: Bounds of the temperature, and its value without cells to fit it to.
TEMPERATURES: Final = (0.2, 5.0)
#: How firmly the temperature is held to 1: few cells, all of them right or all of them wrong, would
#: draw it without end. A hundred cells or more do as they like.
_PRIOR: Final = 20.0
#: Principal components that distances are measured in: with 20, cells of a class that was left out
#: are found better than with 50, and as well as by their nearest labelled cells.
_N_COMPONENTS: Final = 20
#: What is added to the variances within classes, as a share of their mean.
_SHRINKAGE: Final = 1e-2
_CHUNK: Final = 16_384


def fit_temperature(scores: NDArray[np.floating], classes: NDArray[np.int64]) -> float:
    """Find what to divide scores by so that probabilities are as good as can be.

    `scores`, (n, n_classes), are raw outputs of a head for held-out cells. The temperature has the
    lowest negative log-likelihood, to which that of the temperature is added: its logarithm is
    normal around 0. The fewer cells, the nearer to 1; 1 without cells.

    References
    ----------
    Guo et al. 2017, On calibration of modern neural networks (ICML).
    """
    if not len(scores):
        return 1.0
    values = np.asarray(scores, dtype=np.float64)
    rows = np.arange(len(values))

    def loss(log_temperature: float) -> float:
        likelihood = log_softmax(values / np.exp(log_temperature), axis=1)[rows, classes].sum()
        return _PRIOR * log_temperature**2 / 2 - float(likelihood)

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def calibrated_probabilities(
    scores: NDArray[np.floating], temperature: float
) -> NDArray[np.float32]:
    """Softmax of scores divided by the temperature, (n, n_classes)."""
    values = np.asarray(scores, dtype=np.float32) / np.float32(temperature)
    return np.asarray(softmax(values, axis=1))


def log_scores(probabilities: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scores whose softmax is the probabilities, for a temperature to act on."""
    return np.asarray(np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Where the embeddings of labelled cells lie.

    Embeddings are standardised and projected to principal components; there all classes are taken
    to have one covariance, and the distance is that from the nearest class mean in its units.

    Attributes
    ----------
    center
        (d,) what is taken off.
    projection
        (d, k) onto components in units of the covariance within classes.
    means
        (n_classes, k) means of the classes there.

    References
    ----------
    Lee et al. 2018, A simple unified framework for detecting out-of-distribution samples (NeurIPS).
    """

    center: NDArray[np.float32]
    projection: NDArray[np.float32]
    means: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], classes: NDArray[np.int64]) -> Surroundings:
        """Take class means and the covariance within classes, numbers from 0 that all occur.

        `features`, (n, d), are in an order that does not depend on the file.
        """
        center = features.mean(axis=0, dtype=np.float64)
        values = features - center
        scale = values.std(axis=0)
        scale[scale <= ROUNDING * np.abs(features).max(axis=0)] = np.inf
        values /= scale
        kept = principal_axes(values, _N_COMPONENTS)[1]
        scores = values @ kept
        sizes = np.bincount(classes).astype(np.float64)
        sums = np.stack([np.bincount(classes, column) for column in scores.T], axis=1)
        means = sums / sizes[:, None]
        residuals = scores - means[classes]
        within = residuals.T @ residuals / len(residuals)
        ridge = _SHRINKAGE * np.trace(within) / len(within) or 1.0
        root = np.linalg.cholesky(within + ridge * np.eye(len(within)))
        projection = solve_triangular(root, kept.T / scale, lower=True).T
        means = solve_triangular(root, means.T, lower=True).T
        return cls(*(one.astype(np.float32) for one in (center, projection, means)))

    def distances(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) distance of each embedding from the nearest class mean."""
        found = np.empty(len(features))
        for start in range(0, len(features), _CHUNK):
            part = slice(start, start + _CHUNK)
            scores = (features[part] - self.center) @ self.projection
            squares = (scores**2).sum(axis=1)[:, None] + (self.means**2).sum(axis=1)
            squares -= 2 * scores @ self.means.T
            found[part] = np.sqrt(np.maximum(squares.min(axis=1), 0.0))
            let_go(features)
        return found


@dataclass(frozen=True)
class Rejection:
    """When a cell is called unknown: if both thresholds are passed.

    Attributes
    ----------
    rate
        Share of known cells that may be.
    measured, n_cells
        Share of the held-out known cells that are, and the number of these.
    least_probability
        Below it the likeliest class is not supported by its probability.
    greatest_distance
        Above it no class is supported by the embedding.
    """

    rate: float
    measured: float
    n_cells: int
    least_probability: float
    greatest_distance: float

    @classmethod
    def fit(
        cls, confidence: NDArray[np.floating], distances: NDArray[np.float64], rate: float
    ) -> Rejection:
        """Choose thresholds on held-out known cells, (n,) each.

        The same share of them lies beyond either threshold, as large as can be so that no more
        than `rate` of them lies beyond both.
        """
        n_cells = len(confidence)
        by_confidence, by_distance = np.sort(confidence), np.sort(-distances)
        # A cell is rejected once the threshold reaches the larger of its two ranks.
        ranks = np.maximum(
            np.searchsorted(by_confidence, confidence, side="right"),
            np.searchsorted(by_distance, -distances, side="right"),
        )
        n_rejected = int(rate * n_cells)
        beyond = np.sort(ranks)[n_rejected] - 1 if n_rejected < n_cells else n_cells - 1
        least, greatest = float(by_confidence[beyond]), float(-by_distance[beyond])
        measured = float(((confidence < least) & (distances > greatest)).mean())
        return cls(rate, measured, n_cells, least, greatest)

    def rejects(
        self, confidence: NDArray[np.floating], distances: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """(n,) whether cells are unknown."""
        return np.asarray(
            (confidence < self.least_probability) & (distances > self.greatest_distance)
        )


class Annotation(NamedTuple):
    """Classes of cells: calibrated probabilities, (n_obs, n_classes), and whether none is supported."""

    probabilities: NDArray[np.float32]
    is_unknown: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AnnotationHead(Head):
    """A head that names the classes of cells, from :func:`stofm.tl.annotate`.

    Keep it with ``head.save(folder)``, and read it with ``AnnotationHead.load(folder)``.

    Attributes
    ----------
    temperature
        What scores are divided by before the softmax, fitted to the held-out cells.
    rejection
        When a cell is unknown: the stated rate, the thresholds, and the share of held-out known
        cells that they reject; None if none is to be.
    surroundings
        Where the embeddings of the labelled cells lie; None if no cell is to be unknown.
    fitted_to
        A number for each labelled cell, from its name and position: scores on these are no test.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Classes; what is read and by which model; how the head was fitted and how good it is.
    networks, reads, weights, expression, n_neighbors, panel
        The members of the head, what they read, and their weight.
    """

    task: ClassVar[str] = "annotation"
    called: ClassVar[str] = "classes"
    key: ClassVar[str] = Obs.ANNOTATION
    obs_beside: ClassVar[tuple[str, ...]] = (_CONFIDENCE,)
    obsm_beside: ClassVar[tuple[str, ...]] = (_PROBA,)

    temperature: float
    rejection: Rejection | None = None
    surroundings: Surroundings | None = None
    fitted_to: NDArray[np.int64] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in alphabetical order."""
        return self.outputs

    def predict(self, blocks: Blocks) -> Annotation:
        """Name the classes of cells from what is read of them."""
        mean = np.zeros((len(blocks.features), len(self.outputs)))
        for vote, weight in self.votes(blocks, "classes"):
            mean += weight[:, None] * vote
        probabilities = calibrated_probabilities(log_scores(mean), self.temperature)
        is_unknown = np.zeros(len(mean), dtype=bool)
        if self.rejection is not None and self.surroundings is not None:
            distances = self.surroundings.distances(blocks.features)
            is_unknown = self.rejection.rejects(probabilities.max(axis=1), distances)
        return Annotation(probabilities, is_unknown)

    def apply(self, slices: SliceTables, request: Request, key: str) -> None:
        """Name the cells of some tables, and write that."""
        self.refuse_key(slices, key, request, self.use_rep)
        with all_or_nothing(*slices.tables):
            found = self.predict(self.read(slices, request))
            categories = [*self.classes, Label.UNKNOWN]
            likeliest = found.probabilities.argmax(axis=1)
            codes = np.where(found.is_unknown, len(self.classes), likeliest)
            names = pd.Categorical.from_codes(codes, categories=categories)
            params = {name: self.params[name] for name in ("label_key", "reject_rate")}
            params["temperature"] = self.temperature
            self.write(
                slices,
                key,
                {_PROBA: found.probabilities},
                obs={"": names, _CONFIDENCE: found.probabilities.max(axis=1)},
                params=slices.each(
                    lambda table: params | self._seen_of(table, request.spatial_key)
                ),
            )
        logger.info(
            "%d cells annotated with %d classes into obs[%r]; %d are unknown.",
            *(len(codes), len(self.classes), key, found.is_unknown.sum()),
        )

    def _seen_of(self, table: AnnData, spatial_key: str) -> dict[str, Any]:
        """Which cells of a table the head was fitted to, for the record."""
        cells = cell_digests(table, spatial_key)
        seen = cells[np.isin(cells, [] if self.fitted_to is None else self.fitted_to)]
        return {Label.FITTED: seen} if len(seen) else {}

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["temperature"] = self.temperature
        arrays |= {} if self.fitted_to is None else {Label.FITTED: self.fitted_to}
        if self.rejection is None or self.surroundings is None:
            return entries, arrays
        return entries | {"rejection": asdict(self.rejection)}, arrays | asdict(self.surroundings)

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._read_own(own, arrays) | {"temperature": own["temperature"]}
        fields[Label.FITTED] = arrays.get(Label.FITTED)
        if own.get("rejection") is not None:
            fields["rejection"] = Rejection(**own["rejection"])
            parts = {name: arrays[name] for name in Surroundings.__dataclass_fields__}
            fields["surroundings"] = Surroundings(**parts)
        return fields


def learn_classes(slices: SliceTables, request: Request, label_key: str) -> AnnotationHead:
    """Fit a head to a column of ``obs``; temperature and thresholds to the held-out cells."""
    options = request.options
    request.check(slices)
    labels = read_labels(slices, label_key, missing=options.missing, min_share=options.min_share)
    if Label.UNKNOWN in labels.classes:
        raise ValueError(
            f"obs[{label_key!r}] has a class {Label.UNKNOWN!r}, the name of cells that no class "
            "is supported for. Rename it, or add it to `missing` to leave it out."
        )
    codes, weights = labels.codes, None
    if options.class_weights == "balanced":
        sizes = np.bincount(codes[labels.is_known], minlength=len(labels.classes))
        weights = (sizes.sum() / (len(sizes) * sizes)).astype(np.float32)
    targets = Targets("classes", codes, len(labels.classes), weights)
    blocks, splits, members, fields = fit(slices, targets, request, AnnotationHead.task)
    _tell_about(splits[0], labels)
    rows, read, scores = members.rows, blocks.features, log_scores(members.votes)
    temperature = fit_temperature(scores, codes[rows])
    probabilities = calibrated_probabilities(scores, temperature)
    is_unknown = np.zeros(len(rows), dtype=bool)
    if options.reject_rate and len(rows):
        around = [
            Surroundings.fit(read[fitted], codes[fitted])
            for fitted in (row_order(read, codes, split.fitted) for split in splits)
        ]
        distances = np.concatenate(
            [one.distances(read[own]) for one, own in zip(around, members.held_out, strict=True)]
        )
        confidence = probabilities.max(axis=1)
        rejection = Rejection.fit(confidence, distances, options.reject_rate)
        is_unknown = rejection.rejects(confidence, distances)
        fields |= {"rejection": rejection, "surroundings": around[0]}
    found = []
    if len(rows):
        found.append(score_classes(Annotation(probabilities, is_unknown), codes[rows]))
    cells = np.concatenate(slices.each(lambda one: cell_digests(one, request.spatial_key)))
    return AnnotationHead(
        **fields,
        temperature=temperature,
        fitted_to=np.sort(cells[labels.is_known]),
        outputs=labels.classes,
        params={
            **request.record,
            "label_key": label_key,
            "missing": [str(one) for one in options.missing],
            "min_share": float(options.min_share),
            "left_out_classes": list(labels.left_out),
            "class_weights": options.class_weights,
            "n_neighbors": blocks.n_neighbors,
            "reject_rate": float(options.reject_rate),
            "colors": colors_of(slices.tables, label_key),
        },
        validation_scores=pd.DataFrame(found, index=pd.RangeIndex(1, 1 + len(found), name="run")),
    )


def _tell_about(split: Split, labels: Labels) -> None:
    """Log what the held-out cells lack, since weights and calibration come from them."""
    if len(split.moved):
        moved = ", ".join(labels.classes[k] for k in np.unique(labels.codes[split.moved]))
        msg = "Held-out parts would have all cells of %s; these %d cells are fitted."
        logger.info(msg, moved, len(split.moved))
    n_classes = len(np.unique(labels.codes[split.held_out]))
    if len(split.held_out) < _FEW_HELD_OUT or n_classes < len(labels.classes):
        logger.info(
            "%d cells of %d of %d classes are held out. Few cells or classes tell little about when "
            "to stop and how far to trust the head.",
            *(len(split.held_out), n_classes, len(labels.classes)),
        )


def score_classes(found: Annotation, true: NDArray[np.int64]) -> dict[str, float]:
    """Score the likeliest classes of cells, unknown ones too."""
    predicted = found.probabilities.argmax(axis=1)
    likelihood = found.probabilities[np.arange(len(true)), true]
    return {
        "accuracy": metrics.accuracy(true, predicted),
        "macro_f1": metrics.macro_f1(true, predicted),
        "weighted_f1": metrics.weighted_f1(true, predicted),
        "log_loss": -float(log_scores(likelihood).mean()),
        "unknown": float(found.is_unknown.mean()),
        "n_cells": len(true),
    }
