"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real slices, vocabulary tables and golden numbers; skips where it is not there."""
    folder = Path(os.environ.get("STOFM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"needs the development data ({folder} is not there; set STOFM_SHARED)")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20260)
