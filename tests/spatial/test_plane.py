from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stofm.spatial import (
    canonical_order,
    normalize_coordinates,
    partition_balanced,
    partition_reference,
)
from stofm.spatial.plane import spacing

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


GOLDEN = Path(__file__).parents[1] / "golden"


def golden_parts(golden, name):
    flat, offsets = golden[f"{name}_flat"], golden[f"{name}_offsets"]
    return [flat[a:b] for a, b in pairwise(offsets)]


def assert_same_parts(ours, expected):
    assert len(ours) == len(expected)
    for own, golden in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(own, golden)


def assert_covers(parts, n):
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.parametrize("n_cells", [100, 1000])
@pytest.mark.parametrize("shape", ["uniform", "clustered", "elongated"])
def test_reference_tiles(shape, n_cells):
    golden = np.load(GOLDEN / "c_split_small.npz")
    ours = partition_reference(normalize_coordinates(golden[f"{shape}_xy"]), n_cells)
    assert_same_parts(ours, golden_parts(golden, f"{shape}_split{n_cells}"))


@pytest.mark.parametrize("n_cells", [100, 1000])
@pytest.mark.parametrize("shape", ["uniform", "clustered", "elongated"])
@pytest.mark.parametrize("size", ["medium", "large"])
def test_reference_tiles_of_larger_slices(shared, size, shape, n_cells):
    golden = np.load(shared / "golden" / f"c_split_{size}.npz")
    ours = partition_reference(normalize_coordinates(golden[f"{shape}_xy"]), n_cells)
    assert_same_parts(ours, golden_parts(golden, f"{shape}_split{n_cells}"))


def test_cells_that_the_reference_loses_belong_to_the_last_tile():
    golden = np.load(GOLDEN / "c_split_lattice_edge.npz")
    ours = partition_reference(normalize_coordinates(golden["xy"]), int(golden["split_num"]))
    assert_covers(ours, len(golden["xy"]))
    lost = golden["missing_rows"]
    assert len(lost) == 23
    present = [part[~np.isin(part, lost)] for part in ours]
    assert_same_parts(present, golden_parts(golden, "split"))


@pytest.mark.parametrize("axis", [0, 1])
def test_reference_cuts_a_line_along_it(axis):
    line = np.zeros((47, 2))
    line[:, axis] = np.arange(47.0)
    parts = partition_reference(line, 10)
    assert_covers(parts, 47)
    assert len(parts) > 1
    for part in parts:
        assert np.ptp(part) == len(part) - 1


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    n_cells=st.integers(1, 60),
    kind=st.sampled_from(["random", "lattice", "line", "one place", "duplicates"]),
    seed=st.integers(0, 99),
)
def test_balanced_covers_with_even_sizes(n, n_cells, kind, seed):
    rng = np.random.default_rng(seed)
    xy = {
        "random": rng.random((n, 2)),
        "lattice": np.argwhere(np.ones((20, 15)))[:n].astype(float),
        "line": np.column_stack([np.arange(n), np.zeros(n)]).astype(float),
        "one place": np.zeros((n, 2)),
        "duplicates": rng.integers(0, 3, (n, 2)).astype(float),
    }[kind]
    parts = partition_balanced(xy, n_cells)
    assert_covers(parts, n)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() <= n_cells
    if n > n_cells:
        assert sizes.min() >= n_cells / 2 - 1e-9
    assert all((np.diff(part) > 0).all() for part in parts)


def test_balanced_parts_are_compact(rng):
    xy = rng.random((3000, 2))
    for part in partition_balanced(xy, 100):
        width, height = np.ptp(xy[part], axis=0)
        assert width * height < 2 * len(part) / 3000
        assert max(width, height) < 3.5 * min(width, height)


def test_balanced_of_nothing():
    assert partition_balanced(np.empty((0, 2)), 10) == []
    assert partition_reference(np.empty((0, 2)), 10) == []
