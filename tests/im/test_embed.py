from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.spatial.distance import cdist

import stofm as st

if TYPE_CHECKING:
    from pathlib import Path

    import torch

SIDE = 400


def colours(images: torch.Tensor) -> torch.Tensor:
    """Mean colours, whose differences tell one patch from another."""
    return images.mean(dim=(2, 3))


colours.n_pixels = 8


@pytest.fixture
def picture() -> np.ndarray:
    """Red grows with x and green with y."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE * 255
    return np.stack([x, y, np.full_like(x, 51)], axis=-1).astype(np.uint8)


def table(xy: np.ndarray, **uns: Any) -> ad.AnnData:
    names = pd.Index([f"spot{k}" for k in range(len(xy))])
    adata = ad.AnnData(np.zeros((len(xy), 1), np.float32), obs=pd.DataFrame(index=names), uns=uns)
    adata.obsm["spatial"] = np.asarray(xy, dtype=float)
    return adata


@pytest.fixture
def adata(rng: np.random.Generator) -> ad.AnnData:
    """Spots on a square lattice of 25 pixels, mixed; no Visium."""
    x, y = np.meshgrid(np.arange(60, 360, 25), np.arange(60, 360, 25))
    return table(rng.permutation(np.column_stack([x.ravel(), y.ravel()])))


def hexagonal(pitch: float, n: int = 12) -> np.ndarray:
    row, column = (one.ravel() for one in np.mgrid[:n, :n])
    return np.column_stack([pitch * (column + row % 2 / 2), pitch * np.sqrt(3) / 2 * row]) + pitch


def library(image: np.ndarray, **factors: float) -> dict[str, Any]:
    return {"images": {"hires": image}, "scalefactors": factors}


def test_each_row_is_of_its_own_place(adata: ad.AnnData, picture: np.ndarray) -> None:
    before = adata.obsm["spatial"].copy()
    st.im.embed(adata, colours, image=picture, microns_per_unit=2.0, crops=(40, 80), device="cpu")
    for key in ("X_image_spot", "X_image_niche"):
        found = adata.obsm[key]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, :2], before / SIDE, atol=0.006)
        np.testing.assert_allclose(found[:, 2], 0.2, atol=1e-5)
    np.testing.assert_array_equal(adata.obsm["spatial"], before)


def corner(images: torch.Tensor) -> torch.Tensor:
    """Mean of a patch's upper left, more of it at the top."""
    return images[:, :, :2, :4].mean(dim=(2, 3))


corner.n_pixels = 8


@pytest.mark.parametrize("n_views", [1, 2, 4, 8])
def test_features_are_means_over_orientations(
    adata: ad.AnnData, rng: np.random.Generator, n_views: int
) -> None:
    stored = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    options: dict[str, Any] = {"microns_per_unit": 1.0, "crops": (8, 16), "n_views": n_views}
    st.im.embed(adata, corner, image=stored, **options)
    parts = [(slice(2), slice(4)), (slice(2), slice(4, 8)), (slice(6, 8), slice(4))]
    parts += [(slice(6, 8), slice(4, 8))]
    parts += [part[::-1] for part in (parts[0], parts[2], parts[1], parts[3])]
    for found, (x, y) in zip(adata.obsm["X_image_spot"], adata.obsm["spatial"], strict=True):
        patch = stored[int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4] / 255
        means = [patch[part].mean(axis=(0, 1)) for part in parts[:n_views]]
        np.testing.assert_allclose(found, np.mean(means, axis=0), atol=1e-4)
    assert adata.uns["stofm"]["X_image_niche"]["params"]["n_views"] == n_views


def test_other_numbers_of_views_are_refused(adata: ad.AnnData, picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"n_views must be one of \[1, 2, 4, 8\], found 3"):
        st.im.embed(adata, colours, image=picture, microns_per_unit=2.0, n_views=3)


def test_the_order_of_rows_does_not_matter(
    adata: ad.AnnData, picture: np.ndarray, rng: np.random.Generator
) -> None:
    options: dict[str, Any] = {"image": picture, "microns_per_unit": 1.0, "crops": (13, 39)}
    mixed = adata[rng.permutation(adata.n_obs)].copy()
    few = adata[:5].copy()
    for one in (adata, mixed, few):
        st.im.embed(one, colours, **options)
    for key in ("X_image_spot", "X_image_niche"):
        np.testing.assert_allclose(mixed[adata.obs_names].obsm[key], adata.obsm[key], atol=1e-6)
        np.testing.assert_allclose(few.obsm[key], adata.obsm[key][:5], atol=1e-6)


def test_the_niche_is_seen_at_its_own_scale(picture: np.ndarray) -> None:
    picture[:] = 0
    picture[180:220, 180:220] = 255
    adata = table([[200.0, 200.0], [200.0, 260.0]])
    st.im.embed(adata, colours, image=picture, microns_per_unit=0.5, crops=(20, 40))
    spot, niche = adata.obsm["X_image_spot"][:, 0], adata.obsm["X_image_niche"][:, 0]
    np.testing.assert_allclose(spot, [1, 0], atol=0.01)
    np.testing.assert_allclose(niche, [0.25, 0], atol=0.02)


def test_what_is_recorded(adata: ad.AnnData, picture: np.ndarray, tmp_path: Path) -> None:
    with pytest.warns(st.nn.UntrainedModelWarning):
        st.im.embed(adata, image=picture, scale=0.5, microns_per_unit=0.25, crops=(32, 64))
    for key, side in (("X_image_spot", 32), ("X_image_niche", 64)):
        record = adata.uns["stofm"][key]
        assert record["params"] == {
            "encoder": "cnn",
            "n_views": 1,
            "spatial_key": "spatial",
            "library_key": "",
            "microns": side,
        }
        assert len(record["fingerprint"]) == 16
        assert record["n_pixels"] == 64
        assert record["microns_per_pixel"] == 0.5
        assert record["microns_per_unit"] == 0.25
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad").uns["stofm"]["X_image_spot"]
    assert again["fingerprint"] == adata.uns["stofm"]["X_image_spot"]["fingerprint"]


def test_a_copy_leaves_the_table_as_it_is(adata: ad.AnnData, picture: np.ndarray) -> None:
    options: dict[str, Any] = {"image": picture, "microns_per_unit": 1.0, "crops": (40, 80)}
    found = st.im.embed(adata, "statistics", **options, key_added="X_he", copy=True)
    assert found.obsm["X_he_spot"].shape == (adata.n_obs, 30)
    assert list(adata.obsm) == ["spatial"]
    assert "stofm" not in adata.uns


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda image: image[..., 0], 3),
        (lambda image: image.astype(np.uint16) * 16, 3),
        (lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]), 3),
        (lambda image: image / 255, 3),
        (lambda image: image.transpose(2, 0, 1), 3),
    ],
    ids=["grey", "16-bit", "RGBA", "float", "channels first"],
)
def test_images_of_any_kind(
    adata: ad.AnnData, picture: np.ndarray, change: Any, shape: int
) -> None:
    st.im.embed(adata, colours, image=change(picture), microns_per_unit=1.0, crops=(20, 40))
    found = adata.obsm["X_image_spot"]
    assert found.shape == (adata.n_obs, shape)
    assert np.corrcoef(found[:, 0], adata.obsm["spatial"][:, 0])[0, 1] > 0.99


def test_an_image_smaller_than_a_crop(picture: np.ndarray) -> None:
    adata = table([[2.0, 3.0], [4.0, 1.0]])
    st.im.embed(adata, colours, image=picture[:5, :7], microns_per_unit=1.0, crops=(100, 200))
    assert np.isfinite(adata.obsm["X_image_niche"]).all()


def test_spots_outside_are_counted_or_refused(adata: ad.AnnData, picture: np.ndarray) -> None:
    options: dict[str, Any] = {"image": picture, "microns_per_unit": 1.0, "crops": (20, 40)}
    adata.obsm["spatial"][:3] = [[-1, 50], [50, 401], [1000, -1000]]
    with (
        pytest.warns(UserWarning, match="3 of 144 cells lie outside the image of 400 x 400 pixels"),
        pytest.warns(UserWarning, match="lie far from the others"),
    ):
        st.im.embed(adata, colours, **options)
    assert np.isfinite(adata.obsm["X_image_spot"]).all()
    adata.obsm["spatial"] = adata.obsm["spatial"][::-1] * 9
    with (
        pytest.raises(ValueError, match=r"144 cells lie outside .* Pass `scale`"),
        pytest.warns(UserWarning, match="lie far from the others"),
    ):
        st.im.embed(adata, colours, **options)


def test_patches_that_are_enlarged_are_warned_of(adata: ad.AnnData, picture: np.ndarray) -> None:
    options: dict[str, Any] = {"image": picture, "crops": (20, 40)}
    with pytest.warns(UserWarning, match="have 2 pixels of the image and are enlarged 4 times"):
        st.im.embed(adata, colours, microns_per_unit=10.0, **options)
    st.im.embed(adata, colours, microns_per_unit=5.0, **options)  # twice: no warning


def test_bad_arguments(adata: ad.AnnData, picture: np.ndarray) -> None:
    good: dict[str, Any] = {"image": picture, "microns_per_unit": 1.0}
    for options, message in (
        ({"crops": (40, 20)}, "`crops` must be the sides"),
        ({"microns_per_unit": -1}, "microns_per_unit must be a number above 0"),
        ({"scale": 0.0}, "scale must be a number above 0"),
        ({"key_added": "a/b"}, "can't be written to a file"),
    ):
        with pytest.raises(ValueError, match=message):
            st.im.embed(adata, colours, **{**good, **options})
    with pytest.raises(KeyError, match="There is no image 'hires' or 'lowres'"):
        st.im.embed(adata, colours)
    adata.obsm["X_mine_spot"] = np.zeros((adata.n_obs, 2))
    with pytest.raises(ValueError, match="which stofm did not write"):
        st.im.embed(adata, colours, **good, key_added="X_mine")
    assert "stofm" not in adata.uns


# Micrometres


def microns(adata: ad.AnnData) -> float:
    return float(adata.uns["stofm"]["X_image_spot"]["microns_per_unit"][0])


def test_an_argument_comes_first(picture: np.ndarray) -> None:
    factors = {"spot_diameter_fullres": 20.0, "tissue_hires_scalef": 1.0}
    adata = table(hexagonal(30.0), spatial={"a": library(picture, **factors)})
    st.im.embed(adata, colours, microns_per_unit=2.0)
    assert microns(adata) == 2.0


def test_visium_is_known_by_its_spots(picture: np.ndarray) -> None:
    factors = {"spot_diameter_fullres": 20.0, "tissue_hires_scalef": 1.0}
    adata = table(hexagonal(20 * 100 / 65), spatial={"a": library(picture, **factors)})
    st.im.embed(adata, colours)
    assert microns(adata) == 65 / 20
    adata.obsm["spatial"] *= 0.93
    with pytest.warns(UserWarning, match=r"neighbouring spots at 100 µm say 3\.495"):
        st.im.embed(adata, colours)
    assert microns(adata) == 65 / 20
    # A part of the spots, turned.
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    part = adata[np.random.default_rng(0).permutation(144)[:70]].copy()
    part.obsm["spatial"] = part.obsm["spatial"] / 0.93 @ turn.T * 0.5 + 100
    part.uns["spatial"]["a"]["scalefactors"]["spot_diameter_fullres"] = 10.0
    st.im.embed(part, colours)
    assert microns(part) == 6.5


@pytest.mark.parametrize("lattice", ["square", "wide"])
def test_other_spots_with_a_diameter_are_not_taken_for_visium(
    picture: np.ndarray, adata: ad.AnnData, lattice: str
) -> None:
    factors = {"spot_diameter_fullres": 16.0, "tissue_hires_scalef": 1.0}
    adata = adata if lattice == "square" else table(hexagonal(32.0))
    adata.uns["spatial"] = {"a": library(picture, **factors)}
    with pytest.raises(
        ValueError, match=r"nothing says how many micrometres .* `microns_per_unit`"
    ):
        st.im.embed(adata, colours)
    st.im.embed(adata, colours, pitch=200)
    assert microns(adata) == pytest.approx(200 / (25 if lattice == "square" else 32))


def test_metadata_come_before_visium(picture: np.ndarray, tmp_path: Path) -> None:
    factors = {"spot_diameter_fullres": 20.0, "tissue_hires_scalef": 1.0, "microns_per_pixel": 1.5}
    adata = table(hexagonal(30.0), spatial={"a": library(picture, **factors)})
    st.im.embed(adata, colours)
    assert microns(adata) == 1.5
    metadata = {"PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture, metadata=metadata)
    # A pixel of the file is half a unit of the coordinates.
    st.im.embed(adata, colours, image=tmp_path / "a.ome.tif", scale=0.5)
    assert microns(adata) == 2.0
    record = adata.uns["stofm"]["X_image_spot"]
    assert (record["image"][0], record["microns_per_pixel"][0]) == ("a.ome.tif", 4.0)
    adata.uns["stofm"]["source"] = {"unit": "micrometre"}
    st.im.embed(adata, colours, image=tmp_path / "a.ome.tif", scale=0.5)
    assert microns(adata) == 1.0


def test_a_pitch_that_contradicts_the_metadata_is_told(picture: np.ndarray) -> None:
    factors = {"tissue_hires_scalef": 1.0, "microns_per_pixel": 2.0}
    adata = table(hexagonal(30.0), spatial={"a": library(picture, **factors)})
    with pytest.warns(UserWarning, match=r"spots at 100 µm say 3\.333"):
        st.im.embed(adata, colours, pitch=100)
    assert microns(adata) == 2.0


@pytest.mark.parametrize(("spacing", "sides"), [(100.0, (100, 200)), (9.0, (40, 120))])
def test_crops_of_spots_and_of_cells(
    adata: ad.AnnData, picture: np.ndarray, spacing: float, sides: tuple[int, int]
) -> None:
    st.im.embed(adata, colours, image=picture, microns_per_unit=spacing / 25)
    found = [adata.uns["stofm"][f"X_image_{one}"]["params"]["microns"] for one in ("spot", "niche")]
    assert tuple(found) == sides


# Sources


def test_the_larger_image_with_its_factor_is_taken(adata: ad.AnnData, picture: np.ndarray) -> None:
    stored = library(picture, tissue_hires_scalef=1.0, tissue_lowres_scalef=0.25)
    stored["images"]["lowres"] = picture[::4, ::4]
    adata.uns["spatial"] = {"a": stored}
    found = {}
    for image, per_pixel in ((None, 1.0), ("lowres", 4.0)):
        st.im.embed(adata, colours, image=image, microns_per_unit=1.0, crops=(32, 64))
        assert adata.uns["stofm"]["X_image_spot"]["microns_per_pixel"] == per_pixel
        found[image] = adata.obsm["X_image_spot"]
    np.testing.assert_allclose(found[None], found["lowres"], atol=0.01)


def test_missing_scale_factors(adata: ad.AnnData, picture: np.ndarray) -> None:
    adata.uns["spatial"] = {"a": library(picture, tissue_lowres_scalef=1.0)}
    with pytest.raises(KeyError, match=r"no scale factor 'tissue_hires_scalef' \(it has .*lowres"):
        st.im.embed(adata, colours, microns_per_unit=1.0)


def test_each_slice_has_its_own_image(picture: np.ndarray, rng: np.random.Generator) -> None:
    xy = rng.uniform(50, 350, (40, 2))
    adata = table(np.vstack([xy, xy]))
    adata.obs["slide"] = ["a"] * 40 + ["b"] * 40
    adata.uns["spatial"] = {
        "a": library(picture, tissue_hires_scalef=1.0),
        "b": library(picture[::2, ::2] // 2, tissue_hires_scalef=0.5),
    }
    options: dict[str, Any] = {"microns_per_unit": 1.0, "crops": (20, 40)}
    st.im.embed(adata, colours, **options)  # told by the names of the images
    found = adata.obsm["X_image_spot"]
    np.testing.assert_allclose(found[:40] / 2, found[40:], atol=0.01)
    np.testing.assert_array_equal(adata.uns["stofm"]["X_image_spot"]["slice"], ["a", "b"])
    images, scale = {"a": picture, "b": picture[::2, ::2] // 2}, {"a": 1.0, "b": 0.5}
    st.im.embed(adata, colours, image=images, scale=scale, library_key="slide", **options)
    np.testing.assert_allclose(adata.obsm["X_image_spot"], found, atol=1e-6)
    with pytest.raises(KeyError, match=r"`image` has entries for .* none for the slice 'b'"):
        st.im.embed(adata, colours, image={"a": picture}, library_key="slide", **options)


def test_features_made_elsewhere_are_averaged_over_the_niche(
    adata: ad.AnnData, rng: np.random.Generator
) -> None:
    adata.obsm["X_other"] = rng.normal(size=(adata.n_obs, 5))
    st.im.embed(adata, "X_other", pitch=100)
    np.testing.assert_allclose(adata.obsm["X_image_spot"], adata.obsm["X_other"], rtol=1e-6)
    near = cdist(adata.obsm["spatial"], adata.obsm["spatial"]) <= 25.01  # itself and four
    expected = near @ adata.obsm["X_other"] / near.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adata.obsm["X_image_niche"], expected, rtol=1e-5, atol=1e-6)
    assert adata.uns["stofm"]["X_image_niche"]["params"]["encoder"] == "X_other"


def test_niches_do_not_cross_slices(rng: np.random.Generator) -> None:
    xy = rng.uniform(0, 100, (20, 2))
    adata = table(np.vstack([xy, xy]))
    adata.obs["slide"] = ["a"] * 20 + ["b"] * 20
    adata.obsm["X_other"] = np.repeat([[1.0], [3.0]], 20, axis=0)
    st.im.embed(adata, "X_other", microns_per_unit=1.0, library_key="slide")
    np.testing.assert_array_equal(adata.obsm["X_image_niche"], adata.obsm["X_other"])


# SpatialData


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*SpatialData:UserWarning")
@pytest.mark.parametrize("scales", [None, [2]])
def test_a_spatialdata_image_through_its_transformation(
    picture: np.ndarray, rng: np.random.Generator, scales: list[int] | None
) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity

    # Pixels are three units wide, turned by a right angle and moved.
    matrix = np.array([[0.0, -3.0, 1500.0], [3.0, 0.0, 20.0], [0.0, 0.0, 1.0]])
    axes = ("x", "y")
    image = Image2DModel.parse(
        picture.transpose(2, 0, 1),
        dims=("c", "y", "x"),
        scale_factors=scales,
        transformations={"global": Affine(matrix, input_axes=axes, output_axes=axes)},
    )
    pixels = rng.uniform(50, 350, (31, 2))
    xy = pixels @ matrix[:2, :2].T + matrix[:2, 2]
    spots = ShapesModel.parse(
        xy, geometry=0, radius=1.0, index=np.arange(31), transformations={"global": Identity()}
    )
    adata = table(xy / 7)  # its own coordinates are of another system
    adata.obs["region"], adata.obs["id"] = pd.Categorical(["spots"] * 31), np.arange(31)
    adata = TableModel.parse(adata, region="spots", region_key="region", instance_key="id")
    sdata = spatialdata.SpatialData(
        images={"he": image}, shapes={"spots": spots}, tables={"t": adata}
    )
    st.im.embed(sdata, colours, microns_per_unit=0.5, crops=(30, 60))
    np.testing.assert_allclose(sdata["t"].obsm["X_image_spot"][:, :2], pixels / SIDE, atol=0.01)
    assert sdata["t"].uns["stofm"]["X_image_spot"]["microns_per_pixel"] == pytest.approx(1.5)
    sdata.images["other"] = image
    with pytest.raises(KeyError, match=r"images \['he', 'other'\]; pass one of them as `image`"):
        st.im.embed(sdata, colours, microns_per_unit=0.5)
    st.im.embed(sdata, colours, image="he", microns_per_unit=0.5, crops=(30, 60), key_added="X_2")
    np.testing.assert_array_equal(sdata["t"].obsm["X_2_spot"], sdata["t"].obsm["X_image_spot"])


# Real tissue


def test_the_section_of_the_package_has_an_image() -> None:
    adata = st.datasets.load("mouse_olfactory_bulb_st")
    with pytest.warns(UserWarning, match="are enlarged"):
        st.im.embed(adata, "statistics", pitch=200)
    # Tissue is darker than glass.
    assert adata.obsm["X_image_niche"].shape == (379, 30)
    assert np.ptp(adata.obsm["X_image_niche"][:, 0]) > 0.1


def test_a_slide_tells_tissue_from_fat(shared: Path) -> None:
    adata = ad.read_h5ad(shared / "data" / "her2st_B4.h5ad")
    scale = float(adata.uns["he_image"]["scale_from_fullres"])
    file = shared / "data" / "her2st_B4_he.jpg"
    st.im.embed(adata, "statistics", image=file, scale=scale, pitch=200)
    record = adata.uns["stofm"]["X_image_spot"]
    assert record["microns_per_pixel"][0] == pytest.approx(2.1, rel=0.05)
    # Where there are more cells, the image is darker and there is more RNA.
    counts = np.log1p(np.asarray(adata.X.sum(axis=1)).ravel())
    darkness = -adata.obsm["X_image_spot"][:, :3].mean(axis=1)
    assert np.corrcoef(counts, darkness)[0, 1] > 0.4


def test_a_visium_slide_with_a_small_image(shared: Path) -> None:
    adata = ad.read_h5ad(shared / "data" / "dlpfc_151674.h5ad")
    with (
        pytest.warns(UserWarning, match="neighbouring spots at 100 µm say 0.72"),
        pytest.warns(UserWarning, match="have 6.67 pixels of the image and are enlarged 9.6 times"),
    ):
        st.im.embed(adata, "statistics")
    assert microns(adata) == pytest.approx(65 / 96.378, rel=1e-4)
    # The white matter is unlike the cortex.
    features = adata.obsm["X_image_niche"]
    is_white = (adata.obs["layer"] == "WM").to_numpy()
    gap = features[is_white].mean(axis=0) - features[~is_white].mean(axis=0)
    assert (np.abs(gap) / features.std(axis=0)).max() > 0.8


def test_the_log_says_which_patches(adata: ad.AnnData, picture: np.ndarray, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "stofm"):
        st.im.embed(adata, colours, image=picture, microns_per_unit=4.0)
    assert "Patches of 100 and 200 µm, as cells or spots are 100 µm apart." in caplog.text


def test_a_wrong_name_of_features_names_those_that_are_near(adata: ad.AnnData) -> None:
    adata.obsm["X_uni"] = np.ones((adata.n_obs, 3), np.float32)
    with pytest.raises(KeyError, match=r"encoder='X_un1' is none of .* mean \['X_uni'\]"):
        st.im.embed(adata, "X_un1", pitch=100)
    with pytest.raises(KeyError, match=r"mean \['statistics'\]"):
        st.im.embed(adata, "statistic", pitch=100)
    with pytest.raises(KeyError, match=r"hub id 'owner/name'"):
        st.im.embed(adata, "zzz", pitch=100)
