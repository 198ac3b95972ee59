from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pytest

import stofm as st

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@pytest.fixture
def pictured(adata: ad.AnnData) -> ad.AnnData:
    """Images in which a pixel is two units, red growing with x and green with y."""
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(20, 180, (adata.n_obs, 2))
    y, x = np.mgrid[:100, :100] / 100 * 255
    image = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    stored = {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 0.5}}
    adata.uns["spatial"] = {"a": stored, "b": stored}
    return adata


def color_at(ax: Axes, x: float, y: float) -> np.ndarray:
    """Colour that the panel's image has at a place in coordinates."""
    (image,) = ax.images
    column, row = (image.get_transform() - ax.transData).inverted().transform((x, y))
    left, right, bottom, top = image.get_extent()
    values = np.asarray(image.get_array())
    place = (row - top) / (bottom - top), (column - left) / (right - left)
    return values[tuple((np.array(place) * values.shape[:2]).astype(int))]


def test_cells_lie_on_the_tissue_where_they_are(pictured: ad.AnnData) -> None:
    axes = st.pl.image(pictured, "kind", library_key="slide", alpha=0.4, show=False)
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    for ax, name in zip(axes, "ab", strict=True):
        xy = pictured.obsm["spatial"][(pictured.obs["slide"] == name).to_numpy()]
        offsets = ax.collections[0].get_offsets()
        np.testing.assert_allclose(np.sort(offsets, axis=0), np.sort(xy, axis=0))
        assert ax.collections[0].get_alpha() == 0.4
        for x, y in xy[:5]:
            np.testing.assert_allclose(color_at(ax, x, y)[:2], [x / 200, y / 200], atol=0.02)
        low, high = xy.min(axis=0), xy.max(axis=0)
        assert ax.get_xlim()[0] <= low[0] <= high[0] <= ax.get_xlim()[1] <= 200
        assert ax.yaxis_inverted()


def test_another_image_with_its_scale(pictured: ad.AnnData) -> None:
    image = pictured.uns.pop("spatial")["a"]["images"]["hires"][::2, ::2]
    ax = st.pl.image(pictured, image=image, scale=0.25, show=False)
    np.testing.assert_allclose(color_at(ax, 60, 140)[:2], [0.3, 0.7], atol=0.03)


def test_without_an_image(adata: ad.AnnData) -> None:
    with pytest.raises(KeyError, match="There is no image 'hires' or 'lowres'"):
        st.pl.image(adata, show=False)


def test_spatial_draws_the_tissue_where_there_is_one(pictured: ad.AnnData) -> None:
    ax = st.pl.spatial(pictured, "kind", library_key="slide", library_id="a", show=False)
    for x, y in pictured.obsm["spatial"][(pictured.obs["slide"] == "a").to_numpy()][:5]:
        np.testing.assert_allclose(color_at(ax, x, y)[:2], [x / 200, y / 200], atol=0.02)
    plain = st.pl.spatial(pictured, library_key="slide", library_id="a", img_key=None, show=False)
    assert not plain.images
    pale = st.pl.spatial(
        pictured, library_key="slide", library_id="a", img_key="hires", alpha_img=0.3, show=False
    )
    assert pale.images[0].get_alpha() == 0.3
    with pytest.raises(KeyError, match=r"no image 'lowres' of the slice 'a'.*\['hires'\]"):
        st.pl.spatial(pictured, library_key="slide", img_key="lowres", show=False)
    # Other coordinates are none of the image.
    pictured.obsm["X_other"] = pictured.obsm["spatial"] / 7
    ax = st.pl.spatial(pictured, library_key="slide", spatial_key="X_other", show=False)[0]
    assert not ax.images


def test_points_leave_room_for_the_tissue() -> None:
    xy = np.stack(np.meshgrid(np.arange(37.0), np.arange(31.0)), axis=-1).reshape(-1, 2) * 5
    stored = {"images": {"hires": np.zeros((90, 90, 3), np.uint8)}}
    stored["scalefactors"] = {"tissue_hires_scalef": 0.5}
    grid = ad.AnnData(np.ones((37 * 31, 1)), obsm={"spatial": xy}, uns={"spatial": {"a": stored}})
    over, plain = (st.pl.spatial(grid, img_key=key, show=False) for key in ("auto", None))
    sizes = [ax.collections[0].get_sizes()[0] for ax in (over, plain)]
    assert sizes[0] == pytest.approx((0.7 / 0.9) ** 2 * sizes[1])


def test_an_image_without_its_scale_is_told_and_left_out(
    pictured: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    del pictured.uns["spatial"]["a"]["scalefactors"]["tissue_hires_scalef"]
    with caplog.at_level("INFO", logger="stofm"):
        ax = st.pl.spatial(pictured, library_key="slide", library_id="a", show=False)
    assert not ax.images
    assert "The tissue is not drawn: uns['spatial']['a'] has no scale factor" in caplog.text


def test_the_scale_bar_of_visium_and_of_what_read_found(adata: ad.AnnData) -> None:
    rows, columns = np.divmod(np.arange(94), 10)
    adata.obsm["spatial"] = np.stack([columns + rows % 2 / 2, rows * np.sqrt(0.75)], axis=1) * 137.0
    assert not st.pl.spatial(adata, show=False).artists
    # Middles of spots are 100 micrometres apart, 1.54 times the stated diameter.
    factors = {"spot_diameter_fullres": 137.0 * 0.65}
    adata.uns["spatial"] = {"one": {"images": {}, "scalefactors": factors}}
    (bar,) = st.pl.spatial(adata, show=False).artists
    assert bar.txt_label.get_text() == "200 µm"
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(2 * 137.0)
    del adata.uns["spatial"]
    adata.uns["stofm"] = {"source": {"unit": "micrometre", "params": {}}}
    (bar,) = st.pl.spatial(adata, show=False).artists
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(200.0)
