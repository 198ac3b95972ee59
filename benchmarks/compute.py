"""Floating-point operations (FLOPs) of models and of recipes: what training would take.

    python benchmarks/compute.py recipes/stofm-base.toml --n-cells 88e6 --n-tokens 500

Multiplications and additions of all matrix products are counted apart, those of attention with
lengths squared too; of the last encoder layer position 0 only, where that is all that is computed.
Padding and whatever is no matrix product are not counted. A step of training takes three times
the forward pass.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stofm.genes import embedded_vocabulary
from stofm.nn import CellEncoder, SE2Transformer
from stofm.train import Recipe

if TYPE_CHECKING:
    from stofm.nn import CellEncoderConfig, SE2TransformerConfig, StofmConfig
    from stofm.train import StageConfig

#: TFLOP/s of an H200 in bfloat16, dense, as its maker states them.
PEAK_TFLOPS = 989.0
#: Forward and backward, in forward passes.
TRAINING = 3
#: Width of the hidden layer of the embedding of values.
_D_VALUE = 32


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained on: cells in all, tokens of a cell (``<cls>`` counted), virtual cells."""

    n_cells: int
    n_tokens: int
    n_virtual: int = 60


def encoder_flops(config: CellEncoderConfig, length: int, *, everywhere: bool = False) -> int:
    """FLOPs of the cell embedding of one cell of `length` tokens.

    `everywhere`: of hidden states at all tokens instead, as masked genes need them.
    """
    d, inner, genes = config.d_hidden, config.d_inner, config.gene_width
    bert = min(length, config.max_positions)
    linear = 2 * (4 * d * d + 2 * d * inner)
    layer = bert * (linear + 4 * bert * d)
    per_token = 2 * d * genes * config.projects_genes + 2 * d * _D_VALUE * (config.values == "log")
    inputs = bert * per_token
    if everywhere:
        return inputs + config.n_layers * layer
    last = 4 * d * d * bert + 2 * (2 * d * d + 2 * d * inner) + 4 * bert * d
    pooled = 2 * genes * (length - 1 + config.d_cell) * config.pooled
    return inputs + (config.n_layers - 1) * layer + last + 2 * d * config.d_cell + pooled


def transformer_flops(config: SE2TransformerConfig, n_nodes: int, n_pairs: int = 0) -> int:
    """FLOPs of one sub-slice, of whose pairs `n_pairs` have a distance of their own.

    Logits are carried from layer to layer as queries and keys side by side.
    """
    d, kernels = config.d_model, config.n_kernels
    linear = 2 * n_nodes * (4 * d * d + 2 * d * config.d_inner)
    attention = sum(2 * n_nodes**2 * d * (layer + 1) for layer in range(1, config.n_layers + 1))
    bias = 2 * n_pairs * kernels * (kernels + config.n_heads)
    return config.n_layers * linear + attention + 2 * n_nodes * d * config.d_cell + bias


def subslice_flops(config: StofmConfig, n_virtual: int, n_cells: int | None = None) -> int:
    """FLOPs of the SE(2) Transformer for one sub-slice."""
    rules = config.subslice
    n_cells = rules.n_cells if n_cells is None else n_cells
    n_nodes = 1 + n_virtual + n_cells
    # Of two nodes once; of neighbours that are mutual as well.
    n_pairs = n_virtual * n_nodes + n_cells * rules.n_neighbors
    return transformer_flops(config.se2_transformer, n_nodes, n_pairs)


def stage_flops(stage: StageConfig, config: StofmConfig, work: Work) -> int:
    """FLOPs of a stage, the embeddings that it is given included."""
    optimizer, encoder = stage.optimizer, config.cell_encoder
    of_cell = encoder_flops(encoder, work.n_tokens)
    at_once = optimizer.batch_size * optimizer.accumulation
    limit = float("inf") if stage.max_steps is None else stage.max_steps * at_once
    if stage.name == "cell_encoder":
        n_samples = min(stage.epochs * work.n_cells, limit)
        length = min(work.n_tokens, encoder.max_positions)
        d, n_hidden = encoder.d_hidden, stage.masking.share * (length - 1)
        sample = encoder_flops(encoder, work.n_tokens, everywhere=True) + 2 * of_cell
        sample += round(2 * n_hidden * d * (d + encoder.n_tokens))
        return round(n_samples * TRAINING * sample)
    n_cells = stage.subslice_cells or config.subslice.n_cells
    n_samples = min(stage.epochs * work.n_cells / n_cells, limit)
    sample = subslice_flops(config, work.n_virtual, n_cells)
    n_encodings = 1
    if stage.name == "joint":
        sample += stage.sampled_cells * of_cell
        if stage.refresh_every:
            n_encodings += int(n_samples / at_once / stage.refresh_every)
    return round(n_samples * TRAINING * sample + n_encodings * work.n_cells * of_cell)


def count_weights(config: StofmConfig) -> int:
    """Number of weights of a model."""
    with torch.device("meta"):
        # First weights that are computed would need numbers.
        sizes = replace(config.se2_transformer, distance_start="random")
        parts = (CellEncoder(config.cell_encoder), SE2Transformer(sizes))
        return sum(weights.numel() for part in parts for weights in part.parameters())


def describe(path: Path, work: Work, share: float) -> str:
    """A row of the table."""
    recipe = Recipe.from_toml(path)
    config = recipe.model.config(embedded_vocabulary().n_tokens)
    of_cell = encoder_flops(config.cell_encoder, work.n_tokens)
    spatial = subslice_flops(config, work.n_virtual) / config.subslice.n_cells
    stages = [stage_flops(stage, config, work) for stage in recipe.stages]
    hours = sum(stages) / (share * PEAK_TFLOPS * 1e12) / 3600
    parts = " + ".join(f"{flops:.1e}" for flops in stages)
    return (
        f"| `{path.stem}` | {count_weights(config) / 1e6:.1f} million | {of_cell / 1e9:.3g} "
        f"| {spatial / 1e9:.2g} | {work.n_cells / 1e6:g} million | {parts} | {hours:.3g} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--n-cells", type=float, required=True, help="of all slices")
    parser.add_argument("--n-tokens", type=int, default=500, help="of a cell, <cls> counted")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that is reached")
    options = parser.parse_args()
    work = Work(n_cells=int(options.n_cells), n_tokens=options.n_tokens)
    print(
        "| recipe | weights | GFLOPs a cell, cell encoder | the same, SE(2) Transformer | cells "
        "| FLOPs of the stages | hours |\n|---|---|---|---|---|---|---|"
    )
    for path in options.recipes:
        print(describe(path, work, options.share))


if __name__ == "__main__":
    main()
