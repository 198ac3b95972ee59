from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from stofm.corpus.storage import write_json
from stofm.nn import Stofm
from stofm.train import OptimizerConfig
from stofm.train import folder as folder_module
from stofm.train.checkpoint import (
    Progress,
    Trained,
    find_damage,
    load_checkpoint,
    read_progress,
    write_checkpoint,
)
from stofm.train.folder import LOCK, RunFolder, locked
from stofm.train.loop import make_optimizer


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
    write_checkpoint(tmp_path / "one", trained, progress, (optimizer, objective), report={})
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
    write_checkpoint(tmp_path / "one", trained, Progress(), None, report={})
    assert Stofm.from_pretrained(tmp_path / "one").fingerprint == trained.model.fingerprint
    assert not (tmp_path / "one" / "training" / "optimizer.safetensors").exists()


def test_a_head_is_stored_once_and_the_models_weights_only_with_the_model(make):
    trained, _, _ = make()
    assert sorted(trained.head_tensors()) == ["0.head.bias", "0.head.weight"]


def test_a_failed_write_leaves_no_checkpoint(make, tmp_path, monkeypatch):
    trained, objective, optimizer = make()
    folder = RunFolder(tmp_path)
    one = (optimizer, objective)
    write_checkpoint(folder.checkpoint(0, "spatial", 2), trained, Progress(step=2), one, report={})

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(
            folder.checkpoint(0, "spatial", 4), trained, Progress(step=4), one, report={}
        )
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0-spatial-00000002"]
    assert folder.newest() == folder.checkpoint(0, "spatial", 2)


def flip(path, at=-1):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_other_versions_and_states_that_are_damaged_are_refused(make, tmp_path):
    trained, _, _ = make()
    write_checkpoint(tmp_path / "one", trained, Progress(step=3), None, report={})
    state = tmp_path / "one" / "training" / "state.json"
    text = state.read_text()
    state.write_text(json.dumps(json.loads(text) | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version 99, this stofm reads 2"):
        read_progress(tmp_path / "one")
    for damaged in (text[:20], "", "[1]", "{}", text.replace('"step": 3', '"step": 4')):
        state.write_text(damaged)
        assert find_damage(tmp_path / "one") == f"{state} is damaged: its content has changed."


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "training/heads.safetensors",
        "training/optimizer.safetensors",
        "training/history.csv",
        "training/state.json",
    ],
)
def test_any_damage_is_found_and_the_checkpoint_before_taken(make, tmp_path, name):
    trained, objective, optimizer = make()
    objective.step(optimizer)
    folder = RunFolder(tmp_path)
    folder.history.write_text("step\n1\n")
    first, second = (folder.checkpoint(0, "spatial", step) for step in (2, 4))
    for place in (first, second):
        one = (trained, Progress(), (optimizer, objective))
        write_checkpoint(place, *one, report={}, history=folder.history)
    assert folder.newest() == second
    flip(second / name, at=-20 if name.endswith(".json") else -1)
    with pytest.warns(
        UserWarning, match=f"{name} is damaged.*the checkpoint before {second}, which is made"
    ):
        assert folder.newest() == first
    (first / name).unlink()
    with pytest.warns(UserWarning, match=name):
        assert folder.newest() is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "find_damage", lambda folder: "")
    folder = RunFolder(tmp_path / "run")
    for stage, name, step in (
        (0, "cell_encoder", None),
        (1, "spatial", 800),
        (1, "spatial", 900),
        (1, "spatial", 1000),
        (1, "spatial", 20),
    ):
        mark(folder.checkpoint(stage, name, step))
    return folder


def mark(folder):
    """Make it look like a checkpoint to go on from."""
    (folder / "training").mkdir(parents=True)
    for name in ("state.json", "optimizer.safetensors"):
        (folder / "training" / name).touch()


def test_the_newest_checkpoint_is_that_of_the_latest_stage_and_step(folder):
    assert folder.newest().name == "1-spatial-00001000"
    # Kept for its weights alone.
    (folder.checkpoint(1, "spatial", 1000) / "training" / "optimizer.safetensors").unlink()
    assert folder.newest().name == "1-spatial-00000900"
    mark(folder.checkpoint(1, "spatial", None))
    assert folder.newest() == folder.checkpoint(1, "spatial", None)
    assert RunFolder(folder.path / "nowhere").newest() is None


def test_pruning_keeps_what_is_named_the_one_before_and_the_ends_of_stages(folder):
    # The latest is damaged: training goes on from before it.
    folder.remove_later(folder.checkpoint(1, "spatial", 900))
    folder.prune(folder.checkpoint(1, "spatial", 900), {"1-spatial-00000020"})
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "0-cell_encoder-final",
        "1-spatial-00000020",
        "1-spatial-00000800",
        "1-spatial-00000900",
    ]


def test_without_a_sound_checkpoint_none_is_left(folder):
    folder.remove_later(None)
    assert list(folder.checkpoints.iterdir()) == []


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
    with pytest.raises(FileExistsError, match="holds something other than a run of stofm"):
        folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize(
    "place", [".", "checkpoints", "model/a", "refreshed", "../run/tensorboard"]
)
def test_work_folder_that_the_run_would_clear_is_refused(tmp_path, place):
    with pytest.raises(ValueError, match=r"work_dir .* clears; choose another, such as .*run/work"):
        RunFolder(tmp_path / "run", tmp_path / "run" / place)


def report_of(settings):
    return {"stofm_version": "0.1", "status": "begun", "stages": [], "settings": settings}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", None, '{"settings": {}}'],
)
def test_a_report_that_is_lost_comes_from_the_newest_checkpoint(make, tmp_path, content):
    trained, objective, optimizer = make()
    folder = RunFolder(tmp_path)
    report = report_of({"stages": [], "run": {"seed": 1}, "model": {}})
    one = (optimizer, objective)
    place = folder.checkpoint(0, "spatial", 2)
    write_checkpoint(place, trained, Progress(), one, report=report)
    if content is not None:
        folder.report.write_text(content)
    folder.check(resume=True, overwrite=False)
    assert folder.read_report() == report
    with pytest.raises(FileExistsError, match=r"holds a run \(begun\)"):
        folder.check(resume=False, overwrite=False)


def test_what_a_run_leaves_that_had_hardly_begun_is_no_other_thing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    (tmp_path / ".run.json.stofm-new-x").write_text("{")
    folder.check(resume=True, overwrite=False)


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"framework": "other"}'),
        ("run.json", '{"settings": {"seed": 1}, "status": "done"}'),
        ("history.csv", "date,amount\n2020-01-01,3\n"),
        ("model", "mine"),
    ],
)
def test_files_of_others_are_no_run(tmp_path, name, content, resume, overwrite):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileExistsError, match="holds something other than a run of stofm"):
        RunFolder(tmp_path).check(resume=resume, overwrite=overwrite)


@pytest.mark.parametrize(
    "name",
    [
        "model/notes.txt",
        "checkpoints/paper.docx",
        "checkpoints/1-spatial-00000020/training/notes.txt",
        "tensorboard/x",
        "refreshed/cells-mine/a.csv",
    ],
)
def test_overwriting_refuses_to_delete_files_that_are_none_of_the_runs(folder, name):
    write_json(folder.report, report_of({"stages": [], "run": {}, "model": {}}))
    (folder.path / "model").mkdir()
    (folder.path / "model" / "config.json").touch()
    folder.check(resume=False, overwrite=True)
    place = folder.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    with pytest.raises(FileExistsError, match=f"other files, for example .*{name}"):
        folder.check(resume=False, overwrite=True)
    folder.check(resume=True, overwrite=False)
    # What goes in the course of a run takes nothing with it.
    folder.remove_later(None)
    folder.remove(folder.refreshed)
    assert place.exists()


def test_folders_with_names_of_others_are_no_checkpoints(folder):
    others = {"1x-foo-bar", "2024-09-data", "3-spatial-figures"}
    for name in others:
        (folder.checkpoints / name).mkdir()
    assert folder.newest().name == "1-spatial-00001000"
    folder.remove_later(None)
    assert {path.name for path in folder.checkpoints.iterdir()} == others


def test_settings_that_differ_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    old = {"run": {"seed": 1}, "stages": [{"name": "a", "epochs": 2}], "slices": ["x", "y"]}
    old["model"] = {}
    write_json(folder.report, report_of(old))
    begun = folder.read_report()["settings"]
    folder.check_settings(begun, copy.deepcopy(old))
    folder.check_settings(begun, old | {"slices": ("x", "y")})
    new = {"model": {}, "run": {"seed": 2}, "stages": [{"name": "a", "epochs": 3}], "slices": ["x"]}
    with pytest.raises(ValueError, match="begun with other settings") as error:
        folder.check_settings(begun, new)
    for text in (
        "seed was 1, now 2",
        "stages[0].epochs was 2, now 3",
        "slices[1] was 'y', now None",
    ):
        assert text in str(error.value)


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError, match="notes is a file, and a run needs a folder"):
        RunFolder(tmp_path / "notes")


#: Has the lock of a run, and imports nothing of stofm, which would take most of the test's time.
_HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(300)
"""


def test_a_folder_that_another_process_has_is_refused_until_that_is_gone(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "has it\n"
        expected = f"another process trains into it.*delete .*{LOCK}"
        with pytest.raises(FileExistsError, match=expected), locked(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / LOCK).is_file()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_and_released_after_a_failure(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("content", ["", "x", '{"pid": 1, "host": "elsewhere", "started": 1.0}'])
def test_a_file_that_a_killed_process_left_is_no_lock(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        pass
