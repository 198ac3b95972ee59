"""How ``stofm.tl.annotate`` fits a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm import metrics
from stofm._edge.records import all_or_nothing
from stofm._logging import logger
from stofm.tl._annotation_head import Annotation, AnnotationHead, log_scores
from stofm.tl._head_fitting import fit_task
from stofm.tl._head_inputs import read_inputs
from stofm.tl._neighborhood import choose_neighborhood
from stofm.tl._protocol import plan_runs, score_table, split_record
from stofm.tl._voter_fitting import choose_n_heads, fit_voters, splits_of_networks
from stofm.tl._voting_head import add_expression, choose_n_components
from stofm.train import Targets
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

    from stofm.nn import Stofm
    from stofm.spatial import Split
    from stofm.spatial.splits import SplitRule
    from stofm.tl._components import ExpressionComponents
    from stofm.tl._head_inputs import Inputs
    from stofm.tl._heads import Strategy
    from stofm.tl._labels import Labels
    from stofm.tl._protocol import Protocol, Run
    from stofm.tl._sections import Sections
    from stofm.tl._voter_fitting import Voters

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT = 100


@dataclass(frozen=True, kw_only=True)
class AnnotationFitting:
    """The options of :func:`stofm.tl.annotate` that say how a head is fitted."""

    label_key: str
    strategy: Strategy
    n_neighbors: int | None
    n_components: int | None
    n_heads: int | None
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
        with all_or_nothing(*sections.tables):
            inputs = read_inputs(sections, use_rep=use_rep, model=model, **self.reading)
            inputs, expression = self._with_expression(sections, inputs, labels)
            inputs = choose_neighborhood(
                sections,
                inputs,
                self.n_neighbors,
                rows=np.flatnonzero(labels.is_known),
                spatial_key=self.reading["spatial_key"],
                split=self.split,
                protocol=self.protocol,
            )
        heads, tested = [], []
        for run in self._plan(sections, labels, inputs, self.seed):
            head, read = self._fit_run(sections, inputs, labels, run, model)
            heads.append(head.with_components(expression))
            if len(run.test):
                found = head.predict(read.take(run.test))
                tested.append(score_classes(found, labels.codes[run.test]))
        test_scores = score_table(tested) if tested else None
        return replace(heads[0], test_scores=test_scores)

    def _with_expression(
        self, sections: Sections, inputs: Inputs, labels: Labels
    ) -> tuple[Inputs, ExpressionComponents | None]:
        known = np.flatnonzero(labels.is_known)
        return add_expression(
            sections,
            inputs,
            row_order(inputs.features, labels.codes, known),
            n_components=choose_n_components(
                self.n_components, inputs.use_rep, is_repeated=self.protocol is not None
            ),
            layer=self.reading["layer"],
            is_asked_for=self.n_components is not None,
            classes=labels.codes,
        )

    def _plan(self, sections: Sections, labels: Labels, inputs: Inputs, seed: int) -> list[Run]:
        return plan_runs(
            sections,
            labels.is_known,
            inputs.features,
            split=self.split,
            protocol=self.protocol,
            classes=labels.codes,
            spatial_key=self.reading["spatial_key"],
            seed=seed,
        )

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
        targets = Targets("classes", labels.codes, len(labels.classes), self._weights(labels, run))
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
        is_repeated = self.protocol is not None
        n_heads = choose_n_heads(self.n_heads, int(labels.is_known.sum()), is_repeated=is_repeated)
        splits = splits_of_networks(
            run,
            lambda seed: self._plan(sections, labels, inputs, seed),
            n_heads=n_heads,
            is_shared=is_repeated or self.strategy != "frozen",
        )
        voters = fit_voters(
            fit,
            targets,
            splits,
            n_heads=n_heads,
            # Blocks with their margins may be a third of a slice. What they were held out for is
            # known once the networks are weighed and calibrated.
            refit=self.protocol is None,
            seed=run.seed,
        )
        trust, found = self._calibrate(fit.inputs, labels, splits, voters)
        scores = [score_classes(found, labels.codes[voters.rows])] if len(voters.rows) else []
        head = AnnotationHead(
            networks=voters.networks,
            reads=voters.reads,
            weights=voters.weights,
            n_neighbors=voters.n_neighbors,
            outputs=labels.classes,
            use_rep=fit.inputs.use_rep,
            origin=fit.inputs.origin,
            strategy=self.strategy,
            params=self._params(labels, run.seed, n_heads, inputs.n_neighbors),
            split=split_record(split, run.test, sections, labels.is_known, self.protocol),
            validation_scores=score_table(scores),
            history=voters.history,
            model=fit.model,
            temperature=trust.temperature,
            rejection=trust.rejection,
            surroundings=trust.surroundings,
        )
        return head, fit.inputs

    def _calibrate(
        self, inputs: Inputs, labels: Labels, splits: Sequence[Split], voters: Voters
    ) -> tuple[_Trust, Annotation]:
        """Fit temperature and thresholds to the held-out cells, and say what these are called."""
        features, rows, codes = inputs.features, voters.rows, labels.codes
        scores = log_scores(voters.votes)
        temperature = fit_temperature(scores, codes[rows])
        probabilities = calibrated_probabilities(scores, temperature)
        if not self.reject_rate or not len(rows):
            is_unknown = np.zeros(len(rows), dtype=bool)
            return _Trust(temperature, None, None), Annotation(
                probabilities, np.empty(0), is_unknown
            )
        around = [
            Surroundings.fit(features[fitted], codes[fitted])
            for fitted in (row_order(features, codes, split.fitted) for split in splits)
        ]
        distances = np.concatenate(
            [one.distances(features[own]) for one, own in zip(around, voters.held_out, strict=True)]
        )
        confidence = probabilities.max(axis=1)
        rejection = Rejection.fit(confidence, distances, self.reject_rate)
        is_unknown = rejection.rejects(confidence, distances)
        return (
            _Trust(temperature, rejection, around[0]),
            Annotation(probabilities, distances, is_unknown),
        )

    def _weights(self, labels: Labels, run: Run) -> NDArray[np.float32] | None:
        if self.class_weights is None:
            return None
        rows = np.setdiff1d(np.flatnonzero(labels.is_known), run.test)
        sizes = np.bincount(labels.codes[rows], minlength=len(labels.classes))
        weights: NDArray[np.float32] = (len(rows) / (len(sizes) * sizes)).astype(np.float32)
        return weights

    def _params(self, labels: Labels, seed: int, n_heads: int, n_neighbors: int) -> dict[str, Any]:
        options = ("layer", "library_key", "spatial_key")
        return {
            "label_key": self.label_key,
            "missing": [str(one) for one in self.missing],
            "min_share": float(self.min_share),
            "left_out_classes": list(labels.left_out),
            "class_weights": self.class_weights,
            "n_neighbors": n_neighbors,
            "n_components": self.n_components,
            "n_heads": n_heads,
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


def score_classes(found: Annotation, true: NDArray[np.int64]) -> dict[str, float]:
    """Score the likeliest classes of cells, unknown ones too."""
    predicted = found.probabilities.argmax(axis=1)
    likelihood = found.probabilities[np.arange(len(true)), true]
    return {
        "accuracy": metrics.accuracy(true, predicted),
        "macro_f1": metrics.macro_f1(true, predicted),
        "weighted_f1": metrics.weighted_f1(true, predicted),
        "log_loss": float(-np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean()),
        "unknown": float(found.is_unknown.mean()),
        "n_cells": len(true),
    }
