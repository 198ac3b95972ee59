"""The script for a GPU on the CPU: each of its parts, as small as it gets."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stofm.genes import embedded_vocabulary
from stofm.nn import Stofm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu = importlib.import_module("gpu")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(model, monkeypatch):
    """A tiny model of the genes of simulated slices, in place of the embedded one."""
    vocabulary = embedded_vocabulary()
    cells = replace(model.config.cell_encoder, n_tokens=vocabulary.n_tokens, values="log")
    config = replace(model.config, cell_encoder=cells)
    monkeypatch.setattr(gpu, "make", lambda name: Stofm(config, vocabulary).eval())


def test_numbers_are_compared_with_the_cpus_in_float32():
    rows = list(gpu.checks(gpu.DRY, CPU))
    assert [row["precision"] for row in rows] == 2 * (["float32"] * 2 + ["bfloat16"] * 2)
    for row in rows:
        assert row["passed"]
        assert (row["deviation"] > 1e-5) == (row["precision"] == "bfloat16")


def test_embedding_is_timed_and_its_memory_estimated():
    rows = list(gpu.embedding(gpu.DRY, CPU))
    assert len(rows) == 4
    for row in rows:
        assert row["cells"] == gpu.DRY.n_cells
        assert min(row["seconds"], row["flops"], row["estimated_bytes"]) > 0
    assert "estimated" in gpu.to_markdown(rows, 989.0)


def test_a_step_of_training_is_timed():
    row = next(gpu.training(gpu.DRY, CPU))
    assert row["steps"] == 1
    assert 0 < row["cells"] <= gpu.DRY.batches[0]
    assert min(row["seconds"], row["flops"]) > 0
    assert "ms a step" in gpu.to_markdown([row], 989.0)


def test_what_is_too_far_off_fails_the_script(monkeypatch, tmp_path, capsys):
    row = {"what": "gradients", "precision": "float32", "deviation": 0.2, "limit": 0.1}
    for name in ("embedding", "training"):
        monkeypatch.setattr(gpu, name, lambda *_: [])
    arguments = ["--device", "cpu", "--dry-run", "--out", str(tmp_path / "found.json")]
    for passed in (True, False):
        monkeypatch.setattr(gpu, "checks", lambda *_, p=passed: [row | {"passed": p}])
        assert gpu.main(arguments) == int(not passed)
        assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["passed"] is passed
        assert ("**too far**" in capsys.readouterr().out) is not passed


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="'cuda' was requested, but torch finds no such device"):
        gpu.main([])
