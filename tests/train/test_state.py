from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from torch import nn

from stofm._files import _HOST
from stofm.nn import Stofm
from stofm.train import OptimizerConfig, Progress, RunFolder
from stofm.train.optimizer import make_optimizer
from stofm.train.state import (
    Trained,
    load_checkpoint,
    read_progress,
    write_checkpoint,
    write_json,
)


class Objective(nn.Module):
    """A head on a part of the model, as objectives are."""

    def __init__(self, model, head):
        super().__init__()
        self.part = model.cell_encoder.projection
        self.head = head

    def step(self, optimizer):
        optimizer.zero_grad()
        self.head(self.part(torch.ones(3, self.part.in_features))).square().sum().backward()
        optimizer.step()


@pytest.fixture
def make(model):
    """A model, an objective whose head a second one shares, and an optimiser."""

    def make_one():
        torch.manual_seed(2)
        own = copy.deepcopy(model)
        head = nn.Linear(own.config.cell_encoder.d_cell, 2)
        objective = Objective(own, head)
        heads = nn.ModuleList([objective, Objective(own, head)])
        return Trained(own, heads), objective, make_optimizer(objective, OptimizerConfig())

    return make_one


def test_a_checkpoint_holds_weights_optimiser_and_progress(make, tmp_path):
    trained, objective, optimizer = make()
    objective.step(optimizer)
    progress = Progress(
        stage=1, epoch=2, position=3, step=4, best_loss=0.1 + 0.2, totals=[1 / 3], counts=[7.0]
    )
    write_checkpoint(tmp_path / "one", trained, progress, (optimizer, objective))
    assert read_progress(tmp_path / "one") == progress

    other, other_objective, other_optimizer = make()
    load_checkpoint(tmp_path / "one", other, (other_optimizer, other_objective))
    for _ in range(2):
        objective.step(optimizer)
        other_objective.step(other_optimizer)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])
    assert torch.equal(objective.head.weight, other_objective.head.weight)


def test_a_checkpoint_is_a_model_for_everyone(make, tmp_path):
    trained, _, _ = make()
    write_checkpoint(tmp_path / "one", trained, Progress(), None)
    assert Stofm.from_pretrained(tmp_path / "one").fingerprint == trained.model.fingerprint
    assert not (tmp_path / "one" / "training" / "optimizer.safetensors").exists()


def test_a_head_is_stored_once_and_the_models_weights_only_with_the_model(make):
    trained, _, _ = make()
    assert sorted(trained.head_tensors()) == ["0.head.bias", "0.head.weight"]


def test_other_heads_are_refused(make, tmp_path):
    trained, _, _ = make()
    write_checkpoint(tmp_path / "one", trained, Progress(), None)
    wider = Trained(trained.model, nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match=r"The heads in .*one are others than those of this run"):
        load_checkpoint(tmp_path / "one", wider)


def test_a_failed_write_leaves_no_checkpoint(make, tmp_path, monkeypatch):
    trained, objective, optimizer = make()
    folder = RunFolder(tmp_path)
    write_checkpoint(folder.checkpoint(0, "spatial", 2), trained, Progress(step=2), None)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(
            folder.checkpoint(0, "spatial", 4), trained, Progress(step=4), (optimizer, objective)
        )
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0-spatial-00000002"]
    assert folder.newest() == folder.checkpoint(0, "spatial", 2)


def test_damaged_and_newer_checkpoints_are_refused(make, tmp_path):
    trained, _, _ = make()
    write_checkpoint(tmp_path / "one", trained, Progress(), None)
    state = tmp_path / "one" / "training" / "state.json"
    entries = json.loads(state.read_text())
    state.write_text(json.dumps(entries | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version 99, this stofm reads 1"):
        read_progress(tmp_path / "one")
    state.write_text(state.read_text()[:20])
    with pytest.raises(ValueError, match=r"delete .*one to go on from the one before"):
        read_progress(tmp_path / "one")


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for stage, name, step in (
        (0, "cell_encoder", None),
        (1, "spatial", 900),
        (1, "spatial", 1000),
        (1, "spatial", 20),
    ):
        path = folder.checkpoint(stage, name, step) / "training"
        path.mkdir(parents=True)
        (path / "state.json").touch()
    return folder


def test_the_newest_checkpoint_is_that_of_the_latest_stage_and_step(folder):
    assert folder.newest().name == "1-spatial-00001000"
    shutil.rmtree(folder.checkpoint(1, "spatial", 1000) / "training")
    assert folder.newest().name == "1-spatial-00000900"
    end = folder.checkpoint(1, "spatial", None)
    (end / "training").mkdir(parents=True)
    (end / "training" / "state.json").touch()
    assert folder.newest() == end
    assert RunFolder(folder.path / "nowhere").newest() is None


def test_pruning_keeps_what_is_named_and_the_ends_of_stages(folder):
    folder.prune({"1-spatial-00000020"})
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "0-cell_encoder-final",
        "1-spatial-00000020",
    ]


def test_leftovers_of_interrupted_writes_go(folder):
    # Of a process that is no more.
    left = folder.checkpoints / f".1-spatial-00001200.stofm-new-{_HOST}-99999999-ab3"
    left.mkdir()
    (folder.checkpoints / ".1-spatial-00000900.stofm-old").mkdir()
    folder.remove_leftovers()
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert "1-spatial-00000900" in names
    assert not any(name.startswith(".") for name in names)
    assert folder.newest().name == "1-spatial-00001000"


def test_clearing_keeps_prepared_slices(folder):
    (folder.work / "slices").mkdir(parents=True)
    folder.history.touch()
    write_json(folder.report, {})
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["work"]
    folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize("place", ["prepared", "a/b", "../elsewhere", "work"])
def test_work_folder_may_be_anywhere_else(tmp_path, place):
    folder = RunFolder(tmp_path / "run", tmp_path / "run" / place)
    (folder.work / "slices").mkdir(parents=True)
    # Of a run that was stopped while its slices were prepared.
    folder.check(resume=False, overwrite=False)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="holds something else than a run of stofm"):
        folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize(
    "place", [".", "checkpoints", "model/a", "refreshed", "../run/tensorboard"]
)
def test_work_folder_that_the_run_would_clear_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match=r"work_dir .* clears; choose another, such as .*run/work"):
        RunFolder(tmp_path / "run", tmp_path / "run" / place)


def test_refreshed_results_go_and_the_work_folder_stays(folder):
    for one in (folder.work, folder.refreshed):
        (one / "cells").mkdir(parents=True)
    folder.remove_refreshed()
    assert (folder.work.is_dir(), folder.refreshed.exists()) == (True, False)
    folder.remove_refreshed()
    folder.refreshed.mkdir()
    folder.clear()
    assert (folder.work.is_dir(), folder.refreshed.exists()) == (True, False)


def test_settings_that_differ_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    old = {"run": {"seed": 1}, "stages": [{"name": "a", "epochs": 2}], "slices": ["x", "y"]}
    write_json(folder.report, {"settings": old})
    folder.check_settings(copy.deepcopy(old))
    folder.check_settings(old | {"slices": ("x", "y")})
    new = {"run": {"seed": 2}, "stages": [{"name": "a", "epochs": 3}], "slices": ["x"]}
    with pytest.raises(ValueError, match="begun with other settings") as error:
        folder.check_settings(new)
    for text in ("run.seed was 1, now 2", "stages[0].epochs was 2, now 3", "slices was ['x', 'y']"):
        assert text in str(error.value)
