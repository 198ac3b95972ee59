from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import stofm as st
from stofm.pl._subslices import color_map

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad


def colors_by_place(ax: plt.Axes) -> dict[tuple, str]:
    points = ax.collections[0]
    return {
        tuple(place): to_hex(color)
        for place, color in zip(points.get_offsets(), points.get_facecolors(), strict=True)
    }


def test_one_panel_per_slice(laid_out: ad.AnnData) -> None:
    axes = st.pl.subslices(laid_out, show=False)
    assert [ax.get_title() for ax in axes] == ["a: 4 sub-slices", "b: 4 sub-slices"]
    assert [ax.get_aspect() for ax in axes] == [1.0, 1.0]
    assert all(ax.get_legend() is None for ax in axes)
    written = [sum(int(text.get_text()) for text in ax.texts) for ax in axes]
    assert written == [41, 53]


def test_cells_of_a_sub_slice_share_a_color_and_neighbors_differ(laid_out: ad.AnnData) -> None:
    axes = st.pl.subslices(laid_out, show=False)
    drawn = colors_by_place(axes[0]) | colors_by_place(axes[1])
    cells = pd.Series([drawn[tuple(place)] for place in laid_out.obsm["stofm_spatial"]])
    groups = cells.groupby(laid_out.obs["stofm_subslice"].to_numpy())
    assert (groups.nunique() == 1).all()
    color = groups.first()
    # The quadrants 0 1 / 2 3 of either slice: those that share a side differ.
    for first, second in ("01", "02", "13", "23", "45", "46", "57", "67"):
        assert color[first] != color[second]
    assert color.nunique() <= 4


def test_outlines_hold_their_cells(laid_out: ad.AnnData) -> None:
    ax = st.pl.subslices(laid_out, show=False)[0]
    assert len(ax.patches) == 4
    is_a = (laid_out.obs["slide"] == "a").to_numpy()
    places = laid_out.obsm["stofm_spatial"][is_a]
    inside = [patch.get_path().contains_points(places, radius=1e-6) for patch in ax.patches]
    inside_other_way = [
        patch.get_path().contains_points(places, radius=-1e-6) for patch in ax.patches
    ]
    held = np.maximum(np.sum(inside, axis=0), np.sum(inside_other_way, axis=0))
    assert (held >= 1).all()
    assert not st.pl.subslices(laid_out, outlines=False, labels=False, show=False)[0].patches


def test_sizes_are_left_out_where_there_are_many(laid_out: ad.AnnData) -> None:
    laid_out.obs["stofm_subslice"] = pd.Categorical([str(i) for i in range(laid_out.n_obs)])
    axes = st.pl.subslices(laid_out, show=False)
    assert not axes[0].texts
    # Sub-slices of one cell have no outline.
    assert not axes[0].patches
    assert len(st.pl.subslices(laid_out, labels=True, show=False)[0].texts) == 41


def test_cells_on_a_line(laid_out: ad.AnnData) -> None:
    laid_out.obsm["stofm_spatial"][:, 1] = 0.0
    axes = st.pl.subslices(laid_out, show=False)
    assert not axes[0].patches
    axes[0].figure.draw_without_rendering()


def test_one_slice(laid_out: ad.AnnData) -> None:
    one = laid_out[laid_out.obs["slide"] == "a"].copy()
    one.uns["stofm"]["subslice"]["params"]["library_key"] = ""
    assert st.pl.subslices(one, show=False).get_title() == "4 sub-slices"


def test_map_coloring() -> None:
    assert color_map([]).tolist() == []
    assert color_map([set()]).tolist() == [0]
    complete = [set(range(9)) - {i} for i in range(9)]
    assert sorted(color_map(complete)) == list(range(9))
    ring = [{(i - 1) % 8, (i + 1) % 8} for i in range(8)]
    assert color_map(ring).max() == 1


def test_map_coloring_of_a_grid_needs_few_colors() -> None:
    cells = list(itertools.product(range(13), range(11)))
    number = {cell: i for i, cell in enumerate(cells)}
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    neighbors = [{number[c] for a, b in steps if (c := (i + a, j + b)) in number} for i, j in cells]
    color = color_map(neighbors)
    assert all(color[i] != color[j] for i, around in enumerate(neighbors) for j in around)
    assert color.max() <= 5


def test_given_axes_and_file(laid_out: ad.AnnData, tmp_path: Path) -> None:
    _, given = plt.subplots(2)
    path = tmp_path / "cuts.png"
    assert st.pl.subslices(laid_out, ax=list(given), show=False, save=path) == list(given)
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"2 panels are needed \(2 slices\)"):
        st.pl.subslices(laid_out, ax=given[0], show=False)


@pytest.mark.parametrize(("slot", "key"), [("obs", "stofm_subslice"), ("obsm", "stofm_spatial")])
def test_missing_keys_say_what_to_call(laid_out: ad.AnnData, slot: str, key: str) -> None:
    del getattr(laid_out, slot)[key]
    with pytest.raises(KeyError, match=rf"{slot}\['{key}'\] is missing: call st.tl.embed\(adata\)"):
        st.pl.subslices(laid_out, show=False)
