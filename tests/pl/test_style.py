from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import stofm as st
from stofm._edge.colors import distinct_colors
from stofm.pl._colors import category_names, nearest_names

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad


@pytest.mark.parametrize("n_colors", [0, 1, 20, 21, 57, 120, 230])
def test_colors_are_distinct_as_far_as_scanpy_has_some(n_colors: int) -> None:
    colors = distinct_colors(n_colors)
    assert len(colors) == n_colors
    assert len(set(colors)) == min(n_colors, 132)


def test_natural_order_of_text_and_own_order_of_categories() -> None:
    text = category_names(pd.Series(["10", "2", None, "b", "1"], dtype=object))
    assert list(text.cat.categories) == ["1", "2", "10", "b"]
    assert list(text.cat.codes) == [2, 1, -1, 3, 0]
    own = category_names(pd.Series(pd.Categorical.from_codes([0, 1], [10, 2])))
    assert list(own.cat.categories) == ["10", "2"]


def test_nearest_names() -> None:
    assert nearest_names("erbb2", ["ERBB2", "KRT8"]) == " Nearest: ['ERBB2']."
    assert nearest_names("zzz", ["a", "b"]) == " There are: ['a', 'b']."
    assert nearest_names("zzz", [f"k{i}" for i in range(30)]).endswith("...")


def test_folder_that_is_not_there(adata: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*figures for save='.*a.png'; make"):
        st.pl.spatial(adata, show=False, save=tmp_path / "figures" / "a.png")


def test_axes_in_rows(adata: ad.AnnData) -> None:
    _, rows = plt.subplots(2, 2)
    axes = st.pl.spatial(adata, ["kind", "score", "flag", "GENE0"], ax=rows, show=False)
    assert axes == [*rows[0], *rows[1]]


def test_what_is_no_axes(adata: ad.AnnData) -> None:
    with pytest.raises(TypeError, match="ax must be Axes or several of them, found Figure"):
        st.pl.spatial(adata, ax=plt.figure(), show=False)


@pytest.mark.parametrize("plot", [st.pl.spatial, st.pl.umap])
def test_nothing_to_draw_and_no_columns(adata: ad.AnnData, plot: Any) -> None:
    adata.obsm["X_umap"] = adata.obsm["spatial"]
    with pytest.raises(ValueError, match=r"There is nothing to draw: .*0 colours"):
        plot(adata, [], show=False)
    with pytest.raises(ValueError, match="ncols must be at least 1, found 0"):
        plot(adata, "kind", ncols=0, show=False)
    with pytest.raises(ValueError, match="vmin=3 is above vmax=1"):
        plot(adata, "score", vmin=3, vmax=1, show=False)
