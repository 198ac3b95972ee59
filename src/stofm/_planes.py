"""The edge to AnnData for the third coordinate: sections that lie on each other in x and y."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._categories import value_codes
from stofm.spatial.overlays import Nearest, boxes_overlap

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._slices import Slices

_MAX_PLANES: Final = 1000
#: Cells of a plane, on average.
_MIN_CELLS: Final = 5


def refuse_planes(
    adata: AnnData,
    slices: Slices,
    xy: NDArray[np.float64],
    z: NDArray[np.float64],
    spatial_key: str,
) -> None:
    """Refuse sections that lie on each other in x and y, at a few heights z, within a slice."""
    for name, rows in zip(slices.names, slices.rows, strict=True):
        planes = _plane_codes(xy[rows], z[rows])
        if planes is None or not boxes_overlap(xy[rows], planes, int(planes.max()) + 1):
            continue
        n = int(planes.max()) + 1
        heights = np.array([np.median(z[rows][planes == k]) for k in range(n)])
        steps = np.diff(heights)
        apart = (
            f"{steps[0]:g}"
            if np.allclose(steps, steps[0])
            else f"{steps.min():g} to {steps.max():g}"
        )
        where = f"Slice {name!r}: " if name else ""
        digits = max(0, 1 - int(np.floor(np.log10(steps.min()))))
        column = _matching_column(adata.obs.iloc[rows], planes) if not name else ""
        joined = f"adata.obs[{slices.column!r}].astype(str) + ':' + " if slices.column else ""
        todo = (
            f"Pass library_key={column!r}, which names them"
            if column
            else f"Make a column of z and pass it: adata.obs['plane'] = {joined}np.asarray("
            f"adata.obsm[{spatial_key!r}])[:, 2].astype(float).round({digits}).astype(str), "
            "library_key='plane'"
        )
        msg = (
            f"{where}z in obsm[{spatial_key!r}] takes {n} values, {apart} apart, and these planes "
            "overlap in x and y: cells of different planes would be taken as neighbours. "
            f"{todo}. If they are one slice, leave z out: adata.obsm[{spatial_key!r}] = "
            f"np.asarray(adata.obsm[{spatial_key!r}])[:, :2]."
        )
        raise ValueError(msg)


def _plane_codes(xy: NDArray[np.float64], z: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Number of each cell's plane, from below, where z takes few values up to noise; else None."""
    heights, codes = np.unique(np.nan_to_num(z), return_inverse=True)
    most = min(_MAX_PLANES, len(z) // _MIN_CELLS)
    if len(heights) > most:
        steps = np.diff(heights)
        ends = np.flatnonzero(steps > 0.5 * steps.max())
        numbers = np.zeros(len(heights), dtype=np.int64)
        numbers[1:] = np.isin(np.arange(len(steps)), ends).cumsum()
        low, high = heights[np.r_[0, ends + 1]], heights[np.r_[ends, len(heights) - 1]]
        if len(low) > most or (high - low).max() > 0.25 * steps.max():
            return None
        codes = numbers[codes]
    n = int(codes.max()) + 1
    if n < 2 or np.bincount(codes).min() < 1:
        return None
    return codes if _are_apart(xy, codes, z, n) else None


def _are_apart(
    xy: NDArray[np.float64], codes: NDArray[np.int64], z: NDArray[np.float64], n: int
) -> bool:
    """Whether many planes are sections, and not the steps of a volume that are finer than cells."""
    if n <= 10:
        return True
    own = xy[codes == np.bincount(codes).argmax()]
    nearest = Nearest.find(own).distances[:, 0]
    return bool(np.ptp(z) / (n - 1) >= 0.5 * np.median(nearest))


def _matching_column(columns: pd.DataFrame, planes: NDArray[np.int64]) -> str:
    """Name of the column that has one value for each plane; empty if none has."""
    n = int(planes.max()) + 1
    for name in columns.columns:
        codes, names = value_codes(columns[name])
        if len(names) == n and len(np.unique(codes * n + planes)) == n:
            return str(name)
    return ""
