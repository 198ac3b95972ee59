"""Proportions of cell types: the head of ``stofm.tl.deconvolve``, how it is fitted and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm._edge.records import (
    all_or_nothing,
    make_frame,
    refuse_foreign,
    refuse_not_finite,
    remove_entry,
    write_frame,
    write_record,
)
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.base import Entries, Head, refuse_reserved, require_head
from stofm.heads.embeddings import describe_origin, origin_by, same_origin
from stofm.heads.ensemble import fit_voters
from stofm.heads.fitting import Task
from stofm.heads.inputs import Inputs, read_inputs
from stofm.heads.spot_panel import SpotPanel, genes_of, read_panel_counts, remark_on_empty
from stofm.heads.targets import Targets
from stofm.metrics import mae, pearson, rmse
from stofm.nn import choose_device
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.fitting import FirstFit
    from stofm.heads.options import FitOptions, Reading
    from stofm.heads.sections import Sections
    from stofm.heads.spot_tables import SpotTable
    from stofm.nn import Stofm
    from stofm.spatial import Split

_STD = Obsm.DECONVOLUTION_STD.removeprefix(Obsm.DECONVOLUTION)
#: A query with a smaller share of the genes of a head's panel is refused.
_MIN_PANEL: Final = 0.5
#: With fewer spots than this there is nothing to hold out.
_MIN_SPOTS: Final = 20
_SCORES: Final = {"pearson": pearson, "rmse": rmse, "mae": mae}


@dataclass(frozen=True, kw_only=True)
class _Entries(Entries):
    genes: tuple[str, ...] | None = None
    target_sum: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DeconvolutionHead(Head):
    """A head for proportions of cell types, from :func:`stofm.tl.deconvolve`.

    Attributes
    ----------
    panel
        Genes, and components of their expression, that a head which was fitted on simulated spots
        reads; None for one that reads entries of ``obsm``.
    """

    task: ClassVar[str] = "deconvolution"
    called: ClassVar[str] = "types"
    own_entries: ClassVar[type[Any]] = _Entries
    params_read: ClassVar[tuple[str, ...]] = ("n_heads", "seed")

    panel: SpotPanel | None = None

    def __post_init__(self) -> None:
        """Name the scores by type: in a file, types "0" and "NA" look like something else."""
        if len(self.validation_scores):
            index = pd.Index(self.outputs, name="type")
            scores = self.validation_scores.set_axis(index, axis=0)
            object.__setattr__(self, "validation_scores", scores)

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the cell types."""
        return self.outputs

    def predict(self, inputs: Inputs) -> Proportions:
        """Predict from what the head reads."""
        shape = (len(inputs.features), len(self.outputs))
        mean, squares = np.zeros(shape), np.zeros(shape)
        n_votes = 0
        for vote, weight in self.votes(inputs, "proportions"):
            shares = vote.astype(np.float64)
            # In single precision a softmax sums to 1 only nearly.
            shares /= shares.sum(axis=1, keepdims=True)
            mean += weight[:, None] * shares
            squares += weight[:, None] * shares**2
            n_votes += 1
        spread = np.sqrt(np.maximum(squares - mean**2, 0.0)) if n_votes > 1 else None
        return Proportions(mean, spread)

    def read(
        self, sections: Sections, model: Stofm | str | Path | None, reading: Reading
    ) -> Inputs:
        """What the head reads of slices; a given model stands for the head's own."""
        model = self.model if model is None else model
        if self.panel is None:
            inputs = read_inputs(
                sections, reading, use_rep=self.use_rep, model=model, expected=self.origin
            )
            self.check_inputs(inputs)
            return self.read_beside(sections, inputs, reading)
        panel, encoder = self.panel, self._encoder(model)
        reading = replace(reading, device=choose_device(reading.device))
        counts = sections.each(lambda table: self._panel_counts(table, encoder, reading.layer))
        return self.inputs_of(
            np.concatenate([panel.features(own, encoder, reading) for own in counts])
        )

    def inputs_of(self, features: NDArray[np.float32]) -> Inputs:
        """Representations that are made here, not stored, as networks read them."""
        return Inputs(features, self.use_rep, (features.shape[1],), self.origin)

    def _encoder(self, model: Stofm | str | Path | None) -> Stofm:
        """Load the model whose cell encoder the head was fitted to."""
        loaded = load_model(model)
        origin = self.origin[Obsm.X_CELL]
        found = origin_by(loaded)[Obsm.X_CELL]
        if not same_origin(found, origin):
            msg = (
                f"The head was fitted to what {describe_origin(origin)} makes of spots, and the "
                f"model is {describe_origin(found)}. Pass the head's model as `model`, or fit a "
                "new head."
            )
            raise ValueError(msg)
        return loaded

    def _panel_counts(self, adata: AnnData, model: Stofm, layer: str | None) -> Any:
        assert self.panel is not None
        genes, places = genes_of(adata, model, "the query"), self.panel.places(model)
        n_found = int(np.isin(places, genes).sum())
        if n_found < _MIN_PANEL * len(places):
            msg = (
                f"Only {n_found} of the {len(places)} genes that the head reads are in the data; "
                "fit a new head with st.tl.deconvolve(adata, reference=...)."
            )
            raise ValueError(msg)
        if n_found < len(places):
            warn(
                f"{len(places) - n_found} of the {len(places)} genes that the head reads are not in "
                "adata and count as 0; a head that is fitted to these genes is more accurate."
            )
        counts = read_panel_counts(adata, genes, places, layer)
        remark_on_empty(counts)
        return counts

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        if self.panel is None:
            return entries, arrays
        entries["genes"] = self.panel.genes.tolist()
        entries["target_sum"] = self.panel.target_sum
        return entries, {**arrays, "panel.loadings": self.panel.loadings}

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        fields = super()._read_own(entries, arrays)
        if entries.genes is not None:
            genes = np.array(entries.genes, dtype=np.str_)
            fields["panel"] = SpotPanel(genes, arrays["panel.loadings"], entries.target_sum)
        return fields


@dataclass(frozen=True, eq=False)
class Proportions:
    """What a head predicts of spots.

    Attributes
    ----------
    mean
        (n, n_types), not negative; rows sum to 1.
    spread
        (n, n_types) standard deviation between the networks; None for a single one.
    """

    mean: NDArray[np.float64]
    spread: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class ProportionsTask(Task):
    """Learning proportions that are known.

    Attributes
    ----------
    types
        Names of the types.
    source
        What is learnt from, for the head's record.
    """

    name: ClassVar[str] = DeconvolutionHead.task

    types: tuple[str, ...]
    source: Mapping[str, Any]

    @classmethod
    def of(
        cls, spots: SpotTable, options: FitOptions, source: Mapping[str, Any]
    ) -> ProportionsTask:
        """The task of learning what is known of spots; refuses too few."""
        targets = Targets("proportions", spots.proportions, len(spots.types))
        n_known = int(targets.is_known.sum())
        if n_known < _MIN_SPOTS:
            msg = (
                f"{n_known} of {len(targets)} spots have known proportions; at least {_MIN_SPOTS} "
                "are needed to fit a head and to hold some out. Pass more slices, or a smaller "
                "spot_size if cells are summed into spots."
            )
            raise ValueError(msg)
        return cls(targets=targets, options=options, types=tuple(spots.types), source=source)

    def make_head(
        self, first: FirstFit, splits: Sequence[Split], common: dict[str, Any]
    ) -> DeconvolutionHead:
        """Fit the networks that vote."""
        voters = fit_voters(first, self.targets, splits, self.seeds)
        true = self.targets.values[voters.rows]
        return DeconvolutionHead(
            **common,
            **voters.fields,
            outputs=self.types,
            params=params_of(self.options, self.source, first.inputs.n_neighbors),
            validation_scores=score_types(self.types, true, voters.votes),
        )


def params_of(options: FitOptions, source: Mapping[str, Any], n_neighbors: int) -> dict[str, Any]:
    """What is written down of how a head was fitted."""
    return {
        **source,
        "n_neighbors": n_neighbors,
        "n_components": options.n_components,
        "n_heads": options.n_heads,
        "seed": options.seed,
        **options.reading.keys,
    }


def score_types(
    types: Sequence[str], true: NDArray[np.floating], found: NDArray[np.floating]
) -> pd.DataFrame:
    """Score each type over some spots: a row per type, columns pearson, rmse and mae.

    Fewer than two spots have no scores, NaN; a constant type has no Pearson correlation.
    """
    index = pd.Index(types, name="type")
    if len(true) < 2:
        return pd.DataFrame(np.nan, index=index, columns=list(_SCORES))
    true = np.asarray(true, dtype=np.float64)
    scores = {name: np.asarray(score(true, found)) for name, score in _SCORES.items()}
    return pd.DataFrame(scores, index=index)


def deconvolve_with(
    sections: Sections, head: DeconvolutionHead, options: FitOptions, key: str
) -> None:
    """Find the proportions of some spots, and write them."""
    reading = options.reading
    require_head(head, DeconvolutionHead)
    refuse_keys(sections, key, reading, head.use_rep)
    with all_or_nothing(*sections.tables):
        found = head.predict(head.read(sections, options.model, reading))
        write_proportions(sections, head, found, key)


def refuse_keys(
    sections: Sections, key: str, reading: Reading, use_rep: Sequence[str] = ()
) -> None:
    """Refuse a key that is read, or where or beside which something else is stored."""
    refuse_reserved(key, Obsm.DECONVOLUTION, reading.spatial_key, reading.library_key, *use_rep)
    sections.each(lambda table: refuse_foreign(table, key, obsm=[key + _STD]))


def write_proportions(
    sections: Sections, head: DeconvolutionHead, found: Proportions, key: str
) -> None:
    """Write proportions and their spread to each table, with a record."""
    names = head.types
    params = {
        "use_rep": list(head.use_rep),
        "strategy": head.strategy,
        "n_heads": head.params["n_heads"],
        "seed": head.params["seed"],
    }
    refuse_not_finite(head.task, found.mean, found.spread)
    # All is made before anything is written.
    frames = [
        [
            make_frame(table, values[part], names)
            for values in (found.mean, found.spread)
            if values is not None
        ]
        for table, part in zip(sections.tables, sections.places, strict=True)
    ]
    for table, (mean, *spread) in zip(sections.tables, frames, strict=True):
        write_record(table, key, params, **head.model_names())
        write_frame(table, key, mean, names)
        # That of an earlier run would be taken for this one's.
        remove_entry(table, key + _STD)
        for frame in spread:
            write_frame(table, key + _STD, frame, names)
    logger.info("Proportions of %d types in %d spots: obsm[%r].", len(names), len(found.mean), key)
