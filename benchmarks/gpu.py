"""What a GPU gives: numbers against the CPU's, speed against its peak, memory against estimates.

    python benchmarks/gpu.py --out gpu.json                       an H200: under 12 minutes
    python benchmarks/gpu.py --device cpu --dry-run               a small model, anywhere

Checked are embeddings and gradients of stofm-mini and of the base model in both precisions; if one
is too far from the CPU's in float32 the exit code is 1. Timed are embedding with the base model and
steps of training; shares are of the peak in bfloat16, also those in float32. Weights of the base model are random, which changes no time. FLOPs are those of
benchmarks/compute.py for real tokens and nodes: what padding costs is lost.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compute
import numpy as np
import torch

from stofm.datasets import simulate_slice
from stofm.genes import RankedTokens, embedded_vocabulary
from stofm.nn import (
    Stofm,
    StofmConfig,
    SubSliceBatch,
    TokenBatch,
    choose_device,
    embed_slice,
    encode_cells,
)
from stofm.nn.device import Nodes, describe_bytes, encoder_memory, transformer_memory
from stofm.nn.inference import SUBSLICES_AT_ONCE, TOKEN_BUDGET, placed
from stofm.spatial import build_subslice, lay_out_slice
from stofm.tl import train
from stofm.train import OptimizerConfig, StageConfig
from stofm.train.run import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from stofm.spatial import SliceLayout

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Largest deviation of embeddings and of gradients, relative to their norm.
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (3e-2, 1e-1)}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    models: tuple[str, ...] = ("mini", "base")
    checked_cells: int = 24
    n_cells: int = 20_000
    mean_tokens: int = 500
    trained_cells: int = 8_000
    trained_genes: int = 1_500
    n_steps: int = 20
    batches: tuple[int, int] = (64, 8)


DRY = Sizes(
    models=("mini",),
    checked_cells=5,
    n_cells=40,
    mean_tokens=60,
    trained_cells=60,
    trained_genes=120,
    n_steps=2,
    batches=(8, 1),
)


def make(name: str) -> Stofm:
    """The built-in model, or a new one of the paper's sizes."""
    if name == "mini":
        return Stofm.from_pretrained()
    vocabulary = embedded_vocabulary()
    return Stofm(StofmConfig.base(vocabulary.n_tokens), vocabulary).eval()


def ragged(model: Stofm, n_cells: int, mean: int, *, seed: int = 0) -> RankedTokens:
    """Token lists of different lengths, as cells of a slice have them."""
    rng = np.random.default_rng(seed)
    tokens = model.vocabulary.tokens
    lengths = np.clip(rng.gamma(4, mean / 4, n_cells), 1, model.config.max_tokens).astype(np.int64)
    lists = [rng.choice(tokens, n, replace=False) for n in lengths]
    return RankedTokens(
        tokens=np.concatenate(lists).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        values=rng.uniform(0.5, 9.0, lengths.sum()).astype(np.float32),
    )


def laid_out(model: Stofm, n_cells: int) -> tuple[SliceLayout, NDArray[np.float32]]:
    """A slice of random cells."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n_cells, model.config.cell_encoder.d_cell)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return lay_out_slice(rng.random((n_cells, 2)), features, model.config.subslice), features


def checks(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Embeddings and gradients on the device against the CPU's in float32."""
    for name in sizes.models:
        model = make(name)
        for part, net, batch, embed, forward in (
            (
                "cell encoder",
                model.cell_encoder,
                token_batch(model, sizes),
                embedded_cells,
                lambda net, batch: net(batch.to(device_of(net))),
            ),
            (
                "SE(2) Transformer",
                model.se2_transformer,
                subslice_batch(model, sizes),
                lambda net, batch, dtype: hidden_nodes(placed(net, device_of(net), dtype), batch),
                hidden_nodes,
            ),
        ):
            with torch.inference_mode():
                embedded = embed(net, batch, torch.float32)
            steepest = gradients(net, batch, forward, torch.float32)
            there = copy.deepcopy(net).to(device)
            for precision, dtype in PRECISIONS.items():
                with torch.inference_mode():
                    found = embed(there, batch, dtype)
                compared = (
                    ("embeddings", found.float().cpu(), embedded),
                    ("gradients", gradients(there, batch, forward, dtype), steepest),
                )
                for (what, own, expected), limit in zip(compared, LIMITS[precision], strict=True):
                    deviation = float((own - expected).norm() / expected.norm())
                    yield {
                        "what": f"{what}, {part} of {name}",
                        "precision": precision,
                        "deviation": deviation,
                        "limit": limit,
                        "passed": deviation <= limit,
                    }


def embedded_cells(net: Any, batch: TokenBatch, dtype: torch.dtype) -> Tensor:
    return net.embed(batch.to(device_of(net)), net.lay_out(dtype))


def hidden_nodes(net: nn.Module, batch: SubSliceBatch) -> Tensor:
    on = device_of(net)
    return net(batch.to(on)).last_hidden_state[batch.is_real.to(on)]


def token_batch(model: Stofm, sizes: Sizes) -> TokenBatch:
    """Cells of different lengths in one batch, so that there is padding."""
    ranked = ragged(model, sizes.checked_cells, sizes.mean_tokens)
    if not model.config.cell_encoder.reads_values:
        ranked = ranked.without_values()
    length = min(int(ranked.n_tokens.max()) + 1, model.config.cell_encoder.max_positions)
    return TokenBatch.from_ranked(
        ranked,
        np.arange(sizes.checked_cells),
        cls_token=model.vocabulary.cls,
        pad_token=model.vocabulary.pad,
        length=length,
    )


def subslice_batch(model: Stofm, sizes: Sizes) -> SubSliceBatch:
    """Two sub-slices of different sizes."""
    layout, features = laid_out(model, 20 * sizes.checked_cells)
    rows = np.arange(len(features))
    parts = [rows, rows[: len(rows) // 2]]
    subslices = [build_subslice(layout, features, part, model.config.subslice) for part in parts]
    return SubSliceBatch.from_subslices(subslices, node_multiple=8)


def device_of(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def gradients(
    net: nn.Module, batch: Any, forward: Callable[..., Tensor], dtype: torch.dtype
) -> Tensor:
    """Gradients of all weights, as a stage of training in that precision computes them."""
    net.zero_grad()
    with torch.autocast(device_of(net).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = forward(net, batch)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(found.shape, generator=generator).to(found.device)
    (found.float() * direction).sum().backward()
    flat = [w.grad.flatten().float().cpu() for w in net.parameters() if w.grad is not None]
    net.zero_grad()
    return torch.cat(flat)


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


def embedding(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Speed and memory of both parts of the largest model, in both precisions."""
    model = make(sizes.models[-1])
    config, n = model.config, sizes.n_cells
    ranked = ragged(model, n, sizes.mean_tokens)
    layout, features = laid_out(model, n)
    rules = config.subslice
    in_subslices = np.bincount(layout.subslice)
    of_cells = [compute.encoder_flops(config.cell_encoder, k + 1) for k in ranked.n_tokens.tolist()]
    nodes = Nodes(int(in_subslices.max()), layout.virtual.n_virtual)
    flops = sum(
        compute.subslice_flops(config, nodes.n_virtual, n_in) for n_in in in_subslices.tolist()
    )
    budget, at_once = TOKEN_BUDGET[device.type], SUBSLICES_AT_ONCE[device.type]
    for precision, dtype in PRECISIONS.items():
        on = {"device": device, "dtype": dtype}
        encoder = model.cell_encoder.to(device)
        transformer = placed(model.se2_transformer, device, dtype)
        yield {
            **timed(partial(encode_cells, encoder, ranked, model.vocabulary, **on), device),
            "what": "embedding, cell encoder",
            "precision": precision,
            "cells": n,
            "flops": sum(of_cells),
            "estimated_bytes": encoder_memory(
                config.cell_encoder, min(budget, int(ranked.n_tokens.sum()) + n), dtype
            ),
        }
        yield {
            **timed(partial(embed_slice, transformer, layout, features, rules, **on), device),
            "what": "embedding, SE(2) Transformer (sub-slices are built on the CPU)",
            "precision": precision,
            "cells": n,
            "flops": flops,
            "estimated_bytes": transformer_memory(
                config.se2_transformer, rules, nodes, min(at_once, len(in_subslices)), **on
            ),
        }


def timed(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Time of the work, and the most memory that it takes on a GPU beside what is there."""
    if device.type != "cuda":
        return {"seconds": seconds(work, device), "bytes": None}
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"seconds": seconds(work, device), "bytes": peak_memory(device) - before}


def training(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """A step of both stages of the largest model, as a run of training takes it."""
    model = make(sizes.models[-1])
    adata = simulate_slice(sizes.trained_cells, sizes.trained_genes, seed=0)
    for stage, batch_size in zip(("cell_encoder", "spatial"), sizes.batches, strict=True):
        for precision in ("32", "bf16-mixed"):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            steps = StageConfig(
                name=stage,
                epochs=1_000,
                max_steps=sizes.n_steps,
                vary_subslices=True,
                optimizer=OptimizerConfig(batch_size=batch_size, accumulation=1),
            )
            with tempfile.TemporaryDirectory() as folder:
                result = train(
                    adata,
                    model,
                    out_dir=folder,
                    stage=steps,
                    precision=precision,
                    device=device,
                    log_every=1,
                    show_progress_bar=False,
                )
            # The first half warms up.
            half = result.history.iloc[sizes.n_steps // 2 - 1 :]
            n_timed = len(half) - 1
            report = result.run["stages"][0]
            n_cells = int(half["cells"].iloc[-1] - half["cells"].iloc[0])
            flops = flops_of_steps(stage, model, n_cells, half["tokens"])
            yield {
                "what": f"training, stage {stage}, {batch_size} samples a step",
                "precision": precision,
                "cells": n_cells,
                "seconds": float(half["seconds"].iloc[-1] - half["seconds"].iloc[0]),
                "flops": flops,
                "steps": n_timed,
                "share_waiting": report["share_waiting"],
                "bytes": report["peak_memory_bytes"] if device.type == "cuda" else None,
            }


def flops_of_steps(stage: str, model: Stofm, n_cells: int, tokens: pd.Series) -> int:
    """FLOPs of steps in which so many cells were seen; `tokens` are those seen so far."""
    config = model.config
    seen = int(tokens.iloc[-1] - tokens.iloc[0])
    if stage == "cell_encoder":
        work = compute.Work(n_cells=n_cells, n_tokens=seen // n_cells)
        return compute.stage_flops(StageConfig(name=stage), config, work)
    per_part = min(n_cells, config.subslice.n_cells)
    n_parts = -(-n_cells // per_part)
    n_virtual = max(0, (seen - n_cells) // n_parts - 1)
    of_part = compute.subslice_flops(config, n_virtual, per_part)
    return compute.TRAINING * n_parts * of_part


def to_markdown(rows: list[dict[str, Any]], peak_tflops: float) -> str:
    """One table of all rows."""
    lines = ["| what | precision | result |", "|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['precision']} | {result_of(row, peak_tflops)} |" for row in rows
    ]
    return "\n".join(lines)


def result_of(row: dict[str, Any], peak_tflops: float) -> str:
    """What a row says."""
    if "deviation" in row:
        verdict = "at most" if row["passed"] else "**too far**, limit"
        return f"deviates by {row['deviation']:.1e} ({verdict} {row['limit']:.0e})"
    tflops = row["flops"] / row["seconds"] / 1e12
    parts = [
        f"{row['cells'] / row['seconds']:,.0f} cells/s",
        f"{tflops:.3g} TFLOP/s, {tflops / peak_tflops:.2%} of the peak",
    ]
    if "steps" in row:
        waiting = f"{row['share_waiting']:.0%} of it for data"
        parts += [f"{row['seconds'] / row['steps'] * 1e3:.0f} ms a step, {waiting}"]
    if row["bytes"] is not None:
        parts += [describe_bytes(row["bytes"])]
    if "estimated_bytes" in row:
        parts += [f"estimated {describe_bytes(row['estimated_bytes'])}"]
    return "; ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="a small model and few cells")
    parser.add_argument("--peak-tflops", type=float, default=compute.PEAK_TFLOPS)
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    sizes = DRY if options.dry_run else Sizes()
    rows: list[dict[str, Any]] = []
    for measure in (checks, embedding, training):
        for row in measure(sizes, device):
            rows.append(row)
            print(row["what"], row["precision"], file=sys.stderr)
    print(to_markdown(rows, options.peak_tflops))
    if options.out is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        report = {"device": name, "torch": torch.__version__, "sizes": asdict(sizes), "rows": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.get("passed", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
