from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from scipy.stats import pearsonr

import stofm as st
from stofm._edge.colors import PALETTE

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
    axes = st.pl.deconvolution(spots, shared=True, show=False)
    assert [ax.get_title() for ax in axes] == TYPES
    top = np.percentile(spots.obsm[KEY], 99)
    assert {ax.collections[0].get_clim() for ax in axes} == {(0.0, top)}
    # One colour bar, at the end of the row.
    assert [len(ax.child_axes) for ax in axes] == [0, 0, 1]
    for ax, name in zip(axes, TYPES, strict=True):
        drawn = np.sort(ax.collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(spots.obsm[KEY][name]))


def test_scales_of_their_own(spots: ad.AnnData) -> None:
    axes = st.pl.deconvolution(spots, vmax=None, show=False)
    tops = [ax.collections[0].get_clim()[1] for ax in axes]
    np.testing.assert_allclose(tops, spots.obsm[KEY].max())
    assert [len(ax.child_axes) for ax in axes] == [1, 1, 1]


def test_types_and_slices(spots: ad.AnnData) -> None:
    axes = st.pl.deconvolution(spots, types=["oligo", "astro"], library_key="slide", show=False)
    assert [ax.get_title() for ax in axes] == ["a: oligo", "b: oligo", "a: astro", "b: astro"]
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [41, 53, 41, 53]
    assert [len(ax.child_axes) for ax in axes] == [0, 1, 0, 1]
    assert isinstance(st.pl.deconvolution(spots, types="oligo", show=False), Axes)


def test_pies_have_the_area_of_the_shares(spots: ad.AnnData) -> None:
    ax = st.pl.deconvolution(spots, kind="pies", show=False)
    drawn: dict[str, float] = {}
    for color, shape in wedges(ax):
        drawn[color] = drawn.get(color, 0.0) + area(shape)
    total = sum(drawn.values())
    expected = spots.obsm[KEY].mean()
    for name, color in zip(TYPES, PALETTE, strict=False):
        assert drawn[color] / total == pytest.approx(expected[name], abs=0.01)
    assert len(ax.collections[0].get_paths()) == spots.n_obs
    assert all(collection.get_rasterized() for collection in ax.collections)


def test_a_pie_goes_clockwise_from_the_top(adata: ad.AnnData) -> None:
    one = adata[:1].copy()
    one.obsm["spatial"] = np.array([[10.0, 20.0]])
    one.obsm[KEY] = pd.DataFrame([[0.25, 0.75]], index=one.obs_names, columns=["p", "q"])
    ax = st.pl.deconvolution(one, kind="pies", show=False)
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
    assert {color for color, _ in wedges(ax)} == {PALETTE[2]}
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


IMPUTATION_KEY = "stofm_imputed"


@pytest.fixture
def imputed(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    values = rng.gamma(2.0, 1.0, (adata.n_obs, 3))
    genes = ["GENE2", "GENE4", "ELSEWHERE"]
    adata.obsm[IMPUTATION_KEY] = pd.DataFrame(values, index=adata.obs_names, columns=genes)
    return adata


def normalized(adata: ad.AnnData, gene: str) -> np.ndarray:
    """With the total over the genes that were not imputed; 0 for cells without any of them."""
    counts = pd.DataFrame(adata.X.toarray().astype(float), columns=adata.var_names)
    totals = counts.drop(columns=["GENE2", "GENE4", "ELSEWHERE"], errors="ignore").sum(axis=1)
    values = np.log1p(1e4 * counts[gene] / totals.where(totals > 0))
    return values.fillna(0.0).to_numpy()


def test_measured_beside_imputed(imputed: ad.AnnData) -> None:
    before = imputed.X.copy()
    measured, predicted = st.pl.imputation(imputed, "GENE2", show=False)
    expected = normalized(imputed, "GENE2")
    np.testing.assert_allclose(np.sort(measured.collections[0].get_array()), np.sort(expected))
    r = pearsonr(expected, imputed.obsm[IMPUTATION_KEY]["GENE2"]).statistic
    assert measured.get_title() == "GENE2, measured"
    assert predicted.get_title() == f"GENE2, imputed (r = {r:.2f})"
    assert (before != imputed.X).nnz == 0
    assert not imputed.uns


def test_totals_are_of_the_genes_that_the_head_read(imputed: ad.AnnData) -> None:
    read = imputed.var_names[:2]
    imputed.uns["stofm"] = {IMPUTATION_KEY: {"params": {"inputs": read.to_numpy(dtype=object)}}}
    measured, _ = st.pl.imputation(imputed, "GENE2", show=False)
    counts = imputed.to_df().astype(float)
    totals = counts[read].sum(axis=1)
    expected = np.log1p(1e4 * counts["GENE2"] / totals.where(totals > 0)).fillna(0.0)
    np.testing.assert_allclose(np.sort(measured.collections[0].get_array()), np.sort(expected))


def test_an_antibody_of_the_same_name_is_not_drawn(imputed: ad.AnnData) -> None:
    n = imputed.n_vars
    joined = imputed[:, [*range(n), *range(2)]]
    with pytest.warns(UserWarning, match="names are not unique"):
        joined = joined.copy()
    joined.var["feature_types"] = ["Gene Expression"] * n + ["Antibody Capture"] * 2
    joined.var_names = [*imputed.var_names, "GENE2", "GENE4"]
    measured, _ = st.pl.imputation(joined, "GENE2", show=False)
    expected = normalized(imputed, "GENE2")
    np.testing.assert_allclose(np.sort(measured.collections[0].get_array()), np.sort(expected))


def test_each_map_has_its_scale_unless_shared(imputed: ad.AnnData) -> None:
    first, second = st.pl.imputation(imputed, "GENE2", vmin=None, vmax=None, show=False)
    assert first.collections[0].get_clim()[1] == normalized(imputed, "GENE2").max()
    assert second.collections[0].get_clim()[1] == imputed.obsm[IMPUTATION_KEY]["GENE2"].max()
    first, second = st.pl.imputation(imputed, "GENE2", shared=True, show=False)
    assert first.collections[0].get_clim() == second.collections[0].get_clim()


def test_a_gene_that_was_not_measured_has_one_map(imputed: ad.AnnData) -> None:
    ax = st.pl.imputation(imputed, "ELSEWHERE", show=False)
    assert isinstance(ax, Axes)
    assert ax.get_title() == "ELSEWHERE, imputed"


def test_genes_below_each_other_and_slices(imputed: ad.AnnData) -> None:
    axes = st.pl.imputation(imputed, ["GENE4", "GENE2"], library_key="slide", show=False)
    assert [ax.get_title().split(" (")[0] for ax in axes] == [
        f"{slide}: {gene}, {which}"
        for gene in ("GENE4", "GENE2")
        for which in ("measured", "imputed")
        for slide in ("a", "b")
    ]
    rows = (imputed.obs["slide"] == "a").to_numpy()
    r = pearsonr(
        normalized(imputed, "GENE4")[rows], imputed.obsm[IMPUTATION_KEY]["GENE4"][rows]
    ).statistic
    assert axes[2].get_title().endswith(f"(r = {r:.2f})")


def test_measured_in_another_table_by_names(imputed: ad.AnnData) -> None:
    whole = imputed.copy()[::-1].copy()
    whole.var_names = [*whole.var_names[:-1], "ELSEWHERE"]
    part = whole[10:].copy()
    measured, predicted = st.pl.imputation(imputed, "ELSEWHERE", measured=part, show=False)
    expected = pd.Series(normalized(whole, "ELSEWHERE"), whole.obs_names)[part.obs_names]
    drawn = np.ma.filled(measured.collections[0].get_array(), np.nan)
    assert np.isnan(drawn).sum() == 10
    np.testing.assert_allclose(np.sort(drawn[~np.isnan(drawn)]), np.sort(expected))
    r = pearsonr(expected, imputed.obsm[IMPUTATION_KEY]["ELSEWHERE"][part.obs_names]).statistic
    assert predicted.get_title() == f"ELSEWHERE, imputed (r = {r:.2f})"


def test_layer_and_counts_that_are_none(imputed: ad.AnnData) -> None:
    imputed.layers["logged"] = imputed.X.astype(float) * 0.37
    with pytest.raises(ValueError, match="does not hold raw counts"):
        st.pl.imputation(imputed, "GENE2", layer="logged", show=False)
    # Twice the counts are the same after normalising.
    first, _ = st.pl.imputation(imputed, "GENE2", layer="double", show=False)
    expected = np.sort(normalized(imputed, "GENE2"))
    np.testing.assert_allclose(np.sort(first.collections[0].get_array()), expected)


def test_constant_measured_gene_has_no_correlation(imputed: ad.AnnData) -> None:
    imputed.X = imputed.X.toarray() * (imputed.var_names != "GENE2")
    _, predicted = st.pl.imputation(imputed, "GENE2", show=False)
    assert predicted.get_title() == "GENE2, imputed"


def test_given_axes(imputed: ad.AnnData) -> None:
    _, given = plt.subplots(1, 2)
    drawn = st.pl.imputation(imputed, "GENE2", ax=given, show=False)
    assert [a is b for a, b in zip(drawn, given, strict=True)] == [True, True]
    with pytest.raises(ValueError, match="2 panels are needed"):
        st.pl.imputation(imputed, "GENE2", ax=given[0], show=False)


def test_missing(imputed: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"no gene 'gene2'. Nearest: \['GENE2'"):
        st.pl.imputation(imputed, "gene2", show=False)
    with pytest.raises(KeyError, match=r"st.tl.impute\(adata, head=head\) writes it"):
        st.pl.imputation(imputed, "GENE2", key="other", show=False)
    with pytest.raises(TypeError, match="must be a DataFrame"):
        st.pl.imputation(imputed, "GENE2", key="spatial", show=False)
    with pytest.raises(ValueError, match="There are no genes to draw"):
        st.pl.imputation(imputed, [], show=False)
    with pytest.raises(KeyError, match="`measured` has no gene 'ELSEWHERE'"):
        st.pl.imputation(imputed, "ELSEWHERE", measured=imputed, show=False)


def test_measured_of_other_cells(imputed: ad.AnnData) -> None:
    other = imputed.copy()
    other.obs_names = [f"other{i}" for i in range(other.n_obs)]
    with pytest.raises(ValueError, match=r"found \['other0', 'other1', 'other2'\], expected"):
        st.pl.imputation(imputed, "GENE2", measured=other, show=False)
