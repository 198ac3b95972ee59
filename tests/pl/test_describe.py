from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

import stofm as st
from stofm.tl import Description


@pytest.fixture
def described(adata):
    """Two slices with regions, and facts on one of them."""
    adata.obs["where"] = np.where(adata.obs["kind"] == "x", "west", "east")
    rows = {
        "composition": [
            {"type": f"type {k} of a very long name indeed", "share": 0.1} for k in range(15)
        ],
        "neighbors": [{"region": "east", "share": 1.0}],
        "markers": [
            {"gene": "G1", "log2_fold_change": 2.0},
            {"gene": "G2", "log2_fold_change": 1.0},
        ],
        "gene_sets": [{"set": "s", "genes": ["G1", "G2"]}],
        "spatially_variable_genes": [],
    }
    facts = {"west": {"n_cells": 70, "share": 0.4, **rows}}
    return adata, Description(facts, {"groupby": "where"})


def test_a_page(described, tmp_path):
    adata, description = described
    path = tmp_path / "page.png"
    axes = st.pl.describe(adata, description, "west", library_key="slide", save=path, show=False)
    assert path.stat().st_size > 10_000
    assert len(axes) == 2 + 4
    assert axes[0].get_title() == "region west: 70 cells, 40.0%\na"
    titles = [ax.get_title() for ax in axes[2:]]
    assert titles == ["Composition", "Neighbours", "Markers", "Gene sets"]
    names = [label.get_text() for label in axes[2].get_yticklabels()]
    assert len(names) == 12
    assert len(names[0]) == 26
    assert [bar.get_width() for bar in axes[4].patches] == [2.0, 1.0]
    assert [bar.get_width() for bar in axes[5].patches] == [2]
    # As many cells have the region's colour as it has.
    west = to_hex(adata.uns["where_colors"][1])
    drawn = [to_hex(color) for ax in axes[:2] for color in ax.collections[0].get_facecolors()]
    assert drawn.count(west) == (adata.obs["where"] == "west").sum()
    plt.close("all")


def test_axes_and_messages(described):
    adata, description = described
    figure, axes = plt.subplots(2, 3)
    options = {"library_key": "slide", "show": False}
    drawn = st.pl.describe(adata, description, "west", ax=axes, **options)
    assert drawn == axes.ravel().tolist()
    with pytest.raises(ValueError, match="2 slices and 4 charts"):
        st.pl.describe(adata, description, "west", ax=axes[:1], **options)
    with pytest.raises(KeyError, match=r"no region 'wset'. Nearest: \['west'\]"):
        st.pl.describe(adata, description, "wset", show=False)
    del adata.obs["where"]
    with pytest.raises(KeyError, match=r"no obs\['where'\]"):
        st.pl.describe(adata, description, "west", show=False)
    plt.close(figure)
