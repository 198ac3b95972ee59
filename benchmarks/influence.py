"""Whether ``stofm.tl.influence`` finds interactions that were planted.

    python benchmarks/influence.py out.json

A small model learns, on simulated slices, to tell the genes that mark no type from all other genes of
a cell and of those around it. Some of the former are programmes that a ligand in neighbours switches on.
The script masks neighbours in held-out slices, and scores the rank of the planted pairs of types among
all pairs, for the trained model, for the untrained one, and for what needs no model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

import stofm as st
from stofm.genes import GeneVocabulary
from stofm.nn import CellEncoderConfig, SE2TransformerConfig, Stofm, StofmConfig, SubSliceBatch
from stofm.perturb.tables import unedited_slices
from stofm.spatial import SubSliceConfig, build_subslice
from stofm.train.samples import cut_slice

if TYPE_CHECKING:
    from anndata import AnnData

    from stofm.perturb import UneditedSlice

#: Of types that meet, in the regions where they do.
PLANTED = (
    ("Myofibroblast", "Tumor", "VEGFA", 30.0),
    ("Macrophage", "Fibroblast", "CCL20", 30.0),
    ("Endothelial", "CD4 T", "CCL22", 30.0),
    ("Dendritic", "B cell", "CXCL13", 30.0),
)
N_CELLS, N_GENES = 2000, 350
READING = {"layer": None, "spatial_key": "spatial", "library_key": None, "seed": 0}
RUN = {"device": "cpu", "show_progress_bar": False}


def simulate(seed: int) -> AnnData:
    """A slice with the planted interactions."""
    return st.datasets.simulate_slice(
        N_CELLS, N_GENES, regions="nodular", interactions=PLANTED, seed=seed
    )


def split_genes(adata: AnnData) -> tuple[list[str], list[str]]:
    """Genes that are read, and those that are told: they mark no type and are no ligand."""
    ligands = [one[2] for one in PLANTED]
    is_told = (adata.var["marker_of"] == "") & ~adata.var_names.isin(ligands)
    return adata.var_names[~is_told].tolist(), adata.var_names[is_told].tolist()


def new_model(slices: list[AnnData]) -> Stofm:
    """A small model with random weights; sums over genes keep all counts apart."""
    vocabulary = GeneVocabulary.fit(slices, reference=Stofm.from_pretrained().vocabulary)
    cells = CellEncoderConfig(
        n_tokens=vocabulary.n_tokens,
        d_cell=528,
        n_layers=1,
        d_hidden=32,
        n_heads=2,
        d_inner=32,
        d_gene=512,
        max_positions=17,
        values="log",
        depth_power=0.25,
        pooled=True,
    )
    spatial = SE2TransformerConfig(
        d_cell=528,
        n_layers=2,
        d_model=64,
        n_heads=4,
        d_inner=128,
        n_kernels=32,
        norm_first=True,
        distance_start="near",
        dropout=0.05,
    )
    rules = SubSliceConfig(n_cells=300, n_components=10, unit="spacing")
    names = {"cell_encoder": cells, "se2_transformer": spatial, "subslice": rules}
    model = Stofm(StofmConfig(name="planted", trained=True, **names), vocabulary)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model.cell_encoder.gene_embeddings.weight.normal_(std=0.1)
    for _, whole in unedited_slices(slices[0], model, **READING, **RUN):
        mean = torch.from_numpy(whole.features.mean(axis=0))
        model.cell_encoder.gene_offset += mean[: model.config.cell_encoder.gene_width]
    return model.eval()


def train(model: Stofm, slices: list[AnnData], told: list[AnnData], n_steps: int) -> list[float]:
    """Train the transformer, in place, to tell expression from the other genes; returns losses."""
    seen = [next(unedited_slices(one, model, **READING, **RUN))[1] for one in slices]
    values = np.concatenate([log_expression(one) for one in told])
    mean, scale = values.mean(axis=0), values.std(axis=0)
    targets = [torch.from_numpy((log_expression(one) - mean) / scale) for one in told]
    rng, transformer = np.random.default_rng(0), model.se2_transformer
    losses, pending = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(model.config.se2_transformer.d_model, len(mean))
        weights = [*transformer.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
        transformer.train()
        for _ in range(n_steps):
            pending = pending or sub_slices(seen, rng)
            number, cells = pending.pop()
            whole = seen[number]
            nodes = build_subslice(whole.layout, whole.features, cells, whole.rules)
            hidden = transformer(SubSliceBatch.from_subslices([nodes])).last_hidden_state
            found = head(hidden[0, -len(cells) :])
            loss = torch.nn.functional.mse_loss(found, targets[number][cells])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


def sub_slices(seen: list[UneditedSlice], rng: np.random.Generator) -> list[tuple[int, Any]]:
    """Cells of sub-slices, cut at a random angle, in random order."""
    parts = [
        (number, cells)
        for number, one in enumerate(seen)
        for cells in cut_slice(
            one.layout.coordinates, one.rules, angle=float(rng.uniform(0, 2 * np.pi))
        )
    ]
    return [parts[k] for k in rng.permutation(len(parts))]


def log_expression(adata: AnnData) -> np.ndarray:
    """log(1 + count), float32 (n_obs, n_vars)."""
    return np.log1p(adata.X.toarray()).astype(np.float32)


def score(name: str, pairs: pd.DataFrame, column: str) -> dict[str, Any]:
    """AUROC over the pairs of types, and ranks of the planted ones."""
    planted = {(one[0], one[1]) for one in PLANTED}
    is_planted = [pair in planted for pair in zip(pairs["source"], pairs["target"], strict=True)]
    values = pairs[column].fillna(pairs[column].min()).to_numpy()
    ranks = [int((values > value).sum()) + 1 for value in values[is_planted]]
    auroc = float(roc_auc_score(is_planted, values))
    return {"by": name, "auroc": auroc, "ranks": sorted(ranks), "n_pairs": len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--slices", type=int, default=8)
    options = parser.parse_args()
    started = time.process_time()
    slices = [simulate(seed) for seed in range(options.slices)]
    inputs, outputs = split_genes(slices[0])
    read, told = ([one[:, genes].copy() for one in slices] for genes in (inputs, outputs))
    model = new_model(read)
    model.save_pretrained(options.out.with_suffix(".untrained"), overwrite=True)
    losses = train(model, read, told, options.steps)
    model.save_pretrained(options.out.with_suffix(".model"), overwrite=True)
    for start in range(0, len(losses), 100):
        print(start, round(float(np.mean(losses[start : start + 100])), 4), flush=True)
    print("seconds of the processor:", round(time.process_time() - started))


if __name__ == "__main__":
    main()
