"""Classes of cells: what is learnt of them, the head of ``stofm.tl.annotate``, and what it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.records import (
    all_or_nothing,
    make_frame,
    refuse_foreign,
    refuse_not_finite,
    write_frame,
    write_record,
)
from stofm._keys import Label, Obs, Obsm, Suffix
from stofm._logging import logger
from stofm.heads.base import Entries, Head, refuse_reserved, require_head
from stofm.heads.ensemble import fit_voters
from stofm.heads.fitting import Task
from stofm.heads.inputs import read_inputs
from stofm.heads.labels import read_labels
from stofm.heads.network import row_order
from stofm.heads.options import check_choice
from stofm.heads.targets import Targets
from stofm.heads.trust import (
    TEMPERATURES,
    Rejection,
    Surroundings,
    calibrated_probabilities,
    fit_temperature,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.ensemble import Voters
    from stofm.heads.fitting import FirstFit
    from stofm.heads.inputs import Inputs
    from stofm.heads.labels import Labels
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections
    from stofm.spatial import Split

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT: Final = 100


@dataclass(frozen=True, eq=False)
class Annotation:
    """Classes of cells as a head sees them.

    Attributes
    ----------
    probabilities
        float32 (n_obs, n_classes), calibrated.
    distances
        (n_obs,) of each embedding from those of the labelled cells; empty if no cell is to be
        called unknown.
    is_unknown
        (n_obs,) whether neither supports a class.
    """

    probabilities: NDArray[np.float32]
    distances: NDArray[np.float64]
    is_unknown: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Entries(Entries):
    temperature: float
    rejection: Rejection | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AnnotationHead(Head):
    """A head that names the classes of cells, from :func:`stofm.tl.annotate`.

    Keep it with ``head.save(folder)``, and read it with ``AnnotationHead.load(folder)``. The
    attributes of the parts that all heads have come after these.

    Attributes
    ----------
    temperature
        What scores are divided by before the softmax, fitted to the held-out cells.
    rejection
        When a cell is unknown: the stated rate, the thresholds, and the share of held-out known
        cells that they reject; None if none is to be.
    surroundings
        Where the embeddings of the labelled cells lie; None if no cell is to be unknown.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Classes; what is read and by which model; how the head was fitted and how good it is.
    networks, reads, weights, expression, n_neighbors
        What votes on the classes, on what grounds, and with which weight.
    """

    task: ClassVar[str] = "annotation"
    called: ClassVar[str] = "classes"
    own_entries: ClassVar[type[Any]] = _Entries
    params_read: ClassVar[tuple[str, ...]] = ("label_key", "seed", "reject_rate")

    temperature: float
    rejection: Rejection | None = None
    surroundings: Surroundings | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in alphabetical order."""
        return self.outputs

    def predict(self, inputs: Inputs) -> Annotation:
        """Name the classes of cells from what is read of them."""
        self.check_inputs(inputs)
        mean = np.zeros((len(inputs.features), len(self.outputs)))
        for vote, weight in self.votes(inputs, "classes"):
            mean += weight[:, None] * vote
        scores = log_scores(mean)
        probabilities = calibrated_probabilities(scores, self.temperature)
        if self.rejection is None or self.surroundings is None:
            nothing = np.zeros(len(scores), dtype=bool)
            return Annotation(probabilities, np.empty(0), nothing)
        distances = self.surroundings.distances(inputs.features)
        unknown = self.rejection.rejects(probabilities.max(axis=1), distances)
        return Annotation(probabilities, distances, unknown)

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["temperature"] = self.temperature
        if self.rejection is None or self.surroundings is None:
            return entries, arrays
        entries["rejection"] = asdict(self.rejection)
        return entries, arrays | asdict(self.surroundings)

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        fields = super()._read_own(entries, arrays)
        fields["temperature"] = entries.temperature
        fields["rejection"] = entries.rejection
        if entries.rejection is not None:
            own = {name: arrays[name] for name in Surroundings.__dataclass_fields__}
            fields["surroundings"] = Surroundings(**own)
        return fields

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        low, high = TEMPERATURES
        # Fitted on a logarithm, which may be over by a rounding.
        if not low * (1 - 1e-9) <= self.temperature <= high * (1 + 1e-9):
            yield f"temperature must be from {low} to {high}, found {self.temperature}"
        if self.surroundings is None:
            return
        shape = (len(self.surroundings.center), len(self.surroundings.means))
        expected = (self.networks[0].config.d_input, len(self.outputs))
        if shape != expected:
            yield f"surroundings of {shape} columns and classes; the head has {expected}"


def log_scores(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores whose softmax is the probabilities, for a temperature to act on."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotationTask(Task):
    """Learning classes."""

    name: ClassVar[str] = AnnotationHead.task

    labels: Labels
    label_key: str
    missing: Collection[object]
    min_share: float
    class_weights: Literal["balanced"] | None
    reject_rate: float

    def __post_init__(self) -> None:
        """Refuse options that no labels could go with."""
        if not 0 <= self.reject_rate < 1:
            msg = f"reject_rate must be from 0 to below 1, found {self.reject_rate!r}."
            raise ValueError(msg)
        check_choice("class_weights", self.class_weights, (None, "balanced"))

    @classmethod
    def of(cls, sections: Sections, options: FitOptions, **own: Any) -> AnnotationTask:
        """The task of learning a column of ``obs``; refuses labels that can't be learnt."""
        key = own["label_key"]
        labels = read_labels(sections, key, missing=own["missing"], min_share=own["min_share"])
        if Label.UNKNOWN in labels.classes:
            msg = (
                f"obs[{key!r}] has a class {Label.UNKNOWN!r}, which is what cells are called that "
                "no class is supported for. Rename it, or add it to `missing` to leave it out."
            )
            raise ValueError(msg)
        weights = None
        if own["class_weights"] == "balanced":
            sizes = np.bincount(labels.codes[labels.is_known], minlength=len(labels.classes))
            weights = (sizes.sum() / (len(sizes) * sizes)).astype(np.float32)
        targets = Targets("classes", labels.codes, len(labels.classes), weights)
        return cls(targets=targets, options=options, labels=labels, **own)

    def make_head(
        self, first: FirstFit, splits: Sequence[Split], common: dict[str, Any]
    ) -> AnnotationHead:
        """Fit the networks that vote, then temperature and thresholds to the held-out cells."""
        _tell_about(splits[0], self.labels)
        seeds, codes = self.seeds, self.labels.codes
        # Blocks with their margins may be a third of a slice. What they were held out for is known
        # once the networks are weighed and calibrated.
        voters = fit_voters(first, self.targets, splits, seeds)
        trust, found = self._calibrate(first.inputs, splits, voters)
        scores = [score_classes(found, codes[voters.rows])] if len(voters.rows) else []
        return AnnotationHead(
            **common,
            **voters.fields,
            **trust,
            outputs=self.labels.classes,
            params=self._params(len(seeds), first.inputs.n_neighbors),
            validation_scores=pd.DataFrame(
                scores, index=pd.RangeIndex(1, len(scores) + 1, name="run")
            ),
        )

    def _calibrate(
        self, inputs: Inputs, splits: Sequence[Split], voters: Voters
    ) -> tuple[dict[str, Any], Annotation]:
        """What tells how far the head can be trusted, and what it calls the held-out cells."""
        features, rows, codes = inputs.features, voters.rows, self.labels.codes
        scores = log_scores(voters.votes)
        temperature = fit_temperature(scores, codes[rows])
        probabilities = calibrated_probabilities(scores, temperature)
        if not self.reject_rate or not len(rows):
            nothing = np.zeros(len(rows), dtype=bool)
            return {"temperature": temperature}, Annotation(probabilities, np.empty(0), nothing)
        around = [
            Surroundings.fit(features[fitted], codes[fitted])
            for fitted in (row_order(features, codes, split.fitted) for split in splits)
        ]
        distances = np.concatenate(
            [one.distances(features[own]) for one, own in zip(around, voters.held_out, strict=True)]
        )
        confidence = probabilities.max(axis=1)
        rejection = Rejection.fit(confidence, distances, self.reject_rate)
        trust = {"temperature": temperature, "rejection": rejection, "surroundings": around[0]}
        is_unknown = rejection.rejects(confidence, distances)
        return trust, Annotation(probabilities, distances, is_unknown)

    def _params(self, n_heads: int, n_neighbors: int) -> dict[str, Any]:
        return {
            "label_key": self.label_key,
            "missing": [str(one) for one in self.missing],
            "min_share": float(self.min_share),
            "left_out_classes": list(self.labels.left_out),
            "class_weights": self.class_weights,
            "n_neighbors": n_neighbors,
            "n_components": self.options.n_components,
            "n_heads": n_heads,
            "reject_rate": float(self.reject_rate),
            "seed": int(self.options.seed),
            **self.options.reading.keys,
        }


_CONFIDENCE = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)


def annotate_with(sections: Sections, head: AnnotationHead, options: FitOptions, key: str) -> None:
    """Name the cells of some tables, and write that."""
    reading = options.reading
    require_head(head, AnnotationHead)
    refuse_reserved(key, Obs.ANNOTATION, reading.spatial_key, reading.library_key, *head.use_rep)
    sections.each(
        lambda table: refuse_foreign(table, key, obs=[key + _CONFIDENCE], obsm=[key + _PROBA])
    )
    with all_or_nothing(*sections.tables):
        inputs = read_inputs(
            sections,
            reading,
            use_rep=head.use_rep,
            model=head.model if options.model is None else options.model,
            expected=head.origin,
        )
        inputs = head.read_beside(sections, inputs, reading)
        write_annotation(sections, head, head.predict(inputs), key)


def write_annotation(sections: Sections, head: AnnotationHead, found: Annotation, key: str) -> None:
    """Write classes, confidence and probabilities to each table, with a record."""
    refuse_not_finite(head.task, found.probabilities)
    params = {
        "label_key": head.params["label_key"],
        "use_rep": list(head.use_rep),
        "strategy": head.strategy,
        "seed": head.params["seed"],
        "temperature": head.temperature,
        "reject_rate": head.params["reject_rate"],
    }
    # All is made before anything is written.
    frames = [
        make_frame(table, found.probabilities[part], head.classes)
        for table, part in zip(sections.tables, sections.places, strict=True)
    ]
    names = list(head.classes)
    categories = [*names, Label.UNKNOWN]
    likeliest = found.probabilities.argmax(axis=1)
    codes = np.where(found.is_unknown, categories.index(Label.UNKNOWN), likeliest)
    confidence = found.probabilities.max(axis=1)
    for table, part, frame in zip(sections.tables, sections.places, frames, strict=True):
        table.obs[key] = pd.Categorical.from_codes(codes[part], categories=categories)
        table.obs[key + _CONFIDENCE] = confidence[part]
        write_frame(table, key + _PROBA, frame, head.classes)
        # Colours of an earlier run would be taken for these classes'.
        table.uns.pop(key + Suffix.COLORS, None)
        write_record(table, key, params, **head.model_names())
    logger.info(
        "%d cells annotated with %d classes into obs[%r]; %d are unknown.",
        len(codes),
        len(names),
        key,
        found.is_unknown.sum(),
    )


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
