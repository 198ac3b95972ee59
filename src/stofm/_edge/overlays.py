"""Slices that lie on each other in x and y: told by the places of their cells, or by planes of z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import cKDTree

from stofm._edge.coordinates import axis_of
from stofm._edge.tables import value_codes

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Slices

#: Cells that are looked at, and their neighbours; the farther half says who lives around.
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
#: Lattices of equal pitch: spread of the distances within groups, the nearest distance between them
#: in units of the pitch, and neighbours within a group (on a line there are two).
_LATTICE_SPREAD: Final = 1.3
_LATTICE_SHIFT: Final = 0.8
_LATTICE_NEIGHBORS: Final = 3.0
#: Share of cells with a neighbour of another group, where groups are random parts of a tissue.
_RANDOM: Final = 0.9
#: What groups that each fill the same area have; cells of one type have more.
_MAX_CLUSTERING: Final = 1.15
_MAX_PLANES: Final = 1000
#: Cells of a plane, on average.
_MIN_CELLS: Final = 5


@dataclass(frozen=True, eq=False)
class Nearest:
    """Nearest neighbours of cells of one plane, a sample where there are many.

    `rows` are those of the cells and of their neighbours, ascending, with their `places`. `cells`
    (m,) and `neighbors` (m, k), nearest first, are positions in `rows`; `distances` (m, k) are
    infinite where there is no further neighbour.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.float64]
    cells: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    distances: NDArray[np.float64]

    @classmethod
    def find(
        cls, coordinates: NDArray[np.float64], slices: NDArray[np.integer] | None = None
    ) -> Nearest:
        """Find the neighbours of cells, (n, 2), of the same of several slices if these are given."""
        n = len(coordinates)
        # Of a small slice, what is around a cell is not the whole.
        k = min(_NEIGHBORS, max(8, n // 8), n - 1)
        places, limit = coordinates, np.inf
        if slices is not None:
            limit = 2.0 * float(np.ptp(coordinates, axis=0).max()) + 1.0
            places = np.column_stack([coordinates, slices * limit])
        chosen = np.arange(n)
        if n > _CELLS:
            chosen = np.sort(np.random.default_rng(0).choice(n, _CELLS, replace=False))
        tree = cKDTree(places, balanced_tree=False, compact_nodes=False)
        distances, neighbors = tree.query(places[chosen], k=np.arange(1, k + 2))
        # Among many cells at one place, the cell itself may be missing.
        is_self = neighbors == chosen[:, None]
        is_self[~is_self.any(axis=1), -1] = True
        shape = (len(chosen), -1)
        distances, neighbors = (found[~is_self].reshape(shape) for found in (distances, neighbors))
        distances[distances >= limit] = np.inf
        rows = np.unique(np.concatenate([chosen, neighbors.ravel()]))
        return cls(
            rows,
            coordinates[rows],
            np.searchsorted(rows, chosen),
            np.searchsorted(rows, neighbors),
            distances,
        )

    def mixing(self, codes: NDArray[np.integer]) -> float:
        """Share of the cells that have one of another group among their neighbours."""
        other = (codes[self.neighbors] != codes[self.cells][:, None]) & np.isfinite(self.distances)
        return float(other.any(axis=1).mean())

    def same_share(self, codes: NDArray[np.integer]) -> float:
        """How often close cells are of one group, as a share of what would be expected.

        1 or more for groups of cells of one slice, near 0 for slices laid on each other: cells of
        one slice keep a distance, and places of other slices are independent of them. Without
        significant evidence of slices on each other it is 1. `codes` number the groups of `rows`.
        """
        pairs = _Pairs.among(self, codes)
        if pairs is None or not (pairs.are_strewn() or pairs.are_lattices()):
            return 1.0
        close = pairs.nearest <= np.quantile(pairs.nearest, _CLOSE)
        expected, found = pairs.around[close].sum(), int(pairs.same[close, 0].sum())
        is_significant = expected - found >= _SIGNIFICANT * np.sqrt(expected)
        share = found / max(expected, 1.0)
        return float(share) if is_significant and share <= _MAX_SHARE else 1.0

    def are_joined(self, codes: NDArray[np.integer], *, is_named: bool) -> bool:
        """Whether groups fill the same area evenly, and follow each other in the file or are named so.

        It counts where cells keep no distance, so that their places tell nothing: in a sparse sample.
        """
        own = codes[self.cells]
        if not is_named and np.count_nonzero(np.diff(own)) != len(np.unique(own)) - 1:
            return False
        pairs = _Pairs.among(self, codes)
        if pairs is None or not pairs.nearest.any():
            return False
        return pairs.clustering <= _MAX_CLUSTERING and pairs.are_strewn()

    def are_in_one_box(self, codes: NDArray[np.integer]) -> bool:
        """Whether groups lie in the same area, and not as random parts of one tissue would.

        It counts for groups that are named as slices: those of another unit are never close.
        """
        xy, own = self.places[self.cells], codes[self.cells]
        _, own = np.unique(own, return_inverse=True)
        if not boxes_overlap(xy, own, int(own.max()) + 1):
            return False
        tenth, median = np.quantile(self.distances[:, 0], [0.1, 0.5])
        return bool(0 < tenth <= _STREWN * median or self.mixing(codes) < _RANDOM)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Cells that live among other groups: distances, who is of the same group, its share around.

    `clustering` is how often a cell's group is around it, in units of its share of all cells.
    """

    distances: NDArray[np.float64]
    same: NDArray[np.bool_]
    around: NDArray[np.float64]
    clustering: float

    @classmethod
    def among(cls, nearest: Nearest, codes: NDArray[np.integer]) -> _Pairs | None:
        own, distances = codes[nearest.cells], nearest.distances
        same = codes[nearest.neighbors] == own[:, None]
        # Cells at the very place say nothing about who lives around.
        far = (distances > 0) & np.isfinite(distances)
        far[:, : max(2, far.shape[1] // 2)] = False
        n_far = far.sum(axis=1)
        overall = np.bincount(own, minlength=int(codes.max()) + 1) / len(own)
        around = np.where(n_far >= 4, (same & far).sum(axis=1) / np.maximum(n_far, 1), overall[own])
        mixed = (around < 0.9) & np.isfinite(distances[:, 0])
        if mixed.sum() < 20:
            return None
        clustering = float(around.mean() / (overall**2).sum())
        return cls(distances[mixed], same[mixed], around[mixed], clustering)

    @property
    def nearest(self) -> NDArray[np.float64]:
        return self.distances[:, 0]

    def are_strewn(self) -> bool:
        tenth, median = np.quantile(self.nearest, [0.1, 0.5])
        return bool(tenth <= _STREWN * median)

    def are_lattices(self) -> bool:
        """Whether each group is a lattice of one pitch, whose gaps the other groups fill."""
        has = self.same.any(axis=1)
        first = self.same.argmax(axis=1)
        pitch = np.take_along_axis(self.distances, first[:, None], axis=1)[has]
        if not len(pitch):
            return False
        low, median, high = np.quantile(pitch, [0.1, 0.5, 0.9])
        n_around = (self.same[has] & (self.distances[has] <= 1.5 * pitch)).sum(axis=1)
        return bool(
            high <= _LATTICE_SPREAD * low
            and np.median(self.nearest) <= _LATTICE_SHIFT * median
            and n_around.mean() >= _LATTICE_NEIGHBORS
        )


def boxes_overlap(
    coordinates: NDArray[np.float64], codes: NDArray[np.int64], n_groups: int
) -> bool:
    """Whether two groups' bounding boxes share a quarter of the smaller one."""
    low = np.full((n_groups, 2), np.inf)
    high = np.full((n_groups, 2), -np.inf)
    np.minimum.at(low, codes, coordinates)
    np.maximum.at(high, codes, coordinates)
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.maximum(sides, 0.0).prod(axis=-1)
    area = (high - low).prod(axis=1)
    smaller = np.minimum(area[:, None], area[None])
    np.fill_diagonal(shared, 0.0)
    return bool((shared > 0.25 * smaller).any())


# Planes of z


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

    `source` is where z stands: an entry of ``obsm`` whose third column it is, or a column of ``obs``;
    `is_read` whether that is the entry that x and y are read from.
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
