"""What all heads have: members that vote, and the folder that they are saved in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from stofm.heads.blocks import Blocks
from stofm.heads.expression import add_expression
from stofm.heads.genes import Gene
from stofm.heads.head import Head, refuse_reserved, require_head
from stofm.heads.request import HeadOptions, Request, resolve_slices
from stofm.nn import HeadConfig, PredictionHead


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ToyHead(Head):
    task: ClassVar[str] = "toys"
    called: ClassVar[str] = "toys"
    sizes: np.ndarray

    def _own(self):
        entries, arrays = super()._own()
        return {**entries, "note": "for playing"}, {**arrays, "sizes": self.sizes}

    @classmethod
    def _read_own(cls, own, arrays):
        assert own["note"] == "for playing"
        return {**super()._read_own(own, arrays), "sizes": arrays["sizes"]}


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
            "reads": ("embedding", "embedding"),
            "weights": (0.25, 0.75),
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
    head = make(n_neighbors=7, panel=(Gene("GFAP", "ENSG1"), Gene("probe", "")))
    head.save(tmp_path / "head")
    again = ToyHead.load(tmp_path / "head")
    same = ("outputs", "use_rep", "origin", "strategy", "params", "split", "model")
    for name in (*same, "reads", "weights", "expression", "n_neighbors", "panel"):
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


def without_digests(folder):
    """Write the weights anew, without a record of what belongs to them."""
    save_file(load_file(folder / "head.safetensors"), folder / "head.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["outputs"].reverse(),
        lambda config: config["params"].update(seed=None),
        lambda config: config["networks"][0].pop("dropout"),
        lambda config: config["own"].update(weights=[0.5, 0.5]),
    ],
)
def test_a_config_that_is_not_what_was_written(tmp_path, change):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config))
    ToyHead.load(tmp_path / "head")
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is damaged .*has changed since it was wri"):
        ToyHead.load(tmp_path / "head")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda config: config.pop("strategy"), "KeyError: 'strategy'"),
        (lambda config: config.update(use_rep=None), "TypeError"),
        (lambda config: config.update(networks=3), "TypeError"),
        (lambda config: config.update(networks=config["networks"] * 2), "network 2 in head"),
        (lambda config: config["own"].pop("reads"), "KeyError: 'reads'"),
        (lambda config: config["own"].update(reads=3), "TypeError"),
        (lambda config: config.update(own=[]), "TypeError"),
        (lambda config: config.clear(), "holds no head|is damaged"),
    ],
)
def test_a_config_that_no_head_has(tmp_path, change, found):
    make().save(tmp_path / "head")
    without_digests(tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    config = json.loads(path.read_text())
    ToyHead.load(tmp_path / "head")
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"(?s){tmp_path / 'head'}.*({found})"):
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
        with pytest.raises(FileExistsError, match="something other than a head for toys"):
            make().save(tmp_path / name, overwrite=True)
    with pytest.raises(FileExistsError, match="something other than a checkpoint of a model"):
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
    ("change", "found"),
    [
        (lambda value: value * np.nan, "3 of 3 numbers of '1.last.bias' are NaN"),
        (lambda value: value[1:], "size mismatch for last.bias"),
        (lambda value: value.astype(int), "last.bias is torch.int64"),
    ],
)
def test_damaged_arrays(tmp_path, change, found):
    make().save(tmp_path / "head")
    path = tmp_path / "head" / "head.safetensors"
    arrays = load_file(path)
    arrays["1.last.bias"] = np.ascontiguousarray(change(arrays["1.last.bias"]))
    save_file(arrays, path)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path / 'head'}.*{found}"):
        ToyHead.load(tmp_path / "head")


def test_a_tuned_head_needs_its_model(tmp_path, model):
    make(model=model, strategy="lora").save(tmp_path / "head")
    shutil.rmtree(tmp_path / "head" / "model")
    with pytest.raises((FileNotFoundError, ValueError), match=rf"{tmp_path / 'head'}.*model"):
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


@pytest.fixture
def mixed(adata, rng):
    """Two members on five columns of obsm and one on four components; the cells, and their blocks."""
    adata.obsm["X_a"] = rng.normal(size=(184, 2)).astype(np.float32)
    adata.obsm["X_b"] = rng.normal(size=(184, 3)).astype(np.float32)
    features = np.hstack([adata.obsm["X_a"], adata.obsm["X_b"]])
    blocks = Blocks(features, ("X_a", "X_b"), (2, 3), {"X_a": {}, "X_b": {}})
    request = Request(options=HeadOptions(n_components=4))
    slices = resolve_slices(adata, "library")
    blocks, expression = add_expression(slices, blocks, np.arange(184), request, None)
    networks = []
    for seed, d_input in enumerate((5, 5, 4)):
        torch.manual_seed(seed)
        networks.append(PredictionHead(HeadConfig(d_input=d_input, d_output=3, widths=())).eval())
    head = make(
        networks=tuple(networks),
        reads=("embedding", "embedding", "expression"),
        weights=(0.5, 0.2, 0.3),
        origin={"X_a": {}, "X_b": {}},
        expression=expression,
    )
    return head, adata, blocks


def found_by(one, features):
    weight, bias = (value.detach().double().numpy() for value in (one.last.weight, one.last.bias))
    return softmax(features.astype(float) @ weight.T + bias, axis=1)


def read(head, data, layer=None):
    return head.read(resolve_slices(data, "library"), Request(layer=layer))


def votes_of(head, blocks, kind="classes"):
    """What each member says, and its weight, which is the same for all cells."""
    votes, weights = zip(*head.votes(blocks, kind), strict=True)
    assert all(np.ptp(own) == 0.0 for own in weights)
    return np.stack(votes), [own[0] for own in weights]


def test_votes_by_weight(mixed):
    head, adata, blocks = mixed
    again = read(head, adata)
    np.testing.assert_array_equal(again.features, blocks.features)
    np.testing.assert_array_equal(again.expression, blocks.expression)
    votes, weights = votes_of(head, again)
    assert weights == pytest.approx([0.5, 0.2, 0.3])
    read_by = (blocks.features, blocks.features, blocks.expression)
    expected = [found_by(one, own) for one, own in zip(head.networks, read_by, strict=True)]
    np.testing.assert_allclose(votes, expected, atol=1e-5)


def test_without_expression_the_others_vote(mixed):
    head, _, blocks = mixed
    bare = replace(blocks, expression=None)
    votes, weights = votes_of(head, bare, "proportions")
    assert weights == pytest.approx([5 / 7, 2 / 7])
    np.testing.assert_array_equal(votes, votes_of(head, blocks, "proportions")[0][:2])
    assert votes_of(replace(head, weights=(0.0, 0.2, 0.3)), bare)[1] == [1.0]
    with pytest.raises(ValueError, match="184 of 184 cells have nothing of what the head reads"):
        votes_of(replace(head, weights=(0.0, 0.0, 1.0)), bare)


@pytest.mark.filterwarnings("ignore:.*without their expression")
def test_members_that_read_what_a_table_lacks_have_no_vote(mixed):
    head, adata, blocks = mixed
    pair = [adata[adata.obs["library"] == name].copy() for name in ("left", "right")]
    pair[1].X = pair[1].X * 0.37
    found = read(head, pair)
    ballots = list(head.votes(found, "classes"))
    weights = np.stack([weight for _, weight in ballots])
    np.testing.assert_allclose(weights[:, :101].T, [head.weights] * 101)
    np.testing.assert_allclose(weights[:, 101:].T, [[5 / 7, 2 / 7, 0.0]] * 83)
    assert all(np.isfinite(vote).all() for vote, _ in ballots)
    left = (adata.obs["library"] == "left").to_numpy()
    np.testing.assert_array_equal(found.expression[:101], blocks.expression[left])


def test_another_width_is_refused(mixed):
    head, adata, _ = mixed
    adata.obsm["X_b"] = adata.obsm["X_b"][:, :2]
    with pytest.raises(ValueError, match=r"reads 5 columns of obsm.*'X_b'.*, found \[2, 2\]"):
        read(head, adata)


def test_a_head_of_embeddings_reads_no_counts(mixed):
    head, adata, blocks = mixed
    adata.X = None
    plain = replace(head, networks=head.networks[:2], reads=("embedding",) * 2, expression=None)
    np.testing.assert_array_equal(read(plain, adata).features, blocks.features)


def test_files_with_expression(mixed, tmp_path):
    head, adata, blocks = mixed
    head.save(tmp_path / "mixed")
    again = ToyHead.load(tmp_path / "mixed")
    assert (again.reads, again.weights) == (head.reads, head.weights)
    assert again.expression.genes == head.expression.genes
    np.testing.assert_array_equal(read(again, adata).expression, blocks.expression)
    for one, other in zip(votes_of(again, blocks), votes_of(head, blocks), strict=True):
        np.testing.assert_array_equal(one, other)
