"""Groups of cells in the plane."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from stofm.spatial.regions import clustering, contacts, morans_i, pieces, touching_cells


@pytest.fixture
def plane(rng):
    """Two slices of 61 and 43 cells at the same places, rows mixed."""
    xy = rng.random((104, 2)) * 10
    order = rng.permutation(104)
    return xy, [np.sort(order[:61]), np.sort(order[61:])]


def test_cells_touch_their_nearest(plane):
    xy, slices = plane
    found = touching_cells(xy, slices).toarray().astype(bool)
    for rows in slices:
        distances = cdist(xy[rows], xy[rows])
        sixth = np.sort(distances, axis=1)[:, 6]
        near = distances <= np.minimum(sixth, 3 * np.median(sixth))[:, None]
        np.fill_diagonal(near, False)
        np.testing.assert_array_equal(found[np.ix_(rows, rows)], near | near.T)
    assert not found[np.ix_(*slices)].any()


@pytest.mark.parametrize(("step", "n_around"), [(1.0, 8), (0.5, 6)])
def test_a_lattice_has_all_that_are_equally_near(step, n_around):
    """A square one, in which eight are as near as the sixth, and a hexagonal one."""
    rows, columns = np.mgrid[:9, :11].reshape(2, -1)
    is_square = step == 1.0
    x = columns + (0 if is_square else 0.5 * (rows % 2))
    xy = np.stack([x, rows * (1.0 if is_square else np.sqrt(3) / 2)], axis=1)
    found = touching_cells(xy, [np.arange(99)])
    # Cells at the edge reach farther.
    inner = (rows > 2) & (rows < 6) & (columns > 2) & (columns < 8)
    assert set(np.diff(found.indptr)[inner]) == {n_around}


def test_slices_of_one_or_two_cells():
    found = touching_cells(np.zeros((3, 2)), [np.array([0]), np.array([1, 2])])
    assert found.toarray().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert touching_cells(np.zeros((1, 2)), [np.array([0])]).nnz == 0


def test_contacts_against_shuffled_cells(plane, rng):
    xy, slices = plane
    touching = touching_cells(xy, slices)
    codes = rng.integers(-1, 3, 104)
    found, expected = contacts(touching, codes, slices, 3)
    dense = touching.toarray()
    counted = [[dense[np.ix_(codes == a, codes == b)].sum() for b in range(3)] for a in range(3)]
    np.testing.assert_array_equal(found, counted)
    drawn = np.zeros((3, 3))
    for _ in range(400):
        shuffled = codes.copy()
        for rows in slices:
            shuffled[rows] = rng.permutation(codes[rows])
        drawn += contacts(touching, shuffled, slices, 3)[0] / 400
    np.testing.assert_allclose(expected, drawn, rtol=0.1)


def test_a_niche_and_scattered_cells(rng):
    xy = rng.random((400, 2))
    touching, slices = touching_cells(xy, [np.arange(400)]), [np.arange(400)]
    together, scattered = xy[:, 0] < 0.1, rng.random(400) < 0.1
    options = {"n_permutations": 99, "seed": 3}
    ratio, p = clustering(touching, together, slices, **options)
    assert ratio > 4
    assert p == 0.01
    assert clustering(touching, scattered, slices, **options)[1] > 0.05
    assert clustering(touching, together, slices, **options) == (ratio, p)
    assert pieces(touching, together)[0] < 4 < pieces(touching, scattered)[0]


def test_pieces_are_counted_up_to_nine_tenths():
    xy = np.concatenate([np.arange(18.0), [500.0, 501.0, 900.0]])
    xy = np.stack([xy, np.zeros(21)], axis=1)
    touching = touching_cells(xy, [np.arange(21)])
    assert pieces(touching, np.ones(21, dtype=bool)) == (2, pytest.approx(18 / 21))
    assert pieces(touching, np.zeros(21, dtype=bool)) == (0, 0.0)


def test_morans_i(plane, rng):
    from scanpy.metrics import morans_i as reference

    xy, slices = plane
    touching = touching_cells(xy, slices)
    values = np.column_stack([xy[:, 0], rng.random(104), rng.poisson(0.5, 104), np.full(104, 2.0)])
    found = morans_i(touching, sp.csr_matrix(values))
    expected = reference(sp.csr_matrix(touching), values[:, :3].T)
    np.testing.assert_allclose(found[:3], expected, rtol=1e-6)
    assert found[3] == 0
    assert found[0] > 0.8 > 0.2 > abs(found[1])
    assert not morans_i(touching[:2][:, :2] * 0, sp.csr_matrix(values[:2])).any()
