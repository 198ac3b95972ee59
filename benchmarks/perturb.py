"""How long a screen takes: every gene of a panel deleted in the same cells, one by one.

    python benchmarks/perturb.py                                   200 genes in 500 of 3,000 cells
    python benchmarks/perturb.py --n-genes 300 --n-edited 1000

On a simulated slice with stofm-mini, on the CPU, in one thread. What counts on a machine with other
work are the seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

import stofm as st
from stofm.perturb import engine


def measure(n_cells: int, n_genes: int, n_edited: int, n_null: int) -> dict[str, float]:
    """Screen a simulated slice; seconds on the clock and of the processor, and what was computed."""
    adata = st.datasets.simulate_slice(n_cells, n_genes, seed=0)
    model = st.Stofm.from_pretrained()
    cells = np.random.default_rng(0).choice(adata.obs_names, n_edited, replace=False)
    # What is imported and built at the first call is no part of the work.
    small = st.datasets.simulate_slice(500, n_genes, seed=1)
    st.tl.screen(small, small.var_names[:2].tolist(), cells=small.obs_names[:9], null=0)
    done = {"encoded": 0, "embedded": 0}
    encode, forward = engine.encode_cells, engine.SubSliceRun._forward

    def counted_encode(encoder, ranked, *args, **options):
        done["encoded"] += ranked.n_cells
        return encode(encoder, ranked, *args, **options)

    def counted_forward(run, variants):
        done["embedded"] += len(variants)
        return forward(run, variants)

    engine.encode_cells, engine.SubSliceRun._forward = counted_encode, counted_forward
    started, used = time.perf_counter(), time.process_time()
    table = st.tl.screen(
        adata, adata.var_names.tolist(), cells=cells, null=n_null, model=model, device="cpu"
    )
    return {
        "cells": n_cells,
        "genes": len(table),
        "edited_cells": n_edited,
        "cells_with_a_gene": round(float(table["n_cells"].mean()), 1),
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "threads": torch.get_num_threads(),
        "cells_encoded": done["encoded"],
        "sub_slices_embedded": done["embedded"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-cells", type=int, default=3_000)
    parser.add_argument("--n-genes", type=int, default=200)
    parser.add_argument("--n-edited", type=int, default=500)
    parser.add_argument("--n-null", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(**vars(options))))


if __name__ == "__main__":
    main()
