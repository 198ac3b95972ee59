from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

import stofm as st
from stofm.spatial.regions import region_borders

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@pytest.fixture
def halves() -> ad.AnnData:
    """A lattice of 17 x 11 cells, in three regions by x, with a stray cell in the first."""
    xy = np.stack(np.meshgrid(np.arange(17.0), np.arange(11.0)), axis=-1).reshape(-1, 2)
    region = np.digitize(xy[:, 0], [4.5, 10.5])
    found = np.array([2, 0, 1])[region]
    found[(xy == [2.0, 5.0]).all(axis=1)] = 1
    obs = pd.DataFrame(
        {
            "region": pd.Categorical(np.array(["left", "middle", "right"])[region]),
            "stofm_domain": pd.Categorical(found.astype(str)),
        },
        index=[f"cell{k}" for k in range(len(xy))],
    )
    return ad.AnnData(np.ones((len(xy), 1)), obs=obs, obsm={"spatial": 3 * xy})


def lines(ax: Axes) -> np.ndarray:
    (found,) = [one for one in ax.collections if isinstance(one, LineCollection)]
    return np.array(found.get_segments())


def test_domains_take_the_colors_of_the_regions_that_they_match(halves: ad.AnnData) -> None:
    halves.uns["region_colors"] = ["#111111", "#222222", "#333333"]
    axes = st.pl.domains(halves, truth_key="region", show=False)
    assert list(halves.uns["stofm_domain_colors"]) == ["#222222", "#333333", "#111111"]
    assert axes[0].get_title() == "region"
    expected = st.metrics.ari(halves.obs["region"], halves.obs["stofm_domain"])
    assert axes[1].get_title() == f"stofm_domain (ARI {expected:.2f})"


def test_a_domain_without_a_region_has_a_color_of_its_own(halves: ad.AnnData) -> None:
    halves.obs["region"] = halves.obs["region"].astype(str).replace("middle", "left")
    st.pl.domains(halves, truth_key="region", show=False)
    left, right = halves.uns["region_colors"]
    colors = dict(zip("012", halves.uns["stofm_domain_colors"], strict=True))
    assert {colors["0"], colors["1"]} == {left, right}
    assert colors["2"] not in {left, right}


def test_outlines_run_between_domains_and_not_around_single_cells(halves: ad.AnnData) -> None:
    ax = st.pl.domains(halves, show=False)
    x = lines(ax)[..., 0]
    np.testing.assert_allclose(np.unique(x.round(6)), [3 * 4.5, 3 * 10.5])
    # Each goes along the whole of the border.
    lengths = np.ptp(lines(ax)[..., 1], axis=1)
    assert lengths.sum() == pytest.approx(2 * 3 * 11, rel=0.15)
    assert not [
        one
        for one in st.pl.domains(halves, outlines=False, show=False).collections
        if isinstance(one, LineCollection)
    ]
    ax = st.pl.spatial(halves, outlines="region", show=False)
    np.testing.assert_allclose(np.unique(lines(ax)[..., 0].round(6)), [13.5, 31.5])


def test_no_line_crosses_a_gap_of_the_tissue() -> None:
    xy = np.stack(np.meshgrid(np.arange(9.0), np.arange(7.0)), axis=-1).reshape(-1, 2)
    far = np.concatenate([xy, xy + np.array([40.0, 0.0])])
    assert len(region_borders(far, np.repeat([0, 1], len(xy)))) == 0
    near = np.concatenate([xy, xy + np.array([9.0, 0.0])])
    assert len(region_borders(near, np.repeat([0, 1], len(xy)))) >= 7


@pytest.mark.parametrize("n", [1, 3, 20])
def test_few_cells_and_cells_on_a_line_have_no_borders(n: int) -> None:
    xy = np.stack([np.arange(n), np.zeros(n)], axis=1).astype(float)
    assert region_borders(xy, np.arange(n) % 2).shape == (0, 2, 2)


def test_groups_of_regions_or_domains(halves: ad.AnnData) -> None:
    regions, domains = st.pl.domains(halves, truth_key="region", groups=["left", "2"], show=False)
    for ax, name in ((regions, "left"), (domains, "2")):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [name, "others"]
    with pytest.raises(ValueError, match="groups='nowhere' is no category"):
        st.pl.domains(halves, groups="nowhere", show=False)


def test_missing(halves: ad.AnnData) -> None:
    with pytest.raises(KeyError, match=r"no obs\['regoin'\].*Nearest: \['region'\]"):
        st.pl.domains(halves, truth_key="regoin", show=False)
    halves.obs["none"] = pd.Categorical([None] * halves.n_obs, ["a"])
    with pytest.raises(ValueError, match=r"No cell has both obs\['none'\]"):
        st.pl.domains(halves, truth_key="none", show=False)
    del halves.obs["stofm_domain"]
    with pytest.raises(KeyError, match=r"st\.tl\.domains\(adata\) writes it"):
        st.pl.domains(halves, show=False)
