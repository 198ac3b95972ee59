from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
novelty = importlib.import_module("novelty")


def test_false_positives_at_95_percent():
    new = np.arange(300) < 100
    values = np.where(new, np.arange(300) % 100, -1.0)
    values[100:120] = 50
    assert novelty._fpr(values, new, ~new) == 0.1
    assert novelty._auroc(values, new, ~new) == pytest.approx(0.9 + 0.1 * 0.495)


def test_types_from_the_frequent_to_the_rare():
    sizes = {"a": 60, "b": 50, "c": 40, "d": 30, "e": 20, "rare": 2}
    labels = np.repeat(list(sizes), list(sizes.values()))
    table = AnnData(obs=pd.DataFrame({"label": labels}, index=[*map(str, range(202))]))
    assert novelty.choose_types({"s": table}, table, 3) == ["a", "c", "e"]
    assert novelty.choose_types({"s": table}, table[:160], 9) == ["a", "b", "c"]


def test_tables():
    scores = {f"{kind}_{name}": 0.5 for kind in ("auroc", "fpr95") for name in novelty.NAMES}
    found = ["found", "known_novel", "unknown", "known_unknown", "grouped", "grouped_known"]
    sets = {"n_known": 400, "accuracy": 0.7, "coverage": 0.9, "set_size": 1.5}
    new = {"n_new": 30, **scores, **dict.fromkeys(found, 0.25)}
    rows = [
        {"slice": "s", "left_out": None, **sets},
        {"slice": "s", "left_out": "a", **sets, **new},
    ]
    text = novelty.to_markdown(rows)
    assert text.count("| mean |") == 3
    assert "| s | 400 | 0.70 | 0.90 | 1.50 |" in text
    assert "| s, a | 30 | 0.50 | 0.50 | 0.50 | 0.50 |" in text
