"""Cells and sub-slices of a corpus as inputs of the objectives, in new batches each epoch.

All random numbers of a sample come from the seed, the stage, the epoch and the sample's own
number, so that it does not matter which batch, process or thread loads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from stofm.nn import TokenBatch
from stofm.nn.cell_encoder import NO_VALUES
from stofm.nn.inference import padded_length
from stofm.spatial import (
    build_subslice,
    canonical_order,
    partition_balanced,
    partition_reference,
)
from stofm.train.masking import CellBatch, MaskedGenes, MaskedSubSliceBatch, apply, draw, drop_genes
from stofm.train.order import Batches, Draws, Purpose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from stofm.corpus.reader import Corpus
    from stofm.genes import GeneVocabulary
    from stofm.nn import CellEncoderConfig
    from stofm.spatial import SubSlice, SubSliceConfig
    from stofm.train.config import StageConfig, TokenMasking
    from stofm.train.masking import MaskedSubSlice
    from stofm.train.stages import EncodedSlice

#: A sub-slice's number in its slice takes the lower bits of a sample's number.
_PART_BITS = 32
_SIZE_CLASSES_PER_OCTAVE = 4
#: Number of epochs whose cuts are kept: the current one, and the next, which is loaded in advance.
_EPOCHS_KEPT = 2
#: Sub-slices that stay the same in all epochs are kept for up to this many cells.
_CELLS_KEPT = 100_000


def size_class(sizes: NDArray[np.number]) -> NDArray[np.int64]:
    """Classes of similar sizes, at most 19 % apart."""
    octaves = np.log2(np.maximum(sizes, 1))
    found: NDArray[np.int64] = np.round(octaves * _SIZE_CLASSES_PER_OCTAVE).astype(np.int64)
    return found


@dataclass(frozen=True)
class TokenReader:
    """Reads token lists of a corpus in the form that the cell encoder takes."""

    corpus: Corpus
    config: CellEncoderConfig
    vocabulary: GeneVocabulary

    def __post_init__(self) -> None:
        """Raise an error for a corpus without the values that the cell encoder uses."""
        if self.config.reads_values and not self.corpus.has_values:
            raise ValueError(NO_VALUES)

    def padded(self, n_tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Padded length of cells with these numbers of gene tokens, counting ``<cls>``."""
        return padded_length(n_tokens.astype(np.int64) + 1, self.config.max_positions)

    def read(self, cells: NDArray[np.int64]) -> TokenBatch:
        """Token lists of some cells, padded to the longest."""
        ranked = self.corpus.take(cells)
        if not self.config.reads_values:
            ranked = ranked.without_values()
        return TokenBatch.from_ranked(
            ranked,
            np.arange(len(cells)),
            cls_token=self.vocabulary.cls,
            pad_token=self.vocabulary.pad,
            length=int(self.padded(ranked.n_tokens).max()),
        )

    def groups(self, cells: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Group cells of similar length; returns positions in `cells`."""
        classes = size_class(self.corpus.lengths_of(cells) + 1)
        return [np.flatnonzero(classes == k) for k in np.unique(classes)]


@dataclass(frozen=True)
class CellSamples:
    """Cells of a corpus, for the cell encoder's objective. A sample is a cell.

    `shares` are the shares of each slice's cells that an epoch takes; None for all.
    """

    reader: TokenReader
    draws: Draws
    masking: TokenMasking
    gene_dropout: float
    shares: NDArray[np.float64] | None = None

    def epoch(self, number: int) -> Sequence[NDArray[np.int64]]:
        """Return batches that contain each cell once; most have one padded length."""
        corpus, draws = self.reader.corpus, self.draws
        n_cells, find = draws.cells(np.diff(corpus.first_cell), self.shares, number)

        def make(window: int, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
            cells = find(positions)
            sizes = self.reader.padded(corpus.lengths_of(cells))
            return [cells[batch] for batch in draws.batches(sizes, number, window)]

        return Batches(n_cells, draws, make)

    def load(self, samples: NDArray[np.int64], epoch: int) -> CellBatch:
        """Hide genes of some cells and make their two views."""
        cells, vocabulary = self.reader.read(samples), self.reader.vocabulary
        rngs = [self.draws.generator(epoch, Purpose.MASKING, int(cell)) for cell in samples]
        genes = MaskedGenes.build(cells, rngs, masking=self.masking, vocabulary=vocabulary)
        if not self.gene_dropout:
            return CellBatch(genes=genes, views=(cells, cells))
        first, second = (
            drop_genes(cells, self.gene_dropout, pad_token=vocabulary.pad, rngs=rngs)
            for _ in range(2)
        )
        return CellBatch(genes=genes, views=(first, second))

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that cells come from."""
        return self.reader.corpus.describe(self.reader.corpus.locate(samples)[0])


@dataclass
class SubSliceSamples:
    """Sub-slices of a corpus, for the objectives on these. A sample is a sub-slice.

    They are cut by `rules` and masked by the stage's `config`. If they `vary`, each epoch rotates
    the plane by a random angle before a slice is cut. A sample's number encodes its slice and its
    sub-slice, so that it belongs to the same slice in every epoch.

    With a `reader`, some visible cells of each come with their tokens. `shares` are the shares of
    each slice's sub-slices that an epoch takes; None for all.
    """

    corpus: Corpus
    rules: SubSliceConfig
    draws: Draws
    config: StageConfig
    vary: bool
    node_multiple: int = 1
    reader: TokenReader | None = None
    shares: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Cache the last cuts."""
        self._cut = lru_cache(_EPOCHS_KEPT * len(self.corpus.slices))(self._cut_anew)

    @property
    def encoded(self) -> Sequence[EncodedSlice]:
        """Cell embeddings and virtual cells of each slice, from which sub-slices are built."""
        return self._encoded

    @encoded.setter
    def encoded(self, slices: Sequence[EncodedSlice]) -> None:
        self._encoded = slices
        n_kept = 0 if self.vary else max(1, _CELLS_KEPT // self.rules.n_cells)
        self._build = lru_cache(n_kept)(self._build_anew)

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the sub-slices of an epoch, slice after slice."""
        parts = self._parts(epoch)
        taken = self.draws.numbers(parts, self.shares, epoch)
        own = [np.arange(n) for n in parts]
        for k in np.flatnonzero(taken < parts):
            rng = self.draws.generator(epoch, Purpose.MIXTURE, 1, int(k))
            own[k] = np.sort(rng.permutation(parts[k])[: taken[k]])
        return np.concatenate([(k << _PART_BITS) + numbers for k, numbers in enumerate(own)])

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Return batches that contain each sub-slice once, similar sizes together."""
        samples = self.samples(number)
        slices = self.slices_of(samples)
        # Parts of a slice are of nearly equal size.
        mean = (np.diff(self.corpus.first_cell) / self._parts(number))[slices]
        return [samples[batch] for batch in self.draws.batches(size_class(mean), number)]

    def load(self, samples: NDArray[np.int64], epoch: int) -> MaskedSubSliceBatch:
        """Hide and move cells of some sub-slices, and read the tokens of others."""
        parts = self.masked(samples, epoch)
        batch = MaskedSubSliceBatch.from_masked(parts, node_multiple=self.node_multiple)
        if self.reader is None:
            return batch
        n_nodes = batch.subslices.pairs.n_nodes
        places, cells = [], []
        for b, (part, sample) in enumerate(zip(parts, samples.tolist(), strict=True)):
            nodes = self._sample(part, self.draws.generator(epoch, Purpose.CELLS, sample))
            places.append(b * n_nodes + nodes)
            first = self.corpus.first_cell[sample >> _PART_BITS]
            cells.append(first + part.subslice.cell_index[nodes])
        groups = self.reader.groups(np.concatenate(cells))
        read = tuple(self.reader.read(np.concatenate(cells)[group]) for group in groups)
        where = torch.from_numpy(np.concatenate(places)[np.concatenate(groups)])
        return replace(batch, sampled=read, sampled_places=where)

    def masked(self, samples: NDArray[np.int64], epoch: int) -> list[MaskedSubSlice]:
        """Hide and move cells of some sub-slices, one by one."""
        found, masking = [], self.config.spatial_masking
        for sample in samples.tolist():
            subslice = self._build(sample, epoch if self.vary else 0)
            n_cells = int((subslice.cell_index >= 0).sum())
            rng = self.draws.generator(epoch, Purpose.MASKING, sample)
            drawn, around = draw(n_cells, masking, rng), self.config.n_surrounding
            found.append(apply(subslice, drawn, masking, n_surrounding=around))
        return found

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Name the slices that sub-slices come from."""
        return self.corpus.describe(self.slices_of(samples))

    @staticmethod
    def slices_of(samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of each sub-slice's slice."""
        return samples >> _PART_BITS

    def cells_of(self, sample: int, epoch: int) -> NDArray[np.int64]:
        """Rows of a sub-slice's cells in its slice, ascending."""
        part = sample & ((1 << _PART_BITS) - 1)
        return self._cut(sample >> _PART_BITS, epoch if self.vary else 0)[part]

    def _sample(self, part: MaskedSubSlice, rng: Generator) -> NDArray[np.int64]:
        """Nodes of some cells; hidden ones, which get no gradient, only if there are no others."""
        cells = np.flatnonzero(part.subslice.cell_index >= 0)
        visible = np.setdiff1d(cells, part.hidden_nodes)
        chosen = rng.permutation(visible if len(visible) else cells)
        return np.sort(chosen[: self.config.sampled_cells])

    def _parts(self, epoch: int) -> NDArray[np.int64]:
        """Number of sub-slices of each slice."""
        n_cells, number = np.diff(self.corpus.first_cell), epoch if self.vary else 0
        if self.rules.partition == "balanced":
            return -(-n_cells // self.rules.n_cells)
        return np.array([len(self._cut(k, number)) for k in range(len(n_cells))])

    def _cut_anew(self, number: int, epoch: int) -> list[NDArray[np.int64]]:
        angle = 0.0
        if self.vary:
            rng = self.draws.generator(epoch, Purpose.ROTATION, number)
            angle = float(rng.uniform(0.0, 2 * np.pi))
        return cut_slice(self.corpus.slices[number].coordinates, self.rules, angle=angle)

    def _build_anew(self, sample: int, epoch: int) -> SubSlice:
        one = self.encoded[sample >> _PART_BITS]
        return build_subslice(one.layout, one.features, self.cells_of(sample, epoch), self.rules)


def cut_slice(
    coordinates: NDArray[np.float64], config: SubSliceConfig, *, angle: float = 0.0
) -> list[NDArray[np.int64]]:
    """Rotate a slice by an angle in radians and cut it: rows of each sub-slice, ascending."""
    xy = np.asarray(coordinates)
    if angle:
        cosine, sine = np.cos(angle), np.sin(angle)
        xy = xy @ np.array([[cosine, sine], [-sine, cosine]])
    if config.partition == "reference":
        return partition_reference(xy, config.n_cells)
    order = canonical_order(coordinates, np.empty((len(xy), 0)))
    return [np.sort(order[rows]) for rows in partition_balanced(xy[order], config.n_cells)]
