"""Published methods that find the domains of a single slice, on the slices of tasks.py.

    pip install pybanksy spatialleiden
    python benchmarks/published.py FOLDER --out docs/measured/published

BANKSY and SpatialLeiden run as their own guides run them, at the resolution that gives the published
number of regions. Results are written to OUT.json and OUT.md after every score; a run that was
stopped continues.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scanpy as sc
from probes import describe, write_report
from sklearn.neighbors import kneighbors_graph
from task_sets import TASK_SETS, Folder

from stofm import metrics
from stofm.tl._probe_scores import NO_CLASS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

_N_GENES = 2000
#: BANKSY's weight of neighbours, with the number of neighbours and the order of its filter: as its
#: authors use them for spots, and for domains of single cells.
_BANKSY_SETTINGS = {0.2: (6, 0), 0.8: (15, 1)}
_BANKSY_DECAY = "scaled_gaussian"
_N_COMPONENTS = 20
#: SpatialLeiden's neighbours in the tissue, and their layer's weight.
_N_SPATIAL = 10
_LAYER_RATIO = 1.8


def banksy(adata: AnnData, n_domains: int, seed: int, *, weight: float) -> NDArray[Any]:
    """Leiden clusters of BANKSY's matrix, at the resolution that gives so many."""
    from banksy.cluster_methods import run_Leiden_partition
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy
    from banksy_utils.umap_pca import pca_umap

    n_neighbors, order = _BANKSY_SETTINGS[weight]
    table = _normalized(adata)
    table.X = table.X.toarray()
    np.random.seed(seed)  # noqa: NPY002 - its components draw from the global generator
    with contextlib.redirect_stdout(io.StringIO()):
        found = initialize_banksy(
            table,
            (None, None, "spatial"),
            n_neighbors,
            nbr_weight_decay=_BANKSY_DECAY,
            max_m=order,
            plt_edge_hist=False,
            plt_nbr_weights=False,
            plt_theta=False,
        )
        found, _ = generate_banksy_matrix(table, found, [weight], order)
        dims = min(_N_COMPONENTS, table.n_vars)
        pca_umap(found, pca_dims=[dims], plt_remaining_var=False)
        results, _ = run_Leiden_partition(
            found, [], partition_seed=seed, match_labels=False, max_labels=n_domains
        )
    return np.asarray(results["labels"].iloc[0].dense)


def spatial_leiden(adata: AnnData, n_domains: int, seed: int) -> NDArray[Any]:
    """SpatialLeiden's clusters, at the resolutions that give so many."""
    import spatialleiden

    table = _normalized(adata)
    sc.pp.log1p(table)
    sc.pp.pca(table, random_state=seed)
    sc.pp.neighbors(table, random_state=seed)
    distances = kneighbors_graph(table.obsm["spatial"], _N_SPATIAL, mode="distance")
    table.obsp["spatial_connectivities"] = spatialleiden.distance2connectivity(distances)
    options = {"layer_ratio": _LAYER_RATIO, "directed": (False, True), "random_state": seed}
    spatialleiden.search_resolution(
        table, n_domains, latent_kwargs={"random_state": seed}, spatial_kwargs=options
    )
    return table.obs["spatialleiden"].to_numpy()


def _normalized(adata: AnnData) -> AnnData:
    """Counts scaled to the same total, of the genes that vary most."""
    table = adata.copy()
    sc.pp.filter_genes(table, min_cells=1)
    sc.pp.normalize_total(table)
    if table.n_vars > _N_GENES:
        logs = sc.pp.log1p(table, copy=True)
        sc.pp.highly_variable_genes(logs, n_top_genes=_N_GENES)
        table = table[:, logs.var["highly_variable"].to_numpy()].copy()
    return table


METHODS: Mapping[str, Callable[[AnnData, int, int], NDArray[Any]]] = {
    **{f"BANKSY, {one}": partial(banksy, weight=one) for one in _BANKSY_SETTINGS},
    "SpatialLeiden": spatial_leiden,
}


def run(folder: Path, out: Path, names: Sequence[str], seeds: int) -> None:
    """Measure what is not in the report yet; write it after each score."""
    file = out.with_name(out.name + ".json")
    rows = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else []
    done = {(row["task"], row["contender"], row["seed"]) for row in rows}
    for name in names:
        task = TASK_SETS["domains"][name](Folder(folder))
        truth = np.where(task.truth == NO_CLASS, None, task.truth)
        for seed in range(seeds):
            for method, find in METHODS.items():
                if (name, method, seed) in done:
                    continue
                print(f"{name}: {method}, seed {seed} ...", file=sys.stderr, flush=True)
                started = time.perf_counter()
                found = find(task.adata, task.n_domains, seed).astype(str)
                scores = {"ari": metrics.ari(truth, found), "nmi": metrics.nmi(truth, found)}
                row = {"task": name, "contender": method, "seed": seed, "scores": scores}
                row |= {"n_domains": len(set(found)), "n_regions": task.n_domains}
                rows.append(row | {"seconds": round(time.perf_counter() - started, 2)})
                write_report(out, {"results": rows}, to_markdown(rows))


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of each measure, with a line per method and a column per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = []
    for measure, title in {"ari": "ARI", "nmi": "NMI"}.items():
        lines = [["method", *tasks], ["---"] * (len(tasks) + 1)]
        for method in METHODS:
            own = [
                [r["scores"][measure] for r in rows if (r["task"], r["contender"]) == (one, method)]
                for one in tasks
            ]
            lines.append([method, *(describe(scores) if scores else "" for scores in own)])
        parts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument("--only", nargs="+", default=[*TASK_SETS["domains"]], metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3, help="how many [%(default)s]")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    run(options.folder, options.out, options.only, options.seeds)


if __name__ == "__main__":
    main()
