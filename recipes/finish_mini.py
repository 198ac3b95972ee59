"""Put a finished run of recipes/stofm-mini.toml into the package, with its model card.

    python recipes/finish_mini.py RUN SLICES OUT_FOLDER [--probes PROBES.json]

RUN is the folder of the run, SLICES the folder that it was trained on, PROBES what
``benchmarks/probes.py`` measured with the model. Weights are stored in half precision.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stofm import Stofm
from stofm._logging import logger
from stofm._slice_files import open_slice
from stofm.train.recipe import DataConfig, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

RECIPE = Path(__file__).with_name("stofm-mini.toml")
PROVENANCE = (
    "Trained by recipes/stofm-mini.toml on public slices whose publication lets anyone use them; "
    "README.md beside this file lists them with source and licence."
)
INTRODUCTION = """\
A small model for spatial transcriptomics slices, human and mouse, panels and whole transcriptomes.
It is embedded in the package so that `st.tl.embed(adata)` works offline, on a laptop, at more than
a thousand cells per second. It follows SToFM (arXiv 2507.11588), with a fixed linear view of a
cell's counts in front of what its two networks learnt.

It is a zero-shot representation: nothing is fitted to your slice, and cells of any two slices can be
compared. Read alone or side by side, `X_stofm_cell` and `X_stofm` tell types and regions about as
well as principal components that are fitted to the slices in question, or better; the tables below say
where, and where not.
"""
LIMITS = """\
## What it is not good for

- It has seen {n_cells:,} cells of {n_slices} slices: mostly brain, breast and embryo.
- Nothing is done about differences between donors and technologies. Where these are larger than
  those that you look for, centre by slice what you read (`st.tl.domains` does).
- Genes without a human counterpart are not read.
- No clinical use.
"""


def sources(data: DataConfig, folder: Path) -> str:
    """Table of the slices: what they are, where they come from, under which licence."""
    lines = ["| slice | technology | species | tissue | cells | source, licence | paper |"]
    lines.append("|---|---|---|---|---|---|---|")
    for file in data.find(folder)[0]:
        adata = open_slice(file)
        options = data.options_of(file, folder)
        n_cells = adata.n_obs
        if options.exclude:
            n_cells -= int(adata.obs[options.library_key].isin(options.exclude).sum())
        told: Mapping[str, Any] = adata.uns["stofm_source"]
        columns = [
            file.stem,
            told["technology"],
            told["species"],
            told["tissue"],
            f"{n_cells:,}",
            f"{told['repo']} ({told['licence']})",
            told["paper"],
        ]
        lines.append("| " + " | ".join(str(column).replace("|", "/") for column in columns) + " |")
    return "\n".join(lines)


def history(run: Mapping[str, Any]) -> str:
    """Table of the stages: steps, cells, time."""
    lines = ["| stage | steps | cells seen | minutes | peak memory |", "|---|---|---|---|---|"]
    lines += [
        f"| {one['stage']} | {one['steps']:,} | {one['cells']:,} | {one['seconds'] / 60:.1f} "
        f"| {one['peak_memory_bytes'] / 1e9:.1f} GB |"
        for one in run["stages"]
    ]
    return "\n".join(lines)


def card(model: Stofm, run: Mapping[str, Any], table: str, probes: str) -> str:
    """The model card."""
    encoder, spatial = model.config.cell_encoder, model.config.se2_transformer
    n_weights = sum(weights.numel() for weights in model.parameters())
    return "\n".join(
        [
            "---\nlibrary_name: stofm\ntags: [spatial-transcriptomics]\n---",
            f"# {model.name}\n",
            INTRODUCTION,
            f"- {n_weights / 1e6:.1f} million weights in float16; {model.vocabulary.n_genes:,} genes",
            f"- cell encoder: {encoder.n_layers} layers, {encoder.d_hidden} wide, reads the "
            f"{encoder.max_positions - 1} top genes with their values, and the pooled sum of all",
            f"- SE(2) Transformer: {spatial.n_layers} layers, {spatial.d_model} wide; sub-slices of "
            f"{model.config.subslice.n_cells} cells",
            f"- `X_stofm_cell`: {encoder.gene_width} numbers of pooled sums, then {encoder.d_learned} "
            f"that BERT tells; `X_stofm`: the first {spatial.n_passed} of these sums, their mean around "
            f"the cell, then {spatial.d_model} that the SE(2) Transformer tells",
            "\n## How it was trained\n",
            "`stofm train recipes/stofm-mini.toml`: gene embeddings start from the co-expression of "
            f"genes over the slices; then, on {run['device']}:\n",
            history(run),
            "\n## How good its embeddings are\n",
            probes,
            "\n" + LIMITS.format(n_cells=run["n_cells"], n_slices=run["n_slices"]),
            "## Data\n",
            "Weights, vocabulary and medians come from these slices, and the medians from those that "
            "watch the run; further names of genes from others (recipes/fit_mini_vocabulary.py).\n",
            table,
            "",
        ]
    )


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("slices", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--probes", type=Path, help="Markdown that benchmarks/probes.py wrote")
    options = parser.parse_args()
    report = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    model = Stofm.from_pretrained(options.run / "model")
    model.config = replace(model.config, provenance=PROVENANCE)
    table = sources(Recipe.from_toml(RECIPE).data, options.slices)
    probes = "Not measured."
    if options.probes is not None:
        probes = options.probes.read_text(encoding="utf-8").strip()
    model.save_pretrained(options.out, dtype=torch.float16, overwrite=True)
    (options.out / "README.md").write_text(card(model, report, table, probes), encoding="utf-8")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    logger.info("%s: %.1f MB", options.out, size / 1e6)


if __name__ == "__main__":
    main()
