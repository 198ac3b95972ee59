"""How ``stofm.tl.annotate`` fits a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm import metrics
from stofm._logging import logger
from stofm.tl._annotation_head import AnnotationHead
from stofm.tl._head_fitting import fit_task
from stofm.tl._head_inputs import read_inputs
from stofm.tl._protocol import plan_runs, score_table, split_record
from stofm.train import Targets, apply_head, fit_head
from stofm.train.calibration import (
    Rejection,
    Surroundings,
    calibrated_probabilities,
    fit_temperature,
)
from stofm.train.head_fitting import row_order

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stofm.nn import PredictionHead, Stofm
    from stofm.spatial import Split
    from stofm.spatial.splits import SplitRule
    from stofm.tl._head_fitting import TaskFit
    from stofm.tl._head_inputs import Inputs, Sections
    from stofm.tl._heads import Strategy
    from stofm.tl._labels import Labels
    from stofm.tl._protocol import Protocol, Run

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT = 100


@dataclass(frozen=True, kw_only=True)
class AnnotationFitting:
    """The options of :func:`stofm.tl.annotate` that say how a head is fitted."""

    label_key: str
    strategy: Strategy
    class_weights: Literal["balanced"] | None
    split: SplitRule
    protocol: Protocol | None
    reject_rate: float
    min_share: float
    missing: Collection[object]
    seed: int
    reading: dict[str, Any]

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        if not 0 <= self.reject_rate < 1:
            msg = f"reject_rate must be from 0 to below 1, found {self.reject_rate!r}."
            raise ValueError(msg)
        if self.class_weights not in (None, "balanced"):
            msg = f"class_weights must be None or 'balanced', found {self.class_weights!r}."
            raise ValueError(msg)

    def fit(
        self,
        sections: Sections,
        labels: Labels,
        *,
        use_rep: str | Sequence[str],
        model: Stofm | str | Path | None,
    ) -> AnnotationHead:
        """Fit a head, or one for each run of a protocol, of which the first is kept."""
        inputs = read_inputs(sections, use_rep=use_rep, model=model, **self.reading)
        runs = plan_runs(
            sections,
            labels.is_known,
            inputs.features,
            split=self.split,
            protocol=self.protocol,
            classes=labels.codes,
            spatial_key=self.reading["spatial_key"],
            seed=self.seed,
        )
        heads, tested = [], []
        for run in runs:
            head, read = self._fit_run(sections, inputs, labels, run, model)
            heads.append(head)
            if len(run.test):
                tested.append(score_classes(head, read, labels, run.test))
        test_scores = score_table(tested) if tested else None
        return replace(heads[0], test_scores=test_scores)

    def _fit_run(
        self,
        sections: Sections,
        inputs: Inputs,
        labels: Labels,
        run: Run,
        model: Stofm | str | Path | None,
    ) -> tuple[AnnotationHead, Inputs]:
        split = run.split
        _tell_about(split, labels)
        targets = Targets(
            "classes",
            labels.codes,
            len(labels.classes),
            self._weights(labels.codes[split.fitted], len(labels.classes)),
        )
        fit = fit_task(
            sections,
            inputs,
            targets,
            split,
            strategy=self.strategy,
            model=model,
            task=AnnotationHead.task,
            seed=run.seed,
            reading=self.reading,
        )
        trust = self._calibrate(fit, labels, split)
        head = AnnotationHead(
            networks=(fit.network,),
            outputs=labels.classes,
            use_rep=fit.inputs.use_rep,
            origin=fit.inputs.origin,
            strategy=self.strategy,
            params=self._params(labels, run.seed),
            split=split_record(split, run.test, sections, labels.is_known, self.protocol),
            validation_scores=score_table([]),
            history=fit.history,
            model=fit.model,
            temperature=trust.temperature,
            rejection=trust.rejection,
            surroundings=trust.surroundings,
        )
        if len(split.held_out):
            scores = score_classes(head, fit.inputs, labels, split.held_out)
            head = replace(head, validation_scores=score_table([scores]))
        if self.strategy == "frozen" and self.protocol is None:
            head = replace(head, networks=(self._fit_to_all(fit, targets, run.seed),))
        return head, fit.inputs

    def _fit_to_all(self, fit: TaskFit, targets: Targets, seed: int) -> PredictionHead:
        """Fit again, for as many epochs, to all labelled cells: also those held out or between.

        Blocks with their margins may be a third of a slice. What they were held out for is known.
        """
        losses = fit.history[fit.history["split"] == "validation"]
        n_epochs = None if losses.empty else int(losses.loc[losses["loss"].idxmin(), "epoch"])
        known = np.flatnonzero(targets.is_known)
        weights = self._weights(targets.values[known], targets.n_outputs)
        return fit_head(
            fit.inputs.features,
            replace(targets, class_weights=weights),
            fitted=known,
            held_out=known[:0],
            n_epochs=n_epochs,
            seed=seed,
        ).head

    def _calibrate(self, fit: TaskFit, labels: Labels, split: Split) -> _Trust:
        """Fit temperature and thresholds to the held-out cells."""
        features, rows = fit.inputs.features, split.held_out
        scores = apply_head(fit.network, features[rows], "values")
        temperature = fit_temperature(scores, labels.codes[rows])
        if not self.reject_rate or not len(rows):
            return _Trust(temperature, None, None)
        fitted = row_order(features, labels.codes, split.fitted)
        around = Surroundings.fit(features[fitted], labels.codes[fitted])
        confidence = calibrated_probabilities(scores, temperature).max(axis=1)
        rejection = Rejection.fit(confidence, around.distances(features[rows]), self.reject_rate)
        return _Trust(temperature, rejection, around)

    def _weights(self, codes: NDArray[np.int64], n_classes: int) -> NDArray[np.float32] | None:
        if self.class_weights is None:
            return None
        sizes = np.bincount(codes, minlength=n_classes)
        weights: NDArray[np.float32] = (len(codes) / (n_classes * sizes)).astype(np.float32)
        return weights

    def _params(self, labels: Labels, seed: int) -> dict[str, Any]:
        options = ("layer", "library_key", "spatial_key")
        return {
            "label_key": self.label_key,
            "missing": [str(one) for one in self.missing],
            "min_share": float(self.min_share),
            "left_out_classes": list(labels.left_out),
            "class_weights": self.class_weights,
            "reject_rate": float(self.reject_rate),
            "seed": int(seed),
            **{name: self.reading[name] for name in options},
        }


@dataclass(frozen=True)
class _Trust:
    """What tells how far a head can be trusted."""

    temperature: float
    rejection: Rejection | None
    surroundings: Surroundings | None


def _tell_about(split: Split, labels: Labels) -> None:
    """Log what the held-out cells lack, since it bears on when to stop and on the calibration."""
    if len(split.moved):
        codes = np.unique(labels.codes[split.moved])
        logger.info(
            "Held-out parts would have all cells of %s; these %d cells are fitted.",
            ", ".join(labels.classes[k] for k in codes),
            len(split.moved),
        )
    n_classes = len(np.unique(labels.codes[split.held_out]))
    if len(split.held_out) < _FEW_HELD_OUT or n_classes < len(labels.classes):
        logger.info(
            "%d cells of %d of %d classes are held out. Few cells or classes tell little about when "
            "to stop and how far to trust the head.",
            len(split.held_out),
            n_classes,
            len(labels.classes),
        )


def score_classes(
    head: AnnotationHead, inputs: Inputs, labels: Labels, rows: NDArray[np.int64]
) -> dict[str, float]:
    """Score the likeliest classes of some cells, unknown ones too."""
    found = head.predict(inputs.take(rows))
    true, predicted = labels.codes[rows], found.probabilities.argmax(axis=1)
    likelihood = found.probabilities[np.arange(len(rows)), true]
    return {
        "accuracy": metrics.accuracy(true, predicted),
        "macro_f1": metrics.macro_f1(true, predicted),
        "weighted_f1": metrics.weighted_f1(true, predicted),
        "log_loss": float(-np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean()),
        "unknown": float(found.is_unknown.mean()),
        "n_cells": len(rows),
    }
