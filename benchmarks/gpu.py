"""Throughput of the base model on a GPU: cells per second and share of the peak FLOP/s.

    python benchmarks/gpu.py --peak-tflops 989      an H100 or H200 in bfloat16, dense
    python benchmarks/gpu.py --device cpu --n-cells 64 --n-tokens 128      a dry run anywhere

Weights are random, which changes no time. FLOPs are those of the computation that is done: of
the last encoder layer position 0 only, attention over real nodes, multiplications and additions
counted apart.
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stofm.genes import RankedTokens
from stofm.nn import (
    CellEncoder,
    SE2Transformer,
    StofmConfig,
    choose_dtype,
    embed_slice,
    encode_cells,
)
from stofm.spatial import SubSliceConfig, lay_out_slice

if TYPE_CHECKING:
    from collections.abc import Callable

    from stofm.nn import CellEncoderConfig, SE2TransformerConfig

N_TOKENS = 25_427
CLS = 25_426


def encoder_flops(config: CellEncoderConfig, length: int) -> float:
    """Multiplications and additions for one cell of `length` tokens."""
    d, inner = config.d_hidden, config.d_inner
    linear = 2 * (4 * d * d + 2 * d * inner)
    full = length * (linear + 4 * length * d)
    last = 2 * 2 * d * d * length + 2 * (2 * d * d + 2 * d * inner) + 4 * length * d
    return (config.n_layers - 1) * full + last


def transformer_flops(config: SE2TransformerConfig, n_nodes: int) -> float:
    """Multiplications and additions for one sub-slice, logits carried as concatenated heads."""
    d, inner = config.d_model, config.d_inner
    linear = 2 * n_nodes * (4 * d * d + 2 * d * inner)
    attention = sum(2 * n_nodes**2 * d * (layer + 1) for layer in range(1, config.n_layers + 1))
    return config.n_layers * linear + attention


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Shortest time of the work after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both parts of the base model."""
    device = torch.device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = StofmConfig.base(N_TOKENS)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    encoder = CellEncoder(config.cell_encoder)
    n, length = options.n_cells, options.n_tokens
    tokens = rng.integers(2, CLS, n * (length - 1)).astype(np.int32)
    ranked = RankedTokens(tokens, np.arange(n + 1, dtype=np.int64) * (length - 1))
    vocabulary: Any = SimpleNamespace(cls=CLS, pad=0)
    encode = seconds(
        lambda: encode_cells(encoder, ranked, vocabulary, device=device, dtype=dtype), device
    )

    transformer = SE2Transformer(config.se2_transformer)
    features = rng.normal(size=(n, config.se2_transformer.d_cell)).astype(np.float32)
    rules = SubSliceConfig()
    layout = lay_out_slice(rng.random((n, 2)), features, rules)
    embed = seconds(
        lambda: embed_slice(transformer, layout, features, rules, device=device, dtype=dtype),
        device,
    )
    sizes = np.bincount(layout.subslice) + layout.virtual.n_virtual + 1
    rows = (
        ("cell encoder", encode, n * encoder_flops(config.cell_encoder, length)),
        (
            "SE(2) Transformer, sub-slices built on the CPU",
            embed,
            sum(transformer_flops(config.se2_transformer, int(size)) for size in sizes),
        ),
    )
    return [
        {
            "part": part,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "cells_per_second": n / taken,
            "tflops": flops / taken / 1e12,
            "share_of_peak": flops / taken / 1e12 / options.peak_tflops,
        }
        for part, taken, flops in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--n-cells", type=int, default=20_000)
    parser.add_argument("--n-tokens", type=int, default=512, help="of a cell, <cls> counted")
    options = parser.parse_args()
    rows = measure(options)
    print("| part | cells/s | TFLOP/s | share of peak |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['part']} | {row['cells_per_second']:,.0f} | {row['tflops']:.1f} "
            f"| {row['share_of_peak']:.1%} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
