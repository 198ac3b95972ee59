"""Slices that were laid on each other: told by the places of their cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


@dataclass(frozen=True, eq=False)
class Nearest:
    """Nearest neighbours of cells of one plane, a sample where there are many.

    Attributes
    ----------
    rows
        Rows of the cells and of their neighbours, ascending.
    places
        (len(rows), 2) their coordinates.
    cells
        (m,) the cells, as positions in `rows`.
    neighbors
        (m, k) their neighbours, nearest first, as positions in `rows`.
    distances
        (m, k) infinite where there is no further neighbour.
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
        distances, neighbors = (
            distances[~is_self].reshape(shape),
            neighbors[~is_self].reshape(shape),
        )
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
        one slice keep a distance, and places of other slices are independent of them.

        Parameters
        ----------
        codes
            Group of each of :attr:`rows`, from 0.

        Returns
        -------
        The share; 1 where there is no significant evidence of slices on each other.
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
