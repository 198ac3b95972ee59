from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stofm.spatial import canonical_order, normalize_coordinates
from stofm.spatial.coordinates import spacing

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("shape", ["uniform", "clustered", "elongated"])
def test_normalized_like_the_reference(shape):
    golden = np.load(GOLDEN / "c_split_small.npz")
    ours = normalize_coordinates(golden[f"{shape}_xy"])
    np.testing.assert_allclose(ours, golden[f"{shape}_norm"], atol=1e-10)


@pytest.mark.parametrize("size", ["medium", "large"])
@pytest.mark.parametrize("shape", ["uniform", "clustered", "elongated"])
def test_larger_slices_normalized_like_the_reference(shared, size, shape):
    golden = np.load(shared / "golden" / f"c_split_{size}.npz")
    expected = golden[f"{shape}_norm_head" if size == "large" else f"{shape}_norm"]
    ours = normalize_coordinates(golden[f"{shape}_xy"])
    np.testing.assert_allclose(ours[: len(expected)], expected, atol=1e-10)


def test_diagonal_is_100_and_centre_is_origin(rng):
    xy = rng.normal(size=(31, 2)) * [3.0, 700.0] + 1e6
    out = normalize_coordinates(xy)
    low, high = out.min(axis=0), out.max(axis=0)
    np.testing.assert_allclose(low + high, 0.0, atol=1e-9)
    assert np.hypot(*(high - low)) == pytest.approx(100.0)


@pytest.mark.parametrize("n", [1, 5])
def test_one_place_becomes_the_origin(n):
    assert not normalize_coordinates(np.full((n, 2), 7.0)).any()


def test_no_cells():
    assert normalize_coordinates(np.empty((0, 2))).shape == (0, 2)


def test_canonical_order_ignores_file_order(rng):
    xy = rng.integers(0, 3, size=(53, 2)).astype(float)  # many cells share a place
    features = rng.normal(size=(53, 5))
    shuffled = rng.permutation(53)
    order = canonical_order(xy, features)
    again = canonical_order(xy[shuffled], features[shuffled])
    np.testing.assert_array_equal(order, shuffled[again])


def test_canonical_order_decides_by_x_y_then_features():
    xy = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    features = np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 2.0], [5.0, 1.0]])
    assert canonical_order(xy, features).tolist() == [3, 2, 1, 0]


def test_spacing_of_a_hexagonal_lattice():
    rows, columns = np.divmod(np.arange(900), 30)
    xy = np.column_stack([columns + rows % 2 / 2, rows * np.sqrt(3) / 2]) * 7
    assert spacing(xy) == pytest.approx(7)
    assert spacing(xy[rows < 12]) == pytest.approx(7)


@pytest.mark.parametrize("xy", [np.empty((0, 2)), np.zeros((1, 2)), np.ones((20, 2))])
def test_spacing_is_1_where_there_is_none(xy):
    assert spacing(xy) == 1
