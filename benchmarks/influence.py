"""Whether ``stofm.tl.influence`` finds interactions that were planted.

    python benchmarks/influence.py OUT

A small model learns, on simulated slices, to tell the genes that mark no type from all other genes of
a cell and of those around it. Some of the former are programmes that a ligand in neighbours switches on.
The script masks neighbours in held-out slices, and scores the rank of the planted pairs of types among
all pairs, for the trained model, for the untrained one, and for what needs no model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from sklearn.metrics import roc_auc_score

import stofm as st
from stofm.genes import GeneVocabulary
from stofm.heads.request import Request
from stofm.nn import CellEncoderConfig, SE2TransformerConfig, Stofm, StofmConfig, SubSliceBatch
from stofm.perturb.influence import by_type
from stofm.perturb.masking import PairEffects
from stofm.perturb.reading import Subject
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
REACH, MIN_PAIRS = 30.0, 30
RUN = {"device": "cpu", "show_progress_bar": False, "seed": 0}


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
    mean = torch.from_numpy(unedited(slices[0], model).features.mean(axis=0))
    model.cell_encoder.gene_offset += mean[: model.config.cell_encoder.gene_width]
    return model.eval()


def unedited(adata: AnnData, model: Stofm) -> UneditedSlice:
    """A slice as the model sees it."""
    return Subject.read(adata, Request(model, **RUN), None).tissue.whole(0)


def train(model: Stofm, slices: list[AnnData], told: list[AnnData], n_steps: int) -> list[float]:
    """Train the transformer, in place, to tell expression from the other genes; returns losses."""
    seen = [unedited(one, model) for one in slices]
    values = np.concatenate([log_expression(one) for one in told])
    mean, scale = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-3)
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


def influence_of(model: Stofm, adata: AnnData, n_max: int) -> pd.DataFrame:
    """Pairs of types by influence; slices are told apart."""
    found = st.tl.influence(
        adata,
        groupby="cell_type",
        model=model,
        reach=REACH,
        n_max=n_max,
        library_key="slice_id",
        **RUN,
    )
    return found.pairs


def neighbors(adata: AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers and distances of all pairs of a slice within reach."""
    parts = []
    for rows in adata.obs.reset_index().groupby("slice_id", observed=True).indices.values():
        xy = adata.obsm["spatial"][rows]
        pairs = cKDTree(xy).query_pairs(REACH, output_type="ndarray")
        both = np.concatenate([pairs, pairs[:, ::-1]])
        distance = np.linalg.norm(xy[both[:, 0]] - xy[both[:, 1]], axis=1)
        parts.append((rows[both[:, 0]], rows[both[:, 1]], distance))
    senders, receivers, distances = map(np.concatenate, zip(*parts, strict=True))
    return senders, receivers, distances


def without_masking(model: Stofm, adata: AnnData, whole: AnnData) -> dict[str, pd.DataFrame]:
    """Scores of the pairs of types by nearness, by expression, and by attention.

    `adata` has the genes that are read, `whole` all. Expression is told the true ligands and
    programmes: the largest product, over these, of mean ligand in senders and mean programme in
    receivers, each against its mean over types.
    """
    kinds = adata.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
    names = adata.obs["cell_type"].cat.categories.tolist()
    senders, receivers, distances = neighbors(adata)
    sizes = np.bincount(kinds)
    table = pd.DataFrame({"source": kinds[senders], "target": kinds[receivers]})
    near = table.value_counts().rename("n_pairs").reset_index()
    near["score"] = near["n_pairs"] / sizes[near["source"]] / sizes[near["target"]]
    truth = whole.uns["simulation"]["interactions"]
    log = pd.DataFrame(log_expression(whole), columns=whole.var_names).groupby(kinds).mean()
    products = [
        np.outer(log[ligand] / log[ligand].mean(), own.mean(axis=1) / own.to_numpy().mean())
        for ligand, own in (
            (ligand, log[programme.split(",")])
            for ligand, programme in zip(truth["ligand"], truth["programme"], strict=True)
        )
    ]
    expression = near.copy()
    expression["score"] = np.max(products, axis=0)[near["source"], near["target"]]
    for one in (near, expression):
        for column in ("source", "target"):
            one[column] = np.array(names, dtype=object)[one[column]]
    attended = st.tl.attention(
        adata, model, top=N_CELLS, library_key="slice_id", copy=True, **RUN
    ).obsp["stofm_attention"]
    weights = np.asarray(attended[receivers, senders]).ravel().astype(np.float32)
    attention = by_type(
        PairEffects(senders, receivers, distances, weights), kinds, names, min_pairs=MIN_PAIRS
    )
    return {"nearness": near, "expression product": expression, "attention": attention}


def screened(model: Stofm, adata: AnnData) -> list[dict[str, Any]]:
    """Rank of each planted ligand among all genes, deleted in its senders, by the size of the null."""
    found = []
    for (sender, receiver, ligand, _), null in itertools.product(PLANTED, (20, 100)):
        table = st.tl.screen(
            adata,
            adata.var_names.tolist(),
            cells=f"cell_type == '{sender}'",
            receivers=f"cell_type == '{receiver}'",
            null=null,
            model=model,
            **RUN,
        )
        rank = {by: int((table[by] > table.loc[ligand, by]).sum()) + 1 for by in ("z", "effect")}
        found.append({"ligand": ligand, "null": null, **rank, "n_genes": len(table)})
        print(json.dumps(found[-1]), flush=True)
    return found


def score(name: str, pairs: pd.DataFrame, column: str) -> dict[str, Any]:
    """AUROC over the pairs of types, and ranks of the planted ones."""
    pairs = pairs[pairs["n_pairs"] >= MIN_PAIRS]
    planted = {one[:2] for one in PLANTED}
    is_planted = [pair in planted for pair in zip(pairs["source"], pairs["target"], strict=True)]
    values = pairs[column].fillna(pairs[column].min()).to_numpy()
    ranks = [int((values > value).sum()) + 1 for value in values[is_planted]]
    auroc = float(roc_auc_score(is_planted, values))
    return {"by": f"{name}, {column}", "auroc": auroc, "ranks": sorted(ranks), "n": len(pairs)}


def evaluate(models: dict[str, Stofm], n_max: int) -> dict[str, Any]:
    """Score models on held-out slices, in which nothing was trained."""
    whole = ad.concat([simulate(seed) for seed in (200, 201)], merge="same", uns_merge="first")
    whole.obs["slice_id"] = np.repeat(["a", "b"], N_CELLS)
    whole.obs_names_make_unique()
    adata = whole[:, split_genes(whole)[0]].copy()
    pairs: list[dict[str, Any]] = []
    for name, model in models.items():
        found = influence_of(model, adata, n_max)
        found["ratio"] = found["strength"] / found["expected"]
        pairs += [score(f"influence, {name}", found, by) for by in ("z", "ratio", "strength")]
        print(json.dumps(pairs[-3:]), found.head(8).to_string(), flush=True)
    measured = found.loc[found["n_pairs"] >= MIN_PAIRS, ["source", "target"]]
    for name, other in without_masking(models["trained"], adata, whole).items():
        own = measured.merge(other, on=["source", "target"])
        pairs.append(score(name, own, "z" if name == "attention" else "score"))
        print(json.dumps(pairs[-1:]), flush=True)
    xy = adata.obsm["spatial"]
    is_half = (adata.obs["slice_id"] == "a") & (xy[:, 0] < np.median(xy[:, 0]))
    own = adata[is_half].copy()
    return {"pairs": pairs, "screen": {name: screened(one, own) for name, one in models.items()}}


def make_models(out: Path, n_slices: int, n_steps: int) -> float:
    """Train a model, and write it and the untrained one; returns its last loss."""
    slices = [simulate(seed) for seed in range(n_slices)]
    inputs, outputs = split_genes(slices[0])
    read, told = ([one[:, genes].copy() for one in slices] for genes in (inputs, outputs))
    model = new_model(read)
    model.save_pretrained(out / "untrained", overwrite=True)
    losses = train(model, read, told, n_steps)
    model.save_pretrained(out / "trained", overwrite=True)
    return float(np.mean(losses[-100:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder; models that are there are not trained anew")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--n-max", type=int, default=60)
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    started = time.process_time()
    if not (options.out / "trained").is_dir():
        loss = make_models(options.out, options.slices, options.steps)
        seconds = time.process_time() - started
        print(f"trained in {seconds:.0f} s of the processor; last loss {loss:.4f}", flush=True)
    models = {name: Stofm.from_pretrained(options.out / name) for name in ("trained", "untrained")}
    found = evaluate(models, options.n_max)
    (options.out / "found.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
