from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

import stofm as st

if TYPE_CHECKING:
    from pathlib import Path


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


def test_sizes_are_left_out_where_there_are_many(laid_out: ad.AnnData) -> None:
    laid_out.obs["stofm_subslice"] = pd.Categorical([str(i) for i in range(laid_out.n_obs)])
    axes = st.pl.subslices(laid_out, show=False)
    assert not axes[0].texts
    # Sub-slices of one cell have no outline.
    assert not axes[0].patches


def test_cells_on_a_line(laid_out: ad.AnnData) -> None:
    laid_out.obsm["stofm_spatial"][:, 1] = 0.0
    axes = st.pl.subslices(laid_out, show=False)
    assert not axes[0].patches
    axes[0].figure.draw_without_rendering()


def test_one_slice(laid_out: ad.AnnData) -> None:
    one = laid_out[laid_out.obs["slide"] == "a"].copy()
    one.uns["stofm"]["subslice"]["params"]["library_key"] = ""
    assert st.pl.subslices(one, show=False).get_title() == "4 sub-slices"


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


def test_markers_lie_at_the_positions_with_areas_by_cells(laid_out: ad.AnnData) -> None:
    axes = st.pl.virtual_cells(laid_out, show=False)
    assert [ax.get_title() for ax in axes] == ["a: 2 virtual cells", "b: 2 virtual cells"]
    positions = laid_out.uns["stofm"]["subslice"]["coordinates"].round(9)
    n_cells = laid_out.obs["stofm_virtual_cell"].value_counts()
    per_cell = []
    for ax, own in zip(axes, ([0, 1], [2, 3]), strict=True):
        markers = ax.collections[1]
        at = {
            tuple(place): size
            for place, size in zip(markers.get_offsets().round(9), markers.get_sizes(), strict=True)
        }
        assert set(at) == {tuple(positions[i]) for i in own}
        per_cell.extend(at[tuple(positions[i])] / n_cells[str(i)] for i in own)
    np.testing.assert_allclose(per_cell, per_cell[0])


def test_cells_are_paler_than_their_marker(laid_out: ad.AnnData) -> None:
    ax = st.pl.virtual_cells(laid_out, show=False)[1]
    cells, markers = ({to_hex(c) for c in part.get_facecolors()} for part in ax.collections)
    stored = list(laid_out.uns["stofm_virtual_cell_colors"])
    assert markers == set(stored[2:])
    for color in stored[2:]:
        pale = to_hex(np.array(to_rgb(color)) * 0.4 + 0.6)
        assert pale in cells
    assert len(cells) == 2


def test_each_slice_starts_the_palette_anew_unless_colors_are_stored(
    laid_out: ad.AnnData,
) -> None:
    st.pl.virtual_cells(laid_out, show=False)
    stored = list(laid_out.uns["stofm_virtual_cell_colors"])
    assert stored[:2] == stored[2:]
    laid_out.uns["stofm_virtual_cell_colors"] = ["red", "lime", "blue", "yellow"]
    ax = st.pl.virtual_cells(laid_out, show=False)[1]
    assert {to_hex(c) for c in ax.collections[1].get_facecolors()} == {"#0000ff", "#ffff00"}


def test_numbers_where_they_are_few(laid_out: ad.AnnData) -> None:
    axes = st.pl.virtual_cells(laid_out, show=False)
    assert [[text.get_text() for text in ax.texts] for ax in axes] == [["0", "1"], ["2", "3"]]
    n = laid_out.n_obs
    laid_out.obs["stofm_virtual_cell"] = pd.Categorical.from_codes(
        np.arange(n), [str(i) for i in range(n)]
    )
    laid_out.uns["stofm"]["subslice"]["n_cells"] = np.ones(n, dtype=np.int64)
    axes = st.pl.virtual_cells(laid_out, show=False)
    assert not axes[0].texts
    assert len(axes[0].collections[1].get_offsets()) == 41


def test_size_legend(laid_out: ad.AnnData) -> None:
    axes = st.pl.virtual_cells(laid_out, show=False)
    assert axes[0].get_legend() is None
    legend = axes[1].get_legend()
    assert legend.get_title().get_text() == "cells"
    sizes = [int(text.get_text()) for text in legend.get_texts()]
    assert sizes == sorted(sizes)
    assert max(sizes) <= laid_out.obs["stofm_virtual_cell"].value_counts().max()
    drawn = [handle.get_markersize() ** 2 for handle in legend.legend_handles]
    assert drawn == sorted(drawn)


def test_subset_of_the_cells_keeps_the_right_positions(laid_out: ad.AnnData) -> None:
    positions = laid_out.uns["stofm"]["subslice"]["coordinates"]
    part = laid_out[laid_out.obs["stofm_virtual_cell"].isin(["1", "3"])].copy()
    axes = st.pl.virtual_cells(part, show=False)
    np.testing.assert_allclose(axes[0].collections[1].get_offsets(), positions[[1]])
    np.testing.assert_allclose(axes[1].collections[1].get_offsets(), positions[[3]])
    assert axes[0].get_title() == "a: 1 virtual cell"


def test_cells_without_virtual_cell(laid_out: ad.AnnData) -> None:
    laid_out.obs.loc[laid_out.obs_names[:7], "stofm_virtual_cell"] = None
    axes = st.pl.virtual_cells(laid_out, show=False)
    cells = [to_hex(c) for ax in axes for c in ax.collections[0].get_facecolors()]
    assert cells.count("#d9d9d9") == 7


def test_given_axes_and_file_of_virtual_cells(laid_out: ad.AnnData, tmp_path: Path) -> None:
    _, given = plt.subplots(2)
    path = tmp_path / "virtual.png"
    assert st.pl.virtual_cells(laid_out, ax=list(given), show=False, save=path) == list(given)
    assert path.stat().st_size > 1000


def test_missing_keys_of_virtual_cells(laid_out: ad.AnnData) -> None:
    whole = laid_out.copy()
    del laid_out.uns["stofm"]["subslice"]
    with pytest.raises(KeyError, match=r"uns\['stofm'\]\['subslice'\] is missing: call st.tl"):
        st.pl.virtual_cells(laid_out, show=False)
    del whole.obs["stofm_virtual_cell"]
    with pytest.raises(KeyError, match=r"stofm_virtual_cell'\] is missing.*st.pp.subslice"):
        st.pl.virtual_cells(whole, show=False)


def two_slices(laid_out: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
    """Slices that were cut each for itself, with other numbers of cells and virtual cells."""
    parts = []
    for name, n_halves in (("a", 1), ("b", 2)):
        part = laid_out[laid_out.obs["slide"] == name].copy()
        half = (part.obsm["stofm_spatial"][:, 0] > 0) * (n_halves - 1)
        part.obs["stofm_virtual_cell"] = pd.Categorical(half.astype(str))
        part.uns["stofm"]["subslice"] |= {
            "n_cells": np.bincount(half),
            "params": {"library_key": ""},
        }
        parts.append(part)
    return parts[0], parts[1]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("uns_merge", ["first", None])
def test_joined_slices_have_their_own_virtual_cells(
    laid_out: ad.AnnData, order: int, uns_merge: str | None
) -> None:
    parts = two_slices(laid_out)
    joined = ad.concat(parts[::order], uns_merge=uns_merge)
    axes = st.pl.virtual_cells(joined, library_key="slide", show=False)
    for ax, part in zip(axes, parts, strict=True):
        alone = st.pl.virtual_cells(part, show=False)
        np.testing.assert_allclose(
            ax.collections[1].get_offsets(), alone.collections[1].get_offsets()
        )


@pytest.mark.parametrize("plot", [st.pl.virtual_cells, st.pl.subslices])
@pytest.mark.parametrize("order", [1, -1])
def test_joined_slices_need_a_library_key(laid_out: ad.AnnData, plot: Any, order: int) -> None:
    joined = ad.concat(two_slices(laid_out)[::order], uns_merge="first")
    with pytest.raises(KeyError, match=r"of other cells: .* here are 94.*library_key"):
        plot(joined, show=False)


def test_part_of_the_cells_has_markers_at_the_mean_of_the_part(laid_out: ad.AnnData) -> None:
    part = laid_out[::2].copy()
    axes = st.pl.virtual_cells(part, show=False)
    markers = np.vstack([ax.collections[1].get_offsets() for ax in axes])
    means = pd.DataFrame(part.obsm["stofm_spatial"]).groupby(
        part.obs["stofm_virtual_cell"].to_numpy()
    )
    np.testing.assert_allclose(np.sort(markers, axis=0), np.sort(means.mean(), axis=0))
