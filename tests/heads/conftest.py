"""Fixtures of the tests of ``stofm.heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from stofm.genes import RankedTokens
from stofm.spatial import normalize_coordinates
from stofm.train.corpus import Corpus, write_slice

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator) -> Corpus:
    """Three slices of 113, 31 and 59 cells, with 0 to 44 genes each, of which a third cell has none."""
    slices = []
    for k, n_cells in enumerate([113, 31, 59]):
        lengths = rng.integers(1, 45, n_cells)
        lengths[2:3] = 0
        lists = [2 + rng.permutation(67)[:n] for n in lengths]
        ranked = RankedTokens(
            tokens=np.concatenate([np.empty(0, np.int32), *lists]).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )
        places = normalize_coordinates(rng.random((n_cells, 2)) * [7.0, 5.0])
        slices.append(
            write_slice(
                tmp_path / "slices",
                f"slice{k}",
                name=f"slice-{k}",
                blocks=[ranked],
                coordinates=places,
            )
        )
    return Corpus(tuple(slices))
