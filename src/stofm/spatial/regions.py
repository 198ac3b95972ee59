"""Groups of cells in the plane: contacts, pieces, patterns, expectations by chance, borders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Voronoi, cKDTree

from stofm.spatial.domains import smooth_domains
from stofm.spatial.plane import spacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Cells as near as a cell's sixth nearest touch it; on a lattice several may be equally near.
_N_AROUND: Final = 6
_MOST_TIES: Final = 14
_TIE: Final = 1 + 1e-9
#: Cells farther apart than so many times the slice's typical distance do not touch.
_MOST_SPACINGS: Final = 3.0
#: The pieces counted hold this share of a group's cells.
_COUNTED: Final = 0.9
#: Neighbours whose most frequent region a cell is drawn with: single cells get no line.
_SMOOTHED: Final = 12
#: Cells that are farther apart have a gap between them, in spacings of the cells.
_FAR: Final = 4.0
#: Distance of the points around, in sizes of the tissue.
_AROUND: Final = 10.0
#: At the margin of the tissue, edges reach far out: ends farther than the first number of spacings
#: from the middle between two cells are moved to the second.
_OVER, _MARGIN = 1.2, 0.6


def touching_cells(
    coordinates: NDArray[np.floating], slices: Sequence[NDArray[np.int64]]
) -> sp.csr_array:
    """Which cells touch each other, (n, n) of ones: one is among the six nearest of the other.

    Cells of different slices do not touch, nor do cells farther apart than three times the median
    distance to the sixth nearest. The order of the cells does not matter.
    """
    n_cells = len(coordinates)
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for rows in slices:
        own = np.asarray(coordinates[rows], dtype=np.float64)
        n_asked = min(_MOST_TIES, len(rows))
        if n_asked < 2:
            continue
        distances, nearest = cKDTree(own).query(own, k=n_asked)
        sixth = distances[:, min(_N_AROUND, n_asked - 1)]
        reach = np.minimum(sixth * _TIE, _MOST_SPACINGS * np.median(sixth))
        is_near = (distances <= reach[:, None]) & (nearest != np.arange(len(rows))[:, None])
        first, column = np.nonzero(is_near)
        pairs.append(np.stack([rows[first], rows[nearest[first, column]]]))
    first, second = np.concatenate(pairs, axis=1)
    one_way = sp.csr_array((np.ones(len(first)), (first, second)), shape=(n_cells, n_cells))
    return (one_way + one_way.T).sign().tocsr()


def contacts(
    touching: sp.csr_array,
    codes: NDArray[np.int64],
    slices: Sequence[NDArray[np.int64]],
    n_groups: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often cells of each two groups touch, and how often they would by chance.

    `codes` (n,) are the groups, -1 for none. Returns found and expected, (n_groups, n_groups) each; a
    contact within a group counts twice.
    """
    first, second = touching.nonzero()
    expected = np.zeros((n_groups, n_groups))
    found = np.zeros_like(expected)
    is_known = (codes[first] >= 0) & (codes[second] >= 0)
    np.add.at(found, (codes[first[is_known]], codes[second[is_known]]), 1.0)
    degrees = np.diff(touching.indptr)
    for rows in slices:
        own = codes[rows]
        sizes = np.bincount(own[own >= 0], minlength=n_groups).astype(np.float64)
        if len(rows) > 1:
            pairs = np.outer(sizes, sizes) - np.diag(sizes)
            expected += degrees[rows].sum() * pairs / (len(rows) * (len(rows) - 1.0))
    return found, expected


def clustering(
    touching: sp.csr_array,
    is_member: NDArray[np.bool_],
    slices: Sequence[NDArray[np.int64]],
    *,
    n_permutations: int,
    seed: int,
) -> tuple[float, float]:
    """How much more often cells of a group touch each other than cells drawn at random.

    Returns the contacts within the group divided by their mean over the draws, which are made slice
    by slice (NaN where the mean is 0), and the empirical p, (1 + draws with as many) / (1 + draws).
    """
    first, second = touching.nonzero()
    rng = np.random.default_rng(seed)

    def count(member: NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(member[first] & member[second]))

    found, drawn = count(is_member), np.empty(n_permutations)
    shuffled = is_member.copy()
    for k in range(n_permutations):
        for rows in slices:
            shuffled[rows] = rng.permutation(is_member[rows])
        drawn[k] = count(shuffled)
    ratio = found / drawn.mean() if drawn.any() else np.nan
    return float(ratio), float((1 + np.count_nonzero(drawn >= found)) / (1 + n_permutations))


def pieces(touching: sp.csr_array, is_member: NDArray[np.bool_]) -> tuple[int, float]:
    """Number of pieces that hold nine tenths of a group's cells, and the share of the largest.

    Cells belong to one piece if they touch, or are connected by members that do.
    """
    rows = np.flatnonzero(is_member)
    if not len(rows):
        return 0, 0.0
    labels = connected_components(touching[rows][:, rows], directed=False)[1]
    shares = np.sort(np.bincount(labels))[::-1] / len(rows)
    n_pieces = int(np.searchsorted(np.cumsum(shares), _COUNTED - 1e-9)) + 1
    return n_pieces, float(shares[0])


def morans_i(touching: sp.csr_array, values: sp.csr_matrix) -> NDArray[np.float64]:
    """Moran's I of each column, (d,): how similar touching cells are, from about -1 to 1.

    It is 0 for constant columns, and where no cells touch. Sparse throughout: no dense matrix of
    cells by genes is made.

    References
    ----------
    Moran 1950, Notes on continuous stochastic phenomena (Biometrika 37:17).
    """
    n_cells, total = values.shape[0], float(touching.sum())
    own = values.astype(np.float64)
    mean = np.asarray(own.mean(axis=0)).ravel()
    products = np.asarray(own.multiply(touching @ own).sum(axis=0)).ravel()
    degrees = np.diff(touching.indptr)
    products += mean**2 * total - 2 * mean * (own.T @ degrees)
    squares = np.asarray(own.multiply(own).sum(axis=0)).ravel()
    spread = squares - n_cells * mean**2
    found = np.zeros(own.shape[1])
    varies = (spread > 1e-10 * squares) & (total > 0)
    found[varies] = n_cells * products[varies] / (total * spread[varies])
    return found


def region_borders(
    coordinates: NDArray[np.float64], regions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Lines, (n_lines, 2, 2), between neighbouring cells of different regions.

    They are the edges between such cells of the Voronoi diagram of `coordinates`, (n_cells, 2), in
    its unit, and none is longer than the gap that separates pieces of tissue. `regions`, (n_cells,), are
    numbers, -1 for none; first each cell takes the most frequent one around it.
    """
    none = np.empty((0, 2, 2))
    if len(coordinates) < 4:
        return none
    whole = [np.arange(len(coordinates))]
    places = coordinates - coordinates.mean(axis=0)
    smooth = smooth_domains(regions + 1, places, places, whole, min(_SMOOTHED, len(places) - 1))
    if np.linalg.matrix_rank(places) < 2:
        return none  # All cells lie on a line.
    # With points far around them, edges at the margin of the tissue have two ends.
    around = _AROUND * np.ptp(places, axis=0).max() * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    found = Voronoi(np.concatenate([places, around]))
    pairs, ends = found.ridge_points, np.asarray(found.ridge_vertices)
    is_inner = (pairs < len(places)).all(axis=1)
    pairs, ends = pairs[is_inner], ends[is_inner]
    reach = _FAR * spacing(places)
    middles = places[pairs].mean(axis=1)
    is_near = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1) <= reach
    is_border = (smooth[pairs[:, 0]] != smooth[pairs[:, 1]]) & is_near & (ends >= 0).all(axis=1)
    lines, middles = found.vertices[ends[is_border]], middles[is_border, None]
    ways = lines - middles
    lengths = np.linalg.norm(ways, axis=2, keepdims=True) / (reach / _FAR)
    is_out = lengths > _OVER
    lines = middles + ways * np.where(is_out, _MARGIN / np.where(is_out, lengths, 1.0), 1.0)
    return np.asarray(lines + coordinates.mean(axis=0))
