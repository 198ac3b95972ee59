"""Which cells belong to which slice: by column, by metadata, or refused."""

from __future__ import annotations

import logging
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import stofm as st
from stofm._edge.slices import read_places, read_slices
from stofm._keys import Obsm


def tissue(rng, n=14, pitch=10.0):
    """Places of n x n cells that keep a distance, as cells do."""
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2)
    return pitch * (grid + rng.uniform(-0.3, 0.3, grid.shape)) + rng.uniform(0, pitch, 2)


@pytest.fixture
def overlaid(rng):
    """Three slices on each other, of 196 cells each; rows mixed."""
    xy = np.concatenate([tissue(rng) for _ in range(3)])
    order = rng.permutation(len(xy))
    number = np.repeat([0, 1, 2], 196)[order]
    data = AnnData(np.ones((len(xy), 1)), obsm={"spatial": xy[order]})
    data.obs["number"] = number
    return data


def name_slices(adata, column, values):
    adata.obs = pd.DataFrame(
        {
            column: np.array(values)[adata.obs["number"]],
            "cell_type": np.random.default_rng(0).choice(["a", "b", "c"], adata.n_obs),
        },
        index=adata.obs_names,
    )


def read(adata):
    return read_slices(adata, None, "spatial")


def test_slices_by_name(adata):
    slices = read_slices(adata, "library", "spatial")
    assert slices.names == ["left", "right"]
    assert slices.column == "library"
    for name, rows in zip(slices.names, slices.rows, strict=True):
        assert (adata.obs["library"].iloc[rows] == name).all()
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("puck", ["p1", "p2", "p3"]),
        ("Bregma", [-0.14, 0.01, 0.26]),
        ("core", [7, 8, 9]),
        ("is_treated", [True, False, False]),
    ],
)
def test_any_column_whose_slices_lie_on_each_other_is_refused(overlaid, column, values):
    is_pair = len(set(values)) == 2
    adata = overlaid[overlaid.obs["number"] < 2].copy() if is_pair else overlaid
    name_slices(adata, column, values)
    with pytest.raises(ValueError, match=rf"obs\['{column}'\] names \d samples") as error:
        read(adata)
    assert f"Pass library_key={column!r}. If they are one slice" in str(error.value)
    assert "cell_type" not in str(error.value)


def test_all_columns_that_name_the_slices_are_candidates(overlaid):
    name_slices(overlaid, "puck", ["p1", "p2", "p3"])
    overlaid.obs["donor"] = overlaid.obs["puck"].map({"p1": "A", "p2": "B", "p3": "C"})
    with pytest.raises(ValueError, match="Pass library_key='puck' or library_key='donor'"):
        read(overlaid)


@pytest.mark.parametrize("technology", ["xenium", "visium"])
def test_simulated_slices_on_each_other(technology):
    adata = st.datasets.simulate_slice(80, 5, technology=technology, n_slices=3)
    with pytest.raises(ValueError, match="library_key='slice_id'"):
        read(adata)


def test_groups_of_one_slice_are_no_slices(rng):
    xy = tissue(rng, 25)
    adata = AnnData(np.ones((len(xy), 1)), obsm={"spatial": xy})
    distance = np.hypot(*(xy - xy.mean(axis=0)).T)
    adata.obs["at_random"] = rng.integers(0, 5, len(xy))
    adata.obs["layer"] = (distance // 40).astype(str)
    adata.obs["tile"] = (xy[:, 0] // 60).astype(int)
    adata.obs["treated"] = rng.choice(["one", "two"], len(xy))
    for column in adata.obs:
        # Also where the file is in order of it.
        assert len(read(adata[np.argsort(adata.obs[column])].copy()).rows) == 1


def test_slices_side_by_side_are_one(overlaid):
    name_slices(overlaid, "sample", ["a", "b", "c"])
    overlaid.obsm["spatial"][overlaid.obs["sample"] == "b", 0] += 1e4
    overlaid.obsm["spatial"][overlaid.obs["sample"] == "c", 1] += 1e4
    with pytest.warns(UserWarning, match=r"3 values of obs\['sample'\] .* lie apart"):
        assert len(read(overlaid).rows) == 1


def test_names_that_are_there_twice_tell_of_joined_slices(rng):
    parts = [
        AnnData(
            np.ones((196, 1)),
            obs=pd.DataFrame(
                {"cell_type": rng.choice(["a", "b"], 196)}, index=map(str, range(196))
            ),
            obsm={"spatial": tissue(rng)},
        )
        for _ in range(2)
    ]
    with pytest.warns(UserWarning, match="not unique"):
        joined = ad.concat(parts)
    with pytest.raises(ValueError, match="100% of the obs_names occur several times") as error:
        read(joined)
    code = str(error.value).partition("pass it: ")[2].partition(", library_key")[0]
    exec(code, {"adata": joined})
    assert len(read_slices(joined, "sample", "spatial").rows) == 2


def test_a_column_that_is_the_same_for_all_makes_one_slice(overlaid):
    name_slices(overlaid, "all", ["one"] * 3)
    assert len(read_slices(overlaid, "all", "spatial").rows) == 1


def test_a_library_key_that_is_not_there_names_candidates(overlaid):
    name_slices(overlaid, "puck", ["p1", "p2", "p3"])
    with pytest.raises(KeyError, match=r"no obs\['slide'\].*candidates: \['puck'\]"):
        read_slices(overlaid, "slide", "spatial")
    with pytest.raises(KeyError, match=r"candidates: \['puck', 'cell_type'\]"):
        read_slices(overlaid, "cell_typ", "spatial")


def test_cells_without_a_slice_are_refused(adata):
    adata.obs["library"] = adata.obs["library"].where(np.arange(184) > 2)
    with pytest.raises(ValueError, match="3 cells have no value in obs"):
        read_slices(adata, "library", "spatial")


def regions(adata, column):
    adata.uns["spatialdata_attrs"] = {"region_key": column, "instance_key": "id", "region": []}


def images(adata, column):
    adata.uns["spatial"] = {str(name): {} for name in adata.obs[column].unique()}


@pytest.mark.parametrize(("describe", "gap"), [(regions, 0.0), (images, 0.0), (images, 1e4)])
def test_metadata_separates_slices_as_if_asked_for(adata, model, describe, gap, caplog):
    adata.obsm["spatial"][adata.obs["library"] == "right", 0] += gap
    expected = st.tl.embed(adata, model, library_key="library", copy=True, show_progress_bar=False)
    describe(adata, "library")
    with caplog.at_level("INFO", logger="stofm"):
        st.tl.embed(adata, model, show_progress_bar=False)
    assert "names 2 slices in obs['library']: they are separated" in caplog.text
    np.testing.assert_array_equal(adata.obsm[Obsm.X], expected.obsm[Obsm.X])
    assert adata.uns["stofm"][Obsm.X] == expected.uns["stofm"][Obsm.X]
    assert len(st.pl.spatial(adata, show=False)) == 2


@pytest.mark.parametrize("name", ["library", "orig.ident", "Sample_ID", "section label", "fov"])
def test_columns_named_as_those_of_slices_are_enough_where_these_mix(adata, name):
    adata.obs = adata.obs.rename(columns={"library": name})[[name]]
    with pytest.raises(
        ValueError, match=r"names 2 samples \(left, right\) whose coordinates overlap"
    ):
        read(adata)
    adata.obsm["spatial"][adata.obs[name] == "right", 0] += 1e4
    with pytest.warns(UserWarning, match=f"pass library_key='{name}'"):
        assert len(read(adata).rows) == 1


@pytest.mark.parametrize("scale", [0.05, 4.7, 20.0])
def test_slices_of_another_unit_on_each_other(overlaid, scale):
    name_slices(overlaid, "sample", ["a", "b", "c"])
    overlaid.obsm["spatial"][overlaid.obs["sample"] == "b"] *= scale
    with pytest.raises(ValueError, match="library_key='sample'"):
        read(overlaid)


def test_own_columns_are_not_proposed(overlaid):
    overlaid.obs["stofm_subslice"] = overlaid.obs["number"]
    with pytest.raises(ValueError, match="library_key") as error:
        read(overlaid)
    assert "stofm_subslice" not in str(error.value)


@pytest.mark.parametrize("describe", [regions, images])
def test_regions_that_adjoin_are_fields_of_one_slice(rng, describe, caplog):
    xy = tissue(rng, 20)
    adata = AnnData(np.ones((400, 1)), obsm={"spatial": xy})
    adata.obs["field"] = (xy[:, 0] // 100).astype(int).astype(str)
    describe(adata, "field")
    with caplog.at_level("INFO", logger="stofm"):
        assert len(read(adata).rows) == 1
    assert "regions in obs['field'] adjoin" in caplog.text


def test_one_region_is_one_slice(overlaid):
    one = overlaid[overlaid.obs["number"] == 0].copy()
    one.obs["field"] = "cells"
    regions(one, "field")
    assert read(one).column is None


def one_slice(xy, **obs):
    data = AnnData(np.ones((len(xy), 1)), obsm={"spatial": np.asarray(xy, dtype=float)})
    data.obs_names = [f"c{k}" for k in range(len(xy))]
    for name, values in obs.items():
        data.obs[name] = values
    return data


def places(adata, library_key=None):
    return read_places(adata, spatial_key="spatial", library_key=library_key)


def grid(n=15):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2).astype(float)


def test_all_cells_at_one_place_are_warned_of():
    with pytest.warns(UserWarning, match=r"all 5 cells lie at one position \(3, 4\)"):
        places(one_slice([[3, 4]] * 5))


@pytest.mark.parametrize(("axis", "side"), [(0, "height"), (1, "width")])
def test_a_line_is_warned_of(axis, side):
    xy = np.zeros((6, 2))
    xy[:, axis] = np.arange(6)
    with pytest.warns(UserWarning, match=f"zero {side}: its cells lie on a line"):
        places(one_slice(xy))


def test_shared_places_are_warned_of():
    with pytest.warns(UserWarning, match="2 of 5 cells share their position with another"):
        places(one_slice([[0, 0], [1, 2], [1, 2], [1, 2], [3, 0]]))


@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_cells_are_not_remarked_on(n, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        places(one_slice([[3.0, 4.0], [5.0, 4.0]][:n]))
    assert not caplog.text


@pytest.mark.parametrize("n_stray", [1, 4])
def test_stray_cells_are_named(n_stray):
    xy = grid()
    xy[:n_stray] += [400.0, 20.0]
    both = np.concatenate([xy, grid()])
    adata = one_slice(both, slide=["a"] * len(xy) + ["b"] * len(xy))
    with pytest.warns(UserWarning, match=rf"Slice 'a': {n_stray} of 225 cells \(c0") as seen:
        places(adata, "slide")
    assert "the slice 20." in str(seen[0].message)
    scope = {"adata": adata}
    exec(str(seen[0].message).partition("drop them: ")[2], scope)
    assert scope["adata"].n_obs == 450 - n_stray
    places(scope["adata"], "slide")  # without a word


@pytest.mark.parametrize("n", [3, 15])
def test_pieces_of_tissue_are_not_stray(n):
    places(
        one_slice(
            np.concatenate([grid(n) + np.array([x, y]) for x, y in ((0, 0), (500, 0), (0, 900))])
        )
    )


def test_depth_is_warned_of_if_it_is_more_than_the_distance_of_cells(rng, caplog):
    adata = one_slice(np.c_[grid(), rng.random(225)])
    with caplog.at_level(logging.INFO, logger="stofm"):
        places(adata)
    assert "the first two are used. z extends over" in caplog.text
    adata.obsm["spatial"][:, 2] *= 9
    with pytest.warns(UserWarning, match=r"z extends over 8.\d+, x over 14 and y over 14"):
        places(adata)


def test_cells_scattered_far_off_are_told_with_how_they_shrink_the_slice(rng):
    xy = 100 * rng.random((2000, 2))
    xy[:40] = 300 + 500 * rng.random((40, 2))
    with pytest.warns(UserWarning, match="40 of 2000 cells .* lie far from the others"):
        places(one_slice(xy))


@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), ("0", "1"), ("no", "yes")])
@pytest.mark.parametrize("name", ["in_tissue", "array_in_tissue"])
def test_spots_off_tissue_are_counted(off, on, name):
    adata = one_slice(grid(4), **{name: [off] * 3 + [on] * 13})
    with pytest.warns(UserWarning, match=rf"3 of 16 spots are not on tissue by obs\['{name}'\]"):
        places(adata)
    places(adata[3:].copy())  # without a word


@pytest.fixture
def planes(rng):
    """Three planes, 40 apart."""
    xy = np.concatenate([tissue(rng) for _ in range(3)])
    z = np.repeat([0.0, 40.0, 80.0], len(xy) // 3)
    return AnnData(np.ones((len(z), 1)), obsm={"spatial": np.c_[xy, z]})


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("library_key", [None, "donor"])
def test_planes_on_each_other_say_how_to_name_them(planes, rng, library_key, noise):
    planes.obsm["spatial"][:, 2] += noise * rng.random(planes.n_obs)
    if library_key is not None:
        planes.obs["donor"] = np.where(np.arange(planes.n_obs) % 2, "A", "B")
    with pytest.raises(ValueError, match=r"z in obsm\['spatial'\] takes 3 values") as error:
        read_places(planes, spatial_key="spatial", library_key=library_key)
    line = str(error.value).partition("pass it: ")[2].partition(", library_key")[0]
    exec(line, {"adata": planes, "np": np})
    places = read_places(planes, spatial_key="spatial", library_key="plane")
    assert len(places.slices.rows) == (3 if library_key is None else 6)


def test_planes_side_by_side_are_one_slice(planes):
    planes.obsm["spatial"][:, 0] += 10 * planes.obsm["spatial"][:, 2]
    with pytest.warns(UserWarning, match="z extends"):
        places = read_places(planes, spatial_key="spatial", library_key=None)
    assert len(places.slices.rows) == 1
