"""Seconds and memory that ``stofm.read`` takes for folders of 100,000 cells, made here.

python benchmarks/reading.py [N_CELLS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import psutil
from scipy import sparse

import stofm as st


def main(n_cells: int = 100_000) -> None:
    rng = np.random.default_rng(0)
    names = [f"GENE{k}" for k in range(480)] + [f"NegControlProbe_{k:05}" for k in range(20)]
    types = ["Gene Expression"] * 480 + ["Negative Control Probe"] * 20
    counts = sparse.random(n_cells, 500, 0.12, "csr", random_state=0, dtype=np.float32)
    counts.data = np.ceil(counts.data * 4).astype(np.int32)
    ids = np.array([f"cell{k:08}-1" for k in range(n_cells)])
    xy = rng.uniform(0, 5000, (n_cells, 2))
    with tempfile.TemporaryDirectory() as folder:
        write_xenium(Path(folder, "xenium"), counts, ids, xy, names, types)
        write_merscope(Path(folder, "merscope"), counts, xy, names)
        print(f"{'folder':10} {'cells':>8} {'genes':>6} {'seconds':>8} {'peak MB':>8}")
        for name in ("xenium", "merscope"):
            before = psutil.Process().memory_info().rss
            start = time.perf_counter()
            adata = st.read(Path(folder, name))
            seconds = time.perf_counter() - start
            taken = (psutil.Process().memory_info().rss - before) / 1e6
            print(f"{name:10} {adata.n_obs:8} {adata.n_vars:6} {seconds:8.2f} {taken:8.0f}")


def write_xenium(
    folder: Path,
    counts: sparse.csr_matrix,
    ids: np.ndarray,
    xy: np.ndarray,
    names: list,
    types: list,
) -> None:
    folder.mkdir()
    order = np.random.default_rng(1).permutation(len(ids))
    cells = pd.DataFrame({"cell_id": ids, "x_centroid": xy[:, 0], "y_centroid": xy[:, 1]})
    cells.assign(transcript_counts=9, cell_area=50.5).iloc[order].to_parquet(
        folder / "cells.parquet"
    )
    with h5py.File(folder / "cell_feature_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(counts, name), compression="gzip")
        group["shape"], group["barcodes"] = counts.shape[::-1], ids.astype("S")
        for name, values in (("id", names), ("name", names), ("feature_type", types)):
            group[f"features/{name}"] = np.array(values, dtype="S")


def write_merscope(folder: Path, counts: sparse.csr_matrix, xy: np.ndarray, names: list) -> None:
    folder.mkdir()
    ids = 2317032900000100001 + np.arange(len(xy))
    cells = pd.DataFrame(
        {"": ids, "fov": 1, "volume": 9.5, "center_x": xy[:, 0], "center_y": xy[:, 1]}
    )
    cells.to_csv(folder / "cell_metadata.csv", index=False)
    table = pd.DataFrame(counts.toarray(), columns=names, index=pd.Index(ids, name="cell"))
    table.to_csv(folder / "cell_by_gene.csv")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
