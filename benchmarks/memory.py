"""Memory that stofm takes: that of tl.embed against its estimate, and one big slice step by step.

    python benchmarks/memory.py                                       three sizes, three panels
    python benchmarks/memory.py --n-cells 100000 --n-genes 300        one of one's own
    python benchmarks/memory.py --big --n-cells 10000 100000 1000000 --n-genes 300

Every measurement runs in a process of its own. Without ``--big`` it is the highest resident size during
the work above that before it, with libraries, model and counts already there. With ``--big`` a slice is
written to disk and embedded from there (``--source``: backed h5ad, Zarr, lazy), its domains are found and
its cells annotated by a head; the resident size is that of the whole process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import speed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MB, GB = 1e6, 1e9
#: Cells of a tile of a big slice, its side in micrometres, and after how many tiles they repeat.
TILE, SIDE, DIFFERENT = 10_000, 1_200.0, 20
#: Steps of tl.embed, by the function that takes them.
STEPS = {
    "counts to tokens": "compute_tokens",
    "cell encoder": "encode",
    "layout": "lay_out",
    "SE(2) Transformer": "_embed_slices",
}


def measure(n_cells: int, n_genes: int) -> dict[str, float]:
    """Embed a simulated slice in this process; return the estimate and the peak in bytes."""
    import stofm as st
    from stofm._edge import embedding

    model = st.Stofm.from_pretrained()
    # What is imported and built at the first call is no part of the work.
    st.tl.embed(st.datasets.simulate_slice(500, 100, seed=1), model, device="cpu")
    adata = st.datasets.simulate_slice(n_cells, n_genes, seed=0)
    _give_back()
    before = speed._resident_bytes(peak=False)
    estimated = mock.Mock(wraps=embedding.host_memory)
    with mock.patch.object(embedding, "host_memory", estimated):
        st.tl.embed(adata, model, device="cpu")
    call = estimated.call_args
    return {
        "cells": n_cells,
        "genes": n_genes,
        "genes_per_cell": call.args[2].genes_per_cell,
        "estimate": embedding.host_memory(*call.args, **call.kwargs),
        "measured": speed._resident_bytes(peak=True) - before,
    }


def _give_back() -> None:
    """Let the allocator hand back what is free, as if nothing had run before."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# One big slice


def write_big(path: Path, n_cells: int, n_genes: int) -> None:
    """Write a slice of tiles beside each other, whose counts are never in memory together."""
    import h5py
    import pandas as pd
    import zarr
    from anndata import AnnData
    from anndata.io import sparse_dataset, write_elem

    import stofm as st

    n_tiles = max(1, n_cells // TILE)
    per_row = int(np.ceil(np.sqrt(n_tiles)))
    group = h5py.File(path, "w") if path.suffix == ".h5ad" else zarr.open_group(path, mode="w")
    places = []
    made = lru_cache(DIFFERENT)(partial(st.datasets.simulate_slice, n_cells // n_tiles, n_genes))
    for number in range(n_tiles):
        tile = made(seed=number % DIFFERENT)
        places.append(tile.obsm["spatial"] + SIDE * np.array(divmod(number, per_row)))
        if number == 0:
            write_elem(group, "/", AnnData(tile.X, var=tile.var))
            counts = sparse_dataset(group["X"])
        else:
            counts.append(tile.X)
    xy = np.concatenate(places)
    write_elem(group, "obs", pd.DataFrame(index=[f"c{k}" for k in range(len(xy))]))
    write_elem(group, "obsm", {"spatial": xy})
    if path.suffix == ".h5ad":
        group.close()


def open_big(path: Path, source: str) -> Any:
    """Open a slice whose counts stay on disk."""
    import anndata

    from stofm._edge.slice_files import open_table

    if source == "h5ad":
        return anndata.read_h5ad(path, backed="r")
    return open_table(path) if source == "zarr" else anndata.experimental.read_lazy(path)


def measure_big(path: Path, source: str, n_genes: int, works: list[str]) -> list[dict[str, Any]]:
    """Embed, find domains and annotate in this process; a row for each with seconds and peaks."""
    import stofm as st
    from stofm._edge import embedding

    tile = st.datasets.simulate_slice(2_000, n_genes, seed=10_000)
    # What is imported and built at the first call is no part of the work.
    st.tl.embed(tile, device="cpu")
    head = (
        st.tl.annotate(tile, label_key="cell_type", device="cpu") if "annotate" in works else None
    )
    rows: list[dict[str, Any]] = []
    steps: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def watched(name: str) -> Iterator[None]:
        speed._resident_bytes(peak=False)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        steps[name] = {
            "seconds": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "peak": speed._resident_bytes(peak=True),
        }

    def watching(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with watched(name):
                return step(*arguments, **options)

        return run

    adata = open_big(path, source)
    todo: dict[str, Callable[[], Any]] = {
        "embed": lambda: st.tl.embed(adata, device="cpu", show_progress_bar=False),
        "domains": lambda: st.tl.domains(adata, n_domains=8),
        "annotate": lambda: st.tl.annotate(adata, head=head, device="cpu"),
    }
    with contextlib.ExitStack() as stack:
        for name, function in STEPS.items():
            step = watching(name, getattr(embedding, function))
            stack.enter_context(mock.patch.object(embedding, function, step))
        for work in works:
            steps.clear()
            _give_back()
            start, cpu = time.perf_counter(), time.process_time()
            with watched("rest"):
                todo[work]()
            seconds, rest = time.perf_counter() - start, steps.pop("rest")
            rows.append(
                {
                    "cells": adata.n_obs,
                    "source": source,
                    "work": work,
                    "seconds": seconds,
                    "cpu": time.process_time() - cpu,
                    "peak": max(rest["peak"], *(one["peak"] for one in steps.values()), 0),
                    "steps": dict(steps),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def big_to_markdown(rows: list[dict[str, Any]]) -> str:
    """Tables of all works, and of the steps of embedding."""
    lines = [
        "| cells | from | work | CPU seconds | cells/s | peak, GB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['cells']:,} | {row['source']} | {row['work']} | {row['cpu']:,.0f} "
        f"| {row['cells'] / row['cpu']:,.0f} | {row['peak'] / GB:.2f} |"
        for row in rows
    ]
    lines += ["", "| cells | from | " + " | ".join(STEPS) + " |", "|---|---|" + "---|" * len(STEPS)]
    for row in (one for one in rows if one["steps"]):
        steps = (row["steps"][name] for name in STEPS)
        cells = (f"{one['cpu']:,.0f} s, {one['peak'] / GB:.2f} GB" for one in steps)
        lines.append(f"| {row['cells']:,} | {row['source']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# All


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Table of all measurements."""
    lines = [
        "| cells | panel | genes per cell | estimate, MB | measured, MB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["estimate"] / row["measured"]
        lines.append(
            f"| {row['cells']:,} | {row['genes']:,} | {row['genes_per_cell']:.0f} "
            f"| {row['estimate'] / MB:,.0f} | {row['measured'] / MB:,.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def _run_here(*arguments: object) -> Any:
    """Run this script in a fresh process and return what it printed last."""
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-cells", nargs="+", type=int, default=[2_000, 10_000, 40_000])
    parser.add_argument("--n-genes", nargs="+", type=int, default=[100, 300, 1_000])
    parser.add_argument("--big", action="store_true", help="one big slice, step by step")
    parser.add_argument("--source", nargs="+", default=["h5ad", "zarr", "lazy"])
    parser.add_argument("--work", nargs="+", default=["embed", "domains", "annotate"])
    parser.add_argument("--folder", type=Path, help="where slices are written [a temporary folder]")
    parser.add_argument("--here", type=Path, nargs="?", const=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    first = options.n_cells[0], options.n_genes[0]
    if options.here is not None:
        logging.getLogger("stofm").setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
        source, works = options.source[0], options.work
        found: Any = (
            measure_big(options.here, source, first[1], works) if options.big else measure(*first)
        )
        print(json.dumps(found))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for n_cells, n_genes in itertools.product(options.n_cells, options.n_genes):
            words = ["--n-cells", n_cells, "--n-genes", n_genes]
            if not options.big:
                rows.append(_run_here(*words, "--here"))
                print(rows[-1], file=sys.stderr)
                continue
            for source in options.source:
                path = Path(folder, "slice.zarr" if source == "zarr" else "slice.h5ad")
                if source != "lazy" or not path.exists():
                    write_big(path, n_cells, n_genes)
                words += ["--source", source, "--work", *options.work, "--big", "--here", path]
                rows += _run_here(*words)
    print(big_to_markdown(rows) if options.big else to_markdown(rows))


if __name__ == "__main__":
    main()
