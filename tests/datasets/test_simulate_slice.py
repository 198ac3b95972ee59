from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial import cKDTree

import stofm as st
from stofm.datasets._tissues import _genes

if TYPE_CHECKING:
    from pathlib import Path


def totals(adata: ad.AnnData) -> np.ndarray:
    return np.asarray(adata.X.sum(axis=1)).ravel()


@pytest.mark.parametrize("regions", ["laminar", "nodular"])
@pytest.mark.parametrize("technology", ["xenium", "merfish", "slideseq", "visium"])
def test_counts_labels_and_places(technology: str, regions: str) -> None:
    adata = st.datasets.simulate_slice(211, 53, technology=technology, regions=regions)
    assert adata.shape == (211, 53)
    assert sp.issparse(adata.X)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.int32
    assert adata.X.data.min() > 0
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    for key in ("cell_type", "region", "slice_id"):
        assert isinstance(adata.obs[key].dtype, pd.CategoricalDtype)
        assert adata.obs[key].notna().all()
    assert adata.obsm["spatial"].shape == (211, 2)
    assert adata.obsm["spatial"].dtype == np.float64
    assert adata.uns["simulation"]["technology"] == technology


def test_only_spots_have_proportions() -> None:
    cells = st.datasets.simulate_slice(101, 31)
    assert "proportions" not in cells.obsm
    assert "n_cells" not in cells.obs


@pytest.mark.parametrize(
    "arguments", [{"technology": "visium"}, {"cells_per_spot": 3.5}], ids=["visium", "pseudospots"]
)
def test_proportions_are_those_of_the_cells_in_a_spot(arguments: dict) -> None:
    adata = st.datasets.simulate_slice(301, 31, **arguments)
    proportions = adata.obsm["proportions"]
    np.testing.assert_allclose(proportions.sum(axis=1), 1.0, rtol=1e-12)
    assert proportions.index.equals(adata.obs_names)
    in_cells = proportions.to_numpy() * adata.obs["n_cells"].to_numpy()[:, None]
    np.testing.assert_allclose(in_cells, np.round(in_cells), atol=1e-9)
    most_frequent = proportions.to_numpy().max(axis=1)
    of_label = proportions.to_numpy()[
        np.arange(301), proportions.columns.get_indexer(adata.obs["cell_type"])
    ]
    np.testing.assert_array_equal(of_label, most_frequent)


def test_mean_number_of_cells_in_a_spot() -> None:
    adata = st.datasets.simulate_slice(2003, 7, cells_per_spot=4.0)
    assert adata.obs["n_cells"].mean() == pytest.approx(4.0, abs=0.2)
    assert adata.obs["n_cells"].min() >= 1


def test_visium_spots_lie_on_a_hexagonal_lattice() -> None:
    places = st.datasets.simulate_slice(203, 7, technology="visium").obsm["spatial"]
    distances = cKDTree(places).query(places, k=7)[0]
    np.testing.assert_allclose(distances[:, 1], 100.0)
    inside = distances[:, 6] < 101.0
    assert inside.mean() > 0.6


def test_cells_keep_their_distance_without_a_lattice() -> None:
    places = st.datasets.simulate_slice(1009, 7).obsm["spatial"]
    nearest = cKDTree(places).query(places, k=[2])[0]
    assert 6.0 < np.median(nearest) < 12.0
    assert nearest.std() > 1.0


def test_expected_depth() -> None:
    adata = st.datasets.simulate_slice(1501, 61, depth=90.0, n_slices=3)
    # Types differ in size, sections in depth, and some counts drop out.
    assert 45.0 < totals(adata).mean() < 130.0
    deeper = st.datasets.simulate_slice(1501, 61, depth=360.0)
    assert totals(deeper).mean() > 2.5 * totals(adata).mean()


def test_counts_are_noisier_than_poisson() -> None:
    adata = st.datasets.simulate_slice(1501, 41, technology="merfish", seed=3)
    tumor = adata[adata.obs["cell_type"] == adata.obs["cell_type"].value_counts().index[0]]
    counts = tumor.X.toarray()
    expressed = counts.mean(axis=0) > 1
    assert (counts.var(axis=0)[expressed] > 1.5 * counts.mean(axis=0)[expressed]).all()


def test_markers_are_higher_in_their_types() -> None:
    adata = st.datasets.simulate_slice(1999, 101, regions="nodular", seed=5)
    share = sp.diags_array(1 / np.maximum(totals(adata), 1)) @ adata.X
    wins = []
    for cell_type in adata.obs["cell_type"].cat.categories:
        marks = np.array([cell_type in text.split(",") for text in adata.var["marker_of"]])
        is_type = (adata.obs["cell_type"] == cell_type).to_numpy()
        if is_type.sum() < 10:
            continue
        inside = np.asarray(share[is_type].mean(axis=0)).ravel()[marks]
        outside = np.asarray(share[~is_type].mean(axis=0)).ravel()[marks]
        wins.extend(inside > outside)
    assert np.mean(wins) > 0.95


def test_regions_differ_in_composition() -> None:
    adata = st.datasets.simulate_slice(3001, 11, seed=2)
    table = pd.crosstab(adata.obs["region"], adata.obs["cell_type"], normalize="index")
    assert table.loc["WM", "Oligodendrocyte"] > 0.4
    assert table.loc["L4", "L4 IT"] > 0.3
    assert table.loc["L2-3", "L4 IT"] < 0.1
    depth = adata.obs.groupby("region", observed=True).apply(
        lambda rows: adata[rows.index].obsm["spatial"][:, 1].mean(), include_groups=False
    )
    assert list(depth.index) == ["L1", "L2-3", "L4", "L5", "L6", "WM"]
    assert depth.is_monotonic_increasing


def test_expression_changes_inside_a_region() -> None:
    adata = st.datasets.simulate_slice(4001, 61, technology="merfish", seed=4)
    chosen = adata[(adata.obs["region"] == "L2-3") & (adata.obs["cell_type"] == "L2-3 IT")]
    right = chosen.obsm["spatial"][:, 0] > np.median(chosen.obsm["spatial"][:, 0])
    counts = chosen.X.toarray()
    left_mean, right_mean = counts[~right].mean(axis=0), counts[right].mean(axis=0)
    error = np.sqrt(
        counts[~right].var(axis=0) / (~right).sum() + counts[right].var(axis=0) / right.sum()
    )
    z = np.abs(left_mean - right_mean) / np.maximum(error, 1e-9)
    assert 1 <= (z > 4).sum() < 30


def test_types_can_be_found_but_not_perfectly() -> None:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_rand_score

    adata = st.datasets.simulate_slice(701, 151, seed=1)
    counts = adata.X.toarray()
    share = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 150)
    scores = PCA(15, random_state=0).fit_transform(share)
    labels = KMeans(12, n_init=2, random_state=0).fit_predict(scores)
    assert 0.35 < adjusted_rand_score(adata.obs["cell_type"], labels) < 0.95


def test_same_seed_same_slice_other_seed_other_slice() -> None:
    first, again, other = (
        st.datasets.simulate_slice(97, 29, seed=seed, technology="visium") for seed in (8, 8, 9)
    )
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    np.testing.assert_array_equal(first.obsm["spatial"], again.obsm["spatial"])
    pd.testing.assert_frame_equal(first.obsm["proportions"], again.obsm["proportions"])
    assert (first.X != other.X).nnz > 0
    # Other sections of the same tissue: the panel does not depend on the seed.
    assert first.var_names.equals(other.var_names)


def test_more_slices_do_not_change_the_first() -> None:
    one = st.datasets.simulate_slice(89, 23, seed=6)
    three = st.datasets.simulate_slice(89, 23, seed=6, n_slices=3)
    assert three.n_obs == 3 * 89
    assert list(three.obs["slice_id"].cat.categories) == ["slice0", "slice1", "slice2"]
    first = three[three.obs["slice_id"] == "slice0"]
    assert (first.X != one.X).nnz == 0
    np.testing.assert_array_equal(first.obsm["spatial"], one.obsm["spatial"])
    second = three[three.obs["slice_id"] == "slice1"]
    assert (first.X != second.X).nnz > 0


def test_a_smaller_panel_begins_a_larger_one() -> None:
    small = st.datasets.simulate_slice(5, 40)
    large = st.datasets.simulate_slice(5, 90)
    assert large.var_names[:40].equals(small.var_names)


def test_mouse_genes_are_the_counterparts_of_human_ones() -> None:
    genes = _genes()[_genes()["mouse"] != ""]
    mouse_of = dict(zip(genes["human"], genes["mouse"], strict=True))
    human = st.datasets.simulate_slice(3, 700)
    mouse = st.datasets.simulate_slice(3, 700, species="mouse")
    assert "Slc17a7" in mouse.var_names
    assert "SLC17A7" in human.var_names
    shared = [mouse_of[name] for name in human.var_names if name in mouse_of]
    assert len(set(shared) & set(mouse.var_names)) > 650


def test_symbols_are_real(shared: Path) -> None:
    with gzip.open(shared / "vocab" / "geneformer-30m.tsv.gz", "rt") as file:
        known = {line.rstrip("\n").split("\t")[3] for line in file}
    human = _genes()["human"].tolist()
    assert len(human) == len(set(human)) > 1500
    mouse = [name for name in _genes()["mouse"] if name]
    assert len(mouse) == len(set(mouse)) > 1500
    assert np.mean([name in known for name in human]) > 0.98


@pytest.mark.parametrize("technology", ["xenium", "visium"])
@pytest.mark.parametrize("regions", ["laminar", "nodular"])
@pytest.mark.parametrize("n_cells", [1, 2])
def test_one_and_two_cells(n_cells: int, regions: str, technology: str) -> None:
    adata = st.datasets.simulate_slice(n_cells, 5, regions=regions, technology=technology)
    assert adata.shape == (n_cells, 5)
    assert np.isfinite(adata.obsm["spatial"]).all()


def test_round_trip_through_h5ad(tmp_path: Path) -> None:
    adata = st.datasets.simulate_slice(43, 17, technology="visium", n_slices=2)
    adata.write_h5ad(tmp_path / "slice.h5ad")
    back = ad.read_h5ad(tmp_path / "slice.h5ad")
    assert (back.X != adata.X).nnz == 0
    pd.testing.assert_frame_equal(back.obsm["proportions"], adata.obsm["proportions"])
    assert back.uns["simulation"]["unit"] == "micrometre"
    assert back.uns["simulation"]["n_slices"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": 0}, "n_cells must be a whole number of at least 1, found 0"),
        ({"n_cells": 10.0}, "n_cells must be a whole number of at least 1, found 10.0"),
        ({"n_genes": True}, "n_genes must be a whole number of at least 1, found True"),
        ({"n_slices": -1}, "n_slices must be a whole number"),
        ({"n_genes": 9999}, "real symbols of 1576 human genes"),
        ({"n_genes": 1576, "species": "mouse"}, "real symbols of 1533 mouse genes"),
        ({"species": "rat"}, r"species must be one of \['human', 'mouse'\], found 'rat'"),
        ({"technology": "sequencing"}, "technology must be one of"),
        ({"regions": "round"}, r"regions must be one of \['laminar', 'nodular'\]"),
        ({"cells_per_spot": 0.5}, "cells_per_spot must be at least 1, found 0.5"),
        ({"depth": float("nan")}, "depth must be above 0, found nan"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.datasets.simulate_slice(**{"n_cells": 11, "n_genes": 7, **arguments})


@pytest.mark.parametrize("technology", ["visium", "xenium"])
def test_an_image_shows_what_is_planted(technology):
    options = {"technology": technology, "n_slices": 2, "seed": 3}
    plain = st.datasets.simulate_slice(231, 40, **options)
    adata = st.datasets.simulate_slice(231, 40, image=True, **options)
    again = st.datasets.simulate_slice(231, 40, image=True, **options)
    # Nothing else is drawn otherwise; coordinates are moved so that all rows are in the image.
    np.testing.assert_array_equal(adata.X.toarray(), plain.X.toarray())
    assert adata.obs.equals(plain.obs)
    for name, library in adata.uns["spatial"].items():
        rows = (adata.obs["slice_id"] == name).to_numpy()
        image, factors = library["images"]["hires"], library["scalefactors"]
        np.testing.assert_array_equal(again.uns["spatial"][name]["images"]["hires"], image)
        moved = adata.obsm["spatial"][rows] - plain.obsm["spatial"][rows]
        np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-9)
        pixels = adata.obsm["spatial"][rows] * factors["tissue_hires_scalef"]
        assert image.dtype == np.uint8
        assert (pixels > 5).all()
        assert (pixels < np.array(image.shape[1::-1]) - 5).all()
    # Stain between the nuclei tells regions apart: pale is where little is absorbed.
    st.im.embed(adata, _bright, device="cpu", show_progress_bar=False)
    bright = pd.Series(adata.obsm["X_image_niche"][:, 0])
    groups = bright.groupby([adata.obs["slice_id"].to_numpy(), adata.obs["region"].to_numpy()])
    own = bright.groupby(adata.obs["slice_id"].to_numpy()).var().mean()
    assert groups.var().mean() < 0.5 * own


def _bright(images):
    """Ninetieth percentile of green, which eosin absorbs."""
    return images[:, 1].flatten(1).quantile(0.9, dim=1)[:, None]


_bright.n_pixels = 16
