"""Several processes on one machine, over gloo: they give what one gives, and a failure ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file
from scipy import sparse

from stofm._files import read_table
from stofm.nn import Stofm

SCRIPT = Path(__file__).with_name("toy_run.py")
CASES = ("prepare", "step", "killed", "end")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its processes"),
]


def read(folder):
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("rows", "seen")}
    return found | {"weights": load_file(folder / "weights.safetensors")}


def write_slices(path, vocabulary, seed):
    """Two slices of 52 and 40 cells."""
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(0.5, 2.0, 67), (92, 67)).astype(np.float32))
    library = np.repeat(["left", "right"], [52, 40])
    obs = pd.DataFrame({"library": library}, index=[f"cell{k}" for k in range(92)])
    var = pd.DataFrame(index=vocabulary.gene_ids.tolist())
    AnnData(counts, obs=obs, var=var, obsm={"spatial": rng.random((92, 2))}).write_h5ad(path)


@pytest.fixture(scope="module")
def out(tmp_path_factory, _model, vocabulary):
    """Folder of all runs: of the toy stage on 37 samples in batches of 3, of all stages, of failures."""
    out = tmp_path_factory.mktemp("runs")

    def toy(name, n_processes, *, stop=None, begin=None):
        options = {"batch_size": 3, "stop": stop, "begin": begin and str(out / begin / "0")}
        return {"out": str(out / name), "n_processes": n_processes, **options}

    config = _model.config
    config = replace(
        config,
        cell_encoder=replace(config.cell_encoder, dropout=0.0),
        se2_transformer=replace(config.se2_transformer, dropout=0.0),
    )
    Stofm(config, vocabulary, seed=2).save_pretrained(out / "model")
    for seed, name in enumerate(("data", "held_out")):
        write_slices(out / f"{name}.h5ad", vocabulary, seed)
    files = {name: str(out / f"{name}.h5ad") for name in ("data", "held_out")}
    files["model"] = str(out / "model")
    jobs = [
        toy("one", 1),
        toy("two", 2),
        # Stops in the first epoch, after 3 of 7 steps.
        toy("before", 2, stop=3),
        toy("after", 1, begin="before"),
        *({"out": str(out / f"stages{n}"), "n_processes": n, **files} for n in (1, 2)),
        *({"out": str(out / case), "n_processes": 2, "case": case} for case in CASES),
    ]
    command = [sys.executable, str(SCRIPT), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def runs(out):
    n_processes = {"one": 1, "two": 2, "before": 2, "after": 1}
    return {name: [read(out / name / str(k)) for k in range(n)] for name, n in n_processes.items()}


def assert_same_run(weights, rows, expected):
    for name, value in expected["weights"].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    for row, other in zip(rows, expected["rows"], strict=True):
        assert row.keys() == other.keys()
        assert (row["split"], row["step"]) == (other["split"], other["step"])
        for name in ("squares", "contrast", "loss", "cells", "tokens"):
            assert row[name] == pytest.approx(other[name], rel=1e-5)


def test_two_processes_give_loss_and_weights_of_one(runs):
    first, second = runs["two"]
    assert_same_run(first["weights"], first["rows"], runs["one"][0])
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])


def test_a_process_without_a_share_of_a_batch_does_not_count(runs):
    # The last batch of each epoch holds one sample, which the second process only stands by with.
    seen = [np.bincount(part["seen"], minlength=37) for part in runs["two"]]
    assert (seen[0] + seen[1]).sum() == 2 * 37 + 2
    cells = [row["cells"] for row in runs["two"][0]["rows"] if row["split"] == "train"]
    assert cells[-1] == 2 * 37


def test_going_on_with_another_number_of_processes_keeps_every_sample_once(runs):
    parts = [*runs["before"], *runs["after"]]
    seen = np.bincount([k for part in parts for k in part["seen"]], minlength=37)
    assert seen.tolist() == [2] * 37  # two epochs
    rows = runs["before"][0]["rows"] + runs["after"][0]["rows"]
    assert_same_run(runs["after"][0]["weights"], rows, runs["one"][0])


def test_all_stages_over_two_processes_give_the_model_of_one(out):
    one, two = (read_table(out / f"stages{n}" / "history.csv") for n in (1, 2))
    assert one["stage"].drop_duplicates().tolist() == ["spatial", "joint", "cell_encoder"]
    first = one.index[one["stage"] == "cell_encoder"].max() + 1
    same = [table[:first].drop(columns="seconds") for table in (two, one)]
    pd.testing.assert_frame_equal(*same, rtol=1e-4)
    end = "checkpoints/2-cell_encoder-final/model.safetensors"
    trained = [load_file(out / f"stages{n}" / end) for n in (1, 2)]
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=1e-5)
    # The cell encoder of the last stage differs in the last bits, and the clustering into virtual
    # cells can turn on these.
    rest = [table[first:] for table in (two, one)]
    assert rest[0]["step"].tolist() == rest[1]["step"].tolist() == [1, 2, 2, 3, 4, 4]
    np.testing.assert_allclose(*(table["masked_genes"] for table in rest), rtol=0.01)


@pytest.fixture(scope="module")
def ends(out):
    """Exit codes, and what each process said last, of all cases."""
    found = {}
    for case in CASES:
        end = json.loads((out / f"{case}.json").read_text())
        assert end["seconds"] < 60
        found[case] = end["codes"], [(out / f"{case}{k}.txt").read_text() for k in range(2)]
    return found


@pytest.mark.parametrize(
    ("case", "failing", "message"),
    [
        ("prepare", 0, "ValueError: the table is no table"),
        ("step", 1, "FloatingPointError: the loss is not finite"),
    ],
)
def test_a_failure_ends_the_other_process_at_its_next_exchange(ends, case, failing, message):
    codes, said = ends[case]
    assert codes == [1, 1]
    assert said[failing] == message
    assert said[1 - failing]


def test_a_process_that_is_killed_ends_the_other(ends):
    assert ends["killed"][0] == [1, -signal.SIGKILL]


def test_processes_that_end_in_order_say_nothing(ends):
    assert ends["end"] == ([0, 0], ["", ""])
