from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stofm.spatial.spot_grid import grid_spots


@pytest.fixture
def cells(rng):
    """97 cells of two slices, three types, some unknown; counts of 5 genes."""
    return (
        rng.random((97, 2)) * [100.0, 60.0] - 20.0,
        rng.integers(-1, 3, 97),
        [np.arange(41), np.arange(41, 97)],
        sparse.csr_matrix(rng.poisson(1.0, (97, 5))),
    )


def test_spots_are_sums_of_the_labelled_cells_in_a_square(cells):
    coordinates, codes, slices, counts = cells
    grid = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    summed = grid.sum_counts(counts).toarray()
    dense = counts.toarray()
    assert (grid.spot[codes < 0] == -1).all()
    assert (grid.spot[codes >= 0] >= 0).all()
    np.testing.assert_allclose(grid.proportions.sum(axis=1), 1.0)
    for spot, (center, number) in enumerate(zip(grid.centers, grid.slices, strict=True)):
        inside = np.zeros(97, dtype=bool)
        inside[slices[number]] = True
        inside &= (np.abs(coordinates - center) <= 12.5).all(axis=1) & (codes >= 0)
        assert (np.flatnonzero(grid.spot == spot) == np.flatnonzero(inside)).all()
        assert (summed[spot] == dense[inside].sum(axis=0)).all()
        shares = np.bincount(codes[inside], minlength=3) / inside.sum()
        np.testing.assert_allclose(grid.proportions[spot], shares)
    assert summed.sum() == dense[codes >= 0].sum()


def test_counts_may_come_in_blocks(cells):
    coordinates, codes, slices, counts = cells
    grid = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    blocks = [grid.sum_counts(counts[a:b], start=a) for a, b in ((0, 30), (30, 31), (31, 97))]
    assert (sum(blocks) != grid.sum_counts(counts)).nnz == 0


def test_order_of_cells_does_not_matter(cells, rng):
    coordinates, codes, slices, counts = cells
    order = np.concatenate([rng.permutation(41), 41 + rng.permutation(56)])
    one = grid_spots(coordinates, codes, slices, n_types=3, spot_size=25.0)
    other = grid_spots(coordinates[order], codes[order], slices, n_types=3, spot_size=25.0)
    np.testing.assert_array_equal(one.spot[order], other.spot)
    np.testing.assert_array_equal(one.centers, other.centers)
    assert (one.sum_counts(counts) != other.sum_counts(counts[order])).nnz == 0


@pytest.mark.parametrize("size", [0.0, -2.0, np.inf, np.nan])
def test_size_that_can_not_be(cells, size):
    coordinates, codes, slices, _ = cells
    with pytest.raises(ValueError, match="spot_size must be positive"):
        grid_spots(coordinates, codes, slices, n_types=3, spot_size=size)


def test_no_cell_of_known_type(cells):
    coordinates, _, slices, _ = cells
    with pytest.raises(ValueError, match="None of 97 cells has a known type"):
        grid_spots(coordinates, np.full(97, -1), slices, n_types=3, spot_size=5.0)
