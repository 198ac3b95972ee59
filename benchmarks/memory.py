"""Memory that stofm.tl.embed takes, against the estimate that it makes before it starts.

    python benchmarks/memory.py                                       three sizes, three panels
    python benchmarks/memory.py --n-cells 100000 --n-genes 300        one of one's own

Every measurement runs in a process of its own: the highest resident size during the work above that
before it, with libraries, model and counts already there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import speed

MB = 1e6


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-cells", nargs="+", type=int, default=[2_000, 10_000, 40_000])
    parser.add_argument("--n-genes", nargs="+", type=int, default=[100, 300, 1_000])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.n_cells[0], options.n_genes[0])))
        return
    rows = []
    for n_cells, n_genes in itertools.product(options.n_cells, options.n_genes):
        command = [sys.executable, str(Path(__file__)), "--here"]
        command += ["--n-cells", str(n_cells), "--n-genes", str(n_genes)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
