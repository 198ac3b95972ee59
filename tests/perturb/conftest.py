"""Fixtures of edits: a model that answers to small changes, and a slice as it sees one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.perturb import UneditedSlice

N_CELLS = 131


@pytest.fixture
def model(responsive_model):
    """The tiny model with larger weights."""
    return responsive_model


@pytest.fixture
def ranked(rng):
    """Ranked tokens of 5 to 59 genes a cell."""
    lists = [rng.permutation(np.arange(2, 69))[:n] for n in rng.integers(5, 60, N_CELLS)]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists])])
    values = rng.gamma(1.0, 3.0, offsets[-1]).astype(np.float32)
    return RankedTokens(np.concatenate(lists).astype(np.int32), offsets.astype(np.int64), values)


@pytest.fixture
def coordinates(rng):
    """Positions in micrometres."""
    return rng.random((N_CELLS, 2)) * [700.0, 500.0] + 3000.0


@pytest.fixture
def whole(model, ranked, coordinates):
    """The slice: three sub-slices."""
    return UneditedSlice.of(model, ranked, coordinates, device=torch.device("cpu"))
