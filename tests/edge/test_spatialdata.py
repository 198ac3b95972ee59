"""SpatialData: which table is read, where its cells lie, which regions are slices, and its stores."""

from __future__ import annotations

import inspect
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stofm as st
from stofm._edge.slice_files import open_table, read_data
from stofm._edge.slices import read_places
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm.corpus.sources import find_sources
from stofm.train.recipe import FileConfig

if TYPE_CHECKING:
    from anndata import AnnData

pytest.importorskip("spatialdata")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*SpatialData:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Writing )?zarr v[23] :UserWarning"),
]


def shapes(xy: np.ndarray, ids: np.ndarray, transformations: dict, *, polygons: bool = False):
    import geopandas
    from shapely import Point
    from spatialdata.models import ShapesModel

    if not polygons:
        return ShapesModel.parse(
            xy, geometry=0, radius=1.0, index=ids, transformations=transformations
        )
    squares = [Point(place).buffer(2.0, cap_style="square") for place in xy]
    frame = geopandas.GeoDataFrame({"geometry": squares}, index=ids)
    return ShapesModel.parse(frame, transformations=transformations)


def labels(xy: np.ndarray, transformations: dict):
    """Cells 1, 2, ... as squares of three pixels at whole places."""
    from spatialdata.models import Labels2DModel

    pixels = np.zeros(np.ceil(xy[:, ::-1].max(axis=0) + 4).astype(int), dtype=np.int32)
    for number, (x, y) in enumerate(xy.astype(int), start=1):
        pixels[y - 1 : y + 2, x - 1 : x + 2] = number
    return Labels2DModel.parse(pixels, dims=("y", "x"), transformations=transformations)


def scaled(factor: float):
    from spatialdata.transformations import Scale

    return Scale([factor, factor], axes=("x", "y"))


def moved(x: float):
    from spatialdata.transformations import Translation

    return Translation([x, 0.0], axes=("x", "y"))


def made(adata: AnnData, **elements):
    """A SpatialData whose table annotates a region of each library, by ids ``instance``."""
    from spatialdata import SpatialData
    from spatialdata.models import TableModel

    table = adata.copy()
    del table.obsm["spatial"]
    table.obs["region"] = pd.Categorical(table.obs["library"].astype(str))
    keys = {"region_key": "region", "instance_key": "instance"}
    table = TableModel.parse(table, region=sorted(set(table.obs["region"])), **keys)
    return SpatialData.init_from_elements({**elements, "table": table})


@pytest.fixture
def rows(adata: AnnData) -> dict[str, np.ndarray]:
    """Rows of the two libraries; the cells get ids, whose order is not that of the rows."""
    adata.obs["instance"] = np.random.default_rng(0).permutation(adata.n_obs) + 1
    return {name: np.flatnonzero(adata.obs["library"] == name) for name in ("left", "right")}


def circles(adata: AnnData, rows: dict[str, np.ndarray], **transformations: dict):
    """Circles of each library at the places of the AnnData, halved, with transformations."""
    return {
        name: shapes(
            adata.obsm["spatial"][own] / 2,
            adata.obs["instance"].to_numpy()[own],
            transformations[name],
        )
        for name, own in rows.items()
    }


@pytest.fixture
def store(adata: AnnData, rows: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A store with two libraries on each other, an image and points."""
    from spatialdata.models import Image2DModel, PointsModel

    elements = circles(adata, rows, left={"global": scaled(2)}, right={"global": scaled(2)})
    sdata = made(adata, **elements)
    sdata["image"] = Image2DModel.parse(np.zeros((1, 8, 8)), dims=("c", "y", "x"))
    sdata["points"] = PointsModel.parse(adata.obsm["spatial"])
    sdata.write(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def slices(adata: AnnData):
    return read_places(adata, spatial_key="spatial", library_key=None).slices


# Places


def test_cells_lie_at_the_centroids_of_circles_polygons_and_labels(adata, rng):
    adata = adata[:90].copy()
    adata.obs["library"] = np.repeat(["a", "b", "c"], 30)
    adata.obs["instance"] = [*rng.permutation(30), *rng.permutation(30), *range(30, 0, -1)]
    grid = 5.0 * np.stack(np.meshgrid(np.arange(6), np.arange(5)), axis=-1).reshape(-1, 2) + 3
    ids = adata.obs["instance"].to_numpy().reshape(3, 30)
    sdata = made(
        adata,
        a=shapes(grid, ids[0], {"global": scaled(2)}),
        b=shapes(grid, ids[1], {"global": moved(500)}, polygons=True),
        c=labels(grid, {"global": moved(1000)}),
    )
    found = resolve_table(sdata)
    # The centre of pixel 0 is at 0.5, and labels are numbered by place.
    expected = np.concatenate([2 * grid, grid, grid[::-1]])
    expected += np.repeat([[0, 0], [500, 0], [1000.5, 0.5]], 30, axis=0)
    np.testing.assert_allclose(found.obsm["spatial"], expected)
    assert found is sdata["table"]
    record = found.uns["stofm"]["spatial"]["params"]
    assert record == {"a": "global", "b": "global", "c": "global"}


def test_a_copy_leaves_the_table_without_places(adata, rows, model):
    elements = circles(adata, rows, left={"global": scaled(2)}, right={"global": scaled(2)})
    sdata = made(adata, **elements)
    expected = st.tl.embed(adata, model, library_key="library", copy=True, show_progress_bar=False)
    found = st.tl.embed(sdata, model, copy=True, show_progress_bar=False)
    assert "spatial" not in sdata["table"].obsm
    np.testing.assert_allclose(found.obsm["spatial"], adata.obsm["spatial"])
    np.testing.assert_allclose(found.obsm[Obsm.X], expected.obsm[Obsm.X], atol=1e-5)


def test_places_in_the_table_are_used_as_they_are(adata, rows):
    sdata = made(
        adata, **circles(adata, rows, left={"global": scaled(9)}, right={"one": scaled(9)})
    )
    sdata["table"].obsm["spatial"] = adata.obsm["spatial"]
    np.testing.assert_array_equal(resolve_table(sdata).obsm["spatial"], adata.obsm["spatial"])


def test_a_region_with_several_systems_and_no_global_one_is_refused(adata, rows):
    both = {"pixels": scaled(1), "um": scaled(2)}
    sdata = made(adata, **circles(adata, rows, left=both, right={"um": scaled(2)}))
    with pytest.raises(
        ValueError, match=r"'left'\] has the coordinate systems \['pixels', 'um'\]"
    ) as e:
        st.pp.tokenize(sdata)
    assert "spatial" not in sdata["table"].obsm
    exec(str(e.value).partition("choose one: ")[2], {"sdata": sdata})
    resolve_table(sdata)
    # Here the first one was chosen, in another unit than that of the other region.
    left = adata.obs["library"] == "left"
    np.testing.assert_allclose(
        sdata["table"].obsm["spatial"], adata.obsm["spatial"] / np.where(left, 2, 1)[:, None]
    )


def test_instances_without_a_shape_are_counted_and_named(adata, rows):
    sdata = made(adata, **circles(adata, rows, left={"global": scaled(2)}, right={"g": scaled(2)}))
    lost = sdata["right"].index[[4, 7]].tolist()
    sdata["right"] = sdata["right"].drop(lost)
    with pytest.raises(ValueError, match=r"2 of 83 instances of 'right'") as error:
        st.tl.embed(sdata)
    assert all(str(one) in str(error.value) for one in lost)
    assert "spatial" not in sdata["table"].obsm
    exec(str(error.value).partition("Drop them: ")[2], {"sdata": sdata})
    assert resolve_table(sdata).n_obs == adata.n_obs - 2


def test_ids_of_another_type_are_all_missing(adata, rows):
    sdata = made(adata, **circles(adata, rows, left={"g": scaled(2)}, right={"g": scaled(2)}))
    sdata["left"].index = sdata["left"].index.astype(str)
    with pytest.raises(
        ValueError, match=r"101 of 101 instances of 'left'.*its ids are such as \['"
    ):
        resolve_table(sdata)


def test_what_is_not_there_gives_no_places(adata, rows, caplog):
    with caplog.at_level("INFO", logger="stofm"):
        assert "spatial" not in resolve_table(made(adata)).obsm
    assert "annotates 'left', which the SpatialData lacks" in caplog.text


@pytest.mark.parametrize("area", [st.pp, st.tl, st.pl])
def test_all_that_take_a_table_take_its_key(area):
    functions = {name: getattr(area, name) for name in area.__all__}
    parameters = {
        name: inspect.signature(one).parameters
        for name, one in functions.items()
        if inspect.isfunction(one)
        and (area, name) not in {(st.pl, one) for one in ("influence", "probe", "training")}
    }
    assert len(parameters) >= 3
    assert [name for name, one in parameters.items() if "table_key" not in one] == []


# Slices


def test_regions_on_each_other_are_slices(adata, rows):
    sdata = made(adata, **circles(adata, rows, left={"global": scaled(2)}, right={"g": scaled(2)}))
    assert slices(resolve_table(sdata)).names == ["left", "right"]


@pytest.mark.parametrize("system", ["global", "its own"])
def test_regions_side_by_side_are_one_slice_unless_systems_differ(adata, rows, system, tmp_path):
    adata.obsm["spatial"] /= [7, 1]
    systems = {"left": {"global": scaled(2)}, "right": {system: moved(105)}}
    table = resolve_table(made(adata, **circles(adata, rows, **systems)))
    table.write_h5ad(tmp_path / "x.h5ad")
    expected = [""] if system == "global" else ["left", "right"]
    for one in (table, table[::2].copy(), ad.read_h5ad(tmp_path / "x.h5ad")):
        said = pytest.warns(
            UserWarning, match="lie beside each other and are taken as parts of one"
        )
        with said if system == "global" else nullcontext():
            assert slices(one).names == expected


def test_regions_far_apart_are_one_slice_and_that_is_said(adata, rows):
    adata.obsm["spatial"] /= [7, 1]
    systems = {"left": {"global": scaled(2)}, "right": {"global": moved(8000)}}
    table = resolve_table(made(adata, **circles(adata, rows, **systems)))
    with pytest.warns(
        UserWarning, match=r"2 values of obs\['(region|library)'\] .* lie apart"
    ) as seen:
        assert slices(table).names == [""]
    assert len(seen) == 1


# Stores


def damage(store: Path) -> None:
    """Leave nothing of what need not be read: images and points."""
    for name in ("images", "points"):
        for file in (store / name).rglob("*"):
            if file.is_file() and file.suffix != ".json":
                file.write_bytes(b"")


def test_a_store_is_opened_without_counts_images_and_points(store, adata):
    damage(store)
    found = open_table(store)
    assert not hasattr(found.X, "indices")  # still on disk
    np.testing.assert_allclose(found.obsm["spatial"], adata.obsm["spatial"])
    assert slices(found).names == ["left", "right"]
    with pytest.raises(KeyError, match=r"has the tables \['table'\]"):
        open_table(store, "cells")


def test_a_store_that_lacks_chunks_is_refused(store):
    shutil.rmtree(store / "tables" / "table" / "X" / "data" / "c")
    with pytest.raises(ValueError, match=r"lacks a part: the array '.*X/data' has 0 of 1 chunks"):
        open_table(store)


def test_folders_of_stores_are_read(store, adata, vocabulary):
    [source] = find_sources(store.parent, FileConfig())
    with source.open() as found:
        assert found.shape == adata.shape
        assert "spatial" in found.obsm
    expected = st.GeneVocabulary.fit([adata], min_cells=1)
    for one in (store, read_data(store)):
        assert st.GeneVocabulary.fit([one], min_cells=1).fingerprint == expected.fingerprint


def test_a_table_of_its_own_is_added_to_a_store(store, model):
    sdata = read_data(store)
    st.tl.embed(sdata, model, show_progress_bar=False)
    before = sorted(file for file in (store / "tables" / "table").rglob("*"))
    sdata["embedded"] = sdata["table"]
    sdata.write_element("embedded")
    again = read_data(store)
    assert Obsm.X not in again["table"].obsm
    np.testing.assert_array_equal(again["embedded"].obsm[Obsm.X], sdata["table"].obsm[Obsm.X])
    assert sorted(file for file in (store / "tables" / "table").rglob("*")) == before
    assert Obsm.X in open_table(store, "embedded").obsm


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "howto" / "spatialdata.md"
    if not page.is_file():
        pytest.skip("no docs/ beside the tests")
    adata = st.datasets.simulate_slice(300, 200, seed=0)
    adata.obs["instance"], adata.obs["library"] = np.arange(300), "cells"
    systems = {"cells": {"pixels": scaled(1), "um": scaled(2)}}
    sdata = made(adata, **circles(adata, {"cells": np.arange(300)}, **systems))
    sdata.write(tmp_path / "slice.zarr")
    first, choice, *others = re.findall("```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    imports, rest = first.split("st.tl.embed", 1)
    for code in (imports, choice, "st.tl.embed" + rest, *others):
        exec(code, scope)
    assert {Obsm.X, "spatial"} <= set(open_table(tmp_path / "slice.zarr", "embedded").obsm)


@pytest.mark.parametrize(
    ("name", "regions", "own"),
    [
        ("several_regions", ["s1", "s2", "s3"], 3),
        ("visium_like", ["spots"], 1),
        ("xenium_like", ["cell_boundaries"], 1),
    ],
)
def test_stores_as_they_are_written_elsewhere(name, regions, own, shared, model):
    from spatialdata import transform

    store = shared / "instruments" / "_spatialdata_stores" / f"{name}.zarr"
    if not store.is_dir():
        pytest.skip(f"needs the development data ({store} is not there)")
    opened, sdata = open_table(store), read_data(store)
    had_places = "spatial" in sdata["table"].obsm
    table = resolve_table(sdata)
    np.testing.assert_array_equal(opened.obsm["spatial"], table.obsm["spatial"])
    assert len(slices(table).names) == own
    key = table.uns["spatialdata_attrs"]
    for region in set(regions) - {"s3"} if not had_places else ():
        shape = transform(sdata[region], to_coordinate_system="global").geometry.centroid
        rows = np.flatnonzero(table.obs[key["region_key"]] == region)
        places = shape.loc[table.obs[key["instance_key"]].iloc[rows]]
        np.testing.assert_allclose(table.obsm["spatial"][rows], np.c_[places.x, places.y], atol=0.5)
    st.pp.map_genes(sdata)
