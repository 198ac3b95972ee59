from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

import stofm as st

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad


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


def test_several_colors(embedded: ad.AnnData) -> None:
    axes = st.pl.umap(embedded, ["kind", "GENE2", "score"], vmin=0, vmax=None, show=False)
    assert [ax.get_title() for ax in axes] == ["kind", "GENE2", "score"]
    assert [len(ax.child_axes) for ax in axes] == [0, 1, 1]
    legend = axes[0].get_legend().get_tightbbox()
    assert legend.x1 <= axes[1].get_window_extent().x0
    highest = max(points.get_clim()[1] for points in axes[1].collections)
    assert highest == embedded.X.toarray()[:, 2].max()


def test_plain(embedded: ad.AnnData) -> None:
    ax = st.pl.umap(embedded, show=False)
    assert ax.get_title() == ""
    assert ax.get_legend() is None


def test_data_are_left_as_they_are(embedded: ad.AnnData) -> None:
    embedded.obs["text"] = [f"c{i % 3}" for i in range(embedded.n_obs)]
    before = embedded.obs.copy()
    st.pl.umap(embedded, ["text", "GENE1"], show=False)
    pd.testing.assert_frame_equal(embedded.obs, before)
    view = embedded[:20]
    st.pl.umap(view, "text", show=False)
    assert view.is_view


def test_given_axes_and_file(embedded: ad.AnnData, tmp_path: Path) -> None:
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
