"""The edge to AnnData for the third coordinate: sections that lie on each other in x and y."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.coordinates import axis_of
from stofm._edge.overlays import Nearest, boxes_overlap
from stofm._edge.tables import value_codes

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Slices

_MAX_PLANES: Final = 1000
#: Cells of a plane, on average.
_MIN_CELLS: Final = 5


def other_z(adata: AnnData, xy: NDArray[np.float64]) -> tuple[NDArray[np.float64], str] | None:
    """Heights of the cells, and where they are, beside places that are in the plane only."""
    for name, values in adata.obsm.items():
        if getattr(values, "shape", ())[1:] != (3,):
            continue
        array = np.asarray(values)
        if array.dtype.kind in "iuf" and np.array_equal(array[:, :2], xy):
            return array[:, 2].astype(np.float64), f"obsm[{name!r}]"
    for name in adata.obs.columns:
        if axis_of(name) == "z" and adata.obs[name].dtype.kind in "iuf":
            return adata.obs[name].to_numpy(dtype=np.float64), f"obs[{name!r}]"
    return None


def refuse_planes(
    adata: AnnData,
    slices: Slices,
    xy: NDArray[np.float64],
    z: NDArray[np.float64],
    source: str,
    *,
    is_read: bool = True,
) -> None:
    """Refuse sections that lie on each other in x and y, at a few heights z, within a slice.

    Parameters
    ----------
    source
        Where z is: an entry of ``obsm`` whose third column it is, or a column of ``obs``.
    is_read
        Whether it stands beside the places that are read.
    """
    values = f"np.asarray(adata.{source})[:, 2]" if source.startswith("obsm") else f"adata.{source}"
    one_slice = (
        f"leave z out: adata.{source} = np.asarray(adata.{source})[:, :2]"
        if is_read
        else "pass a column that is the same for all cells as library_key"
    )
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
            else f"Make a column of z and pass it: adata.obs['plane'] = {joined}{values}"
            f".astype(float).round({digits}).astype(str), library_key='plane'"
        )
        msg = (
            f"{where}z in {source} takes {n} values, {apart} apart, and these planes "
            "overlap in x and y: cells of different planes would be taken as neighbours. "
            f"{todo}. If they are one slice, {one_slice}."
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
    """Whether planes are sections, and not the steps of a volume that are finer than cells.

    Steps may be numbers of planes: a few whose cells lie on each other are sections all the same.
    """
    own = xy[codes == np.bincount(codes).argmax()]
    spacing = np.median(Nearest.find(own).distances[:, 0])
    if np.ptp(z) / (n - 1) >= 0.5 * spacing:
        return True
    nearest = Nearest.find(xy)
    found = codes[nearest.rows]
    return n <= 10 and (nearest.same_share(found) < 1 or nearest.are_joined(found, is_named=True))


def _matching_column(columns: pd.DataFrame, planes: NDArray[np.int64]) -> str:
    """Name of the column that has one value for each plane; empty if none has."""
    n = int(planes.max()) + 1
    for name in columns.columns:
        codes, names = value_codes(columns[name])
        if len(names) == n and len(np.unique(codes * n + planes)) == n:
            return str(name)
    return ""
