from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import FancyArrowPatch
from scipy import sparse

import stofm as st


@pytest.fixture
def found(rng: np.random.Generator) -> SimpleNamespace:
    names = ["x", "y", "z"]
    pairs = pd.DataFrame([(a, b) for a in names for b in names], columns=["source", "target"])
    pairs["z"] = np.linspace(4.0, -2.0, 9)
    pairs["FDR"] = [0.001, 0.01, 0.02, *[0.5] * 6]
    return SimpleNamespace(pairs=pairs.iloc[:-1])


def test_influence(found, tmp_path) -> None:
    heat, network = st.pl.influence(found, save=tmp_path / "a.png")
    values = heat.images[0].get_array()
    assert values[0, 0] == 4.0
    assert np.ma.getmaskarray(np.ma.masked_invalid(values))[2, 2]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["x", "y", "z"]
    marked = heat.lines[0].get_xydata()
    assert marked.tolist() == [[0, 0], [1, 0], [2, 0]]
    arrows = [one for one in network.patches if isinstance(one, FancyArrowPatch)]
    # A type's influence on itself has no arrow.
    assert len(arrows) == 2
    assert arrows[0].get_linewidth() > arrows[1].get_linewidth()
    assert (tmp_path / "a.png").stat().st_size > 0


def test_without_a_pair_that_stands_out(found) -> None:
    found.pairs = found.pairs.assign(FDR=1.0)
    _, network = st.pl.influence(found)
    assert not network.patches
    assert network.get_title() == "no two types with FDR < 0.05"


def test_messages_of_influence(found) -> None:
    with pytest.raises(TypeError, match=r"Expected what st\.tl.influence returns, found DataFrame"):
        st.pl.influence(found.pairs)
    found.pairs = found.pairs.iloc[:0]
    with pytest.raises(ValueError, match="raise `n_max`"):
        st.pl.influence(found)


@pytest.fixture
def attended(adata):
    weights = np.zeros((94, 94), dtype=np.float32)
    own = np.flatnonzero(adata.obs["slide"] == "b")[:8]
    weights[own[0], own[1:]] = np.linspace(0.1, 0.2, 7)
    adata.obsp["stofm_attention"] = sparse.csr_matrix(weights)
    return adata, own


def test_attention(attended) -> None:
    adata, own = attended
    ax = st.pl.attention(adata, adata.obs_names[own[0]], library_key="slide")
    values = ax.collections[0].get_array()
    assert len(values) == 53
    assert np.isfinite(np.ma.filled(values, np.nan)).sum() == 7
    np.testing.assert_allclose(ax.lines[0].get_xydata()[0], adata.obsm["spatial"][own[0]])
    several = st.pl.attention(adata, list(adata.obs_names[own[:2]]), library_key="slide")
    assert len(several) == 2


def test_messages_of_attention(attended) -> None:
    adata, own = attended
    with pytest.raises(KeyError, match="There is no cell 'cellx'"):
        st.pl.attention(adata, "cellx", library_key="slide")
    other = np.flatnonzero(adata.obs["slide"] == "a")[0]
    names = adata.obs_names[[own[0], other]].tolist()
    with pytest.raises(ValueError, match=r"of 2 slices.*one slice at a time"):
        st.pl.attention(adata, names, library_key="slide")
    del adata.obsp["stofm_attention"]
    with pytest.raises(KeyError, match=r"call st\.tl\.attention"):
        st.pl.attention(adata, names[0])
