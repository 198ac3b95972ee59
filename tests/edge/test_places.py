"""Warnings of places that carry little or mislead."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
from anndata import AnnData

from stofm._edge.places import read_places


def one_slice(xy, **obs):
    data = AnnData(np.ones((len(xy), 1)), obsm={"spatial": np.asarray(xy, dtype=float)})
    data.obs_names = [f"c{k}" for k in range(len(xy))]
    for name, values in obs.items():
        data.obs[name] = values
    return data


def read(adata, library_key=None):
    return read_places(adata, spatial_key="spatial", library_key=library_key)


def grid(n=15):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2).astype(float)


def test_all_cells_at_one_place_are_warned_of():
    with pytest.warns(UserWarning, match=r"all 5 cells lie at one place \(3, 4\)"):
        read(one_slice([[3, 4]] * 5))


@pytest.mark.parametrize(("axis", "side"), [(0, "height"), (1, "width")])
def test_a_line_is_warned_of(axis, side):
    xy = np.zeros((6, 2))
    xy[:, axis] = np.arange(6)
    with pytest.warns(UserWarning, match=f"zero {side}: its cells lie on a line"):
        read(one_slice(xy))


def test_shared_places_are_warned_of():
    with pytest.warns(UserWarning, match="2 of 5 cells share their place with another"):
        read(one_slice([[0, 0], [1, 2], [1, 2], [1, 2], [3, 0]]))


@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_cells_are_not_remarked_on(n, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        read(one_slice([[3.0, 4.0], [5.0, 4.0]][:n]))
    assert not caplog.text


@pytest.mark.parametrize(
    ("off", "on"),
    [(0, 1), (False, True), ("0", "1"), (0.0, 1.0), ("False", "True"), ("no", "yes")],
)
@pytest.mark.parametrize("is_category", [True, False])
def test_spots_off_tissue_are_counted(off, on, is_category):
    adata = one_slice(grid(4), in_tissue=[off] * 3 + [on] * 13)
    if is_category:
        adata.obs["in_tissue"] = adata.obs["in_tissue"].astype("category")
    with pytest.warns(UserWarning, match=r"3 of 16 spots are not on tissue") as seen:
        read(adata)
    scope = {"adata": adata}
    exec(str(seen[0].message).partition("Drop them: ")[2], scope)
    assert scope["adata"].n_obs == 13
    read(scope["adata"])  # without a word


@pytest.mark.parametrize("n_stray", [1, 4])
def test_stray_cells_are_named(n_stray):
    xy = grid()
    xy[:n_stray] += [400.0, 20.0]
    both = np.concatenate([xy, grid()])
    adata = one_slice(both, slide=["a"] * len(xy) + ["b"] * len(xy))
    with pytest.warns(UserWarning, match=rf"Slice 'a': {n_stray} of 225 cells \(c0") as seen:
        read(adata, "slide")
    assert "the slice is 20." in str(seen[0].message)
    scope = {"adata": adata}
    exec(str(seen[0].message).partition("drop them: ")[2], scope)
    assert scope["adata"].n_obs == 450 - n_stray
    read(scope["adata"], "slide")  # without a word


@pytest.mark.parametrize("n", [3, 15])
def test_pieces_of_tissue_are_not_stray(n):
    read(
        one_slice(
            np.concatenate([grid(n) + np.array([x, y]) for x, y in ((0, 0), (500, 0), (0, 900))])
        )
    )


def test_depth_is_warned_of_if_it_is_more_than_the_distance_of_cells(rng, caplog):
    adata = one_slice(np.c_[grid(), rng.random(225)])
    with caplog.at_level(logging.INFO, logger="stofm"):
        read(adata)
    assert "the first two are used; z differs by no more" in caplog.text
    adata.obsm["spatial"][:, 2] *= 9
    with pytest.warns(UserWarning, match=r"z extends over 8.\d+, x over 14 and y over 14"):
        read(adata)


@pytest.mark.parametrize("name", ["on_tissue", "is_in_tissue", "array_in_tissue"])
def test_columns_of_tissue_of_other_names(name):
    with pytest.warns(UserWarning, match=rf"5 of 225 spots are not on tissue by obs\['{name}'\]"):
        read(one_slice(grid(), **{name: np.arange(225) >= 5}))


def test_cells_scattered_far_off_are_told_with_how_they_shrink_the_slice(rng):
    xy = 100 * rng.random((2000, 2))
    xy[:40] = 300 + 500 * rng.random((40, 2))
    with pytest.warns(UserWarning, match="40 of 2000 cells .* lie far off the others") as caught:
        read(one_slice(xy))
    assert "np.setdiff1d(np.arange(adata.n_obs), [0, 1, 2," in str(caught[0].message)
