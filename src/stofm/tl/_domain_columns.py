"""Columns and colours of domains, level by level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._edge.records import read_record
from stofm._keys import Suffix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray


def write_levels(
    adata: AnnData, key: str, found: Mapping[str, tuple[Any, list[NDArray[np.int64]]]]
) -> list[list[str]]:
    """Write each level's column and colours, and drop those of an earlier run.

    `found` are rows and their labels at each level, the finest first, by what the names of their
    domains begin with. Returns the names of each level's domains.
    """
    import pandas as pd

    n_before = len((read_record(adata, key) or {}).get("params", {}).get("coarser", ()))
    n_levels = len(next(iter(found.values()))[1])
    names: list[list[str]] = []
    codes = np.empty((n_levels, adata.n_obs), dtype=np.int64)
    for level, column in enumerate(level_columns(key, n_levels)):
        names.append([])
        for prefix, (rows, labels) in found.items():
            codes[level, rows] = labels[level] + len(names[level])
            names[level] += [f"{prefix}{k}" for k in range(int(labels[level].max()) + 1)]
        adata.obs[column] = pd.Categorical.from_codes(codes[level], categories=names[level])
        _write_colors(adata, column, codes[0], codes[level])
    for column in level_columns(key, n_before + 1)[n_levels:]:
        if column in adata.obs:
            del adata.obs[column]
        adata.uns.pop(column + Suffix.COLORS, None)
    return names


def level_columns(key: str, n_levels: int) -> list[str]:
    """Columns of ``obs`` that levels are written to, the finest first."""
    return [key, *(key + Suffix.LEVEL.format(level) for level in range(1, n_levels))]


def _write_colors(
    adata: AnnData, column: str, finest: NDArray[np.int64], codes: NDArray[np.int64]
) -> None:
    """Scanpy's colours: of each domain that of its largest part at the finest level."""
    from scanpy.plotting.palettes import default_20, default_28, default_102

    cells = np.zeros((int(codes.max()) + 1, int(finest.max()) + 1), dtype=np.int64)
    np.add.at(cells, (codes, finest), 1)
    palettes = (one for one in (default_20, default_28, default_102) if cells.shape[1] <= len(one))
    palette = next(palettes, None)
    if palette is None:
        # Those of an earlier run would be taken for these domains'.
        adata.uns.pop(column + Suffix.COLORS, None)
    else:
        adata.uns[column + Suffix.COLORS] = [str(palette[k]) for k in cells.argmax(axis=1)]
