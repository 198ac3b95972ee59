from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from stofm.spatial import split_cells
from stofm.spatial.splits import leave_out_blocks


@pytest.fixture
def plane(rng):
    """Three slices of 701, 503 and 97 cells, rows mixed, and ten rows of none."""
    rows = np.split(rng.permutation(1311), np.cumsum([701, 503, 97]))[:3]
    return rng.random((1311, 2)) * [30.0, 20.0], [np.sort(part) for part in rows]


def parts(split):
    return split.fitted, split.held_out, split.left_out


@pytest.mark.parametrize("how", ["auto", "slices", "blocks", "random"])
def test_each_cell_of_a_slice_is_in_one_part(plane, how):
    xy, slices = plane
    split = split_cells(xy, slices, how=how)
    assert all((np.diff(part) > 0).all() for part in parts(split))
    assert np.array_equal(np.sort(np.concatenate(parts(split))), np.sort(np.concatenate(slices)))


def test_whole_slices(plane):
    xy, slices = plane
    split = split_cells(xy, slices, how="slices", share=0.4, seed=2)
    (chosen,) = split.slices
    assert np.array_equal(split.held_out, slices[chosen])
    assert {split_cells(xy, slices, how="slices", seed=s).slices for s in range(9)} == {
        (0,),
        (1,),
        (2,),
    }


def test_whole_slices_by_default_where_there_are_several(plane):
    xy, slices = plane
    assert split_cells(xy, slices).how == "blocks"
    assert split_cells(xy, [*slices[:2], *np.array_split(slices[2], 2)]).how == "slices"


def test_at_least_one_slice_is_fitted(plane):
    xy, slices = plane
    assert len(split_cells(xy, slices[:2], how="slices", share=0.9).slices) == 1


def test_blocks_keep_two_distances_between_neighbours():
    grid = np.stack(np.meshgrid(np.arange(37.0), np.arange(29.0)), axis=-1).reshape(-1, 2)
    split = split_cells(grid, [np.arange(len(grid))])
    gaps = cdist(grid[split.fitted], grid[split.held_out]).min(axis=1)
    assert 2 < gaps.min() <= 3
    assert cdist(grid[split.left_out], grid[split.held_out]).min(axis=1).max() <= gaps.min()
    assert len(split.left_out) < 0.35 * len(grid)


@pytest.mark.parametrize("n_cells", [60, 341, 997])
def test_held_out_blocks_are_spread(rng, n_cells):
    xy = rng.random((n_cells, 2))
    corners = (xy > np.median(xy, axis=0)) @ [1, 2]
    for seed in range(4):
        split = split_cells(xy, [np.arange(n_cells)], how="blocks", seed=seed)
        counts = np.bincount(corners[split.held_out], minlength=4)
        assert counts.sum() == pytest.approx(n_cells / 10, abs=n_cells / 30)
        assert np.count_nonzero(counts >= 0.1 * counts.sum()) >= 3
        assert len(split.left_out) <= 0.26 * n_cells


def test_held_out_blocks_have_about_the_classes_of_their_slice(rng):
    xy = rng.random((341, 2))
    classes = np.where(xy[:, 0] < 0.1, 1, 0)
    shares = []
    for known in (None, classes):
        splits = [
            split_cells(xy, [np.arange(341)], how="blocks", classes=known, seed=s) for s in range(6)
        ]
        shares.append([classes[split.held_out].mean() for split in splits])
    assert min(shares[0]) == 0
    assert min(shares[1]) > 0
    assert np.std(shares[1]) < np.std(shares[0])


def test_slices_with_the_only_cells_of_a_class_are_fitted(plane):
    xy, slices = plane
    classes = np.zeros(len(xy), dtype=np.int64)
    classes[slices[0]] = 1
    classes[slices[2][:5]] = 2
    for seed in range(6):
        split = split_cells(xy, slices, how="slices", classes=classes, seed=seed)
        assert split.slices == (1,)
        assert len(split.moved) == 0


def test_a_class_with_no_cell_to_fit_is_moved_with_a_margin():
    grid = np.stack(np.meshgrid(np.arange(30.0), np.arange(20.0)), axis=-1).reshape(-1, 2)
    xy, slices = np.concatenate([grid, grid]), [np.arange(600), np.arange(600, 1200)]
    lone = [rows[xy[rows, 0] < 3] for rows in slices]
    classes = np.zeros(1200, dtype=np.int64)
    classes[lone[0]], classes[lone[1]] = 1, 2
    split = split_cells(xy, slices, how="slices", classes=classes)
    (chosen,) = split.slices
    assert np.array_equal(split.moved, lone[chosen])
    assert np.isin(split.moved, split.fitted).all()
    assert 2 < cdist(xy[split.moved], xy[split.held_out]).min() <= 3
    near = cdist(xy[split.left_out], xy[split.moved]).min(axis=1)
    assert len(near)
    assert near.max() <= 2.5
    assert split.record()["n_moved"] == len(lone[chosen])


def test_slices_that_share_no_class(plane):
    xy, slices = plane
    apart = np.zeros(len(xy), dtype=np.int64)
    apart[slices[1]] = 1
    with pytest.raises(ValueError, match="holds nothing out"):
        split_cells(xy, slices[:2], how="slices", classes=apart)
    fifths = np.array_split(slices[0], 5)
    for k, rows in enumerate(fifths):
        apart[rows[:9]] = k + 1
    assert split_cells(xy, fifths).how == "slices"
    assert split_cells(xy, fifths, classes=apart).how == "blocks"


def test_classes_of_random_cells_are_fitted(plane):
    xy, slices = plane
    classes = np.zeros(len(xy), dtype=np.int64)
    lone = split_cells(xy, slices, how="random").held_out[:3]
    classes[lone] = 1
    split = split_cells(xy, slices, how="random", classes=classes)
    assert np.array_equal(split.moved, lone)
    assert len(split.left_out) == 0


def test_blocks_hold_cells_together(plane):
    xy, slices = plane
    lone = {}
    for how in ("blocks", "random"):
        split = split_cells(xy, slices[:1], how=how)
        distance = cdist(xy[split.held_out], xy[split.held_out])
        np.fill_diagonal(distance, np.inf)
        lone[how] = np.median(distance.min(axis=1))
    assert lone["blocks"] < lone["random"] / 1.5


def test_random_cells(plane):
    xy, slices = plane
    split = split_cells(xy, slices, how="random", share=0.2)
    assert [len(np.intersect1d(split.held_out, rows)) for rows in slices] == [140, 101, 19]
    assert len(split.left_out) == 0


@pytest.mark.parametrize("how", ["slices", "blocks", "random"])
def test_order_of_rows_does_not_matter(plane, rng, how):
    xy, slices = plane
    order = rng.permutation(len(xy))
    place = np.argsort(order)
    moved = [np.sort(place[rows]) for rows in slices]
    first, again = split_cells(xy, slices, how=how), split_cells(xy[order], moved, how=how)
    for one, other in zip(parts(first), parts(again), strict=True):
        assert np.array_equal(one, np.sort(order[other]))
    if how != "slices":
        assert not np.array_equal(split_cells(xy, slices, how=how, seed=1).held_out, first.held_out)


def test_tiny_slices():
    xy = np.arange(14.0).reshape(7, 2)
    split = split_cells(xy, [np.array([0]), np.arange(1, 7)], how="blocks", share=0.3)
    assert 0 in split.fitted
    assert len(split.held_out) == 2


def test_record(plane):
    xy, slices = plane
    split = split_cells(xy, slices, how="blocks", seed=4)
    assert split.record() == {
        "how": "blocks",
        "share": 0.1,
        "seed": 4,
        "n_fitted": len(split.fitted),
        "n_held_out": len(split.held_out),
        "n_left_out": len(split.left_out),
        "n_moved": 0,
        "held_out_slices": [],
    }
    split = split_cells(xy, slices, how="slices")
    assert split.record(["a", "b", "c"])["held_out_slices"] == ["abc"[split.slices[0]]]


def test_bad_options(plane):
    xy, slices = plane
    with pytest.raises(ValueError, match="how must be one of"):
        split_cells(xy, slices, how="rows")
    with pytest.raises(ValueError, match="share must be between 0 and 1, found 1"):
        split_cells(xy, slices, share=1)
    with pytest.raises(ValueError, match="at least two slices"):
        split_cells(xy, slices[:1], how="slices")


def test_each_block_is_left_out_once_with_a_margin(rng):
    xy = rng.random((203, 2)) * [30.0, 10.0]
    folds = leave_out_blocks(xy, 5)
    assert_array_equal(np.sort(np.concatenate([own for _, own in folds])), np.arange(203))
    assert {len(own) for _, own in folds} <= {40, 41}
    for fitted, own in folds:
        assert not set(fitted) & set(own)
        n_margin = 203 - len(fitted) - len(own)
        assert 0 < n_margin <= 0.26 * (203 - len(own))
        distance = cKDTree(xy[own]).query(xy)[0]
        rest = np.setdiff1d(np.arange(203), np.concatenate([fitted, own]))
        assert distance[fitted].min() > distance[rest].max()
    order = rng.permutation(203)
    again = leave_out_blocks(xy[order], 5)
    for (fitted, own), (other_fitted, other_own) in zip(folds, again, strict=True):
        assert_array_equal(np.sort(order[other_own]), own)
        assert_array_equal(np.sort(order[other_fitted]), fitted)
    assert [len(own) for _, own in leave_out_blocks(xy[:3], 5)] == [1, 1, 1]
