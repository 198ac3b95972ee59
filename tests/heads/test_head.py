from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file

from stofm.heads.base import (
    Head,
    refuse_reserved,
    require_head,
)
from stofm.heads.inputs import Inputs
from stofm.nn import HeadConfig, PredictionHead


@dataclass(frozen=True)
class ToyEntries:
    note: str


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ToyHead(Head):
    task: ClassVar[str] = "toys"
    called: ClassVar[str] = "toys"
    own_entries: ClassVar[type] = ToyEntries
    sizes: np.ndarray

    def _own(self):
        return {"note": "for playing"}, {"sizes": self.sizes}

    @classmethod
    def _read_own(cls, entries, arrays):
        assert entries == ToyEntries("for playing")
        return {"sizes": arrays["sizes"]}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class OtherHead(Head):
    task: ClassVar[str] = "other things"
    called: ClassVar[str] = "things"


def make(**options):
    torch.manual_seed(1)
    config = HeadConfig(d_input=5, d_output=3, widths=(7, 6))
    networks = tuple(PredictionHead(config).eval() for _ in range(2))
    networks[0].fit_inputs(torch.randn(11, 5))
    scores = pd.DataFrame({"accuracy": [0.1 + 0.2]}, index=pd.Index([1], name="run"))
    return ToyHead(
        **{
            "networks": networks,
            "outputs": ("bear", "ball", "Bär, groß"),
            "use_rep": ("X_a", "X_b"),
            "origin": {"X_a": {"model": "m", "model_fingerprint": "1"}, "X_b": {}},
            "strategy": "frozen",
            "params": {"seed": 3, "missing": ["?"], "layer": None},
            "split": {"how": "random"},
            "validation_scores": scores,
            "history": pd.DataFrame({"epoch": [1, 2], "loss": [1 / 3, 0.25]}),
            "sizes": np.arange(6.0).reshape(2, 3)[:, ::2],
        }
        | options
    )


def test_round_trip(tmp_path):
    head = make()
    head.save(tmp_path / "head")
    again = ToyHead.load(tmp_path / "head")
    for name in ("outputs", "use_rep", "origin", "strategy", "params", "split", "model"):
        assert getattr(again, name) == getattr(head, name)
    for name in ("validation_scores", "history"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(head, name), check_exact=True)
    np.testing.assert_array_equal(again.sizes, head.sizes)
    features = torch.randn(13, 5)
    for one, other in zip(head.networks, again.networks, strict=True):
        assert torch.equal(one(features), other(features))
        assert not other.training


def test_any_name_and_numbers_of_numpy(tmp_path):
    names = ("a\u2028b\x85\r\nc\x1c", "", " x ")
    params = {"seed": np.int64(3), "spot_size": np.float32(50), "classes": np.array([1, 2])}
    make(outputs=names, params=params).save(tmp_path / "head")
    again = ToyHead.load(tmp_path / "head")
    assert again.outputs == names
    assert again.params == {"seed": 3, "spot_size": 50.0, "classes": [1, 2]}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda config: config.pop("strategy"), r"Missing from config.json: \['strategy'\]"),
        (lambda config: config["outputs"].pop(), r"2 toys, and networks with \[3, 3\] outputs"),
        (lambda config: config["networks"].append(config["networks"][0]), "of network 2 in head"),
        (
            lambda config: config.update(use_rep=None),
            "use_rep must be a list of strings, found None",
        ),
    ],
)
def test_damaged_config(tmp_path, change, found):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"(?s)head is damaged .*({found}).* save the head again"):
        ToyHead.load(tmp_path / "head")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config["outputs"].reverse()),
        ("config.json", lambda config: config["params"].update(seed=None)),
        ("config.json", lambda config: config["networks"][0].pop("dropout")),
    ],
)
def test_a_config_that_fits_and_is_not_what_was_written(tmp_path, name, change):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / name
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config))
    ToyHead.load(tmp_path / "head")
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name} is damaged .*has changed since it was written"):
        ToyHead.load(tmp_path / "head")
    # One of an earlier version has no record of it.
    weights = tmp_path / "head" / "head.safetensors"
    save_file(load_file(weights), weights)
    ToyHead.load(tmp_path / "head")


def test_a_table_that_is_not_what_was_written(tmp_path):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "validation_scores.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match=r"validation_scores.tsv is damaged"):
        ToyHead.load(tmp_path / "head")


def test_damaged_weights(tmp_path):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"head.safetensors is damaged"):
        ToyHead.load(tmp_path / "head")


def test_files(tmp_path, model):
    make(model=model).save(tmp_path / "head")
    assert {path.name for path in (tmp_path / "head").iterdir()} == {
        "config.json",
        "head.safetensors",
        "validation_scores.tsv",
        "history.tsv",
        "model",
    }
    assert ToyHead.load(tmp_path / "head").model.fingerprint == model.fingerprint
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        make().save(tmp_path / "head")
    make(outputs=("a", "b", "c")).save(tmp_path / "head", overwrite=True)
    again = ToyHead.load(tmp_path / "head")
    assert (again.outputs, again.model) == (("a", "b", "c"), None)


def test_a_head_replaces_one_of_its_task_only(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    make().save(tmp_path / "toys")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    for name in ("model", "files"):
        with pytest.raises(FileExistsError, match="something else than a head for toys"):
            make().save(tmp_path / name, overwrite=True)
    with pytest.raises(FileExistsError, match="something else than a checkpoint of a model"):
        model.save_pretrained(tmp_path / "toys", overwrite=True)
    (tmp_path / "toys" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"more than a head .*\['notes.txt'\]"):
        make().save(tmp_path / "toys", overwrite=True)


@pytest.mark.parametrize("k", range(4))
def test_killed_at_any_rename_old_or_new_is_loaded(k, tmp_path, monkeypatch):
    folder = tmp_path / "head"
    make().save(folder)
    calls = iter(range(100))
    real = os.rename

    def kill(*args):
        if next(calls) >= k:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, "rename", kill)
    with contextlib.suppress(KeyboardInterrupt):
        make(outputs=("a", "b", "c")).save(folder, overwrite=True)
    monkeypatch.undo()
    assert ToyHead.load(folder).outputs in (make().outputs, ("a", "b", "c"))
    make().save(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("1.last.bias", lambda value: value * np.nan, "3 of 3 numbers of '1.last.bias' are NaN"),
        ("1.input_scale", lambda value: value * 0, "input_scale of a network must be positive"),
        ("1.last.bias", lambda value: value[1:], r"wrong shape \(last.bias: \(2,\) in place of"),
        ("1.last.bias", lambda value: value.astype(int), "last.bias is torch.int64"),
        ("more", lambda _: np.ones(2), r"holds \['more'\], which config.json does not name"),
    ],
)
def test_damaged_arrays(tmp_path, name, change, found):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "head.safetensors"
    arrays = load_file(path)
    arrays[name] = np.ascontiguousarray(change(arrays.get(name)))
    save_file(arrays, path)
    with pytest.raises(ValueError, match=found):
        ToyHead.load(tmp_path / "head")


def test_a_tuned_head_needs_its_model(tmp_path, model):
    make(model=model, strategy="lora").save(tmp_path / "head")
    shutil.rmtree(tmp_path / "head" / "model")
    with pytest.raises(ValueError, match="strategy 'lora', and no model/"):
        ToyHead.load(tmp_path / "head")


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(params={"what": object()}).save(tmp_path / "head")
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of a head"):
        ToyHead.load(tmp_path)
    make().save(tmp_path / "part")
    (tmp_path / "part" / "validation_scores.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['validation_scores.tsv'\] missing"):
        ToyHead.load(tmp_path / "part")
    make().save(tmp_path / "head")
    with pytest.raises(ValueError, match="holds a head for toys, not one for other things"):
        OtherHead.load(tmp_path / "head")
    (tmp_path / "head" / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['head.safetensors'\] missing"):
        ToyHead.load(tmp_path / "head")
    config = tmp_path / "head" / "config.json"
    config.write_text(json.dumps({"name": "a checkpoint"}))
    with pytest.raises(ValueError, match="holds no head"):
        ToyHead.load(tmp_path / "head")
    config.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        ToyHead.load(tmp_path / "head")


def test_representation_and_names():
    head = make()
    assert repr(head) == "ToyHead(3 toys, use_rep=['X_a', 'X_b'], strategy='frozen')"
    assert head.model_names() == {"model": "m", "model_fingerprint": "1"}


def test_inputs_of_another_width_are_refused():
    features = np.zeros((2, 6), dtype=np.float32)
    with pytest.raises(ValueError, match=r"reads 5 columns .*, found 6"):
        make().check_inputs(Inputs(features, ("X_a", "X_b"), (2, 4), {}))


@pytest.mark.parametrize(
    ("head", "found"),
    [(make(), "a head for toys"), ("folder", r"OtherHead.load\(path\)"), (3, "a int")],
)
def test_only_heads_of_the_task(head, found):
    with pytest.raises(TypeError, match=rf"head for other things .OtherHead., found .*{found}"):
        require_head(head, OtherHead)


def test_names_are_checked():
    for key in ("X_stofm", "stofm_domain", "mine"):
        with pytest.raises(ValueError, match=r"such as 'stofm_annotation'"):
            refuse_reserved(key, "stofm_annotation", "mine", None)
