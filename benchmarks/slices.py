"""A table over all slices of a folder: what `tl.embed` makes of each, and how fast.

    python benchmarks/slices.py FOLDER               every .h5ad with coordinates
    python benchmarks/slices.py FOLDER --model DIR   another model than the embedded one

A file may hold several slices (`obs["slice_id"]`); nothing crosses them. What can't be embedded stands
in the table with its message.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np

import stofm as st
from stofm.nn import Stofm, UntrainedModelWarning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

LIBRARY_KEY = "slice_id"


def embed_file(path: Path, model: Stofm, *, device: str) -> dict[str, Any]:
    """Embed one file and describe the result."""
    adata = anndata.read_h5ad(path)
    library_key = LIBRARY_KEY if _n_slices(adata) > 1 else None
    start = time.perf_counter()
    try:
        st.tl.embed(adata, model, library_key=library_key, device=device, show_progress_bar=False)
    except (KeyError, ValueError) as error:
        return {"file": path.stem, "cells": adata.n_obs, "genes": adata.n_vars, "error": str(error)}
    seconds = time.perf_counter() - start
    embedding = adata.obsm["X_stofm"]
    return {
        "file": path.stem,
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "matched": int((adata.var["stofm_token_id"] >= 0).sum()),
        "counts_kept": _share_of_counts(adata),
        "tokens_per_cell": float(adata.obs["stofm_n_tokens"].median()),
        "slices": _n_slices(adata),
        "subslices": int(adata.obs["stofm_subslice"].nunique()),
        "virtual_cells": int(adata.obs["stofm_virtual_cell"].nunique()),
        "finite": bool(np.isfinite(embedding).all()),
        "seconds": seconds,
        "cells_per_second": adata.n_obs / seconds,
    }


def _n_slices(adata: AnnData) -> int:
    return int(adata.obs[LIBRARY_KEY].nunique()) if LIBRARY_KEY in adata.obs else 1


def _share_of_counts(adata: AnnData) -> float:
    per_gene = np.asarray(adata.X.sum(axis=0)).ravel()
    return float(per_gene[adata.var["stofm_token_id"].to_numpy() >= 0].sum() / per_gene.sum())


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Table of all files, and a line of totals."""
    lines = [
        "| file | cells | genes matched | counts kept | tokens per cell (median) | slices "
        "| sub-slices | virtual cells | seconds | cells/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['file']} | {r['cells']:,} | {r['error']} | | | | | | | |")
            continue
        cells = [
            r["file"],
            f"{r['cells']:,}",
            f"{r['matched']:,} of {r['genes']:,}",
            f"{r['counts_kept']:.1%}",
            f"{r['tokens_per_cell']:.0f}",
            f"{r['slices']}",
            f"{r['subslices']}",
            f"{r['virtual_cells']}",
            f"{r['seconds']:.2f}",
            f"{r['cells_per_second']:,.0f}" + ("" if r["finite"] else " NOT FINITE"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    done = [r for r in results if "error" not in r]
    n_cells, seconds = sum(r["cells"] for r in done), sum(r["seconds"] for r in done)
    if done:
        lines.append(
            f"\n{len(done)} of {len(results)} files, {n_cells:,} cells in {seconds:.1f} s: "
            f"{n_cells / seconds:,.0f} cells/s."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="stofm-mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", category=UntrainedModelWarning)
    model = Stofm.from_pretrained(options.model)
    paths = [path for path in sorted(options.folder.glob("*.h5ad")) if _has_places(path)]
    if not paths:
        parser.error(f"{options.folder} holds no .h5ad file with obsm['spatial'].")
    # The first call of a process also imports libraries.
    st.tl.embed(st.datasets.simulate_slice(200, 100), model, device=options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for path in paths:
        print(f"embedding {path.name} ...", file=sys.stderr)
        results.append(embed_file(path, model, device=options.device))
        # After each file, so that an interrupted run leaves what it has.
        (options.out / "slices.json").write_text(json.dumps(results, indent=2) + "\n")
    print(to_markdown(results))


def _has_places(path: Path) -> bool:
    return "spatial" in anndata.read_h5ad(path, backed="r").obsm


if __name__ == "__main__":
    main()
