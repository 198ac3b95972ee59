"""Files of a few slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData


@pytest.fixture
def files(tmp_path: Path, adata: AnnData) -> Path:
    """A folder of five files with 41, 37, 31, 43 and 32 cells that share none."""
    folder = tmp_path / "files"
    folder.mkdir()
    ends = np.cumsum([0, 41, 37, 31, 43, 32])
    for k in range(5):
        part = adata[ends[k] : ends[k + 1]].copy()
        part.obs["library"] = "one"
        part.write_h5ad(folder / f"{'abcde'[k]}.h5ad")
    return folder


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """Read the files of a folder, without locks."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    return read
