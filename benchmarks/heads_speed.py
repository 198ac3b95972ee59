"""How long a frozen annotation head takes to fit and to predict, from stored embeddings and counts.

    python benchmarks/heads_speed.py                       20,000 cells to fit, 100,000 to predict
    python benchmarks/heads_speed.py --out results/heads_speed

Cells of a simulated slice are embedded once and drawn again and again, each with some noise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anndata import AnnData

import stofm as st

if TYPE_CHECKING:
    from collections.abc import Callable

_N_SIMULATED = 2_000
_N_GENES = 300
#: Of noise, in standard deviations of each column.
_NOISE = 0.3


def draw_cells(embedded: AnnData, n_cells: int, *, seed: int) -> AnnData:
    """Draw cells with replacement, with their counts, and move their embeddings a little."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, embedded.n_obs, n_cells)
    obsm = {"spatial": embedded.obsm["spatial"][rows]}
    for key in ("X_stofm_cell", "X_stofm"):
        values = embedded.obsm[key][rows]
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        obsm[key] = values + _NOISE * values.std(axis=0) * noise
    obs = embedded.obs.iloc[rows].set_axis([f"cell{k}" for k in range(n_cells)])
    drawn = AnnData(embedded.X[rows], obs=obs, var=embedded.var, obsm=obsm)
    # The records are of fewer cells, which heads would notice.
    records = {key: {**record, "n_cells": n_cells} for key, record in embedded.uns["stofm"].items()}
    drawn.uns["stofm"] = records
    return drawn


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result, seconds on the clock, and seconds of all processors."""
    started, used = time.perf_counter(), time.process_time()
    result = work()
    clock, processors = time.perf_counter() - started, time.process_time() - used
    return result, {"seconds": round(clock, 2), "processor_seconds": round(processors, 2)}


def measure(
    model: str, *, n_fit: int, n_predict: int, device: str, seed: int = 0
) -> dict[str, Any]:
    """Fit to some cells and predict others."""
    embedded = st.datasets.simulate_slice(_N_SIMULATED, _N_GENES, seed=seed)
    st.tl.embed(embedded, model, device=device, show_progress_bar=False)
    training = draw_cells(embedded, n_fit, seed=seed)
    query = draw_cells(embedded, n_predict, seed=seed + 1)
    options = {"device": device, "show_progress_bar": False}
    head, fitting = timed(
        lambda: st.tl.annotate(training, label_key="cell_type", seed=seed, **options)
    )
    _, predicting = timed(lambda: st.tl.annotate(query, head=head, **options))
    found = query.obsm["stofm_annotation_proba"].idxmax(axis=1)
    return {
        "model": model,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "classes": len(head.classes),
        "columns": int(sum(training.obsm[key].shape[1] for key in head.use_rep)),
        "fit": {"cells": n_fit, **fitting},
        "predict": {"cells": n_predict, **predicting},
        "accuracy": st.metrics.accuracy(query.obs["cell_type"], found),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """A line for each step."""
    lines = [
        f"Frozen annotation head, {report['classes']} classes, {report['columns']} columns of "
        f"`{report['model']}`, {report['threads']} threads on {report['cores']} cores:",
        "",
        "| step | cells | seconds | processor seconds |",
        "| --- | --- | --- | --- |",
    ]
    for step in ("fit", "predict"):
        row = report[step]
        lines.append(
            f"| {step} | {row['cells']:,} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stofm-mini", help="folder or name [%(default)s]")
    parser.add_argument("--fit", type=int, default=20_000, help="cells [%(default)s]")
    parser.add_argument("--predict", type=int, default=100_000, help="cells [%(default)s]")
    parser.add_argument("--device", default="cpu", help="[%(default)s]")
    parser.add_argument("--out", type=Path, help="writes the numbers to OUT.json")
    options = parser.parse_args()
    report = measure(
        options.model, n_fit=options.fit, n_predict=options.predict, device=options.device
    )
    if options.out is not None:
        path = options.out.with_name(options.out.name + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
