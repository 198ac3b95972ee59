"""Cells of a corpus as inputs of the cell encoder's objective.

All random numbers of a sample come from the seed, the stage, the epoch and the sample's own
number, so that it does not matter which batch, process or thread loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stofm.nn import TokenBatch
from stofm.nn.cell_encoder import NO_VALUES
from stofm.train.inputs import CellBatch
from stofm.train.sampling import Purpose, batch_length, epoch_of_cells, generator, size_class

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.nn import CellEncoderConfig
    from stofm.train.corpus import Corpus
    from stofm.train.gene_masking import TokenMasking


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What samples are drawn by.

    Attributes
    ----------
    seed
        Seed of the run, at least 0.
    stage
        Number of the stage in the run.
    batch_size
        Samples of a batch over all processes, at most.
    """

    seed: int
    stage: int
    batch_size: int

    def __post_init__(self) -> None:
        """Check each value."""
        for name, least in (("seed", 0), ("stage", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                msg = f"{name} must be at least {least}, found {getattr(self, name)}."
                raise ValueError(msg)

    def generator(self, epoch: int, purpose: Purpose, *sample: int) -> np.random.Generator:
        """Random numbers of one sample (:func:`stofm.train.sampling.generator`)."""
        return generator(self.seed, self.stage, epoch, purpose, *sample)


class TokenReader:
    """Reads token lists of a corpus as the cell encoder takes them.

    Parameters
    ----------
    corpus
        The slices.
    config
        What the cell encoder reads.
    vocabulary
        Gives the special tokens.

    Raises
    ------
    ValueError
        The model reads values and the corpus has none.
    """

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
    """Cells of a corpus, for the cell encoder's objective. A sample is a cell.

    Parameters
    ----------
    reader
        Reads their tokens.
    draws
        What samples are drawn by.
    masking
        Which genes are hidden.
    gene_dropout
        Share of a cell's genes that each contrastive view leaves out.
    """

    epochs_differ_in_length = False

    def __init__(
        self, reader: TokenReader, draws: Draws, *, masking: TokenMasking, gene_dropout: float
    ) -> None:
        self._reader = reader
        self._draws = draws
        self._masking = masking
        self._gene_dropout = gene_dropout

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches that take each cell once."""
        return epoch_of_cells(
            self._reader.corpus,
            batch_size=self._draws.batch_size,
            max_length=self._reader.max_length,
            rng=self._draws.generator(number, Purpose.ORDER),
        )

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
