from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from scipy.stats import pearsonr

import stofm as st

if TYPE_CHECKING:
    import anndata as ad

KEY = "stofm_imputed"


@pytest.fixture
def imputed(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    values = rng.gamma(2.0, 1.0, (adata.n_obs, 3))
    genes = ["GENE2", "GENE4", "ELSEWHERE"]
    adata.obsm[KEY] = pd.DataFrame(values, index=adata.obs_names, columns=genes)
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
    r = pearsonr(expected, imputed.obsm[KEY]["GENE2"]).statistic
    assert measured.get_title() == "GENE2, measured"
    assert predicted.get_title() == f"GENE2, imputed (r = {r:.2f})"
    assert (before != imputed.X).nnz == 0
    assert not imputed.uns


def test_totals_are_of_the_genes_that_the_head_read(imputed: ad.AnnData) -> None:
    read = imputed.var_names[:2]
    imputed.uns["stofm"] = {KEY: {"params": {"inputs": read.to_numpy(dtype=object)}}}
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
    assert second.collections[0].get_clim()[1] == imputed.obsm[KEY]["GENE2"].max()
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
    r = pearsonr(normalized(imputed, "GENE4")[rows], imputed.obsm[KEY]["GENE4"][rows]).statistic
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
    r = pearsonr(expected, imputed.obsm[KEY]["ELSEWHERE"][part.obs_names]).statistic
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
