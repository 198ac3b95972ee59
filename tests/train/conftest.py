"""A tiny corpus on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stofm.genes import RankedTokens
from stofm.spatial import normalize_coordinates
from stofm.train.corpus import Corpus, write_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def ranked_tokens(
    rng: np.random.Generator, n_cells: int, *, values: bool = False, n_genes: int = 67
) -> RankedTokens:
    """Random lists of 0 to 44 genes, of which the third cell has none."""
    lengths = rng.integers(1, 45, n_cells)
    lengths[2:3] = 0
    lists = [2 + rng.permutation(n_genes)[:n] for n in lengths]
    tokens = np.concatenate([np.empty(0, np.int32), *lists]).astype(np.int32)
    return RankedTokens(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        values=rng.uniform(0.5, 9.0, len(tokens)).astype(np.float32) if values else None,
    )


@pytest.fixture
def write_corpus(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Corpus]:
    """Write a corpus of slices with so many cells each."""

    def write(sizes: Sequence[int], *, values: bool = False, names: str = "slice") -> Corpus:
        return Corpus(
            tuple(
                write_slice(
                    tmp_path / "slices",
                    f"{names}{k}",
                    name=f"{names}-{k}",
                    blocks=[ranked_tokens(rng, n, values=values)],
                    coordinates=normalize_coordinates(rng.random((n, 2)) * [7.0, 5.0]),
                )
                for k, n in enumerate(sizes)
            )
        )

    return write


@pytest.fixture
def corpus(write_corpus: Callable[..., Corpus]) -> Corpus:
    """Three slices of 113, 31 and 59 cells."""
    return write_corpus([113, 31, 59])
