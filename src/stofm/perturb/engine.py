"""One slice as a model sees it, and the embeddings of its cells after edits, sub-slice by sub-slice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from stofm.corpus.reader import take_cells
from stofm.genes import RankedTokens
from stofm.nn import SubSliceBatch, encode_cells
from stofm.nn.inference import (
    CUDA_NODE_MULTIPLE,
    SUBSLICES_AT_ONCE,
    evaluating,
    placed,
    refuse_not_finite,
)
from stofm.perturb.edit import PlacedEdit
from stofm.spatial import build_subslice, lay_out_slice, rows_by_subslice
from stofm.spatial.plane import MODEL_DIAGONAL, spacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from stofm.nn import Stofm
    from stofm.nn.se2_transformer import SE2Transformer
    from stofm.perturb.edit import Detached, Edit
    from stofm.spatial import SliceLayout, SubSlice, SubSliceConfig

_UNEDITED: Final = -1


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of one sub-slice's cells before and after an edit."""

    edit: int  # number of the edit in the list
    rows: NDArray[np.int64]  # (m,) rows of the cells, ascending; removed ones are not among them
    before: NDArray[np.float32]  # (m, d_embedding)
    after: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Variant:
    """A sub-slice after an edit: rows of its cells, its nodes, and their attention bias."""

    edit: int
    rows: NDArray[np.int64]
    nodes: SubSlice
    bias: Tensor


class SubSliceRun:
    """One sub-slice, and the transformer's output for it after edits."""

    def __init__(self, whole: UneditedSlice, k: int) -> None:
        self.whole = whole
        self.k = k
        self.rows = whole.parts[k]

    @cached_property
    def unit(self) -> float:
        """Unit of distances, whichever cells are removed or moved."""
        coordinates = self.whole.layout.coordinates[self.rows]
        return spacing(coordinates) if self.whole.rules.unit == "spacing" else 1.0

    @cached_property
    def unedited(self) -> _Variant:
        """The unedited sub-slice, whose attention bias serves all edits that move no node."""
        coordinates, features = self.whole.layout.coordinates, self.whole.features
        return self._build(self.rows, coordinates, features[self.rows])

    @cached_property
    def before(self) -> NDArray[np.float32]:
        """Embeddings of the unedited cells."""
        return self._forward([self.unedited])[0]

    def embed(self, group: Sequence[tuple[int, PlacedEdit]]) -> Iterator[Embedded]:
        """Embed the cells after each edit of a group that changes the input."""
        at_once = SUBSLICES_AT_ONCE.get(self.whole.device.type, 1)
        variants = self._variants(group)
        while waiting := list(islice(variants, at_once)):
            for one, after in zip(waiting, self._forward(waiting), strict=True):
                yield Embedded(one.edit, one.rows, self._before(one.rows), after)

    def _before(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if rows is self.rows:
            return self.before
        if np.isin(rows, self.rows).all():
            return self.before[np.searchsorted(self.rows, rows)]
        # Cells that come from another sub-slice were embedded there.
        return self.whole.embeddings[rows]

    def _variants(self, group: Sequence[tuple[int, PlacedEdit]]) -> Iterator[_Variant]:
        for (number, one), (cells, values) in zip(group, self._encoded(group), strict=True):
            found = self.unedited
            if one.changes_nodes(self.k):
                rows = np.flatnonzero(one.after == self.k)
                found = self._build(rows, one.coordinates, self._features(rows, cells, values))
            elif len(cells):
                features = self._features(self.rows, cells, values)
                others = found.nodes.features[: -len(self.rows)]
                nodes = replace(found.nodes, features=np.vstack([others, features]))
                found = replace(found, nodes=nodes)
            if one.edit.detached is not None:
                found = self._detach(found, one.edit, one.edit.detached)
            if found is not self.unedited:
                yield replace(found, edit=number)

    def _encoded(
        self, group: Sequence[tuple[int, PlacedEdit]]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """For each edit, the cells here whose embedding it changes, and the new embeddings."""
        cells = [one.cells_in(self.k) for _, one in group]
        tokens = [
            one.edit.tokens(rows)
            for rows, (_, one) in zip(cells, group, strict=True)
            if one.edit.tokens is not None and len(rows)
        ]
        encoded = self.whole.features[:0]
        if tokens:
            encoded = self.whole.encode(RankedTokens.concatenate(tokens))
        ends = np.cumsum([len(rows) for rows in cells])
        for rows, values in zip(cells, np.split(encoded, ends[:-1]), strict=True):
            is_other = (values != self.whole.features[rows]).any(axis=1)
            yield rows[is_other], values[is_other]

    def _features(
        self, rows: NDArray[np.int64], cells: NDArray[np.int64], values: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        features = self.whole.features[rows]
        features[np.searchsorted(rows, cells)] = values
        return features

    def _build(
        self,
        rows: NDArray[np.int64],
        coordinates: NDArray[np.float64],
        features: NDArray[np.float32],
    ) -> _Variant:
        """Assemble a sub-slice of some cells, in the unedited unit of distances."""
        virtual, rules = self.whole.layout.virtual, replace(self.whole.rules, unit="diagonal")
        here = replace(
            self.whole.layout,
            coordinates=coordinates[rows] / self.unit,
            virtual=replace(virtual, coordinates=virtual.coordinates / self.unit),
        )
        nodes = build_subslice(here, features, np.arange(len(rows)), rules)
        with torch.inference_mode():
            bias = self.whole.transformer.attention_bias(self._batch([nodes]))
        return _Variant(_UNEDITED, rows, nodes, bias)

    def _detach(self, found: _Variant, edit: Edit, pairs: Detached) -> _Variant:
        """Hide the senders from the receivers, if there are both."""
        n, n_cells = found.nodes.n_nodes, len(found.rows)
        senders, receivers = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
        senders[-n_cells:] = pairs.senders[found.rows]
        if pairs.receivers is not None or np.isfinite(pairs.reach):
            receivers[:-n_cells] = False
        if pairs.receivers is not None:
            receivers[-n_cells:] = pairs.receivers[found.rows]
        hidden = receivers[:, None] & senders
        np.fill_diagonal(hidden, val=False)
        if np.isfinite(pairs.reach):
            xy = self.whole.coordinates if edit.coordinates is None else edit.coordinates
            is_near = cdist(xy[found.rows], xy[found.rows]) <= pairs.reach
            hidden[-n_cells:, -n_cells:] &= is_near
        if not hidden.any():
            return found
        padding = found.bias.shape[-1] - n
        padded = torch.from_numpy(np.pad(hidden, (0, padding))).to(found.bias.device)
        return replace(found, bias=found.bias.masked_fill(padded, -torch.inf))

    def _forward(self, variants: Sequence[_Variant]) -> list[NDArray[np.float32]]:
        """Embeddings of the cells of some variants."""
        transformer, device = self.whole.transformer, self.whole.device
        with torch.inference_mode(), evaluating(transformer):
            batch = self._batch([one.nodes for one in variants])
            size = batch.pairs.n_nodes
            biases = [F.pad(one.bias, (0, size - one.bias.shape[-1]) * 2) for one in variants]
            bias = biases[0] if len(biases) == 1 else torch.cat(biases)
            hidden = transformer.embed(batch, bias=bias).cpu().numpy()
        found = [
            own[one.nodes.n_nodes - len(one.rows) : one.nodes.n_nodes]
            for own, one in zip(hidden, variants, strict=True)
        ]
        refuse_not_finite(np.concatenate(found), device, torch.float32)
        return found

    def _batch(self, nodes: list[SubSlice]) -> SubSliceBatch:
        multiple = CUDA_NODE_MULTIPLE if self.whole.device.type == "cuda" else 1
        return SubSliceBatch.from_subslices(nodes, node_multiple=multiple).to(self.whole.device)


#: Edited cells whose tokens are in memory at a time, if no edit has more.
_CELLS_AT_ONCE: Final = 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class UneditedSlice:
    """Everything in one slice that embeddings depend on, and the embeddings after edits.

    Sub-slices, clusters, virtual cells and the unit of distances stay as they are in the unedited
    slice, and only sub-slices that an edit changes are computed. Everything is in float32, because
    differences matter.
    """

    model: Stofm  # used in evaluation mode
    ranked: RankedTokens  # tokens of the n cells, as many of each as the model keeps
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
        """Embed the cells of the sub-slices that edits change, each edit on its own.

        An edit that changes no input of a sub-slice is skipped there: the difference is exactly 0.
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
        """The slice after an edit as a new unedited one, laid out again.

        Rows of removed cells are gone. Detached pairs are not part of it: pass them in an edit of
        the new slice.
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
