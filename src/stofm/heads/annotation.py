"""Classes of cells: the head of ``stofm.tl.annotate``, how far it can be trusted, what it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.colors import colors_of
from stofm._edge.observations import cell_digests
from stofm._edge.tables import all_or_nothing
from stofm._keys import Label, Obs, Obsm
from stofm._logging import logger
from stofm.heads.fitting import fit
from stofm.heads.head import Head
from stofm.heads.network import apply_head, row_order
from stofm.heads.targets import Targets, read_labels
from stofm.heads.trust import (
    Novelty,
    PredictionSets,
    Rejection,
    Surroundings,
    calibrated_probabilities,
    energy,
    fit_temperature,
    log_scores,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks
    from stofm.heads.fitting import Members
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import Labels
    from stofm.spatial import Split

#: With fewer held-out cells a line of the log says so.
_FEW_HELD_OUT: Final = 100
_CONFIDENCE = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)
_SET = Obsm.ANNOTATION_SET.removeprefix(Obs.ANNOTATION)
_NOVELTY: Final = "_novelty"
#: Fields that config.json holds as dicts of numbers.
_TRUST: Final[dict[str, Any]] = {"rejection": Rejection, "sets": PredictionSets, "novelty": Novelty}
_NO_NOVELTY: Final = (
    "The head has no novelty and no prediction sets: no labelled cell was held out. Fit it to more "
    "cells to have them."
)


class Annotation(NamedTuple):
    """Classes of cells."""

    probabilities: NDArray[np.float32]  # (n_obs, n_classes) calibrated
    is_unknown: NDArray[np.bool_]  # (n_obs,) whether no class is supported
    #: (n_obs,) how new a cell is, and (n_obs, n_classes) whether a class is in its prediction set;
    #: None for a head without them.
    novelty: NDArray[np.float32] | None = None
    sets: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AnnotationHead(Head):
    """A head that names the classes of cells, from :func:`stofm.tl.annotate`.

    Save it with ``head.save(folder)``, and load it with ``AnnotationHead.load(folder)``.

    Attributes
    ----------
    temperature
        What scores are divided by before the softmax, fitted to the held-out cells.
    rejection
        When a cell is unknown: the stated rate, the thresholds, and the share of held-out known
        cells that they reject; None if none is to be.
    surroundings
        Where the embeddings of the labelled cells lie; None if no labelled cell was held out.
    sets, novelty
        Which classes are in a cell's prediction set, with the coverage stated and measured, and what
        a cell's novelty is relative to; None if no labelled cell was held out.
    fitted_to
        A number for each labelled cell, from its name and position: scores on these are no test.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Classes; inputs and the model they come from; how the head was fitted and how good it is.
    networks, reads, weights, expression, n_neighbors, panel
        The members of the head, their inputs, and their weights.
    """

    task: ClassVar[str] = "annotation"
    called: ClassVar[str] = "classes"
    key: ClassVar[str] = Obs.ANNOTATION
    obs_beside: ClassVar[tuple[str, ...]] = (_CONFIDENCE, _NOVELTY)
    obsm_beside: ClassVar[tuple[str, ...]] = (_PROBA, _SET)

    temperature: float
    rejection: Rejection | None = None
    surroundings: Surroundings | None = None
    sets: PredictionSets | None = None
    novelty: Novelty | None = None
    fitted_to: NDArray[np.int64] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in alphabetical order."""
        return self.outputs

    def predict(self, blocks: Blocks) -> Annotation:
        """Name the classes of cells from their inputs."""
        mean = np.zeros((len(blocks.features), len(self.outputs)))
        for vote, weight in self.votes(blocks, "classes"):
            mean += weight[:, None] * vote
        probabilities = calibrated_probabilities(log_scores(mean), self.temperature)
        found = Annotation(probabilities, np.zeros(len(mean), dtype=bool))
        if self.sets is not None:
            found = found._replace(sets=self.sets.of(probabilities))
        if self.surroundings is None:
            return found
        far = self.surroundings.distances(blocks.averaged[0])
        if self.novelty is not None:
            novelty = self.novelty.of(far, self.energies(blocks))
            found = found._replace(novelty=novelty.astype(np.float32))
        if self.rejection is None:
            return found
        return found._replace(is_unknown=self.rejection.rejects(probabilities.max(axis=1), far))

    def energies(self, blocks: Blocks) -> NDArray[np.float64]:
        """Mean energy of the networks for each cell, (n_obs,), NaN where they lack what they read."""
        hidden = [(n, r) for n, r in zip(self.networks, self.reads, strict=True) if n.config.widths]
        total = np.zeros(len(blocks.features))
        for network, reads in hidden:
            known = blocks.knows(reads)
            if known.any():
                total += energy(apply_head(network, blocks.rows_of(reads), "values"))
            total[~known] = np.nan
        return total / len(hidden)

    def apply(self, slices: SliceTables, request: Request, key: str) -> None:
        """Name the cells of some tables, and write that."""
        self.refuse_key(slices, key, request, self.use_rep)
        novelty_key = Obs.NOVELTY if key == Obs.ANNOTATION else key + _NOVELTY
        with all_or_nothing(*slices.tables):
            found = self.predict(self.read(slices, request))
            categories = [*self.classes, Label.UNKNOWN]
            likeliest = found.probabilities.argmax(axis=1)
            codes = np.where(found.is_unknown, len(self.classes), likeliest)
            names = pd.Categorical.from_codes(codes, categories=categories)
            names_of = ("label_key", "reject_rate", "coverage")
            params = {name: self.params.get(name) for name in names_of}
            frames: dict[str, Any] = {_PROBA: found.probabilities}
            if found.sets is not None:
                frames[_SET] = found.sets
            self.write(
                slices,
                key,
                frames,
                obs={"": names, _CONFIDENCE: found.probabilities.max(axis=1)},
                params=slices.each(
                    lambda table: (
                        params
                        | {"temperature": self.temperature}
                        | self._seen_of(table, request.spatial_key)
                    )
                ),
            )
            for table, place in zip(slices.tables, slices.places, strict=True):
                if found.novelty is not None:
                    table.obs[novelty_key] = found.novelty[place]
                elif novelty_key in table.obs:
                    del table.obs[novelty_key]
        if found.novelty is None:
            logger.info(_NO_NOVELTY)
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
        for name in _TRUST:
            one = getattr(self, name)
            entries[name] = None if one is None else asdict(one)
        if self.surroundings is None:
            return entries, arrays
        return entries, arrays | vars(self.surroundings)

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._read_own(own, arrays) | {"temperature": own["temperature"]}
        fields[Label.FITTED] = arrays.get(Label.FITTED)
        for name, kind in _TRUST.items():
            if own[name] is not None:
                fields[name] = kind(**own[name])
        if "points" in arrays:
            parts = {one: arrays[one] for one in ("center", "projection", "points")}
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
    rows, read, scores = members.rows, blocks.averaged[0], log_scores(members.votes)
    temperature = fit_temperature(scores, codes[rows])
    probabilities = calibrated_probabilities(scores, temperature)
    is_unknown = np.zeros(len(rows), dtype=bool)
    if len(rows):
        of_slice = np.zeros(len(codes), dtype=np.int64)
        for number, own in enumerate(slices.rows if splits[0].slices else ()):
            of_slice[own] = number
        right = probabilities.argmax(axis=1) == codes[rows]
        fields["sets"] = PredictionSets.fit(
            probabilities, codes[rows], of_slice[rows], options.coverage
        )
        known = row_order(read, codes, np.flatnonzero(labels.is_known))
        fields["surroundings"] = Surroundings.fit(read[known], codes[known])
        distances, energies = _judge_held_out(blocks, codes, splits, members)
        fields["novelty"] = Novelty.fit(distances, energies)
        if options.reject_rate:
            confidence = probabilities.max(axis=1)
            rejection = Rejection.fit(confidence, distances, options.reject_rate, right)
            is_unknown = rejection.rejects(confidence, distances)
            fields["rejection"] = rejection
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
            "coverage": float(options.coverage),
            "colors": colors_of(slices.tables, label_key),
        },
        validation_scores=pd.DataFrame(found, index=pd.RangeIndex(1, 1 + len(found), name="run")),
    )


def _judge_held_out(
    blocks: Blocks, codes: NDArray[np.int64], splits: Sequence[Split], members: Members
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance and energy of the held-out cells of all splits in turn, by what each was fitted to."""
    features, distances, energies = blocks.averaged[0], [], []
    rounds = zip(splits, members.held_out, members.networks, members.reads, strict=False)
    for split, own, network, reads in rounds:
        fitted = row_order(features, codes, split.fitted)
        # A class that is held out whole has no number here.
        classes = np.unique(codes[fitted], return_inverse=True)[1]
        distances.append(Surroundings.fit(features[fitted], classes).distances(features[own]))
        energies.append(energy(apply_head(network, blocks.of(reads)[own], "values")))
    return np.concatenate(distances), np.concatenate(energies)


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
