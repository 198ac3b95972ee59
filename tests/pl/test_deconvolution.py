from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from scanpy.plotting.palettes import default_20

import stofm as st

if TYPE_CHECKING:
    from matplotlib.collections import PolyCollection
    from numpy.typing import NDArray

KEY = "stofm_deconvolution"
TYPES = ["astro", "neuron", "oligo"]


@pytest.fixture
def spots(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    shares = rng.dirichlet([1.0, 2.0, 0.5], adata.n_obs)
    adata.obsm[KEY] = pd.DataFrame(shares, index=adata.obs_names, columns=TYPES)
    return adata


def area(shape: NDArray[np.float64]) -> float:
    """Area of a polygon (shoelace formula)."""
    x, y = shape.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def wedges(ax: Axes) -> list[tuple[str, NDArray[np.float64]]]:
    """Colour and corners of the parts of all pies, without the discs below them."""
    collections: list[PolyCollection] = list(ax.collections[1:])
    return [
        (to_hex(color), path.vertices[:-1])
        for collection in collections
        for color, path in zip(collection.get_facecolors(), collection.get_paths(), strict=True)
    ]


def test_one_map_per_type_with_one_scale(spots: ad.AnnData) -> None:
    axes = st.pl.deconvolution(spots, show=False)
    assert [ax.get_title() for ax in axes] == TYPES
    top = np.percentile(spots.obsm[KEY], 99)
    assert {ax.collections[0].get_clim() for ax in axes} == {(0.0, top)}
    # One colour bar, at the end of the row.
    assert [len(ax.child_axes) for ax in axes] == [0, 0, 1]
    for ax, name in zip(axes, TYPES, strict=True):
        drawn = np.sort(ax.collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(spots.obsm[KEY][name]))


def test_scales_of_their_own(spots: ad.AnnData) -> None:
    axes = st.pl.deconvolution(spots, shared=False, vmax=None, show=False)
    tops = [ax.collections[0].get_clim()[1] for ax in axes]
    np.testing.assert_allclose(tops, spots.obsm[KEY].max())
    assert [len(ax.child_axes) for ax in axes] == [1, 1, 1]


def test_types_and_slices(spots: ad.AnnData) -> None:
    axes = st.pl.deconvolution(spots, types=["oligo", "astro"], library_key="slide", show=False)
    assert [ax.get_title() for ax in axes] == ["a: oligo", "b: oligo", "a: astro", "b: astro"]
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [41, 53, 41, 53]
    assert [len(ax.child_axes) for ax in axes] == [0, 1, 0, 0]
    assert isinstance(st.pl.deconvolution(spots, types="oligo", show=False), Axes)


def test_pies_have_the_area_of_the_shares(spots: ad.AnnData) -> None:
    ax = st.pl.deconvolution(spots, kind="pies", show=False)
    drawn: dict[str, float] = {}
    for color, shape in wedges(ax):
        drawn[color] = drawn.get(color, 0.0) + area(shape)
    total = sum(drawn.values())
    expected = spots.obsm[KEY].mean()
    for name, color in zip(TYPES, default_20, strict=False):
        assert drawn[to_hex(color)] / total == pytest.approx(expected[name], abs=0.01)
    assert len(ax.collections[0].get_paths()) == spots.n_obs
    assert all(collection.get_rasterized() for collection in ax.collections)


def test_a_pie_goes_clockwise_from_the_top(adata: ad.AnnData) -> None:
    one = adata[:1].copy()
    one.obsm["spatial"] = np.array([[10.0, 20.0]])
    one.obsm[KEY] = pd.DataFrame([[0.25, 0.75]], index=one.obs_names, columns=["p", "q"])
    for invert_y in (True, False):
        ax = st.pl.deconvolution(one, kind="pies", invert_y=invert_y, show=False)
        (_, first), _ = sorted(wedges(ax), key=lambda part: area(part[1]))
        center = ax.transData.transform([10.0, 20.0])
        corners = ax.transData.transform(first) - center
        # A quarter: on the page it lies to the right and above.
        assert corners.min() > -1e-6


def test_pies_do_not_overlap_their_neighbors() -> None:
    places = np.stack(np.meshgrid(np.arange(13.0), np.arange(11.0)), axis=-1).reshape(-1, 2)
    grid = ad.AnnData(np.ones((143, 1)), obsm={"spatial": 7 * places})
    grid.obsm[KEY] = pd.DataFrame({"all": np.ones(143)}, index=grid.obs_names)
    ax = st.pl.deconvolution(grid, kind="pies", show=False)
    width = np.ptp(ax.collections[0].get_paths()[0].vertices[:, 0])
    assert 0.85 * 7 < width < 7


def test_types_that_are_not_chosen_are_grey(spots: ad.AnnData) -> None:
    ax = st.pl.deconvolution(spots, types=["oligo"], kind="pies", show=False)
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["oligo", "others"]
    assert {color for color, _ in wedges(ax)} == {to_hex(default_20[2])}
    assert to_hex(ax.collections[0].get_facecolors()[0]) == "#d9d9d9"


def test_colors_of_pies(spots: ad.AnnData) -> None:
    palette = {"astro": "red", "neuron": "lime", "oligo": "blue"}
    ax = st.pl.deconvolution(spots, kind="pies", palette=palette, show=False)
    assert {color for color, _ in wedges(ax)} == {"#ff0000", "#00ff00", "#0000ff"}
    spots.uns[f"{KEY}_colors"] = ["#111111", "#222222", "#333333"]
    ax = st.pl.deconvolution(spots, kind="pies", show=False)
    assert {color for color, _ in wedges(ax)} == {"#111111", "#222222", "#333333"}
    ax = st.pl.deconvolution(spots, kind="pies", palette="Set1", show=False)
    assert {color for color, _ in wedges(ax)} == {"#e41a1c", "#ff7f00", "#999999"}


def test_spots_without_proportions_are_grey(spots: ad.AnnData) -> None:
    spots.obsm[KEY].iloc[:5] = np.nan
    ax = st.pl.deconvolution(spots, kind="pies", show=False)
    assert len(ax.collections[0].get_paths()) == spots.n_obs
    assert all(np.isfinite(shape).all() for _, shape in wedges(ax))


def test_too_many_pies_are_drawn_and_said(
    spots: ad.AnnData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stofm.pl._predicted._MAX_PIES", 50)
    with caplog.at_level("INFO", logger="stofm"):
        axes = st.pl.deconvolution(spots, kind="pies", library_key="slide", show=False)
    assert [len(ax.collections[0].get_paths()) for ax in axes] == [41, 53]
    assert "b: 53 pies are too small" in caplog.text


def test_data_are_left_as_they_are(spots: ad.AnnData) -> None:
    before = spots.copy()
    st.pl.deconvolution(spots, show=False)
    st.pl.deconvolution(spots, kind="pies", show=False)
    pd.testing.assert_frame_equal(spots.obsm[KEY], before.obsm[KEY])
    assert not spots.uns


def test_missing_or_misfit(spots: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"st.tl.deconvolve\(adata, head=head\) writes it"):
        st.pl.deconvolution(spots, key="stofm_deconvolutions", show=False)
    with pytest.raises(KeyError, match=r"no type 'Oligo'. Nearest: \['oligo'\]"):
        st.pl.deconvolution(spots, types="Oligo", show=False)
    with pytest.raises(ValueError, match="no types to draw"):
        st.pl.deconvolution(spots, types=[], show=False)
    with pytest.raises(ValueError, match=r"kind must be one of \['maps', 'pies'\], found 'pie'"):
        st.pl.deconvolution(spots, kind="pie", show=False)
    with pytest.raises(TypeError, match=r"must be a DataFrame .* found ndarray"):
        st.pl.deconvolution(spots, key="spatial", show=False)


def test_pies_of_what_are_no_proportions(spots: ad.AnnData) -> None:
    spots.obsm[KEY] *= 3
    with pytest.raises(ValueError, match=r"sums to 3 in a row. Draw it with kind='maps'"):
        st.pl.deconvolution(spots, kind="pies", show=False)
    spots.obsm[KEY].iloc[3, 1] = -0.5
    with pytest.raises(ValueError, match=r"goes down to -0\.5"):
        st.pl.deconvolution(spots, kind="pies", show=False)


def test_size_of_pies(spots: ad.AnnData) -> None:
    ax = st.pl.deconvolution(spots, kind="pies", size=100.0, show=False)
    corners = ax.transData.transform(ax.collections[0].get_paths()[0].vertices)
    points = np.ptp(corners[:, 0]) / ax.figure.dpi * 72
    assert points == pytest.approx(10.0, rel=0.01)
