from __future__ import annotations

import numpy as np
import pytest

from stofm.heads.sections import resolve_slices
from stofm.heads.splits import plan_runs, score_table


def plan(adata, known=None, library_key="library", **options):
    sections = resolve_slices(adata, library_key)
    known = np.ones(adata.n_obs, dtype=bool) if known is None else known
    features = np.random.default_rng(1).random((adata.n_obs, 3)).astype(np.float32)
    return plan_runs(sections, known, features, **({"spatial_key": "spatial", "seed": 0} | options))


def test_the_papers_protocol(adata):
    runs = plan(adata, protocol="stofm-paper", seed=5)
    assert [run.seed for run in runs] == [5, 6, 7]
    for run in runs:
        split = run.split
        assert split.how == "random"
        every = np.concatenate([split.fitted, split.held_out, run.test])
        assert np.array_equal(np.sort(every), np.arange(184))
        assert len(run.test) == 20 + 17
        assert len(split.held_out) == 8 + 7
    assert not np.array_equal(runs[0].test, runs[1].test)


def test_each_class_has_cells_to_fit_in_each_run(adata):
    runs = plan(adata, protocol="stofm-paper")
    classes = np.zeros(184, dtype=np.int64)
    classes[runs[0].test[:2]] = 1
    classes[runs[1].split.held_out[:2]] = 2
    for run in plan(adata, classes=classes, protocol="stofm-paper"):
        assert set(classes[run.split.fitted]) == {0, 1, 2}
        assert not np.isin(run.test, run.split.fitted).any()
        assert np.isin(run.split.moved, run.split.fitted).all()
        if run.seed == 0:
            assert np.isin(runs[0].test[:2], run.split.moved).all()
    split = plan(adata, classes=classes)[0].split
    assert set(classes[split.fitted]) == {0, 1, 2}


def test_only_cells_with_a_target_are_split(adata, rng):
    known = rng.random(184) < 0.5
    for options in ({}, {"split": "blocks"}, {"protocol": "stofm-paper"}):
        (run, *_) = plan(adata, known, **options)
        parts = (run.split.fitted, run.split.held_out, run.split.left_out, run.test)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.flatnonzero(known))


def test_split_by_slice_or_block(adata):
    (run,) = plan(adata)
    assert run.split.how == "blocks"
    assert len(run.test) == 0
    assert plan(adata, split="slices")[0].split.how == "slices"
    adata.obs["quarter"] = np.arange(184) % 4
    (run,) = plan(adata, library_key="quarter")
    assert run.split.how == "slices"
    # A slice without a target does not count.
    known = (adata.obs["quarter"] != 3).to_numpy()
    assert plan(adata, known, library_key="quarter")[0].split.how == "blocks"


def test_without_coordinates(adata, caplog):
    caplog.set_level("INFO", logger="stofm")
    del adata.obsm["spatial"]
    (run,) = plan(adata, library_key=None)
    assert run.split.how == "random"
    assert "the split is 'random'" in caplog.text
    assert plan(adata)[0].split.how == "slices"
    with pytest.raises(KeyError, match="no obsm"):
        plan(adata, library_key=None, split="blocks")


def test_record_names_slices(adata):
    (run,) = plan(adata, split="slices")
    sections = resolve_slices(adata, "library")
    record = run.record(sections, np.ones(184, dtype=bool), None)
    assert record["held_out_slices"] == [["left", "right"][run.split.slices[0]]]
    assert (record["protocol"], record["n_test"]) == ("", 0)


def test_unknown_names(adata):
    with pytest.raises(ValueError, match="protocol must be one of"):
        plan(adata, protocol="paper")
    with pytest.raises(ValueError, match="how must be one of"):
        plan(adata, split="rows")


def test_score_table():
    table = score_table([{"accuracy": 0.5}, {"accuracy": 0.25}])
    assert table.index.name == "run"
    assert table["accuracy"].to_dict() == {1: 0.5, 2: 0.25}


def test_whole_slices_of_which_one_has_known_cells(adata):
    known = (adata.obs["library"] == "left").to_numpy()
    with pytest.raises(ValueError, match=r"split='slices' .* 1 of the 2 slices has cells to learn"):
        plan(adata, known, split="slices")
