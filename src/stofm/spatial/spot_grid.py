"""Spots of many cells out of slices with single cells: squares of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SpotGrid:
    """Which cells make up which spot; cells without a type are in none.

    Attributes
    ----------
    spot
        (n_cells,) spot of each cell, -1 for none.
    centers
        (n_spots, 2) centres of the squares, in the unit of the coordinates.
    slices
        (n_spots,) number of each spot's slice.
    proportions
        (n_spots, n_types) share of each type among a spot's cells; rows sum to 1.
    """

    spot: NDArray[np.int64]
    centers: NDArray[np.float64]
    slices: NDArray[np.int64]
    proportions: NDArray[np.float64]

    def sum_counts(self, counts: sparse.csr_matrix, start: int = 0) -> sparse.csr_matrix:
        """Add up counts of cells from row `start` on, as (n_spots, n_genes)."""
        spot = self.spot[start : start + counts.shape[0]]
        cells = np.flatnonzero(spot >= 0)
        ones = np.ones(len(cells), dtype=np.int64)
        shape = (len(self.centers), counts.shape[0])
        summed = sparse.csr_matrix((ones, (spot[cells], cells)), shape=shape) @ counts
        return sparse.csr_matrix(summed)


def grid_spots(
    coordinates: NDArray[np.floating],
    codes: NDArray[np.integer],
    slices: Sequence[NDArray[np.integer]],
    *,
    n_types: int,
    spot_size: float,
) -> SpotGrid:
    """Share cells out to the squares of a grid, slice by slice.

    Squares without a cell of known type are no spots. Spots come slice by slice, and within a
    slice by x, then y; the order of cells does not matter.

    Parameters
    ----------
    coordinates
        (n_cells, 2), any unit.
    codes
        (n_cells,) type of each cell, from 0 to `n_types` - 1; -1 for cells to leave out.
    slices
        Rows of each slice.
    n_types
        Number of types.
    spot_size
        Side of a square, in the unit of the coordinates.

    Raises
    ------
    ValueError
        `spot_size` is not positive, or no cell has a type.
    """
    if not 0.0 < spot_size < np.inf:
        msg = f"spot_size must be positive, in the unit of the coordinates, found {spot_size!r}."
        raise ValueError(msg)
    number = np.full(len(codes), -1, dtype=np.int64)
    corner = np.zeros((len(slices), 2))
    for k, rows in enumerate(slices):
        number[rows] = k
        corner[k] = coordinates[rows].min(axis=0, initial=np.inf)
    cells = np.flatnonzero((codes >= 0) & (number >= 0))
    if not len(cells):
        msg = f"None of {len(codes)} cells has a known type; there is nothing to make spots from."
        raise ValueError(msg)
    own = number[cells]
    square = np.floor((coordinates[cells] - corner[own]) / spot_size).astype(np.int64)
    keys = np.column_stack([own, square])
    places, found = np.unique(keys, axis=0, return_inverse=True)
    spot = np.full(len(codes), -1, dtype=np.int64)
    spot[cells] = found.ravel()
    members: NDArray[Any] = np.zeros((len(places), n_types))
    np.add.at(members, (spot[cells], codes[cells]), 1.0)
    return SpotGrid(
        spot=spot,
        centers=corner[places[:, 0]] + (places[:, 1:] + 0.5) * spot_size,
        slices=places[:, 0],
        proportions=members / members.sum(axis=1, keepdims=True),
    )
