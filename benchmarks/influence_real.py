"""Whether influence, on real slices, ranks first what is known: CCL19 and CCR7 in lymphoid tissue.

    python benchmarks/influence_real.py FOLDER

With stofm-mini. Ligands and receptors (LIANA's consensus, of stofm[communication]) are ranked over the same
pairs of spots by influence, by attention with the same null, by the product of their expression, and by
nearness alone. Of a cortex it says whether its layers leave anything to rank.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import stofm as st
from stofm.heads.request import Request
from stofm.perturb.influence import by_genes, expressed, read_resource
from stofm.perturb.masking import PairEffects, effects_between
from stofm.perturb.reading import Subject

if TYPE_CHECKING:
    from anndata import AnnData

    from stofm.perturb.influence import Resource

CORTEX, LYMPHOID = "dlpfc_151676", ("visium_breast_tile", "visium_hcc1")
LAYERS = ["Layer1", "Layer2", "Layer3", "Layer4", "Layer5", "Layer6", "WM"]
PLANTED = [("CCL19", "CCR7"), ("CCL21", "CCR7"), ("CXCL13", "CXCR5")]
MIN_PAIRS = 30


def pairs_of(adata: AnnData, n_max: int) -> tuple[PairEffects, PairEffects]:
    """Pairs of spots within reach with their influence, and the same pairs with their attention."""
    kinds = np.zeros(adata.n_obs, dtype=np.int64)
    subject = Subject.read(adata, Request(show_progress_bar=False), None)
    pairs, _ = effects_between(subject.tissue, kinds, None, reach=None, n_max=n_max)
    attended = st.tl.attention(adata, top=adata.n_obs, copy=True, show_progress_bar=False)
    weights = attended.obsp["stofm_attention"][pairs.receivers, pairs.senders]
    return pairs, pairs._replace(effects=np.asarray(weights).ravel().astype(np.float32))


def complexes(adata: AnnData, resource: Resource) -> sparse.csr_array:
    """Mean log(1 + count) of the genes of each complex, (n_obs, n_complexes)."""
    sizes = np.asarray(resource.subunits.sum(axis=0)).ravel()
    return sparse.csr_array(adata.X.log1p() @ resource.subunits / np.maximum(sizes, 1))


def layers(adata: AnnData, n_max: int) -> list[dict[str, Any]]:
    """How many of the pairs of different layers that have enough pairs of spots are adjacent."""
    found = st.tl.influence(
        adata, groupby="layer", n_max=n_max, min_pairs=MIN_PAIRS, show_progress_bar=False
    ).pairs
    codes = found[["source", "target"]].map(LAYERS.index).to_numpy()
    gaps = np.abs(codes[:, 0] - codes[:, 1])
    return [{"n_different": int((gaps > 0).sum()), "n_adjacent": int((gaps == 1).sum())}]


def ligands(adata: AnnData, resource: Resource, n_max: int) -> list[dict[str, Any]]:
    """Ranks of pairs that bring lymphocytes together among all ligands and receptors."""
    kinds = np.zeros(adata.n_obs, dtype=np.int64)
    pairs, attention = pairs_of(adata, n_max)
    cells, values = expressed(adata.X, resource.subunits), complexes(adata, resource)
    columns = ["ligand_complex", "receptor_complex"]
    tables = {
        name: by_genes(one, kinds, ["all"], cells, resource, min_pairs=MIN_PAIRS)
        for name, one in (("influence", pairs), ("attention", attention))
    }
    own = values[pairs.senders][:, resource.ligands]
    products = own.multiply(values[pairs.receivers][:, resource.receptors]).mean(axis=0)
    called = {
        columns[0]: resource.names[resource.ligands],
        columns[1]: resource.names[resource.receptors],
        "product": np.asarray(products).ravel(),
    }
    table = tables["influence"].merge(tables["attention"], on=columns, suffixes=("", "_attention"))
    table = table.merge(pd.DataFrame(called), on=columns)
    n_cells = dict(zip(resource.names, np.asarray(cells.sum(axis=0)).ravel(), strict=True))
    n_both = table[columns[0]].map(n_cells) * table[columns[1]].map(n_cells)
    table["nearness"] = table["n_pairs"] / n_both
    found = []
    for pair in PLANTED:
        row = table[(table[columns[0]] == pair[0]) & (table[columns[1]] == pair[1])]
        if len(row):
            ranks = {
                by: int((table[by] > row[by].iloc[0]).sum()) + 1
                for by in ("z", "z_attention", "product", "nearness")
            }
            z, rate = float(row["z"].iloc[0]), float(row["FDR"].iloc[0])
            found.append(
                {"pair": "-".join(pair), **ranks, "n": len(table), "value": z, "FDR": rate}
            )
    return [*found, {"n_low_FDR": int((table["FDR"] < 0.05).sum())}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument("--n-max", type=int, default=40, help="senders of a layer [%(default)s]")
    parser.add_argument("--n-spots", type=int, default=500, help="senders of all [%(default)s]")
    options = parser.parse_args()
    for name in (CORTEX, *LYMPHOID):
        started = time.process_time()
        adata = ad.read_h5ad(options.folder / f"{name}.h5ad")
        adata.X = sparse.csr_matrix(adata.X)
        if name == CORTEX:
            rows = layers(adata[adata.obs["layer"].notna()].copy(), options.n_max)
        else:
            resource = read_resource("consensus", adata.var_names.tolist())
            rows = ligands(adata, resource, options.n_spots)
        for row in rows:
            print(json.dumps({"slice": name, **row}), flush=True)
        print(f"{name}: {time.process_time() - started:.0f} s of the processor", flush=True)


if __name__ == "__main__":
    main()
