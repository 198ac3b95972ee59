from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stofm.spatial import normalize_coordinates, partition_balanced, partition_reference

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
