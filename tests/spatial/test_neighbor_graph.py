"""Means over the neighbours of cells."""

from __future__ import annotations

import numpy as np
import pytest

from stofm.spatial.plane import neighbor_means


def test_mean_of_the_nearest_of_the_slice(rng):
    xy, values = rng.random((90, 2)), rng.normal(size=(90, 4)).astype(np.float32)
    order = rng.permutation(90)
    slices = [np.sort(order[:50]), np.sort(order[50:])]
    found = neighbor_means(values, xy, slices, 6)
    assert found.dtype == np.float32
    for rows in slices:
        gaps = np.linalg.norm(xy[rows, None] - xy[None, rows], axis=-1)
        np.fill_diagonal(gaps, np.inf)
        nearest = np.argsort(gaps, axis=1)[:, :6]
        np.testing.assert_allclose(found[rows], values[rows][nearest].mean(axis=1), atol=1e-6)


def test_order_of_rows_does_not_matter_where_neighbours_tie(rng):
    # Ten of the twelve cells around a cell of a lattice are as near as others.
    xy = np.stack(np.meshgrid(np.arange(8.0), np.arange(7.0)), axis=-1).reshape(-1, 2)
    values = rng.normal(size=(56, 3)).astype(np.float32)
    found = neighbor_means(values, xy, [np.arange(56)], 10)
    for _ in range(5):
        order = rng.permutation(56)
        moved = neighbor_means(values[order], xy[order], [np.arange(56)], 10)
        np.testing.assert_array_equal(moved, found[order])


def test_cells_at_one_place(rng):
    values = rng.normal(size=(20, 2))
    xy = np.repeat(rng.random((4, 2)), 5, axis=0)
    found = neighbor_means(values, xy, [np.arange(20)], 4)
    groups = values.reshape(4, 5, 2)
    expected = (groups.sum(axis=1, keepdims=True) - groups) / 4
    np.testing.assert_allclose(found, expected.reshape(20, 2), atol=1e-6)


@pytest.mark.parametrize("n", [2, 5])
def test_small_slices_take_all_others(rng, n):
    values = rng.normal(size=(n, 3))
    found = neighbor_means(values, rng.random((n, 2)), [np.arange(n)], 10)
    np.testing.assert_allclose(found, (values.sum(axis=0) - values) / (n - 1), atol=1e-6)


def test_a_cell_by_itself_and_cells_of_no_slice(rng):
    values = rng.normal(size=(3, 2)).astype(np.float32)
    found = neighbor_means(values, rng.random((3, 2)), [np.array([1])], 10)
    np.testing.assert_array_equal(found[1], values[1])
    assert np.isnan(found[[0, 2]]).all()
