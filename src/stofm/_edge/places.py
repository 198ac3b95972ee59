"""Coordinates and slices of what is embedded, and warnings of those that mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.coordinates import read_axes
from stofm._edge.overlays import Nearest, refuse_planes
from stofm._edge.slices import Slices, listed, overlaid_within, separate, tell_slices
from stofm._logging import logger
from stofm._messages import warn

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_ON: Final = {"1", "1.0", "true", "yes", "on", "in", "tissue"}
_OFF: Final = {"0", "0.0", "false", "no", "off", "out", "background"}
#: From which share of different places on, those that are shared are worth a line only.
_FEW_PLACES: Final = 0.99
#: Cells at one end of a slice that may lie astray, at most, and as a share of the slice.
_MAX_STRAY: Final = 10
_STRAY_SHARE: Final = 0.02
#: Of larger slices this share of the cells at one end may, beyond as much of the others' extent.
_SCATTERED_SHARE: Final = 0.03
_SCATTERED_BEYOND: Final = 0.35
#: How far they lie off, in units of the others' extent, and how much the whole grows by them.
_STRAY_GAP: Final = 0.1
_STRAY_GROWTH: Final = 1.2


@dataclass(frozen=True)
class Places:
    """Coordinates and slices of an AnnData, and where they were read."""

    coordinates: NDArray[np.float64]
    slices: Slices
    spatial_key: str
    library_key: str | None


def read_places(adata: AnnData, *, spatial_key: str, library_key: str | None) -> Places:
    """Read coordinates and slices, and warn of places that carry little or mislead."""
    xy, z = read_axes(adata, spatial_key)
    if library_key is None:
        slices = tell_slices(adata, xy, z, spatial_key=spatial_key)
    else:
        slices = separate(adata, library_key, spatial_key)
    if z is not None:
        if slices.column is not None:
            refuse_planes(adata, slices, xy, z, f"obsm[{spatial_key!r}]")
        _remark_on_depth(slices, xy, z, spatial_key)
    if slices.column is not None:
        _warn_of_overlays(adata, slices, xy)
    _warn_of_spots_off_tissue(adata)
    _warn_of_stray_cells(adata, slices, xy)
    remark_on_places(xy, slices)
    return Places(xy, slices, spatial_key, slices.column)


def _remark_on_depth(
    slices: Slices, xy: NDArray[np.float64], z: NDArray[np.float64], key: str
) -> None:
    rows = max(slices.rows, key=lambda rows: np.ptp(np.nan_to_num(z[rows])))
    depth = float(np.ptp(np.nan_to_num(z[rows])))
    xy = xy[rows]
    width, height = np.ptp(xy, axis=0)
    used = f"obsm[{key!r}] has three coordinates: the first two are used"
    spacing = float(np.median(Nearest.find(xy).distances[:, 0])) if len(xy) > 1 else 0.0
    if depth <= spacing:
        logger.info("%s; z differs by no more than the distance between cells.", used)
        return
    warn(
        f"{used}. z extends over {depth:.3g}, x over {width:.3g} and y over {height:.3g}, so that "
        "cells above each other are taken as neighbours. If z is of several sections, pass "
        "`library_key`; in a thick volume, embed slabs of it one by one."
    )


def _warn_of_overlays(adata: AnnData, slices: Slices, xy: NDArray[np.float64]) -> None:
    found = overlaid_within(adata, slices, xy)
    if found:
        column, values = found[0]
        both = f"adata.obs[{slices.column!r}].astype(str) + ':' + adata.obs[{column!r}].astype(str)"
        warn(
            f"Within the slices of obs[{slices.column!r}], coordinates of the {len(values)} values "
            f"of obs[{column!r}] ({listed(values)}) overlap as those of different "
            f"slices do. If they are slices, pass library_key={column!r}, or a column of both: "
            f"adata.obs['slice'] = {both}."
        )


def _warn_of_spots_off_tissue(adata: AnnData) -> None:
    """Warn of spots that the metadata says are not on tissue."""
    for name in adata.obs.columns:
        if "tissue" not in str(name).lower():
            continue
        values = {str(value).lower(): value for value in adata.obs[name].dropna().unique()}
        off = sorted(set(values) & _OFF)
        if len(off) != 1 or not set(values) <= _ON | _OFF:
            continue
        n = int((adata.obs[name] == values[off[0]]).sum())
        without = (
            f"adata = adata[adata.obs[{name!r}] != {np.asarray(values[off[0]]).item()!r}].copy()"
        )
        todo = f"Drop them: {without}" if n < adata.n_obs else "Is that column right?"
        warn(
            f"{n} of {adata.n_obs} spots are not on tissue by obs[{name!r}]; they are taken like "
            f"the others, and change what is found for their neighbours. {todo}"
        )


def _warn_of_stray_cells(adata: AnnData, slices: Slices, xy: NDArray[np.float64]) -> None:
    """Warn of a few cells far off the others, which make the whole slice small in the model's frame."""
    for name, rows in zip(slices.names, slices.rows, strict=True):
        is_stray = stray_cells(xy[rows])
        if not is_stray.any():
            continue
        own = xy[rows]
        growth = np.hypot(*np.ptp(own, axis=0)) / np.hypot(*np.ptp(own[~is_stray], axis=0))
        if growth < _STRAY_GROWTH:
            continue
        stray = rows[is_stray]
        names, n = adata.obs_names[stray].tolist(), len(stray)
        kept = f"~adata.obs_names.isin({names})"
        if not adata.obs_names.is_unique or n > _MAX_STRAY:
            kept = f"np.setdiff1d(np.arange(adata.n_obs), {stray.tolist()})"
        warn(
            f"{f'Slice {name!r}' if name else 'The slice'}: {n} of {len(rows)} cells "
            f"({listed(names)}) lie far off the others. With them "
            f"the slice is {growth:.3g} times as large, and as its size is set to a fixed one, all "
            "its cells are as much nearer to each other, which changes all embeddings. If they are "
            f"debris or misplaced, drop them: adata = adata[{kept}].copy()"
        )


def stray_cells(xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each cell is one of a handful that lie far off the others, (n,)."""
    is_stray = np.zeros(len(xy), dtype=bool)
    most = min(_MAX_STRAY, max(1, int(_STRAY_SHARE * len(xy))))
    if len(xy) < 10:
        return is_stray
    for values in (*xy.T, *(-xy.T)):
        outer = np.argpartition(values, len(values) - most - 1)[-most - 1 :]
        outer = outer[np.argsort(values[outer])]
        others = values[outer[:-1]] - values.min()
        gaps = np.flatnonzero(np.diff(values[outer]) > _STRAY_GAP * others)
        if len(gaps):
            is_stray[outer[gaps[0] + 1 :]] = True
    low, high = np.quantile(xy, [_SCATTERED_SHARE, 1 - _SCATTERED_SHARE], axis=0)
    beyond = _SCATTERED_BEYOND * (high - low)
    is_stray |= ((xy < low - beyond) | (xy > high + beyond)).any(axis=1)
    return is_stray


def remark_on_places(coordinates: NDArray[np.float64], slices: Slices) -> None:
    """Warn of slices whose coordinates carry little: one place, a line, many duplicates."""
    import pandas as pd

    for name, rows in zip(slices.names, slices.rows, strict=True):
        xy = coordinates[rows]
        called = f"Slice {name!r}" if name else "The slice"
        extent = np.ptp(xy, axis=0)
        if len(xy) > 1 and not extent.any():
            warn(
                f"{called}: all {len(xy)} cells lie at one place ({xy[0, 0]:g}, {xy[0, 1]:g}), so "
                "place says nothing about them. Check the coordinates."
            )
        elif len(xy) > 2 and not extent.all():
            side = "width" if extent[0] == 0 else "height"
            warn(f"{called} has zero {side}: its cells lie on a line. Check the coordinates.")
        n_places = len(xy) - int(pd.DataFrame(xy).duplicated().sum())
        if extent.any() and n_places < len(xy):
            tell = warn if n_places < _FEW_PLACES * len(xy) else logger.info
            tell(
                f"{called}: {len(xy) - n_places} of {len(xy)} cells share their place with another; "
                "they count as neighbours at distance 0. If slices were joined, pass `library_key`; "
                "if cells are there twice, drop them."
            )
