"""Draw the small pictures of the API page of ``stofm.pl``, one for each function.

python recipes/draw_thumbnails.py docs/_static/pl
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import cKDTree

import stofm as st

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Pixels of a picture, and colours of its palette, so that files stay small.
_SIZE = (360, 240)
_N_COLORS = 64


def main() -> None:
    """Draw all of them into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, args, options in plots():
        axes = getattr(st.pl, name)(*args, **options, show=False)
        figure = (axes if hasattr(axes, "figure") else axes[0]).figure
        drawn = BytesIO()
        figure.savefig(drawn, dpi=80, bbox_inches="tight")
        plt.close(figure)
        write(Image.open(drawn).convert("RGB"), folder / f"{name}.png")


def write(picture: Image.Image, file: Path) -> None:
    """Fit a picture into the size of all, on white."""
    picture.thumbnail(_SIZE)
    page = Image.new("RGB", _SIZE, "white")
    page.paste(picture, tuple((a - b) // 2 for a, b in zip(_SIZE, picture.size, strict=True)))
    page.quantize(_N_COLORS).save(file, optimize=True)


def plots() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Name, arguments and options of each plot."""
    import scanpy as sc

    cortex = st.datasets.load("mouse_cortex_osmfish")
    st.tl.embed(cortex)
    st.tl.domains(cortex, n_domains=11)
    yield "spatial", (cortex,), {"color": "region", "legend_loc": None}
    yield "domains", (cortex,), {"legend_loc": None}
    yield "subslices", (cortex,), {}
    yield "virtual_cells", (cortex,), {}
    sc.pp.neighbors(cortex, use_rep="X_stofm")
    sc.tl.umap(cortex)
    yield "umap", (cortex,), {"color": "stofm_domain", "legend_loc": None}
    bulb = st.datasets.load("mouse_olfactory_bulb_st")
    yield "image", (bulb,), {"color": "Penk"}
    # The mean over the nearest spots stands in for a prediction.
    _, near = cKDTree(bulb.obsm["spatial"]).query(bulb.obsm["spatial"], k=7)
    mean = np.log1p(bulb[:, "Penk"].X.toarray().ravel())[near].mean(axis=1)
    for name, key in (("imputation", "stofm_imputed"), ("gene_prediction", "stofm_predicted")):
        bulb.obsm[key] = pd.DataFrame({"Penk": mean}, bulb.obs_names)
        yield name, (bulb, "Penk"), {}
    yield from simulated_plots()


def simulated_plots() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Plots of heads, proportions, descriptions, losses, and of what a model uses."""
    spots = st.datasets.simulate_slice(300, 100, technology="visium", regions="nodular", seed=1)
    yield "deconvolution", (spots,), {"key": "proportions", "kind": "pies", "legend_loc": None}
    cells = st.datasets.simulate_slice(500, 80, seed=0)
    st.tl.embed(cells)
    yield "probe", (st.tl.probe(cells, label_key="region", use_rep=["X_stofm"], seeds=1),), {}
    st.tl.annotate(cells, head=st.tl.annotate(cells, label_key="region"))
    panels = ["confusion", "reliability"]
    yield "annotation", (cells,), {"truth_key": "region", "panels": panels}
    description = st.tl.describe(cells, "region", label_key="cell_type")
    yield "describe", (cells, description, "L4"), {}
    yield "influence", (st.tl.influence(cells, groupby="cell_type"),), {}
    st.tl.attention(cells)
    yield "attention", (cells, cells.obs_names[0]), {}
    effect = st.tl.perturb(cells, remove=True, cells=cells.obs_names[:9], null=0)
    yield "perturbation", (cells, effect), {}
    steps = np.arange(1, 200)
    noise = np.random.default_rng(0).normal(0, 0.1, len(steps))
    history = pd.DataFrame({"step": steps, "loss": 3 + 2 * np.exp(-steps / 60) + noise})
    yield "training", (history.assign(stage="cell_encoder", split="train"),), {}


if __name__ == "__main__":
    main()
