from __future__ import annotations

import contextlib
import json
import os
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from stofm.genes import GeneVocabulary
from stofm.nn import Stofm, StofmConfig, UntrainedModelWarning
from stofm.nn import checkpoint as checkpoint_module


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("d_gene", [None, 20])
def test_round_trip(model, vocabulary, tmp_path, d_gene):
    cells = replace(model.config.cell_encoder, d_gene=d_gene)
    model = Stofm(replace(model.config, cell_encoder=cells), vocabulary, seed=1).eval()
    model.save_pretrained(tmp_path / "saved")
    again = Stofm.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    for (name, own), (other, value) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(own, value)
    assert not again.training


def test_folder_holds_what_it_should_and_no_pickle(saved):
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "vocabulary.tsv"]
    assert "stofm" in (saved / "README.md").read_text()


def test_half_precision_is_stored_and_loaded_as_single(model, tmp_path):
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    again = Stofm.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    full = sum(p.numel() for p in model.parameters()) * 4
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.75 * full


def test_same_seed_same_weights_other_seed_other(model, vocabulary):
    again, other = (Stofm(model.config, vocabulary, seed=s).fingerprint for s in (1, 2))
    assert again == model.fingerprint
    assert other != model.fingerprint


def test_making_and_loading_a_model_leaves_torchs_generators_alone(
    model, vocabulary, tmp_path, monkeypatch
):
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    Stofm(model.config, vocabulary, seed=4)
    model.save_pretrained(tmp_path / "model")
    Stofm.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    # It would seed the generators of all devices.
    assert not seeded


def test_fingerprint_follows_weights_rules_and_vocabulary(model, vocabulary):
    first = model.fingerprint
    assert model.fingerprint == first
    with torch.no_grad():
        model.se2_transformer.input_projection.bias += 1e-3
    assert model.fingerprint != first
    rules = replace(model.config, subslice=replace(model.config.subslice, n_cells=99))
    assert Stofm(rules, vocabulary, seed=1).fingerprint != first
    other = replace(vocabulary, medians=vocabulary.medians * 2)
    assert Stofm(model.config, other, seed=1).fingerprint != first
    renamed = replace(model.config, name="another", provenance="elsewhere")
    assert Stofm(renamed, vocabulary, seed=1).fingerprint == first


def test_an_existing_checkpoint_is_replaced_only_when_asked(model, saved):
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        model.save_pretrained(saved)
    with torch.no_grad():
        model.se2_transformer.input_projection.bias += 1
    model.save_pretrained(saved, overwrite=True)
    assert Stofm.from_pretrained(saved).fingerprint == model.fingerprint
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_of_other_things_is_never_replaced(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="something other than a checkpoint"):
        model.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_crash_leaves_the_old_checkpoint(model, saved, monkeypatch):
    before = Stofm.from_pretrained(saved).fingerprint

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(GeneVocabulary, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert Stofm.from_pretrained(saved).fingerprint == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_truncated_weights_are_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        Stofm.from_pretrained(saved)


def test_a_missing_file_is_named(saved):
    (saved / "vocabulary.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['vocabulary\.tsv'\] missing"):
        Stofm.from_pretrained(saved)


def test_a_damaged_config_is_refused(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Stofm.from_pretrained(saved)


def test_a_checkpoint_of_a_newer_version_is_refused(saved):
    entries = json.loads((saved / "config.json").read_text()) | {"format_version": 2}
    (saved / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="pip install -U stofm"):
        Stofm.from_pretrained(saved)


def test_a_vocabulary_of_another_model_is_refused(saved, vocabulary):
    other = replace(vocabulary, gene_ids=vocabulary.gene_ids[::-1].copy())
    other.save(saved / "vocabulary.tsv")
    with pytest.raises(ValueError, match=f"{other.fingerprint}.*belongs to another model"):
        Stofm.from_pretrained(saved)


def test_an_embedded_name_is_never_a_folder_that_happens_to_be_there(tmp_path, monkeypatch):
    (tmp_path / "stofm-mini").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checkpoint_module.find_checkpoint("stofm-mini") != tmp_path / "stofm-mini"
    assert checkpoint_module.find_checkpoint("./stofm-mini").resolve() == tmp_path / "stofm-mini"


@pytest.mark.parametrize("k", range(4))
def test_killed_at_any_rename_old_or_new_is_loaded(k, model, vocabulary, saved, monkeypatch):
    new = Stofm(model.config, vocabulary, seed=9)
    both = {model.fingerprint, new.fingerprint}
    calls = iter(range(100))
    real = {name: getattr(os, name) for name in ("rename", "rmdir")}

    def kill(name, *args, **options):
        if next(calls) >= k:
            raise KeyboardInterrupt
        real[name](*args, **options)

    for name in real:
        monkeypatch.setattr(os, name, partial(kill, name))
    with contextlib.suppress(KeyboardInterrupt):
        new.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert Stofm.from_pretrained(saved).fingerprint in both
    new.save_pretrained(saved, overwrite=True)
    assert Stofm.from_pretrained(saved).fingerprint == new.fingerprint
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def change_weights(saved, change):
    path = saved / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


NAME = "se2_transformer.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w[NAME].view(-1)[3:5].fill_(float("nan")), rf"2 of \d+ numbers of '{NAME}'"),
        (lambda w: w.update({NAME: w[NAME].int()}), rf"{NAME} is torch.int32"),
        (lambda w: w.pop(NAME), rf'Missing key.*"{NAME}"'),
        (lambda w: w.update(more=w[NAME] + 0), r'Unexpected key.*"more"'),
        (lambda w: w.update({NAME: w[NAME][1:] + 0}), rf"size mismatch for {NAME}"),
    ],
)
def test_weights_that_are_none_are_refused(change, found, saved):
    change_weights(saved, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{found}"):
        Stofm.from_pretrained(saved)


def test_a_flipped_bit_is_noticed(saved):
    change_weights(saved, lambda w: w[NAME].view(torch.int32).view(-1)[3].bitwise_xor_(1))
    Stofm.from_pretrained(saved)  # nobody has written a digest of these
    path = saved / "model.safetensors"
    Stofm.from_pretrained(saved).save_pretrained(saved, overwrite=True)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*has changed since"):
        Stofm.from_pretrained(saved)


@pytest.mark.parametrize(
    ("part", "name", "value", "found"),
    [
        ("cell_encoder", "n_layers", 10**12, "n_layers must be at least 1 and at most"),
        ("cell_encoder", "n_layers", 10**9, "has changed since it was written"),
        ("cell_encoder", "d_inner", 2**31 - 1, "has changed since it was written"),
        ("se2_transformer", "n_kernels", 10**9, "has changed since it was written"),
        ("cell_encoder", "dropout", "0.1", "dropout must be a finite number, found '0.1'"),
        ("se2_transformer", "norm_first", "false", "norm_first must be true or false"),
        ("subslice", "n_cells", 1.5, "n_cells must be an integer, found 1.5"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(part, name, value, found, saved):
    path = saved / "config.json"
    entries = json.loads(path.read_text())
    entries[part][name] = value
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=rf"{saved}.*({found})"):
        Stofm.from_pretrained(saved)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("cell_encoder", "activation"),
        ("cell_encoder", "n_heads"),
        ("se2_transformer", "norm_first"),
        ("se2_transformer", "feature_scale"),
        ("subslice", "n_cells"),
    ],
)
def test_an_entry_that_is_missing_does_not_take_its_default(part, name, model, tmp_path):
    other = {
        "cell_encoder": {"activation": "gelu", "n_heads": 1},
        "se2_transformer": {"norm_first": True, "feature_scale": 2.0},
        "subslice": {"n_cells": 77},
    }
    changed = {k: replace(getattr(model.config, k), **own) for k, own in other.items()}
    saved = tmp_path / "own"
    Stofm(replace(model.config, **changed), model.vocabulary).save_pretrained(saved)
    path = saved / "config.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(entries | {"provenance": "renamed"}))
    Stofm.from_pretrained(saved)
    del entries[part][name]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"config.json is damaged .*has changed since"):
        Stofm.from_pretrained(saved)


def test_symbols_that_changed_places_are_noticed(saved):
    path = saved / "vocabulary.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    column = lines[0].index("symbol")
    genes = [line for line in lines[1:] if line[column]]
    genes[0][column], genes[1][column] = genes[1][column], genes[0][column]
    path.write_text("\n".join("\t".join(line) for line in lines) + "\n")
    with pytest.raises(ValueError, match=r"vocabulary.tsv is damaged .*has changed since"):
        Stofm.from_pretrained(saved)


def test_only_a_checkpoint_is_replaced(model, tmp_path, saved):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="holds something other than a checkpoint"):
        model.save_pretrained(project, overwrite=True)
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref")
    with pytest.raises(FileExistsError, match=r"holds more than a checkpoint .*\['.git/HEAD'\]"):
        model.save_pretrained(saved, overwrite=True)
    assert (saved / ".git" / "HEAD").exists()


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(FileNotFoundError, match=r"'stofm-huge'.*built-in models \['stofm-mini'\]"):
        Stofm.from_pretrained("stofm-huge")


def test_hub_download_gets_the_arguments(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Stofm.from_pretrained("lab/model", revision="v1", local_files_only=True, token="t")
    assert (asked["name"], asked["revision"], asked["token"]) == ("lab/model", "v1", "t")
    assert asked["local_files_only"]
    assert not any("bin" in pattern or "pth" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*no route"):
        Stofm.from_pretrained("lab/model")


def test_untrained_weights_are_announced(model, vocabulary):
    untrained = Stofm(replace(model.config, trained=False), vocabulary)
    with pytest.warns(UntrainedModelWarning, match=r"weights of 'tiny' are random, not trained"):
        untrained.warn_if_untrained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.warn_if_untrained()


def test_embedded_model_loads_and_is_small():
    from stofm.genes import embedded_vocabulary

    model = Stofm.from_pretrained("stofm-mini")
    assert model.vocabulary.fingerprint == embedded_vocabulary().fingerprint
    assert model.config == replace(
        StofmConfig.mini(model.vocabulary.n_tokens),
        provenance=model.config.provenance,
        stofm_version=model.config.stofm_version,
        trained=model.config.trained,
    )
    folder = checkpoint_module.find_checkpoint("stofm-mini")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 30e6
    assert all(torch.isfinite(p).all() for p in model.parameters())
