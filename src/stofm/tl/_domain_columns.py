"""Columns and colours of domains, level by level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stofm._edge.records import read_record
from stofm._keys import Suffix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DomainLevels:
    """Rows that were clustered together, and their labels at each level, the finest first."""

    rows: NDArray[np.int64]
    labels: list[NDArray[np.int64]]


def write_levels(adata: AnnData, key: str, found: Mapping[str, DomainLevels]) -> list[list[str]]:
    """Write each level's column and colours, and drop those of an earlier run.

    Parameters
    ----------
    found
        By what the names of the domains begin with.

    Returns
    -------
    For each level, the names of its domains.
    """
    import pandas as pd

    n_before = len((read_record(adata, key) or {}).get("params", {}).get("coarser", ()))
    n_levels = len(next(iter(found.values())).labels)
    names: list[list[str]] = []
    codes = np.empty((n_levels, adata.n_obs), dtype=np.int64)
    for level in range(n_levels):
        names.append([])
        for prefix, part in found.items():
            labels = part.labels[level]
            codes[level, part.rows] = labels + len(names[level])
            names[level] += [f"{prefix}{k}" for k in range(int(labels.max()) + 1)]
        column = _column(key, level)
        adata.obs[column] = pd.Categorical.from_codes(codes[level], categories=names[level])
        _write_colors(adata, column, _colors(codes, level))
    for level in range(n_levels, n_before + 1):
        column = _column(key, level)
        if column in adata.obs:
            del adata.obs[column]
        _write_colors(adata, column, None)
    return names


def level_columns(key: str, n_levels: int) -> list[str]:
    """Columns of ``obs`` that levels are written to, the finest first."""
    return [_column(key, level) for level in range(n_levels)]


def _column(key: str, level: int) -> str:
    return key + Suffix.LEVEL.format(level) if level else key


def _colors(codes: NDArray[np.int64], level: int) -> list[str] | None:
    """A level's colours: of each domain that of its largest part at the finest level."""
    colors = _palette(int(codes[0].max()) + 1)
    if colors is None:
        return None
    return [colors[k] for k in _largest_parts(codes[0], codes[level])]


def _largest_parts(finest: NDArray[np.int64], codes: NDArray[np.int64]) -> list[int]:
    """For each coarse domain its largest fine one."""
    cells = np.zeros((int(codes.max()) + 1, int(finest.max()) + 1), dtype=np.int64)
    np.add.at(cells, (codes, finest), 1)
    return [int(k) for k in cells.argmax(axis=1)]


def _write_colors(adata: AnnData, column: str, colors: list[str] | None) -> None:
    if colors is None:
        # Those of an earlier run would be taken for these domains'.
        adata.uns.pop(column + Suffix.COLORS, None)
    else:
        adata.uns[column + Suffix.COLORS] = colors


def _palette(n_colors: int) -> list[str] | None:
    """Scanpy's colours for so many categories, None if it has none."""
    from scanpy.plotting.palettes import default_20, default_28, default_102

    for palette in (default_20, default_28, default_102):
        if n_colors <= len(palette):
            return [str(color) for color in palette[:n_colors]]
    return None
