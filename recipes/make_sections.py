"""Make the sections that ``stofm.datasets.load`` reads, from slices with sources and licences.

    python recipes/make_sections.py SLICES src/stofm/datasets/sections

Only slices whose source lets anyone pass them on; README.md beside them names source and licence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from stofm._edge.tables import write_record
from stofm._keys import Obsm, Uns

if TYPE_CHECKING:
    from anndata import AnnData

#: By name: file, columns of obs, what is not in the file's own record.
SECTIONS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "mouse_cortex_osmfish": (
        "osmfish_sscortex",
        ["cell_type", "region"],
        {
            "licence": "MIT (Copyright (c) 2019 Ruben Dries)",
            "unit": "unknown",
            "note": "All cells of the section; 33 genes. Places in pixels.",
        },
    ),
    "human_breast_xenium": (
        "xenium_breast_tile",
        ["cell_type"],
        {
            "licence": "CC BY 4.0 (counts and places: public data of 10x Genomics, cut); BSD-3-Clause "
            "(types: raphael-group/GASTON, Copyright (c) 2023 Princeton University)",
            "unit": "micrometre",
            "note": "The window of replicate 1 whose cells have a type; types were matched by place.",
        },
    ),
    "mouse_olfactory_bulb_st": (
        "st_mob_he_MOB1",
        [],
        {
            "licence": "MIT (Copyright (c) 2019 Joseph Bergenstråhle)",
            "unit": "unknown",
            "note": "1,000 genes; places in pixels of the H&E image in uns['spatial'] (full size).",
        },
    ),
}
IMAGE_SIDE = 500
README = """\
# Sections that `stofm.datasets.load` reads

Made by `recipes/make_sections.py`. Each file names its source, licence and paper in `uns["stofm"]["source"]` too. All three are among the
slices that `stofm-mini` was trained on (without their labels): scores on them say how a thing is used, not how good it is. `LICENSES.txt`
holds the licences' texts; CC BY 4.0 is at https://creativecommons.org/licenses/by/4.0/.

| name | cells or spots x genes | labels | technology | source | licence | paper |
|---|---|---|---|---|---|---|
"""


def make(slices: Path, name: str) -> AnnData:
    """Cut one section down to what is needed."""
    file, columns, more = SECTIONS[name]
    found = anndata.read_h5ad(slices / f"{file}.h5ad")
    said = dict(found.uns["stofm_source"])
    if name == "human_breast_xenium":
        is_labelled = found.obs["cell_type"].notna().to_numpy()
        low, high = (edge(found.obsm["spatial"][is_labelled], axis=0) for edge in (np.min, np.max))
        xy = found.obsm["spatial"]
        found = found[is_labelled & ((xy >= low) & (xy <= high)).all(axis=1)].copy()
    obs = pd.DataFrame(
        {key: found.obs[key].astype("category").cat.remove_unused_categories() for key in columns},
        index=found.obs_names,
    )
    var = pd.DataFrame({"gene_ids": found.var["ensembl_id"].astype(str)})
    var.index = pd.Index(found.var_names.astype(str).to_numpy())
    adata = anndata.AnnData(sparse.csr_matrix(found.X, dtype=np.float32), obs=obs, var=var)
    adata.obsm[Obsm.SPATIAL] = np.asarray(found.obsm["spatial"], dtype=np.float32)
    if "spatial" in found.uns:
        adata.uns["spatial"] = smaller(found.uns["spatial"])
    write_record(
        adata,
        Uns.SOURCE,
        {},
        technology=said["technology"],
        organism=said["species"],
        tissue=said["tissue"],
        repository=f"github.com/{said['repo']}",
        path=said["path"],
        citation=said["paper"],
        trained_stofm_mini=True,
        **more,
    )
    return adata


def smaller(images: Any) -> dict[str, Any]:
    """The image at half its size, with its scale."""
    kept = {}
    for library, one in images.items():
        image = one["images"]["lowres"]
        step = -(-image.shape[0] // IMAGE_SIDE)
        side = image.shape[0] // step * step
        blocks = image[:side, :side].reshape(side // step, step, side // step, step, 3)
        factors = dict(one["scalefactors"])
        factors["tissue_lowres_scalef"] /= step
        kept[library] = {
            "images": {"lowres": blocks.mean(axis=(1, 3)).astype(np.uint8)},
            "scalefactors": factors,
            "metadata": {},
        }
    return kept


def main() -> None:
    """Make all sections, and the table of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slices", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in SECTIONS:
        adata = make(options.slices, name)
        adata.write_h5ad(options.out / f"{name}.h5ad", compression="gzip", compression_opts=9)
        said = adata.uns["stofm"]["source"]
        labels = ", ".join(f"`{key}` ({adata.obs[key].nunique()})" for key in adata.obs) or "none"
        lines.append(
            f"| `{name}` | {adata.n_obs:,} x {adata.n_vars:,} | {labels} | {said['technology']} | "
            f"{said['repository']}, `{said['path']}` | {said['licence']} | {said['citation']} |\n"
        )
    notes = "".join(f"- `{name}`: {more['note']}\n" for name, (*_, more) in SECTIONS.items())
    (options.out / "README.md").write_text(f"{README}{''.join(lines)}\n{notes}", encoding="utf-8")


if __name__ == "__main__":
    main()
