from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

import stofm as st
from stofm._edge.colors import PALETTE, UNKNOWN_COLOR, distinct_colors, fill_colors
from stofm._messages import nearest_names
from stofm.pl._colors import NO_VALUE_COLOR, category_names

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad


@pytest.mark.parametrize("n_colors", [0, 1, 20, 21, 57, 120, 230])
def test_colors_are_distinct_as_far_as_there_are_some(n_colors: int) -> None:
    colors = distinct_colors(n_colors)
    assert len(colors) == n_colors
    assert len(set(colors)) == min(n_colors, 132)


#: Machado, Oliveira and Fernandes 2009, A physiologically-based model for simulation of color
#: vision deficiency (IEEE TVCG 15:1291), severity 1, of linear RGB.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def seen(rgb: np.ndarray, by: str) -> np.ndarray:
    """CIELAB of colours as a reader sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if by != "normal":
        linear = np.clip(linear @ np.array(DEFICIENCIES[by]).T, 0, 1)
    return rgb2lab(
        np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    )


@pytest.mark.parametrize(("by", "least"), [("normal", 12), *((name, 7.5) for name in DEFICIENCIES)])
def test_thirty_colors_can_be_told_apart(by: str, least: float) -> None:
    greys = [NO_VALUE_COLOR, UNKNOWN_COLOR]
    lab = seen(np.array([to_rgb(color) for color in [*PALETTE, *greys]]), by)
    distances = deltaE_ciede2000(lab[:, None], lab[None])
    np.fill_diagonal(distances, np.inf)
    assert distances[:30, :30].min() >= least
    # Greys of cells without a class, too.
    assert distances[:30, 30:].min() >= 6


def test_known_colors_are_kept_and_others_are_free() -> None:
    colors = fill_colors(["a", "b", "c"], {"b": PALETTE[0], "z": PALETTE[1]})
    assert colors == [PALETTE[2], PALETTE[0], PALETTE[3]]


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
