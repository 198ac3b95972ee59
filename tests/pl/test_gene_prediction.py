from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import stofm as st


@pytest.fixture
def adata():
    found = st.datasets.load("mouse_olfactory_bulb_st")
    values = np.random.default_rng(0).normal(size=(found.n_obs, 2))
    found.obsm["stofm_predicted"] = pd.DataFrame(values, found.obs_names, ["Penk", "Unmeasured"])
    return found


def test_measured_and_predicted_lie_over_the_tissue(adata):
    axes = st.pl.gene_prediction(adata, ["Penk", "Unmeasured"], alpha=0.5, show=False)
    titles = [ax.get_title() for ax in axes]
    r = np.corrcoef(
        np.log1p(1e4 * adata[:, "Penk"].X.toarray().ravel() / _totals(adata)),
        adata.obsm["stofm_predicted"]["Penk"],
    )[0, 1]
    assert titles == ["Penk, measured", f"Penk, predicted (r = {r:.2f})", "Unmeasured, predicted"]
    for ax in axes:
        assert len(ax.images) == 1
        assert ax.collections[-1].get_alpha() == 0.5
        assert len(ax.collections[-1].get_offsets()) == adata.n_obs
    plt.close("all")


def _totals(adata):
    """Over the genes that were not predicted."""
    is_counted = ~adata.var_names.isin(["Penk", "Unmeasured"])
    return np.asarray(adata[:, is_counted].X.sum(axis=1)).ravel()


def test_what_is_missing_is_named(adata):
    with pytest.raises(KeyError, match="has no gene 'Penk1'"):
        st.pl.gene_prediction(adata, "Penk1", show=False)
    del adata.obsm["stofm_predicted"]
    with pytest.raises(KeyError, match=r"st\.tl\.predict_genes\(adata, aligner\) writes it"):
        st.pl.gene_prediction(adata, "Penk", show=False)
