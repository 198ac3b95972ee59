"""Sub-slices of a corpus as inputs of the spatial and the joint objective."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from stofm.spatial import build_subslice
from stofm.train.cell_masking import apply, draw
from stofm.train.inputs import JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.sampling import Purpose, SubSliceSampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.nn import TokenBatch
    from stofm.spatial import SubSlice, SubSliceConfig
    from stofm.train.cell_cache import EncodedSlice
    from stofm.train.cell_masking import MaskedSubSlice, SpatialMasking
    from stofm.train.cell_samples import Draws, TokenReader
    from stofm.train.corpus import Corpus
    from stofm.train.gene_masking import TokenMasking

#: Built sub-slices that stay the same from epoch to epoch are kept up to this.
_KEPT_BYTES = 256 * 2**20


class SubSliceSamples:
    """Sub-slices of a corpus, for the spatial objective. A sample is a sub-slice.

    Parameters
    ----------
    corpus
        The slices.
    rules
        How they are cut, and which pairs of nodes have a distance.
    draws
        What samples are drawn by.
    masking
        Which cells are hidden and moved.
    vary
        Cut slices anew in every epoch.
    node_multiple
        As in :meth:`stofm.nn.SubSliceBatch.from_subslices`.
    n_surrounding
        As in :func:`stofm.train.cell_masking.apply`.
    """

    def __init__(
        self,
        corpus: Corpus,
        rules: SubSliceConfig,
        draws: Draws,
        *,
        masking: SpatialMasking,
        vary: bool,
        node_multiple: int = 1,
        n_surrounding: int = 0,
    ) -> None:
        self._corpus = corpus
        self._rules = rules
        self._draws = draws
        self._masking = masking
        self._node_multiple = node_multiple
        self._n_surrounding = n_surrounding
        self._sampler = SubSliceSampler(
            [s.coordinates for s in corpus.slices],
            rules,
            vary=vary,
            seed=draws.seed,
            stage=draws.stage,
        )
        self._encoded: Sequence[EncodedSlice] | None = None
        self._built: OrderedDict[int, SubSlice] = OrderedDict()
        self._built_bytes = 0
        self._lock = threading.Lock()

    @property
    def encoded(self) -> Sequence[EncodedSlice]:
        """Cell embeddings and virtual cells of each slice, from which sub-slices are built."""
        if self._encoded is None:
            msg = "The cells are not encoded yet: call refresh() or restore() of the stage first."
            raise RuntimeError(msg)
        return self._encoded

    @encoded.setter
    def encoded(self, slices: Sequence[EncodedSlice]) -> None:
        with self._lock:
            self._encoded = slices
            self._built.clear()
            self._built_bytes = 0

    @property
    def varies(self) -> bool:
        """Whether slices are cut anew in every epoch."""
        return self._sampler.vary

    @property
    def epochs_differ_in_length(self) -> bool:
        """Whether the number of batches may differ between epochs."""
        return self._sampler.epochs_differ_in_length

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches that take each sub-slice once."""
        rng = self._draws.generator(number, Purpose.ORDER)
        return self._sampler.epoch(number, batch_size=self._draws.batch_size, rng=rng)

    def load(self, samples: NDArray[np.int64], epoch: int) -> MaskedSubSliceBatch:
        """Hide and move cells of some sub-slices."""
        return self.collate(self.masked(samples, epoch))

    def masked(self, samples: NDArray[np.int64], epoch: int) -> list[MaskedSubSlice]:
        """Hide and move cells of some sub-slices, one by one."""
        found = []
        for sample in samples.tolist():
            subslice = self._subslice(sample, epoch)
            n_cells = int((subslice.cell_index >= 0).sum())
            rng = self._draws.generator(epoch, Purpose.MASKING, sample)
            drawn = draw(n_cells, self._masking, rng)
            found.append(apply(subslice, drawn, self._masking, n_surrounding=self._n_surrounding))
        return found

    def collate(self, masked: Sequence[MaskedSubSlice]) -> MaskedSubSliceBatch:
        """Pad sub-slices into one batch."""
        return MaskedSubSliceBatch.from_masked(masked, node_multiple=self._node_multiple)

    def n_cells(self, inputs: MaskedSubSliceBatch) -> int:
        """Number of cells."""
        return int((inputs.subslices.cell_index >= 0).sum())

    def n_tokens(self, inputs: MaskedSubSliceBatch) -> int:
        """Number of nodes."""
        return sum(inputs.subslices.pairs.n_real)

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that sub-slices come from."""
        return self._corpus.describe(self.slices_of(samples))

    def slices_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of each sub-slice's slice."""
        return self._sampler.locate(samples)[0]

    def cells_of(self, sample: int, epoch: int) -> NDArray[np.int64]:
        """Rows of a sub-slice's cells in its slice, ascending."""
        return self._sampler.cells(sample, epoch)

    def _subslice(self, sample: int, epoch: int) -> SubSlice:
        if self._sampler.vary:
            return self._build(sample, epoch)
        with self._lock:
            found = self._built.get(sample)
        if found is None:
            found = self._build(sample, epoch)
            self._keep(sample, found)
        return found

    def _build(self, sample: int, epoch: int) -> SubSlice:
        number = int(self.slices_of(np.array([sample]))[0])
        one = self.encoded[number]
        return build_subslice(one.layout, one.features, self.cells_of(sample, epoch), self._rules)

    def _keep(self, sample: int, built: SubSlice) -> None:
        with self._lock:
            if sample in self._built:
                return
            self._built[sample] = built
            self._built_bytes += _n_bytes(built)
            while self._built_bytes > _KEPT_BYTES:
                self._built_bytes -= _n_bytes(self._built.popitem(last=False)[1])


class JointSamples:
    """Sub-slices with the tokens of some of their cells, for the joint objective.

    Parameters
    ----------
    subslices
        The sub-slices.
    reader
        Reads tokens.
    draws
        What samples are drawn by.
    sampled_cells
        Cells of each sub-slice that go through the cell encoder; none that is hidden.
    token_masking
        Which of their genes are hidden, if masked genes are trained along; else None.
    """

    def __init__(
        self,
        subslices: SubSliceSamples,
        reader: TokenReader,
        draws: Draws,
        *,
        sampled_cells: int,
        token_masking: TokenMasking | None,
    ) -> None:
        if sampled_cells < 1:
            msg = f"sampled_cells must be at least 1, found {sampled_cells}."
            raise ValueError(msg)
        self.subslices = subslices
        self._reader = reader
        self._draws = draws
        self._sampled_cells = sampled_cells
        self._token_masking = token_masking

    @property
    def epochs_differ_in_length(self) -> bool:
        """Whether the number of batches may differ between epochs."""
        return self.subslices.epochs_differ_in_length

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches that take each sub-slice once."""
        return self.subslices.epoch(number)

    def load(self, samples: NDArray[np.int64], epoch: int) -> JointBatch:
        """Hide and move cells of some sub-slices, and read the tokens of others."""
        parts = self.subslices.masked(samples, epoch)
        batch = self.subslices.collate(parts)
        nodes = [
            self._sample(part, self._draws.generator(epoch, Purpose.CELLS, int(sample)))
            for part, sample in zip(parts, samples, strict=True)
        ]
        n_nodes = batch.subslices.pairs.n_nodes
        places = np.concatenate([b * n_nodes + own for b, own in enumerate(nodes)])
        rows = [part.subslice.cell_index[own] for part, own in zip(parts, nodes, strict=True)]
        slices = np.repeat(self.subslices.slices_of(samples), [len(own) for own in nodes])
        cells = self._reader.corpus.first_cell[slices] + np.concatenate(rows)
        groups = self._reader.groups(cells)
        in_order = np.concatenate(groups)
        read = tuple(self._reader.read(cells[group]) for group in groups)
        return JointBatch(
            masked=batch,
            cells=read,
            places=torch.from_numpy(places[in_order]),
            genes=self._hide_genes(read, [cells[group] for group in groups], epoch),
        )

    def n_cells(self, inputs: JointBatch) -> int:
        """Number of cells of the sub-slices."""
        return self.subslices.n_cells(inputs.masked)

    def n_tokens(self, inputs: JointBatch) -> int:
        """Number of nodes, and of tokens of the sampled cells."""
        n_tokens = sum(int(group.is_real.sum()) for group in inputs.cells)
        return self.subslices.n_tokens(inputs.masked) + n_tokens

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that sub-slices come from."""
        return self.subslices.describe(samples)

    def _sample(self, part: MaskedSubSlice, rng: np.random.Generator) -> NDArray[np.int64]:
        """Nodes of some cells; hidden ones, which get no gradient, only if there are no others."""
        cells = np.flatnonzero(part.subslice.cell_index >= 0)
        visible = np.setdiff1d(cells, part.hidden_nodes)
        return np.sort(rng.permutation(visible if len(visible) else cells)[: self._sampled_cells])

    def _hide_genes(
        self, read: Sequence[TokenBatch], cells: Sequence[NDArray[np.int64]], epoch: int
    ) -> tuple[MaskedGenes, ...]:
        if self._token_masking is None:
            return ()
        return tuple(
            MaskedGenes.build(
                tokens,
                [self._draws.generator(epoch, Purpose.GENES, int(cell)) for cell in own],
                masking=self._token_masking,
                vocabulary=self._reader.vocabulary,
            )
            for tokens, own in zip(read, cells, strict=True)
        )


def _n_bytes(subslice: SubSlice) -> int:
    pairs = subslice.pairs
    arrays = (subslice.coordinates, subslice.features, pairs.rows, pairs.columns, pairs.distances)
    return sum(array.nbytes for array in arrays)
