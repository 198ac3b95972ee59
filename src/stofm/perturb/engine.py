"""One slice as a model sees it, and the embeddings of its cells after edits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from stofm.corpus.reader import take_cells
from stofm.nn import encode_cells
from stofm.nn.inference import placed
from stofm.perturb.edit import PlacedEdit
from stofm.perturb.runs import SubSliceRun
from stofm.spatial import lay_out_slice, rows_by_subslice
from stofm.spatial.plane import MODEL_DIAGONAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.nn import Stofm
    from stofm.nn.se2_transformer import SE2Transformer
    from stofm.perturb.edit import Edit
    from stofm.perturb.runs import Embedded
    from stofm.spatial import SliceLayout, SubSliceConfig

#: Edited cells whose tokens are in memory at a time, if no edit has more.
_CELLS_AT_ONCE: Final = 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class UneditedSlice:
    """All of one slice that embeddings depend on, and what comes out after edits.

    Sub-slices, clusters, virtual cells and the unit of distances stay as they are in the unedited
    slice, and only sub-slices that an edit changes are computed. All in float32, as differences
    count.
    """

    model: Stofm  # used in evaluation mode
    ranked: RankedTokens  # tokens of the n cells, all that the model keeps of a cell
    coordinates: NDArray[np.float64]  # (n, 2), any unit
    #: (n, d_cell), computed from `ranked` in the same way as those of edited cells.
    features: NDArray[np.float32]
    layout: SliceLayout  # sub-slices, clusters and virtual cells
    seed: int  # of the clustering
    device: torch.device
    panel: NDArray[np.integer]  # tokens of the measured genes; by default those in `ranked`

    @classmethod
    def of(
        cls,
        model: Stofm,
        ranked: RankedTokens,
        coordinates: NDArray[np.floating],
        *,
        seed: int = 0,
        device: torch.device,
        panel: NDArray[np.integer] | None = None,
    ) -> UneditedSlice:
        """Encode the cells of a slice and lay it out; arguments are the attributes of that name."""
        xy = np.asarray(coordinates, dtype=np.float64)
        panel = np.unique(ranked.tokens) if panel is None else panel
        features = encode_cells(
            model.cell_encoder, ranked, model.vocabulary, device=device, panel=panel
        )
        return cls(
            model=model,
            ranked=ranked,
            coordinates=xy,
            features=features,
            layout=lay_out_slice(xy, features, model.config.subslice, seed=seed),
            seed=seed,
            device=device,
            panel=panel,
        )

    @property
    def rules(self) -> SubSliceConfig:
        """Sub-slice rules."""
        return self.model.config.subslice

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.features)

    @cached_property
    def transformer(self) -> SE2Transformer:
        """The SE(2) Transformer where it computes."""
        return placed(self.model.se2_transformer, self.device, torch.float32)

    @cached_property
    def parts(self) -> list[NDArray[np.int64]]:
        """Rows of each sub-slice's cells."""
        return rows_by_subslice(self.layout)

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """(n, d_embedding) embeddings of the unedited slice."""
        width = self.model.config.se2_transformer.d_embedding
        found = np.empty((self.n_cells, width), dtype=np.float32)
        for k, rows in enumerate(self.parts):
            found[rows] = SubSliceRun(self, k).before
        return found

    def in_frame(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Coordinates (m, 2) in the frame of the layout."""
        low, high = self.coordinates.min(axis=0), self.coordinates.max(axis=0)
        diagonal = float(np.hypot(*(high - low))) or 1.0
        return np.asarray((coordinates - (high + low) / 2) / diagonal * MODEL_DIAGONAL)

    def encode(self, ranked: RankedTokens) -> NDArray[np.float32]:
        """Embed cells from their tokens alone, (n_cells, d_cell)."""
        model, device = self.model, self.device
        return encode_cells(
            model.cell_encoder, ranked, model.vocabulary, device=device, panel=self.panel
        )

    def embed(
        self, edits: Sequence[Edit], on_done: Callable[[int], object] | None = None
    ) -> Iterator[Embedded]:
        """Embed the cells of the sub-slices that edits change, each edit by itself.

        An edit that changes no input of a sub-slice gives nothing there: the difference is exactly 0.
        `on_done` is called with the number of sub-slices after each.
        """
        placed_edits = [PlacedEdit.of(edit, self) for edit in edits]
        for k in range(self.layout.n_subslices):
            run = SubSliceRun(self, k)
            touching = [(e, one) for e, one in enumerate(placed_edits) if one.touches(k)]
            most = max((len(one.cells_in(k)) for _, one in touching), default=0)
            at_once = max(1, _CELLS_AT_ONCE // max(1, most))
            for start in range(0, len(touching), at_once):
                yield from run.embed(touching[start : start + at_once])
            if on_done is not None:
                on_done(1)

    def after(self, edit: Edit) -> UneditedSlice:
        """The slice after an edit as an unedited one: sub-slices, clusters and virtual cells move.

        Rows of removed cells are gone. Detached pairs are no part of it: pass them in an edit of it.
        """
        is_kept = np.ones(self.n_cells, dtype=bool)
        is_kept[edit.removed] = False
        kept = np.flatnonzero(is_kept)
        features = self.features.copy()
        if edit.tokens is not None:
            features[edit.cells] = self.encode(edit.tokens(edit.cells))
        xy = (self.coordinates if edit.coordinates is None else edit.coordinates)[kept]
        return replace(
            self,
            ranked=take_cells(self.ranked, kept),
            coordinates=xy,
            features=features[kept],
            layout=lay_out_slice(xy, features[kept], self.rules, seed=self.seed),
        )
