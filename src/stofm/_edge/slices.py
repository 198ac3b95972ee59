"""Which cells belong to which slice: by a column or by metadata, or an error."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.spatial import cKDTree

from stofm._edge.places import (
    listed,
    read_axes,
    read_coordinates,
    warn_of_depth,
    warn_of_places,
    warn_of_spots_off_tissue,
)
from stofm._edge.tables import read_record
from stofm._keys import Obsm, Uns
from stofm._logging import logger
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_MAX_SLICES: Final = 1000
#: Smallest mean number of cells per slice for a column to name slices.
_MIN_CELLS: Final = 5
#: With more heights than this, z is that of a volume.
_MAX_PLANES: Final = 100
#: Words in the names of columns that name slices.
_SLICE_WORDS: Final = re.compile(
    r"(?<![a-z])(animal|batch|donor|embryo|fov|library|mouse|orig|patient|puck|replicate|sample"
    r"|section|slice|slide|specimen|subject)",
    re.IGNORECASE,
)
#: Share of cells with repeated names from which on slices must have been joined.
_REPEATED: Final = 0.05
#: Share of cells with a neighbour in another region from which on regions adjoin.
_ADJOINING: Final = 0.002
#: Number of cells examined, and of their neighbours, whose farther half is the surroundings.
_CELLS: Final = 10_000
_NEIGHBORS: Final = 40
#: Share of the cells, those with the nearest neighbours, that count as close.
_CLOSE: Final = 1 / 3
#: Nearest distances: the tenth part and the median of them stand as 0.39 to 1 where cells are strewn
#: independently of each other. Cells of one tissue need room: 0.57 and more, with few exceptions.
_STREWN: Final = 0.56
#: Close pairs within a group, as a share of what its frequency around lets expect. Of 900 groupings
#: of single slices (types, clusters, tiles, counts, at random) none has less with significance.
_MAX_SHARE: Final = 0.7
_SIGNIFICANT: Final = 4.0


@dataclass(frozen=True)
class Slices:
    """Names of slices in alphabetical order, and rows of their cells, ascending.

    `column` of ``obs`` separates them, by request or by the metadata. It is None for an
    AnnData of one slice, whose name is the empty string.
    """

    names: list[str]
    rows: list[NDArray[np.int64]]
    column: str | None = None


@dataclass(frozen=True)
class Places:
    """Coordinates and slices of an AnnData, and the key that they were read from."""

    coordinates: NDArray[np.float64]
    slices: Slices
    spatial_key: str


def read_places(adata: AnnData, *, spatial_key: str, library_key: str | None) -> Places:
    """Read coordinates and slices, and warn of positions that mislead or say little."""
    xy, z = read_axes(adata, spatial_key)
    slices = read_slices(adata, library_key, spatial_key)
    warn_of_spots_off_tissue(adata)
    for name, rows in zip(slices.names, slices.rows, strict=True):
        warn_of_places(adata, name, rows, xy[rows])
    if z is not None:
        _refuse_planes(xy, z, slices, spatial_key)
        rows = max(slices.rows, key=lambda rows: np.ptp(z[rows]))
        warn_of_depth(xy[rows], z[rows], Nearest.find(xy[rows]).spacing, spatial_key)
    return Places(xy, slices, spatial_key)


def _refuse_planes(
    xy: NDArray[np.float64], z: NDArray[np.float64], slices: Slices, spatial_key: str
) -> None:
    """Raise an error if a slice consists of overlapping sections at a few heights z."""
    for name, rows in zip(slices.names, slices.rows, strict=True):
        heights = np.unique(z[rows])
        steps = np.diff(heights)
        borders = np.flatnonzero(steps > 0.5 * steps.max(initial=0))
        n = len(borders) + 1
        planes = np.searchsorted(heights[borders], z[rows], side="left")
        most = min(_MAX_PLANES, len(rows) // _MIN_CELLS)
        if not 2 <= n <= most or not _boxes_overlap(xy[rows], planes):
            continue
        parts = [z[rows][planes == k] for k in range(n)]
        is_thin = max(np.ptp(part) for part in parts) <= 0.25 * steps.max()
        largest = xy[rows][planes == np.bincount(planes).argmax()]
        # The steps of a volume may be smaller than cells.
        if not is_thin or np.ptp(z[rows]) / (n - 1) < 0.5 * Nearest.find(largest).spacing:
            continue
        middles = ", ".join(f"{heights[b] + steps[b] / 2:.6g}" for b in borders)
        joined = f"adata.obs[{slices.column!r}].astype(str) + ':' + " if slices.column else ""
        raise ValueError(
            f"{f'Slice {name!r}: ' if name else ''}z in obsm[{spatial_key!r}] takes {n} values, and "
            "these planes overlap in x and y: cells of different planes would be taken as "
            f"neighbours. Make a column of z and pass it: adata.obs['plane'] = {joined}np.digitize("
            f"adata.obsm[{spatial_key!r}][:, 2], [{middles}]).astype(str), library_key='plane'. If "
            "they are one slice, leave z out of the coordinates."
        )


def read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    """Separate the slices of an AnnData by a column, or by the one that the metadata names.

    Without such a column all cells are one slice, unless positions in ``obsm[spatial_key]``, if
    present, show that they are not: then ValueError says which column may name them.
    """
    column = library_key or described_column(adata)
    if library_key is not None or spatial_key not in adata.obsm:
        return _separate(adata, column)
    xy = read_coordinates(adata, spatial_key)
    if column is not None and _are_slices(adata, column, xy, spatial_key):
        slices = _separate(adata, column)
        logger.info(
            "The metadata names %d slices in obs[%r]: they are separated, as with library_key=%r.",
            *(len(slices.rows), column, column),
        )
        return slices
    _refuse_overlays(adata, xy)
    return _separate(adata, None)


def _separate(adata: AnnData, column: str | None) -> Slices:
    """Slices by a column; all cells are one slice if it is None."""
    if column is None:
        return Slices(names=[""], rows=[np.arange(adata.n_obs)])
    if column not in adata.obs:
        there = [str(name) for name in adata.obs.columns]
        likely = [name for name in there if _SLICE_WORDS.search(name)]
        likely += difflib.get_close_matches(column, there)
        raise KeyError(
            f"There is no obs[{column!r}] to separate slices by; "
            f"candidates: {list(dict.fromkeys(likely)) or 'none'}. If all cells are one "
            f"slice, add it: adata.obs[{column!r}] = 'one'."
        )
    values = adata.obs[column]
    if n_missing := int(values.isna().sum()):
        raise ValueError(
            f"{n_missing} cells have no value in obs[{column!r}]; every cell must belong to "
            "a slice. Fill the column or drop the cells."
        )
    names, codes = np.unique(values.astype(str).to_numpy().astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return Slices(names=names.tolist(), rows=rows, column=column)


def region_column(adata: AnnData) -> str | None:
    """Column of ``obs`` with the regions that a SpatialData's table annotates, if several."""
    attrs = adata.uns.get("spatialdata_attrs", {})
    key = attrs.get("region_key") if hasattr(attrs, "get") else None
    return str(key) if key in adata.obs and adata.obs[key].nunique() > 1 else None


def described_column(adata: AnnData) -> str | None:
    """Column of ``obs`` that separates slices according to the metadata; None if there is none.

    It is the region column of a SpatialData's table, or the one whose values name the images that
    squidpy and scanpy store in ``uns["spatial"]``.
    """
    if (region := region_column(adata)) is not None:
        return region
    images = adata.uns.get("spatial")
    names = set(map(str, images)) if isinstance(images, dict) else set()
    for column in adata.obs.columns if len(names) > 1 else ():
        values = adata.obs[column]
        if 1 < values.nunique() <= len(names) and set(values.dropna().astype(str)) <= names:
            return str(column)
    return None


def _are_slices(adata: AnnData, column: str, xy: NDArray[np.float64], spatial_key: str) -> bool:
    """Whether the metadata names slices, and not parts of one slide.

    They are slices if they overlap or have coordinate systems of their own. Images that lie apart
    are too; regions in the same system are not.
    """
    codes, names = _numbered(adata.obs[column])
    record = (read_record(adata, Obsm.SPATIAL) if spatial_key == Obsm.SPATIAL else None) or {}
    if len(set(record.get("params", {}).values())) > 1 or _boxes_overlap(xy, codes):
        return True
    if Nearest.find(xy).mixing(codes) < _ADJOINING:
        return column != region_column(adata)
    logger.info(
        "The %d regions in obs[%r] adjoin, as fields of one slide do: they are taken as one slice. "
        "Pass library_key=%r to separate them.",
        *(len(names), column, column),
    )
    return False


# Slices that overlap


def _refuse_overlays(adata: AnnData, xy: NDArray[np.float64]) -> None:
    """Raise an error for overlapping slices; warn of a column that names separate parts."""
    nearest = Nearest.find(xy)
    # If the column's name suggests slices, overlapping boxes are enough.
    found = [
        (name, values)
        for name, codes, values in _groupings(adata.obs)
        if (_SLICE_WORDS.search(name) and _boxes_overlap(xy, codes)) or nearest.are_overlaid(codes)
    ]
    if found:
        column, values = found[0]
        ways = " or ".join(f"library_key={name!r}" for name, _ in found)
        raise ValueError(
            f"obs[{column!r}] names {len(values)} samples ({listed(values)}) whose coordinates "
            f"overlap: cells of different slices would be taken as neighbours. Pass {ways}. If they "
            "are one slice, pass a column that is the same for all cells."
        )
    _refuse_joined_names(adata, xy)
    for name, codes, values in _groupings(adata.obs):
        # Fields of view and regions of one slide adjoin; other samples that do were put side by side.
        are_parts = name == region_column(adata) or "fov" in name.lower()
        if not (are_parts or _SLICE_WORDS.search(name)):
            continue
        is_apart = nearest.mixing(codes) == 0.0
        if is_apart or not are_parts:
            warn(
                f"The {len(values)} values of obs[{name!r}] ({listed(values)}) lie "
                f"{'apart from' if is_apart else 'beside'} each other and are taken as parts of one "
                "slice, which is scaled to one size as a whole. If they are slices, pass "
                f"library_key={name!r}."
            )
            return


def _groupings(obs: pd.DataFrame) -> Iterator[tuple[str, NDArray[np.int64], list[str]]]:
    """Columns that group cells, with numbered values."""
    for name in obs.columns:
        most = min(_MAX_SLICES, len(obs) // _MIN_CELLS)
        if not str(name).startswith(Uns.STOFM) and 1 < obs[name].nunique(dropna=False) <= most:
            yield str(name), *_numbered(obs[name])


def _numbered(column: pd.Series) -> tuple[NDArray[np.int64], list[str]]:
    """Number the values of a column, missing ones as one more."""
    import pandas as pd

    codes, values = pd.factorize(column, use_na_sentinel=False)
    return codes.astype(np.int64), ["(none)" if pd.isna(one) else str(one) for one in values]


def _refuse_joined_names(adata: AnnData, xy: NDArray[np.float64]) -> None:
    """Raise an error for overlapping slices joined without a column: names of cells repeat."""
    times = adata.obs.groupby(level=0, sort=False).cumcount().to_numpy()
    share = float(adata.obs_names.duplicated(keep=False).mean())
    if share >= _REPEATED and _boxes_overlap(xy, times):
        raise ValueError(
            f"{share:.0%} of the obs_names occur several times (up to {times.max() + 1}), and "
            "their cells lie on each other: slices that were joined without a column that names "
            "them? Make one and pass it: adata.obs['sample'] = adata.obs.groupby(level=0).cumcount()"
            ".astype(str).to_numpy(), library_key='sample'. If they are one slice, pass a column "
            "that is the same for all cells."
        )


def _boxes_overlap(xy: NDArray[np.float64], codes: NDArray[np.integer]) -> bool:
    """Whether two groups' bounding boxes share a quarter of the smaller one."""
    n = int(codes.max()) + 1
    low, high = np.full((n, 2), np.inf), np.full((n, 2), -np.inf)
    np.minimum.at(low, codes, xy)
    np.maximum.at(high, codes, xy)
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.maximum(sides, 0.0).prod(axis=-1)
    area = (high - low).prod(axis=1)
    np.fill_diagonal(shared, 0.0)
    return bool((shared > 0.25 * np.minimum(area[:, None], area[None])).any())


@dataclass(frozen=True, eq=False)
class Nearest:
    """Nearest neighbours in the plane of `cells` (m,), a sample if there are many.

    `neighbors` (m, k) are rows, the nearest first; `distances` (m, k) are their distances.
    """

    cells: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    distances: NDArray[np.float64]

    @classmethod
    def find(cls, xy: NDArray[np.float64]) -> Nearest:
        """Find the neighbours of cells at `xy` (n, 2)."""
        n = len(xy)
        # In a small slice, the surroundings of a cell must not be the whole slice.
        k = min(_NEIGHBORS, max(8, n // 8), n - 1)
        chosen = np.arange(n)
        if n > _CELLS:
            chosen = np.sort(np.random.default_rng(0).choice(n, _CELLS, replace=False))
        tree = cKDTree(xy, balanced_tree=False, compact_nodes=False)
        distances, neighbors = tree.query(xy[chosen], k=np.arange(1, k + 2))
        # Among many cells at one position, the cell itself may be missing.
        is_self = neighbors == chosen[:, None]
        is_self[~is_self.any(axis=1), -1] = True
        shape = (len(chosen), -1)
        return cls(chosen, neighbors[~is_self].reshape(shape), distances[~is_self].reshape(shape))

    @property
    def spacing(self) -> float:
        """Median distance to the nearest neighbour; 0 for a single cell."""
        return float(np.median(self.distances[:, 0])) if self.distances.size else 0.0

    def mixing(self, codes: NDArray[np.integer]) -> float:
        """Share of the cells that have a cell of another group among their neighbours."""
        other = codes[self.neighbors] != codes[self.cells][:, None]
        return float(other.any(axis=1).mean())

    def are_overlaid(self, codes: NDArray[np.integer]) -> bool:
        """Whether close cells share a group far less often than their surroundings suggest.

        Cells of one slice keep a distance, and positions in other slices are independent of them.
        """
        own, distances = codes[self.cells], self.distances
        same: NDArray[Any] = codes[self.neighbors] == own[:, None]
        # Cells at the same position say nothing about the surroundings.
        far = distances > 0
        far[:, : max(2, far.shape[1] // 2)] = False
        n_far = far.sum(axis=1)
        overall = np.bincount(own) / len(own)
        around = np.where(n_far >= 4, (same & far).sum(axis=1) / np.maximum(n_far, 1), overall[own])
        is_mixed = around < 0.9
        if is_mixed.sum() < 20:
            return False
        nearest, same_first, around = distances[is_mixed, 0], same[is_mixed, 0], around[is_mixed]
        tenth, close, median = np.quantile(nearest, [0.1, _CLOSE, 0.5])
        if tenth > _STREWN * median:
            return False
        expected = around[nearest <= close].sum()
        found = int(same_first[nearest <= close].sum())
        is_significant = expected - found >= _SIGNIFICANT * np.sqrt(expected)
        return bool(is_significant and found <= _MAX_SHARE * expected)
