from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import stofm as st

ROLES = ["edited", "neighbor", "far", "out_of_reach", "not_in_input", "removed"]


@pytest.fixture
def effect(adata, rng):
    """An effect that falls with distance, on slice b; nothing on slice a."""
    is_b = (adata.obs["slide"] == "b").to_numpy()
    role = np.where(is_b, np.where(rng.random(adata.n_obs) < 0.2, 0, 2), 3)
    distance = np.where(is_b, rng.uniform(5.0, 90.0, adata.n_obs), np.nan)
    distance[role == 0] = 0.0
    l2 = np.where(is_b, np.exp(-np.nan_to_num(distance) / 20.0), 0.0)
    columns = {
        "role": pd.Categorical.from_codes(role, ROLES),
        "distance": distance,
        "cosine": l2 / 10,
        "l2": l2,
        "towards": np.where(is_b, rng.normal(size=adata.n_obs), 0.0),
    }
    return SimpleNamespace(cells=pd.DataFrame(columns, index=adata.obs_names))


@pytest.fixture
def draw(adata, effect):
    def call(**options):
        return st.pl.perturbation(adata, effect, show=False, library_key="slide", **options)

    return call


def test_roles_and_shifts_of_each_slice_and_a_chart_are_drawn(draw, effect):
    axes = draw()
    assert len(axes) == 2 * 2 + 1
    assert [ax.get_title() for ax in axes[:4]] == ["a", "b"] * 2
    names = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert names == ["edited", "far", "out_of_reach"]
    shown = np.concatenate([ax.collections[0].get_array() for ax in axes[2:4]])
    moved = effect.cells["l2"] > 0
    np.testing.assert_allclose(
        np.sort(shown[np.isfinite(shown)]), np.sort(np.log10(effect.cells["l2"][moved]))
    )
    assert np.isnan(np.ma.filled(shown, np.nan)).sum() == (~moved).sum()


def test_the_chart_shows_the_median_of_cells_that_were_not_edited(draw):
    chart = draw()[-1]
    assert chart.get_yscale() == "log"
    points = chart.collections[0].get_offsets()
    assert points[:, 0].min() > 0
    (line,) = chart.lines
    x, y = line.get_data()
    np.testing.assert_allclose(y, np.exp(-np.asarray(x) / 20.0), rtol=0.2)
    assert "distance to the nearest edited cell" in chart.get_xlabel()


def test_the_approach_to_a_goal_is_drawn_around_0(draw):
    axes = draw(shift="towards", vmin=None, vmax=None)
    norm = axes[2].collections[0].norm
    assert norm.vmin == -norm.vmax
    assert axes[-1].get_yscale() == "linear"


def test_nobody_around_leaves_the_chart_empty(draw, effect):
    effect.cells["role"] = pd.Categorical(["edited"] * len(effect.cells), ROLES)
    chart = draw()[-1]
    assert not chart.lines


def test_messages(adata, effect, draw):
    with pytest.raises(KeyError, match=r"no shift 'l1'; it has .'l2', 'cosine', 'towards'."):
        draw(shift="l1")
    with pytest.raises(ValueError, match="effect is of 94 cells that are not those of adata"):
        st.pl.perturbation(adata[::-1], effect, show=False)
    with pytest.raises(ValueError, match=r"5 panels are needed .2 slices x 2 maps"):
        draw(ax=plt.figure().add_subplot())
