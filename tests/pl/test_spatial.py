from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba

import stofm as st
from stofm._edge.colors import PALETTE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def legend_names(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def face_colors(ax: Axes) -> set[str]:
    return {to_hex(color) for color in ax.collections[0].get_facecolors()}


def test_one_panel_without_slices(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, show=False)
    assert isinstance(ax, Axes)
    offsets = ax.collections[0].get_offsets()
    np.testing.assert_allclose(np.sort(offsets, axis=0), np.sort(adata.obsm["spatial"], axis=0))
    assert ax.get_aspect() == 1.0
    assert not ax.axison
    assert ax.collections[0].get_rasterized()
    assert ax.get_legend() is None


def test_y_points_down_unless_told(adata: ad.AnnData) -> None:
    assert st.pl.spatial(adata, show=False).yaxis_inverted()


def test_one_panel_per_slice(adata: ad.AnnData) -> None:
    axes = st.pl.spatial(adata, "kind", library_key="slide", show=False)
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [41, 53]
    # One legend, beside the last panel of the row, in the order of the categories.
    assert axes[0].get_legend() is None
    assert legend_names(axes[1]) == ["z", "y", "x"]
    assert axes[1].get_legend().get_title().get_text() == "kind"


def test_cells_have_the_colors_of_their_category(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, "kind", show=False)
    assert list(adata.uns["kind_colors"]) == list(PALETTE[:3])
    drawn = {
        tuple(place): to_hex(color)
        for place, color in zip(
            ax.collections[0].get_offsets(), ax.collections[0].get_facecolors(), strict=True
        )
    }
    for place, kind in zip(adata.obsm["spatial"], adata.obs["kind"].cat.codes, strict=True):
        assert drawn[tuple(place)] == adata.uns["kind_colors"][kind]


def test_stored_colors_are_used_again(adata: ad.AnnData) -> None:
    adata.uns["kind_colors"] = np.array(["#111111", "red", "#333333"])
    assert face_colors(st.pl.spatial(adata, "kind", show=False)) == {
        "#111111",
        "#ff0000",
        "#333333",
    }
    assert list(adata.uns["kind_colors"]) == ["#111111", "red", "#333333"]


def test_stored_colors_that_do_not_do_are_replaced(adata: ad.AnnData) -> None:
    adata.uns["kind_colors"] = ["#111111"]
    st.pl.spatial(adata, "kind", show=False)
    assert len(adata.uns["kind_colors"]) == 3


@pytest.mark.parametrize(
    "palette",
    [
        {"x": "blue", "y": "lime", "z": "red"},
        ["red", "lime", "blue", "black"],
        np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        mpl.cycler(color=["red", "lime", "blue"]),
        mpl.colors.ListedColormap(["red", "lime", "blue"]),
    ],
    ids=lambda palette: type(palette).__name__,
)
def test_palette(adata: ad.AnnData, palette: object) -> None:
    ax = st.pl.spatial(adata, "kind", palette=palette, show=False)
    assert face_colors(ax) == {"#ff0000", "#00ff00", "#0000ff"}
    assert adata.uns["kind_colors"] == ["#ff0000", "#00ff00", "#0000ff"]


def test_palette_that_is_too_short(adata: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="2 colours for 3 categories"):
        st.pl.spatial(adata, "kind", palette=["red", "blue"], show=False)
    with pytest.raises(ValueError, match=r"no colour for \['x'\]"):
        st.pl.spatial(adata, "kind", palette={"y": "red", "z": "blue"}, show=False)
    adata.obs["number"] = np.arange(adata.n_obs).astype(str)
    with pytest.raises(ValueError, match="12 colours for 94 categories"):
        st.pl.spatial(adata, "number", palette="Set3", show=False)


@pytest.mark.parametrize("name", ["tab20", "Set3", "viridis"])
@pytest.mark.parametrize("plot", [st.pl.spatial, st.pl.umap])
def test_palette_by_name_is_that_of_scanpy(adata: ad.AnnData, name: str, plot: Any) -> None:
    adata.obsm["X_umap"] = adata.obsm["spatial"]
    plot(adata, "kind", palette=name, show=False)
    found = list(adata.uns["kind_colors"])
    sc.pl.embedding(adata, "umap", color="kind", palette=name, show=False)
    assert found == list(adata.uns["kind_colors"])


def test_palette_of_numbered_categories(adata: ad.AnnData) -> None:
    adata.obs["level"] = pd.Categorical(np.arange(adata.n_obs) % 2)
    st.pl.spatial(adata, "level", palette={0: "red", 1: "blue"}, show=False)
    assert adata.uns["level_colors"] == ["#ff0000", "#0000ff"]


def test_unknown_names_of_colors(adata: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"palette='set3' .*Nearest: \['Set3'"):
        st.pl.spatial(adata, "kind", palette="set3", show=False)
    with pytest.raises(ValueError, match=r"cmap='virids' .*Nearest: \['viridis'"):
        st.pl.spatial(adata, "score", cmap="virids", show=False)
    assert not plt.get_fignums()


def test_color_map_itself(adata: ad.AnnData) -> None:
    cmap = mpl.colormaps["magma"]
    ax = st.pl.spatial(adata, "score", cmap=cmap, show=False)
    assert ax.collections[0].get_cmap().name == "magma"


def test_cells_without_category_are_grey_below_and_named(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, "partial", show=False)
    assert legend_names(ax) == ["p", "q", "r", "NA"]
    n_missing = int(adata.obs["partial"].isna().sum())
    first = ax.collections[0].get_facecolors()[:n_missing]
    assert {to_hex(color) for color in first} == {"#d9d9d9"}


def test_flags_and_text_are_categories(adata: ad.AnnData) -> None:
    adata.obs["text"] = [f"c{i % 12}" for i in range(adata.n_obs)]
    flag, text = st.pl.spatial(adata, ["flag", "text"], show=False)
    assert legend_names(flag) == ["False", "True"]
    assert legend_names(text) == [f"c{i}" for i in range(12)]
    assert not isinstance(adata.obs["text"].dtype, pd.CategoricalDtype)


def test_only_categories_that_are_there_are_in_the_legend(adata: ad.AnnData) -> None:
    adata.obs["kind"] = adata.obs["kind"].cat.add_categories(["nowhere"])
    assert legend_names(st.pl.spatial(adata, "kind", show=False)) == ["z", "y", "x"]
    assert len(adata.uns["kind_colors"]) == 4


def test_thirty_classes_stay_readable(adata: ad.AnnData) -> None:
    adata.obs["many"] = pd.Categorical([f"class number {i % 31}" for i in range(adata.n_obs)])
    axes = st.pl.spatial(adata, "many", library_key="slide", show=False)
    figure = axes[0].figure
    legend = axes[1].get_legend()
    box = legend.get_tightbbox()
    assert len(legend.get_texts()) == 31
    assert len(face_colors(axes[0]) | face_colors(axes[1])) == 31
    # Inside the figure, and clear of the panels.
    assert box.y0 > 0
    assert box.x1 < figure.bbox.width
    assert box.x0 >= max(ax.get_window_extent().x1 for ax in axes)
    rgb = np.array([to_rgba(color)[:3] for color in adata.uns["many_colors"]])
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + 9 * np.eye(31)
    assert distances.min() > 0.08


def test_hundreds_of_categories_have_no_legend(
    adata: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    many = ad.concat([adata, adata], index_unique="-")
    many.obs["id"] = pd.Categorical([str(i) for i in range(many.n_obs)])
    with caplog.at_level("INFO", logger="stofm"):
        ax = st.pl.spatial(many, "id", show=False)
    assert ax.get_legend() is None
    assert "188 categories" in caplog.text


def test_counts_are_log_normalised_for_the_picture_and_layers_are_not(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, "GENE3", vmin=None, vmax=None, show=False)
    counts = adata.X.toarray().astype(float)
    totals = np.maximum(counts.sum(axis=1), 1)
    expected = np.log1p(1e4 * counts[:, 3] / totals)
    np.testing.assert_allclose(np.sort(ax.collections[0].get_array()), np.sort(expected))
    assert ax.child_axes[0].get_title(loc="left") == "log-normalised"
    doubled = st.pl.spatial(adata, "GENE3", layer="double", vmin=0, vmax=None, show=False)
    assert doubled.collections[0].get_clim() == (0.0, 2 * counts[:, 3].max())
    assert doubled.child_axes[0].get_title(loc="left") == "double"
    # What was normalised before is drawn as it is.
    adata.X = adata.X * 0.3
    ax = st.pl.spatial(adata, ["GENE3", "GENE0"], vmin=None, vmax=None, show=False)[0]
    np.testing.assert_allclose(np.sort(ax.collections[0].get_array()), np.sort(0.3 * counts[:, 3]))
    assert ax.child_axes[0].get_title(loc="left") == ""


def test_a_column_of_a_frame_by_name(adata: ad.AnnData) -> None:
    shares = np.linspace(0, 1, adata.n_obs)
    frame = pd.DataFrame({"Stromal": shares, "B": 1 - shares}, index=adata.obs_names)
    adata.obsm["stofm_deconvolution"] = frame
    adata.obsm["stofm_deconvolution_std"] = frame * 0
    ax = st.pl.spatial(adata, "Stromal", vmin=None, vmax=None, show=False)
    np.testing.assert_allclose(np.sort(ax.collections[0].get_array()), shares)
    adata.obsm["other"] = frame / 2
    with pytest.raises(ValueError, match=r"color='stofm_deconvolution:B' or color='other:B'"):
        st.pl.spatial(adata, "B", show=False)
    ax = st.pl.spatial(adata, "other:B", vmin=None, vmax=None, show=False)
    assert ax.collections[0].get_clim() == (0.0, 0.5)
    with pytest.raises(KeyError, match=r"DataFrame in obsm\. Nearest: \['Stromal'\]"):
        st.pl.spatial(adata, "stromall", show=False)


def test_groups_na_color_title_and_names_on_the_cells(adata: ad.AnnData) -> None:
    look = {"groups": ["y"], "na_color": "#010203", "title": "T", "show": False}
    ax = st.pl.spatial(adata, "kind", **look)
    assert face_colors(ax) == {"#010203", adata.uns["kind_colors"][1]}
    assert (ax.get_title(), legend_names(ax)) == ("T", ["y", "others"])
    ax = st.pl.spatial(adata, "kind", legend_loc="on data", show=False)
    assert ax.get_legend() is None
    written = {text.get_text(): text.get_position() for text in ax.texts}
    middle = np.median(adata.obsm["spatial"][adata.obs["kind"] == "y"], axis=0)
    np.testing.assert_allclose(written["y"], middle)
    ax = st.pl.spatial(adata, "kind", legend_loc=None, show=False)
    assert (ax.get_legend(), len(ax.texts)) == (None, 0)
    with pytest.raises(ValueError, match=r"groups='Z' is no category of 'kind'. Nearest: \['z'\]"):
        st.pl.spatial(adata, "kind", groups="Z", show=False)
    with pytest.raises(ValueError, match=r"1 titles are needed .* but title holds 2"):
        st.pl.spatial(adata, "kind", title=["a", "b"], show=False)
    with pytest.raises(ValueError, match=r"legend_loc must be one of .* found 'left'"):
        st.pl.spatial(adata, "kind", legend_loc="left", show=False)


def test_parts_and_chosen_slices(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, crop_coord=(40, 90, 20, 60), show=False)
    xy = adata.obsm["spatial"]
    is_in = ((xy >= [40, 20]) & (xy <= [90, 60])).all(axis=1)
    assert len(ax.collections[0].get_offsets()) == is_in.sum()
    assert (ax.get_xlim(), ax.get_ylim()) == ((40.0, 90.0), (60.0, 20.0))
    ax = st.pl.spatial(adata, library_key="slide", library_id="b", show=False)
    assert (ax.get_title(), len(ax.collections[0].get_offsets())) == ("b", 53)
    with pytest.raises(ValueError, match=r"No cell lies in crop_coord=\(0, 1, 900, 901\)"):
        st.pl.spatial(adata, crop_coord=(0, 1, 900, 901), show=False)
    with pytest.raises(ValueError, match=r"must be \(left, right, top, bottom\)"):
        st.pl.spatial(adata, crop_coord=(0, 1), show=False)
    with pytest.raises(KeyError, match="library_id='c' is no slice"):
        st.pl.spatial(adata, library_key="slide", library_id="c", show=False)


def test_high_values_lie_on_top(adata: ad.AnnData) -> None:
    values = st.pl.spatial(adata, "GENE3", show=False).collections[0].get_array()
    assert (np.diff(values) >= 0).all()


def test_limits_are_percentiles_over_all_panels(adata: ad.AnnData) -> None:
    axes = st.pl.spatial(adata, "score", library_key="slide", vmin="p10", vmax="p90", show=False)
    expected = tuple(np.nanpercentile(adata.obs["score"], [10, 90]))
    assert axes[0].collections[0].get_clim() == pytest.approx(expected)
    assert axes[1].collections[0].get_clim() == pytest.approx(expected)
    (bar,) = axes[1].child_axes
    assert bar.get_title(loc="left") == "score"
    assert not axes[0].child_axes


def test_rare_gene_is_not_washed_out(adata: ad.AnnData) -> None:
    adata.obs["rare"] = 0.0
    adata.obs.loc[["cell5"], "rare"] = 7.0
    ax = st.pl.spatial(adata, "rare", vmax="p95", show=False)
    assert ax.collections[0].get_clim() == (0.0, 7.0)


def test_missing_values_are_grey(adata: ad.AnnData) -> None:
    points = st.pl.spatial(adata, "score", show=False).collections[0]
    points.figure.draw_without_rendering()
    drawn = [to_hex(color) for color in points.get_facecolors()]
    n_missing = int(adata.obs["score"].isna().sum())
    assert drawn[:n_missing] == ["#d9d9d9"] * n_missing
    assert "#d9d9d9" not in drawn[n_missing:]


def test_only_missing_values(adata: ad.AnnData) -> None:
    adata.obs["nothing"] = np.nan
    ax = st.pl.spatial(adata, "nothing", show=False)
    assert ax.collections[0].get_clim() == (0.0, 1.0)


def test_panels_of_colors_and_slices(adata: ad.AnnData) -> None:
    axes = st.pl.spatial(adata, ["kind", "GENE1"], library_key="slide", show=False)
    assert [ax.get_title() for ax in axes] == ["a", "b", "a", "b"]
    assert legend_names(axes[1]) == ["z", "y", "x"]
    assert len(axes[3].child_axes) == 1
    boxes = [ax.get_position(original=True) for ax in axes]
    assert boxes[0].x1 <= boxes[1].x0
    assert boxes[2].y1 <= boxes[0].y0


def test_several_colors_of_one_slice_stand_side_by_side(adata: ad.AnnData) -> None:
    axes = st.pl.spatial(adata, ["kind", "GENE1", "score"], ncols=2, show=False)
    assert [ax.get_title() for ax in axes] == ["kind", "GENE1", "score"]
    boxes = [ax.get_position(original=True) for ax in axes]
    assert boxes[0].y0 == pytest.approx(boxes[1].y0)
    assert boxes[2].y1 <= boxes[0].y0
    legend = axes[0].get_legend().get_tightbbox()
    assert legend.x1 <= axes[1].get_window_extent().x0


def test_slices_share_a_scale_if_their_units_agree() -> None:
    places = np.stack(np.meshgrid(np.arange(13.0), np.arange(11.0)), axis=-1).reshape(-1, 2)
    small = places[places[:, 0] < 5]
    slides = ad.AnnData(
        np.ones((len(places) + len(small), 1)),
        obs=pd.DataFrame({"slide": ["a"] * 143 + ["b"] * 55}, index=map(str, range(198))),
        obsm={"spatial": np.concatenate([places, small])},
    )
    first, second = st.pl.spatial(slides, library_key="slide", show=False)
    assert np.ptp(first.get_xlim()) == pytest.approx(np.ptp(second.get_xlim()))
    slides.obsm["spatial"][len(places) :] *= 2
    first, second = st.pl.spatial(slides, library_key="slide", show=False)
    assert np.ptp(first.get_ylim()) < 0.6 * np.ptp(second.get_ylim())


def test_slices_of_the_sub_slices_are_the_default(laid_out: ad.AnnData) -> None:
    axes = st.pl.spatial(laid_out, show=False)
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    laid_out.uns["stofm"]["subslice"]["params"]["library_key"] = ""
    assert isinstance(st.pl.spatial(laid_out, show=False), Axes)


def test_cells_without_slice_have_a_panel(adata: ad.AnnData) -> None:
    adata.obs.loc[adata.obs_names[:5], "slide"] = None
    axes = st.pl.spatial(adata, library_key="slide", show=False)
    assert [ax.get_title() for ax in axes] == ["a", "b", "NA"]
    assert len(axes[2].collections[0].get_offsets()) == 5


def test_points_on_a_lattice_just_touch() -> None:
    places = np.stack(np.meshgrid(np.arange(37.0), np.arange(31.0)), axis=-1).reshape(-1, 2)
    grid = ad.AnnData(np.ones((37 * 31, 2)), obsm={"spatial": places * 3})
    ax = st.pl.spatial(grid, show=False)
    ax.figure.draw_without_rendering()
    first, second = ax.transData.transform([[0, 0], [3, 0]])
    spacing = np.linalg.norm(second - first) / ax.figure.dpi * 72
    diameter = np.sqrt(ax.collections[0].get_sizes()[0])
    assert 0.8 * spacing < diameter <= spacing


def test_size_can_be_given(adata: ad.AnnData) -> None:
    assert st.pl.spatial(adata, size=5.0, show=False).collections[0].get_sizes() == [5.0]


@pytest.mark.parametrize("n_obs", [1, 2, 3])
def test_few_cells(adata: ad.AnnData, n_obs: int) -> None:
    ax = st.pl.spatial(adata[:n_obs].copy(), "kind", show=False)
    ax.figure.draw_without_rendering()
    assert len(ax.collections[0].get_offsets()) == n_obs


def test_cells_at_one_place_and_on_a_line(adata: ad.AnnData) -> None:
    adata.obsm["spatial"][:] = 3.0
    st.pl.spatial(adata, show=False).figure.draw_without_rendering()
    adata.obsm["spatial"][:, 0] = np.arange(adata.n_obs)
    st.pl.spatial(adata, show=False).figure.draw_without_rendering()


def test_third_coordinate_is_left_out(adata: ad.AnnData) -> None:
    adata.obsm["spatial"] = np.column_stack([adata.obsm["spatial"], np.ones(adata.n_obs)])
    assert st.pl.spatial(adata, show=False).collections[0].get_offsets().shape == (94, 2)


def test_view_stays_a_view(adata: ad.AnnData) -> None:
    view = adata[adata.obs["slide"] == "a"]
    st.pl.spatial(view, "kind", show=False)
    assert view.is_view
    assert "kind_colors" not in adata.uns


def test_data_are_left_as_they_are(adata: ad.AnnData) -> None:
    before = adata.copy()
    st.pl.spatial(adata, ["kind", "flag", "GENE0"], library_key="slide", show=False)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0
    assert set(adata.uns) == {"kind_colors", "flag_colors"}


def test_given_axes(adata: ad.AnnData) -> None:
    figure, given = plt.subplots(1, 2)
    axes = st.pl.spatial(adata, "kind", library_key="slide", ax=list(given), show=False)
    assert axes == list(given)
    assert plt.get_fignums() == [figure.number]
    _, single = plt.subplots()
    assert st.pl.spatial(adata, "kind", ax=single, show=False) is single
    with pytest.raises(ValueError, match=r"2 panels are needed \(2 slices x 1 colours\), but ax"):
        st.pl.spatial(adata, "kind", library_key="slide", ax=single, show=False)


def test_axes_of_a_subfigure_can_be_saved(adata: ad.AnnData, tmp_path: Path) -> None:
    ax = plt.figure().subfigures(1, 2)[0].subplots()
    st.pl.spatial(adata, "kind", ax=ax, show=False, save=tmp_path / "part.png")
    assert (tmp_path / "part.png").stat().st_size > 1000


@pytest.fixture
def settings() -> Iterator[Any]:
    names = ("figdir", "file_format_figs", "autosave")
    before = {name: getattr(sc.settings, name) for name in names}
    yield sc.settings
    for name, value in before.items():
        setattr(sc.settings, name, value)


def test_scanpys_settings_say_where_figures_go(
    adata: ad.AnnData, tmp_path: Path, settings: Any
) -> None:
    settings.figdir, settings.file_format_figs = tmp_path / "figures", "png"
    st.pl.spatial(adata, "kind", show=False)
    assert not (tmp_path / "figures").exists()
    st.pl.spatial(adata, "kind", save=True, show=False)
    settings.autosave = True
    adata.obsm["X_umap"] = adata.obsm["spatial"]
    st.pl.umap(adata, "kind", show=False)
    names = sorted(one.name for one in (tmp_path / "figures").iterdir())
    assert names == ["spatial.png", "umap.png"]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_save(adata: ad.AnnData, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"figure.{suffix}"
    st.pl.spatial(adata, "kind", show=False, save=path)
    assert path.stat().st_size > 1000


def test_nothing_is_shown_without_a_screen(
    adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    st.pl.spatial(adata)
    assert shown == []
    st.pl.spatial(adata, show=True)
    assert shown == [True]


def test_scale_bar(adata: ad.AnnData) -> None:
    ax = st.pl.spatial(adata, microns_per_unit=0.5, show=False)
    (bar,) = ax.artists
    assert bar.txt_label.get_text() == "20 µm"
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(40.0)
    wide = st.pl.spatial(adata, microns_per_unit=40, show=False)
    assert wide.artists[0].txt_label.get_text() == "2 mm"
    with pytest.raises(ValueError, match="microns_per_unit must be above 0, found 0"):
        st.pl.spatial(adata, microns_per_unit=0, show=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"color": "knid"}, r"'knid' is neither a column of obs nor a gene.*Nearest: \['kind'\]"),
        ({"color": "gene3"}, r"Nearest: \['GENE3'"),
        ({"library_key": "slides"}, r"library_key='slides' is not a column.*Nearest: \['slide'\]"),
        ({"spatial_key": "X_spatial"}, r"no obsm\['X_spatial'\].*pass spatial_key='spatial'"),
        ({"color": "GENE1", "layer": "doubel"}, r"no layer 'doubel'. Nearest: \['double'\]"),
    ],
)
def test_missing_keys(adata: ad.AnnData, arguments: dict, message: str) -> None:
    with pytest.raises(KeyError) as error:
        st.pl.spatial(adata, show=False, **arguments)
    assert re.search(message, error.value.args[0])


def test_bad_limit(adata: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="percentiles such as 'p99'; found '99%'"):
        st.pl.spatial(adata, "score", vmax="99%", show=False)


def test_coordinates_that_are_not_finite(adata: ad.AnnData) -> None:
    adata.obsm["spatial"][4] = np.nan
    with pytest.raises(ValueError, match=r"1 of 94 cells have NaN .* \['cell4'\]"):
        st.pl.spatial(adata, show=False)


def test_no_cells(adata: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="has no cells; nothing to do"):
        st.pl.spatial(adata[:0].copy(), show=False)


@pytest.fixture
def embedded(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    adata.obsm["X_umap"] = rng.normal(size=(adata.n_obs, 2)).astype(np.float32)
    return adata


def test_points_and_legend(embedded: ad.AnnData) -> None:
    ax = st.pl.umap(embedded, "kind", show=False)
    assert isinstance(ax, Axes)
    assert ax.get_title() == "kind"
    assert not ax.axison
    offsets = np.concatenate([points.get_offsets() for points in ax.collections])
    assert len(offsets) == embedded.n_obs
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["z", "y", "x"]
    colors = {to_hex(c) for points in ax.collections for c in points.get_facecolors()}
    assert colors == set(embedded.uns["kind_colors"])
    assert all(points.get_rasterized() for points in ax.collections)


def test_colors_are_those_of_spatial(embedded: ad.AnnData) -> None:
    st.pl.spatial(embedded, "kind", palette=["red", "lime", "blue"], show=False)
    ax = st.pl.umap(embedded, "kind", show=False)
    colors = {to_hex(c) for points in ax.collections for c in points.get_facecolors()}
    assert colors == {"#ff0000", "#00ff00", "#0000ff"}


def test_umap_of_several_colors(embedded: ad.AnnData) -> None:
    axes = st.pl.umap(embedded, ["kind", "GENE2", "score"], vmin=0, vmax=None, show=False)
    assert [ax.get_title() for ax in axes] == ["kind", "GENE2", "score"]
    assert [len(ax.child_axes) for ax in axes] == [0, 1, 1]
    legend = axes[0].get_legend().get_tightbbox()
    assert legend.x1 <= axes[1].get_window_extent().x0
    counts = embedded.X.toarray()
    expected = np.log1p(1e4 * counts[:, 2] / np.maximum(counts.sum(axis=1), 1))
    highest = max(points.get_clim()[1] for points in axes[1].collections)
    assert highest == pytest.approx(expected.max())


def test_plain_umap(embedded: ad.AnnData) -> None:
    ax = st.pl.umap(embedded, show=False)
    assert ax.get_title() == ""
    assert ax.get_legend() is None


def test_umap_leaves_the_data(embedded: ad.AnnData) -> None:
    embedded.obs["text"] = [f"c{i % 3}" for i in range(embedded.n_obs)]
    before = embedded.obs.copy()
    st.pl.umap(embedded, ["text", "GENE1"], show=False)
    pd.testing.assert_frame_equal(embedded.obs, before)
    view = embedded[:20]
    st.pl.umap(view, "text", show=False)
    assert view.is_view


def test_umap_on_given_axes_and_file(embedded: ad.AnnData, tmp_path: Path) -> None:
    _, ax = plt.subplots()
    path = tmp_path / "umap.png"
    assert st.pl.umap(embedded, "kind", ax=ax, show=False, save=path) is ax
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"2 panels are needed \(2 colours\), but ax holds 1"):
        st.pl.umap(embedded, ["kind", "score"], ax=ax, show=False)


def test_missing_umap_says_how_to_make_it(adata: ad.AnnData) -> None:
    with pytest.raises(KeyError) as error:
        st.pl.umap(adata, show=False)
    assert error.value.args[0] == (
        "obsm['X_umap'] is missing: call st.tl.embed(adata); "
        "sc.pp.neighbors(adata, use_rep='X_stofm'); sc.tl.umap(adata) first."
    )
    adata.obsm["X_stofm"] = np.zeros((adata.n_obs, 3))
    with pytest.raises(KeyError, match=r"is missing: call sc\.pp\.neighbors"):
        st.pl.umap(adata, show=False)


def test_missing_color(embedded: ad.AnnData) -> None:
    with pytest.raises(KeyError, match="'leidne' is neither a column of obs nor a gene"):
        st.pl.umap(embedded, "leidne", show=False)
