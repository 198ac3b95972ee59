"""Draw the picture of README and the landing page from the sections in the package.

    python recipes/draw_strip.py docs/_static/strip.png

From left to right: an olfactory bulb's H&E image, its domains over it, a cortex's published regions,
its domains, and the cell types of a breast tumour that a head named from those on the left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np

import stofm as st

_LABEL_SIZE = 9
_WIDTHS = (1, 1, 1.25, 1.25, 1.3)
#: Share of the breast section whose types the head is fitted to.
_LABELLED = 0.5


def main() -> None:
    """Embed the sections, find and learn their regions and types, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    bulb = st.datasets.load("mouse_olfactory_bulb_st")
    cortex = st.datasets.load("mouse_cortex_osmfish")
    breast = st.datasets.load("human_breast_xenium")
    for adata in (bulb, cortex, breast):
        st.tl.embed(adata, show_progress_bar=False)
    st.tl.domains(bulb, n_domains=5)
    st.tl.domains(cortex, n_domains=cortex.obs["region"].nunique())
    x = breast.obsm["spatial"][:, 0]
    border = np.quantile(x, _LABELLED)
    breast.obs["known"] = breast.obs["cell_type"].where(x < border)
    head = st.tl.annotate(breast, label_key="known")
    st.tl.annotate(breast, head=head)

    figure, axes = plt.subplots(
        1, len(_WIDTHS), figsize=(13, 2.9), width_ratios=_WIDTHS, layout="constrained"
    )
    st.pl.image(bulb, alpha=0, ax=axes[0], show=False)
    st.pl.image(bulb, color="stofm_domain", alpha=1, ax=axes[1], show=False)
    st.pl.spatial(cortex, color="region", ax=axes[2], show=False)
    st.pl.spatial(cortex, color="stofm_domain", ax=axes[3], show=False)
    st.pl.spatial(breast, color="stofm_annotation", ax=axes[4], show=False)
    axes[4].axvline(border, color="black", linewidth=1, linestyle="--")
    titles = (
        "Olfactory bulb, H&E",
        "domains, without labels",
        "Cortex, published regions",
        "domains, without labels",
        "Breast tumour: types learnt left,\nnamed right of the line",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=_LABEL_SIZE)
        ax.set_axis_off()
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    figure.savefig(picture, dpi=110, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
