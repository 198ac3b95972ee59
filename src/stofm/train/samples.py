"""Cells and sub-slices of a corpus as inputs of the objectives."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from stofm.nn import TokenBatch
from stofm.nn.cell_encoder import NO_VALUES
from stofm.spatial import build_subslice
from stofm.train.batches import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.epochs import (
    Purpose,
    SubSliceSampler,
    batch_length,
    draw_batches,
    size_class,
)
from stofm.train.masking import apply, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.nn import CellEncoderConfig
    from stofm.spatial import SubSlice, SubSliceConfig
    from stofm.train.cell_cache import EncodedSlice
    from stofm.train.config import SpatialMasking, TokenMasking
    from stofm.train.corpus import Corpus
    from stofm.train.epochs import Draws
    from stofm.train.masking import MaskedSubSlice

#: Built sub-slices that stay the same from epoch to epoch are kept up to this.
_KEPT_BYTES = 256 * 2**20


class TokenReader:
    """Reads token lists of a corpus as the cell encoder takes them."""

    def __init__(
        self, corpus: Corpus, config: CellEncoderConfig, vocabulary: GeneVocabulary
    ) -> None:
        if config.reads_values and not corpus.has_values:
            raise ValueError(NO_VALUES)
        self.corpus = corpus
        self.vocabulary = vocabulary
        self.max_length = config.max_positions
        self._with_values = config.reads_values

    def read(self, cells: NDArray[np.int64]) -> TokenBatch:
        """Token lists of some cells, padded to the longest."""
        ranked = self.corpus.take(cells)
        if not self._with_values:
            ranked = ranked.without_values()
        return TokenBatch.from_ranked(
            ranked,
            np.arange(len(cells)),
            cls_token=self.vocabulary.cls,
            pad_token=self.vocabulary.pad,
            length=int(batch_length(ranked.n_tokens, self.max_length).max()),
        )

    def groups(self, cells: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Put cells of like length together; returns places in `cells`."""
        classes = size_class(self.corpus.cell_lengths[cells] + 1)
        return [np.flatnonzero(classes == k) for k in np.unique(classes)]


class CellSamples:
    """Cells of a corpus, for the cell encoder's objective. A sample is a cell."""

    epochs_differ_in_length = False

    def __init__(
        self, reader: TokenReader, draws: Draws, *, masking: TokenMasking, gene_dropout: float
    ) -> None:
        self._reader = reader
        self._draws = draws
        self._masking = masking
        self._gene_dropout = gene_dropout

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches that take each cell once; most hold cells of one padded length."""
        lengths = batch_length(self._reader.corpus.cell_lengths, self._reader.max_length)
        return draw_batches(self._draws, lengths, number)

    def load(self, samples: NDArray[np.int64], epoch: int) -> CellBatch:
        """Hide genes of some cells and make their two views."""
        return CellBatch.build(
            self._reader.read(samples),
            [self._draws.generator(epoch, Purpose.MASKING, int(cell)) for cell in samples],
            masking=self._masking,
            gene_dropout=self._gene_dropout,
            vocabulary=self._reader.vocabulary,
        )

    def n_cells(self, inputs: CellBatch) -> int:
        """Number of cells."""
        return inputs.n_cells

    def n_tokens(self, inputs: CellBatch) -> int:
        """Number of tokens of these cells, each counted once."""
        return int(inputs.genes.tokens.is_real.sum())

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that cells come from."""
        return self._reader.corpus.describe(self._reader.corpus.locate(samples)[0])


class SubSliceSamples:
    """Sub-slices of a corpus, for the spatial objective. A sample is a sub-slice.

    They are cut by `rules`, anew in every epoch if they `vary`; `masking` says which cells are
    hidden and moved, `n_surrounding` over how many nearest cells surroundings are averaged.
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
        places = [s.coordinates for s in corpus.slices]
        self._sampler = SubSliceSampler(places, rules, draws, vary=vary)
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
        return self._sampler.epoch(number)

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
        found = None if self.varies else self._built.get(sample)
        if found is not None:
            return found
        one = self.encoded[int(self.slices_of(np.array([sample]))[0])]
        cells = self.cells_of(sample, epoch)
        built = build_subslice(one.layout, one.features, cells, self._rules)
        if not self.varies:
            self._keep(sample, built)
        return built

    def _keep(self, sample: int, built: SubSlice) -> None:
        with self._lock:
            if sample in self._built:
                return
            self._built[sample] = built
            self._built_bytes += _n_bytes(built)
            while self._built_bytes > _KEPT_BYTES:
                self._built_bytes -= _n_bytes(self._built.popitem(last=False)[1])


def _n_bytes(subslice: SubSlice) -> int:
    pairs = subslice.pairs
    arrays = (subslice.coordinates, subslice.features, pairs.rows, pairs.columns, pairs.distances)
    return sum(array.nbytes for array in arrays)


class JointSamples:
    """Sub-slices with the tokens of some of their cells, for the joint objective.

    `sampled_cells` of each go through the cell encoder, none that is hidden; with
    `token_masking`, some of their genes are hidden too.
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

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that sub-slices come from."""
        return self.subslices.describe(samples)

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
        read = tuple(self._reader.read(cells[group]) for group in groups)
        return JointBatch(
            masked=batch,
            cells=read,
            places=torch.from_numpy(places[np.concatenate(groups)]),
            genes=self._hide_genes(read, [cells[group] for group in groups], epoch),
        )

    def n_cells(self, inputs: JointBatch) -> int:
        """Number of cells of the sub-slices."""
        return self.subslices.n_cells(inputs.masked)

    def n_tokens(self, inputs: JointBatch) -> int:
        """Number of nodes, and of tokens of the sampled cells."""
        n_tokens = sum(int(group.is_real.sum()) for group in inputs.cells)
        return self.subslices.n_tokens(inputs.masked) + n_tokens

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
