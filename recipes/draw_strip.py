"""Draw the picture of README and the landing page from the sections in the package.

    python recipes/draw_strip.py docs/_static/strip.png

From left to right: an olfactory bulb's H&E image, its domains over it, a cortex's published regions,
its domains, and the cell types of a breast tumour that a head named from those on the left.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from PIL import Image

import stofm as st

if TYPE_CHECKING:
    from anndata import AnnData

_TITLES = {
    "Olfactory bulb,\nH&E": 1.0,
    "Domains,\nwithout labels": 1.0,
    "Cortex,\npublished regions": 0.7,
    "Domains,\nwithout labels ": 0.7,
    "Breast tumour:\ntypes learnt left of the line": 0.75,
}
#: Of a palette, so that the file stays small.
_N_COLORS = 256
#: Share of the breast section whose types the head is fitted to.
_LABELLED = 0.5


def main() -> None:
    """Embed the sections, find and learn their regions and types, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    bulb = st.datasets.load("mouse_olfactory_bulb_st")
    cortex = st.datasets.load("mouse_cortex_osmfish")
    breast = st.datasets.load("human_breast_xenium")
    for adata in (bulb, cortex, breast):
        st.tl.embed(adata, show_progress_bar=False)
    st.tl.domains(bulb, n_domains=5)
    st.tl.domains(cortex, n_domains=cortex.obs["region"].nunique())
    x = breast.obsm["spatial"][:, 0]
    border = float(np.quantile(x, _LABELLED))
    breast.obs["known"] = breast.obs["cell_type"].where(x < border)
    head = st.tl.annotate(breast, label_key="known")
    st.tl.annotate(breast, head=head)
    draw(bulb, cortex, breast, border, picture)


def draw(bulb: AnnData, cortex: AnnData, breast: AnnData, border: float, picture: Path) -> None:
    """Draw the panels side by side, without legends."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(_TITLES),
        figsize=(12, 3.4),
        width_ratios=list(_TITLES.values()),
        layout="constrained",
    )
    st.pl.image(bulb, alpha=0, ax=axes[0], show=False)
    st.pl.image(bulb, color="stofm_domain", alpha=1, ax=axes[1], show=False)
    st.pl.domains(cortex, truth_key="region", outlines=False, ax=list(axes[2:4]), show=False)
    st.pl.spatial(breast, color="stofm_annotation", ax=axes[4], show=False)
    axes[4].axvline(border, color="black", linewidth=1, linestyle="--")
    for ax, title in zip(axes, _TITLES, strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_axis_off()
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(_N_COLORS).save(picture, optimize=True)


if __name__ == "__main__":
    main()
