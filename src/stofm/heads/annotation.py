"""Classes of cells: what is learnt of them, the head of ``stofm.tl.annotate``, and what it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

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
from stofm.heads.fitting import Task
from stofm.heads.head import Head, refuse_reserved, require_head
from stofm.heads.labels import read_labels
from stofm.heads.network import row_order
from stofm.heads.targets import Targets
from stofm.heads.trust import (
    Rejection,
    Surroundings,
    calibrated_probabilities,
    fit_temperature,
    log_scores,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.labels import Labels
    from stofm.heads.members import Members
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.spatial import Split

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT: Final = 100
_CONFIDENCE = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)


@dataclass(frozen=True, eq=False)
class Annotation:
    """Classes of cells as a head sees them.

    Attributes
    ----------
    probabilities
        float32 (n_obs, n_classes), calibrated.
    is_unknown
        (n_obs,) whether neither probability nor place among the labelled cells supports a class.
    """

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
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Classes; what is read and by which model; how the head was fitted and how good it is.
    networks, reads, weights, expression, n_neighbors, panel
        The members of the head, what they read, and their weight.
    """

    task: ClassVar[str] = "annotation"
    called: ClassVar[str] = "classes"

    temperature: float
    rejection: Rejection | None = None
    surroundings: Surroundings | None = None

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

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["temperature"] = self.temperature
        if self.rejection is None or self.surroundings is None:
            return entries, arrays
        entries["rejection"] = asdict(self.rejection)
        return entries, arrays | asdict(self.surroundings)

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._read_own(own, arrays) | {"temperature": own["temperature"]}
        if own.get("rejection") is not None:
            fields["rejection"] = Rejection(**own["rejection"])
            parts = {name: arrays[name] for name in Surroundings.__dataclass_fields__}
            fields["surroundings"] = Surroundings(**parts)
        return fields


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotationTask(Task):
    """Learning classes."""

    name: ClassVar[str] = AnnotationHead.task

    labels: Labels
    label_key: str

    @classmethod
    def of(cls, slices: SliceTables, request: Request, label_key: str) -> AnnotationTask:
        """The task of learning a column of ``obs``; refuses labels that can't be learnt."""
        options = request.options
        labels = read_labels(
            slices, label_key, missing=options.missing, min_share=options.min_share
        )
        if Label.UNKNOWN in labels.classes:
            raise ValueError(
                f"obs[{label_key!r}] has a class {Label.UNKNOWN!r}, the name of cells that no class "
                "is supported for. Rename it, or add it to `missing` to leave it out."
            )
        weights = None
        if options.class_weights == "balanced":
            sizes = np.bincount(labels.codes[labels.is_known], minlength=len(labels.classes))
            weights = (sizes.sum() / (len(sizes) * sizes)).astype(np.float32)
        targets = Targets("classes", labels.codes, len(labels.classes), weights)
        return cls(targets=targets, request=request, labels=labels, label_key=label_key)

    def make_head(
        self, blocks: Blocks, splits: Sequence[Split], members: Members, common: dict[str, Any]
    ) -> AnnotationHead:
        """Fit temperature and thresholds to the held-out cells."""
        _tell_about(splits[0], self.labels)
        options, codes, rows = self.request.options, self.labels.codes, members.rows
        scores = log_scores(members.votes)
        temperature = fit_temperature(scores, codes[rows])
        probabilities = calibrated_probabilities(scores, temperature)
        trust: dict[str, Any] = {"temperature": temperature}
        is_unknown = np.zeros(len(rows), dtype=bool)
        if options.reject_rate and len(rows):
            read = blocks.features
            around = [
                Surroundings.fit(read[fitted], codes[fitted])
                for fitted in (row_order(read, codes, split.fitted) for split in splits)
            ]
            distances = np.concatenate(
                [a.distances(read[own]) for a, own in zip(around, members.held_out, strict=True)]
            )
            confidence = probabilities.max(axis=1)
            rejection = Rejection.fit(confidence, distances, options.reject_rate)
            is_unknown = rejection.rejects(confidence, distances)
            trust |= {"rejection": rejection, "surroundings": around[0]}
        found = [score_classes(Annotation(probabilities, is_unknown), codes[rows])]
        return AnnotationHead(
            **common,
            **trust,
            outputs=self.labels.classes,
            params={
                **self.request.record,
                "label_key": self.label_key,
                "missing": [str(one) for one in options.missing],
                "min_share": float(options.min_share),
                "left_out_classes": list(self.labels.left_out),
                "class_weights": options.class_weights,
                "n_neighbors": blocks.n_neighbors,
                "reject_rate": float(options.reject_rate),
            },
            validation_scores=pd.DataFrame(
                found[: len(rows)], index=pd.RangeIndex(1, 1 + bool(len(rows)), name="run")
            ),
        )


def _tell_about(split: Split, labels: Labels) -> None:
    """Log what the held-out cells lack, since weights and calibration come from them."""
    if len(split.moved):
        logger.info(
            "Held-out parts would have all cells of %s; these %d cells are fitted.",
            ", ".join(labels.classes[k] for k in np.unique(labels.codes[split.moved])),
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
    if not len(true):
        return {}
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


def refuse_keys(slices: SliceTables, request: Request, key: str, use_rep: Sequence[str]) -> None:
    """Refuse a key that is read, or where something else is stored."""
    refuse_reserved(key, Obs.ANNOTATION, request.spatial_key, request.library_key, *use_rep)
    slices.each(
        lambda table: refuse_foreign(table, key, obs=[key + _CONFIDENCE], obsm=[key + _PROBA])
    )


def annotate_with(slices: SliceTables, head: AnnotationHead, request: Request, key: str) -> None:
    """Name the cells of some tables, and write that."""
    require_head(head, AnnotationHead)
    refuse_keys(slices, request, key, head.use_rep)
    with all_or_nothing(*slices.tables):
        _write(slices, head, head.predict(head.read(slices, request)), key)


def _write(slices: SliceTables, head: AnnotationHead, found: Annotation, key: str) -> None:
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
        for table, part in zip(slices.tables, slices.places, strict=True)
    ]
    categories = [*head.classes, Label.UNKNOWN]
    likeliest = found.probabilities.argmax(axis=1)
    codes = np.where(found.is_unknown, categories.index(Label.UNKNOWN), likeliest)
    confidence = found.probabilities.max(axis=1)
    for table, part, frame in zip(slices.tables, slices.places, frames, strict=True):
        table.obs[key] = pd.Categorical.from_codes(codes[part], categories=categories)
        table.obs[key + _CONFIDENCE] = confidence[part]
        write_frame(table, key + _PROBA, frame, head.classes)
        # Colours of an earlier run would be taken for these classes'.
        table.uns.pop(key + Suffix.COLORS, None)
        write_record(table, key, params, **head.model_names())
    logger.info(
        "%d cells annotated with %d classes into obs[%r]; %d are unknown.",
        len(codes),
        len(head.classes),
        key,
        found.is_unknown.sum(),
    )
