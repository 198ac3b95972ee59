"""Shards of a corpus against h5ad and Zarr, memory of the reader, and its rate against a model's.

    python benchmarks/corpus.py                            100 slices of 3,000 cells; 1 million cells
    python benchmarks/corpus.py --slices 20 --large 1 10   fewer slices; 1 and 10 million cells

Files are read right after they were written, so the disk plays no part. Blocks are read from open
files. Memory is what a process has for itself (its heap); pages of mapped files are the system's, which
takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable

N_CELLS, N_GENES, GENES_PER_CELL, BLOCK = 3_000, 500, 150, 1_000


def make_slices(folder: Path, n_slices: int) -> None:
    """Write slices with counts of human genes to .h5ad files."""
    from anndata import AnnData

    from stofm.genes import embedded_vocabulary

    genes = embedded_vocabulary().gene_ids[:N_GENES].tolist()
    for number in range(n_slices):
        rng = np.random.default_rng(number)
        counts = sparse.random(
            *(N_CELLS, N_GENES), GENES_PER_CELL / N_GENES, "csr", np.float32, rng=rng
        )
        counts.data = 1 + rng.poisson(1.0, counts.nnz).astype(np.float32)
        adata = AnnData(counts, obsm={"spatial": rng.random((N_CELLS, 2)) * 1e4})
        adata.var_names = genes
        adata.write_h5ad(folder / f"{number:04d}.h5ad")


def seconds_of(read: Callable[[int, int], Any], n_slices: int) -> float:
    """Median seconds of a block of cells: slice, first cell."""
    rng, times = np.random.default_rng(0), []
    for _ in range(200):
        number, first = rng.integers(n_slices), rng.integers(N_CELLS - BLOCK)
        start = time.perf_counter()
        read(int(number), int(first))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def compare_formats(folder: Path, n_slices: int) -> dict[str, float]:
    """Build a corpus and export it; seconds for a block of cells from each."""
    import anndata
    import zarr
    from anndata.io import sparse_dataset

    import stofm as st
    from stofm.corpus.manifest import read_slices

    (folder / "h5ad").mkdir()
    make_slices(folder / "h5ad", n_slices)
    start = time.perf_counter()
    st.corpus.build(folder / "h5ad", folder / "corpus", show_progress_bar=False)
    building = time.perf_counter() - start
    st.corpus.export(folder / "corpus", folder / "zarr", show_progress_bar=False)
    slices = read_slices(folder / "corpus")
    files = [anndata.read_h5ad(p, backed="r") for p in sorted((folder / "h5ad").iterdir())]
    stores = [sparse_dataset(zarr.open(p)["X"]) for p in sorted((folder / "zarr").glob("*.zarr"))]

    def shard(number: int, first: int) -> sparse.csr_matrix:
        one = slices[number]
        start = one.shard.first_cell[one.number] + first
        offsets = one.shard["offsets"][start : start + BLOCK + 1]
        own = slice(offsets[0], offsets[-1])
        counts, genes = (np.array(one.shard[name][own]) for name in ("counts", "tokens"))
        return counts, genes, offsets - offsets[0]

    n_bytes = {
        name: sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
        for name in ("h5ad", "zarr", "corpus")
    }
    return {
        "shard_ms": 1e3 * seconds_of(shard, n_slices),
        "shard_tokens_ms": 1e3
        * seconds_of(lambda k, first: slices[k].take(first + np.arange(BLOCK)), n_slices),
        "h5ad_ms": 1e3 * seconds_of(lambda k, first: files[k].X[first : first + BLOCK], n_slices),
        "zarr_ms": 1e3 * seconds_of(lambda k, first: stores[k][first : first + BLOCK], n_slices),
        "build_cells_per_second": n_slices * N_CELLS / building,
        **{f"{name}_bytes_per_cell": size / n_slices / N_CELLS for name, size in n_bytes.items()},
    }


def write_large(folder: Path, millions: int) -> None:
    """Write slices of 250,000 cells to shards, without counts to read them from."""
    from stofm.corpus.shards import ShardWriter, write_shard
    from stofm.genes import embedded_vocabulary

    vocabulary, rng = embedded_vocabulary(), np.random.default_rng(0)
    n = 250_000
    lengths = rng.integers(50, 250, n)
    size = int(lengths.sum())
    arrays = {
        "tokens": rng.choice(vocabulary.tokens[:N_GENES], size).astype(np.uint16),
        "counts": (1 + rng.poisson(1.0, size)).astype(np.uint16),
        "totals": np.full(n, 300.0),
        "hashes": rng.integers(0, 2**63, n).astype(np.uint64),
        "rows": np.arange(n),
        "places": rng.random((n, 2)),
        "coordinates": rng.random((n, 2)) * 50,
    }

    def fill(number: int, writer: ShardWriter) -> list[dict[str, Any]]:
        writer.append(lengths, **arrays)
        known = {"name": f"s{number}", "checksum": str(number), "cells": n, "token_bits": 15}
        return [known]

    for number in range(4 * millions):
        write_shard(
            folder / f"{number:04d}", vocabulary.fingerprint, lambda w, k=number: fill(k, w)
        )


def _memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = dict(line.split(":", 1) for line in lines)
    return {name: int(entries[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")}


def read_large(folder: Path) -> dict[str, Any]:
    """Open a corpus, draw an epoch and read batches of single cells and of sub-slices."""
    import stofm as st
    from stofm.corpus.preparation import open_corpus
    from stofm.train import TokenMasking
    from stofm.train.order import Draws
    from stofm.train.samples import CellSamples, TokenReader

    model = st.Stofm.from_pretrained()
    before = _memory()["RssAnon"]
    corpus = open_corpus([(path, 0) for path in sorted(folder.iterdir())], model)
    reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
    rng, n = np.random.default_rng(0), 300
    start = time.perf_counter()
    for _ in range(n):
        corpus.take(rng.integers(corpus.n_cells, size=64))
    single = 64 * n / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(n):
        first = rng.integers(corpus.n_cells - 1000)
        corpus.take(first + np.arange(1000))
    blocks = 1000 * n / (time.perf_counter() - start)
    reading = _memory()
    draws = Draws(seed=0, stage=0, batch_size=64)
    batches = CellSamples(reader, draws, TokenMasking(), 0.0).epoch(0)
    start = time.perf_counter()
    ordered = sum(len(batch) for batch in itertools.islice(batches, 4_096))
    seconds = time.perf_counter() - start
    return {
        "million_cells": corpus.n_cells / 1e6,
        "reader_mb": reading["RssAnon"] - before,
        "mapped_mb": reading["RssFile"],
        "order_mb": _memory()["RssAnon"] - reading["RssAnon"],
        "batches": len(batches),
        "cells_per_second_ordered": ordered / seconds,
        "cells_per_second_single": single,
        "cells_per_second_blocks": blocks,
    }


def measure_appetite(folder: Path) -> dict[str, float]:
    """Cells per second that stofm-mini takes on this machine, in training and in embedding."""
    import anndata

    import stofm as st
    from stofm.train import StageConfig

    files = sorted((folder / "h5ad").iterdir())
    run = st.tl.train(
        folder / "corpus",
        stage=StageConfig(name="cell_encoder", max_steps=8),
        out_dir=folder / "run",
        device="cpu",
        show_progress_bar=False,
    ).run
    adata = anndata.read_h5ad(files[0])
    start = time.perf_counter()
    st.tl.embed(adata, device="cpu", show_progress_bar=False)
    embedding = adata.n_obs / (time.perf_counter() - start)
    stage = run["stages"][0]
    return {"train": stage["cells"] / stage["seconds"], "embed": embedding}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--large", type=int, nargs="*", default=[1], help="millions of cells")
    parser.add_argument("--folder", type=Path, help="where files go [a temporary folder]")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("stofm").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.read:
        print(json.dumps(read_large(options.read)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        formats = compare_formats(folder, options.slices)
        print(json.dumps(formats, indent=1))
        ratios = {n: formats[f"{n}_ms"] / formats["shard_ms"] for n in ("h5ad", "zarr")}
        print("times slower than shards:", {n: round(ratio) for n, ratio in ratios.items()})
        appetite = measure_appetite(folder)
        print("stofm-mini, cells a second:", {n: round(rate) for n, rate in appetite.items()})
        for millions in options.large:
            place = folder / f"large-{millions}"
            write_large(place, millions)
            # A process of its own: nothing that was written is in its memory.
            words = [sys.executable, __file__, "--read", str(place)]
            found = json.loads(
                subprocess.run(words, check=True, capture_output=True, text=True).stdout
            )
            print(json.dumps(found))
            factor = found["cells_per_second_single"] / appetite["train"]
            print(f"reader: {factor:.0f} times what training takes")


if __name__ == "__main__":
    main()
