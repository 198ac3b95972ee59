from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
published = importlib.import_module("published")
task_sets = importlib.import_module("task_sets")


def test_methods_are_measured_once_for_each_seed(adata, tmp_path, monkeypatch):
    kinds = adata.obs["kind"].to_numpy(dtype=str)
    truth = np.where(np.arange(len(kinds)) < 20, published.NO_CLASS, kinds)
    task = task_sets.Domains(adata, truth)
    monkeypatch.setitem(published.TASK_SETS, "domains", {"kinds": lambda _folder: task})
    seeds = []

    def right(adata, n_domains, seed):
        assert n_domains == len(set(kinds))
        seeds.append(seed)
        return kinds

    methods = {"right": right, "one": lambda adata, *_: np.zeros(adata.n_obs)}
    monkeypatch.setattr(published, "METHODS", methods)
    out = tmp_path / "report"
    published.run(tmp_path, out, ["kinds"], seeds=1)
    published.run(tmp_path, out, ["kinds"], seeds=3)
    assert seeds == [0, 1, 2]
    rows = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [row["scores"]["ari"] for row in rows] == [1, 0] * 3
    assert {row["n_domains"] for row in rows} == {1, len(set(kinds))}
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[2:6] == [
        "| method | kinds |",
        "| --- | --- |",
        "| right | 1.000 ± 0.000 |",
        "| one | 0.000 ± 0.000 |",
    ]
