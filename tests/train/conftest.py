"""A tiny corpus on disk."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stofm.corpus.reader import Corpus, CorpusSlice, Reading
from stofm.corpus.shards import Shard
from stofm.corpus.sources import FileConfig, find_sources
from stofm.corpus.writing import write_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from anndata import AnnData

    from stofm.genes import GeneVocabulary


def counted_slice(rng: np.random.Generator, n_cells: int, genes: Sequence[str]) -> AnnData:
    """Cells with counts of 1 to 44 genes, of which the third has none."""
    from anndata import AnnData
    from scipy import sparse

    lengths = rng.integers(1, 45, n_cells)
    lengths[2:3] = 0
    columns = np.concatenate([rng.permutation(len(genes))[:n] for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counts = rng.integers(1, 9, len(columns)).astype(np.float32)
    adata = AnnData(sparse.csr_matrix((counts, columns, offsets), (n_cells, len(genes))))
    adata.var_names = genes
    adata.obsm["spatial"] = rng.random((n_cells, 2)) * [7.0, 5.0]
    return adata


@pytest.fixture
def write_corpus(
    tmp_path: Path, rng: np.random.Generator, vocabulary: GeneVocabulary
) -> Callable[..., Corpus]:
    """Write a corpus of slices with so many cells each."""
    genes = vocabulary.gene_ids.tolist()

    def write(sizes: Sequence[int], *, values: bool = False, names: str = "slice") -> Corpus:
        slices = []
        for k, n in enumerate(sizes):
            (source,) = find_sources(counted_slice(rng, n, genes), FileConfig())
            folder = tmp_path / "slices" / f"{names}{k}"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*1 of .* cells have no count")
                write_source(replace(source, name=f"{names}-{k}"), vocabulary, folder)
            slices.append(
                CorpusSlice(Shard(folder), 0, Reading(vocabulary, 99, 1.0 if values else None))
            )
        return Corpus(tuple(slices))

    return write


@pytest.fixture
def corpus(write_corpus: Callable[..., Corpus]) -> Corpus:
    """Three slices of 113, 31 and 59 cells."""
    return write_corpus([113, 31, 59])
