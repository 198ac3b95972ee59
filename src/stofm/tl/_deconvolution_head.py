"""The head that :func:`stofm.tl.deconvolve` fits, and what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from stofm._edge.embedding import load_model
from stofm._edge.records import (
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
from stofm.nn import choose_device, choose_dtype
from stofm.tl._embeddings import describe_origin, origin_by, same_origin
from stofm.tl._head_inputs import Inputs, read_inputs
from stofm.tl._spot_panel import SpotPanel, genes_of, read_panel_counts, remark_on_empty
from stofm.tl._voting_head import VotingEntries, VotingHead

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm
    from stofm.tl._sections import Sections

_STD = Obsm.DECONVOLUTION_STD.removeprefix(Obsm.DECONVOLUTION)
#: A query with a smaller share of the genes of a head's panel is refused.
_MIN_PANEL: float = 0.5


@dataclass(frozen=True, kw_only=True)
class _Entries(VotingEntries):
    genes: tuple[str, ...] | None = None
    target_sum: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DeconvolutionHead(VotingHead):
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
        self, sections: Sections, model: Stofm | str | Path | None, options: Mapping[str, Any]
    ) -> Inputs:
        """Return what the head reads of slices.

        Parameters
        ----------
        sections
            The slices.
        model
            Model to embed with where embeddings are missing; by default the head's own.
        options
            As :func:`stofm.tl._head_inputs.read_inputs` takes them.

        Raises
        ------
        ValueError
            Embeddings are by another model, or genes that the head reads are missing.
        """
        model = self.model if model is None else model
        if self.panel is None:
            inputs = read_inputs(
                sections, use_rep=self.use_rep, model=model, expected=self.origin, **options
            )
            self.check_inputs(inputs)
            return self.read_beside(
                sections, inputs, layer=options["layer"], spatial_key=options["spatial_key"]
            )
        encoder = self._encoder(model)
        device = choose_device(options["device"])
        counts = sections.each(lambda table: self._panel_counts(table, encoder, options["layer"]))
        parts = [
            self.panel.features(
                own,
                encoder,
                device=device,
                dtype=choose_dtype("auto", device),
                show_progress_bar=options["show_progress_bar"],
            )
            for own in counts
        ]
        return self.inputs_of(np.concatenate(parts))

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


def refuse_foreign_proportions(sections: Sections, key: str) -> None:
    """Refuse a key beside which something else is stored where its spread would be written."""
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
