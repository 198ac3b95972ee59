from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
influence = importlib.import_module("influence")


def test_a_model_learns_to_tell_genes_that_it_does_not_read(monkeypatch) -> None:
    monkeypatch.setattr(influence, "N_CELLS", 307)
    adata = influence.simulate(0)
    read, told = influence.split_genes(adata)
    assert not set(read) & set(told)
    assert {one[2] for one in influence.PLANTED} <= set(read)
    programmes = ",".join(adata.uns["simulation"]["interactions"]["programme"]).split(",")
    assert set(programmes) <= set(told)
    slices = [adata[:, read].copy()]
    model = influence.new_model(slices)
    losses = influence.train(model, slices, [adata[:, told].copy()], 24)
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])


def test_score() -> None:
    pairs = pd.DataFrame([one[:2] for one in influence.PLANTED], columns=["source", "target"])
    others = pairs.iloc[::-1].rename(columns={"source": "target", "target": "source"})
    table = pd.concat([pairs, others], ignore_index=True).assign(n_pairs=100)
    table["z"] = [9.0, 8.0, 7.0, 1.0, 5.0, np.nan, 0.0, -1.0]
    found = influence.score("some", table, "z")
    assert found == {"by": "some, z", "auroc": 15 / 16, "ranks": [1, 2, 3, 5], "n": 8}
