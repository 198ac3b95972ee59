"""The head of ``stofm.tl.annotate``, and what it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stofm._edge.records import (
    make_frame,
    refuse_foreign,
    refuse_not_finite,
    write_frame,
    write_record,
)
from stofm._keys import Label, Obs, Obsm, Suffix
from stofm._logging import logger
from stofm.tl._voting_head import VotingEntries, VotingHead
from stofm.train.calibration import (
    TEMPERATURES,
    Rejection,
    Surroundings,
    calibrated_probabilities,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from stofm.tl._head_inputs import Inputs
    from stofm.tl._sections import Sections


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
class _Entries(VotingEntries):
    temperature: float
    rejection: Rejection | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AnnotationHead(VotingHead):
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
    outputs, use_rep, origin, strategy, params, split, validation_scores, test_scores, history, model
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
        """Name the classes of cells.

        Parameters
        ----------
        inputs
            Their representations.

        Raises
        ------
        ValueError
            They have another width than those that the head was fitted to.
        """
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

    def check(self) -> None:
        """Refuse parts that do not belong together."""
        super().check()
        low, high = TEMPERATURES
        # Fitted on a logarithm, which may be over by a rounding.
        if not low * (1 - 1e-9) <= self.temperature <= high * (1 + 1e-9):
            msg = f"temperature must be from {low} to {high}, found {self.temperature}"
            raise ValueError(msg)
        if self.surroundings is None:
            return
        shape = (len(self.surroundings.center), len(self.surroundings.means))
        expected = (self.networks[0].config.d_input, len(self.outputs))
        if shape != expected:
            msg = f"surroundings of {shape} columns and classes; the head has {expected}"
            raise ValueError(msg)


def log_scores(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores whose softmax is the probabilities, for a temperature to act on."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))


_CONFIDENCE = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)


def refuse_foreign_annotation(sections: Sections, key: str) -> None:
    """Refuse a key beside which something else is stored where an annotation would be written."""
    sections.each(
        lambda table: refuse_foreign(table, key, obs=[key + _CONFIDENCE], obsm=[key + _PROBA])
    )


def write_annotation(sections: Sections, head: AnnotationHead, found: Annotation, key: str) -> None:
    """Write classes, confidence and probabilities to each table, with a record."""
    import pandas as pd

    refuse_not_finite(head.task, found.probabilities)
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
        write_record(table, key, _params(head), **head.model_names())
    logger.info(
        "%d cells annotated with %d classes into obs[%r]; %d are unknown.",
        len(codes),
        len(names),
        key,
        found.is_unknown.sum(),
    )


def _params(head: AnnotationHead) -> dict[str, Any]:
    return {
        "label_key": head.params["label_key"],
        "use_rep": list(head.use_rep),
        "strategy": head.strategy,
        "seed": head.params["seed"],
        "temperature": head.temperature,
        "reject_rate": head.params["reject_rate"],
    }
