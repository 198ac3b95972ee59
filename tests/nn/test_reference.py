from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stofm.nn import Stofm, embed_slice, encode_cells
from stofm.nn.reference import read_reference
from stofm.spatial import SliceLayout, SubSliceConfig, VirtualCells, lay_out_slice

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


def write_published(folder, kind):
    """Write the golden weights as the authors publish theirs, as pickles or safetensors."""
    encoder = folder / "cell_encoder"
    (encoder / "cell_bert").mkdir(parents=True)
    shutil.copy(GOLDEN / "b_cell_encoder" / "cell_bert" / "config.json", encoder / "cell_bert")
    shutil.copy(GOLDEN / "i_end_to_end.config.json", folder / "config.json")
    parts = {
        encoder / "cell_bert" / "model": GOLDEN / "b_cell_encoder/cell_bert/model.safetensors",
        encoder / "cell_proj": GOLDEN / "b_cell_encoder" / "cell_proj.safetensors",
        folder / "se2transformer": GOLDEN / "i_end_to_end.safetensors",
    }
    for target, source in parts.items():
        weights = load_file(source)
        if kind == "safetensors":
            save_file(weights, target.with_suffix(".safetensors"))
        elif target.name == "model":
            torch.save(weights, target.with_name("pytorch_model.bin"))
        else:
            suffix = ".pth" if target.name == "se2transformer" else ".bin"
            torch.save(weights, target.with_suffix(suffix))
    return folder


@pytest.fixture
def golden_vocabulary(vocabulary):
    """A vocabulary with the golden cell encoder's number of tokens."""
    return replace(vocabulary, special={"pad": 0, "mask": 1, "cls": 409})


@pytest.fixture(params=["pickles", "safetensors"])
def published(request, tmp_path):
    return write_published(tmp_path / "published", request.param)


def test_gives_the_references_cell_embeddings(published, golden_vocabulary):
    model = Stofm.from_reference(published, golden_vocabulary)
    golden = np.load(GOLDEN / "b_cell_encoder.npz")
    from stofm.genes import RankedTokens

    lists = [row[1:n] for row, n in zip(golden["input_ids"], golden["lengths"], strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])]).astype(np.int64)
    ranked = RankedTokens(np.concatenate(lists).astype(np.int32), offsets)
    out = encode_cells(model.cell_encoder, ranked, golden_vocabulary, device=CPU)
    np.testing.assert_allclose(out, golden["embeddings"], atol=1e-5)


def test_gives_the_references_slice_embeddings(published, golden_vocabulary):
    model = Stofm.from_reference(published, golden_vocabulary)
    golden = np.load(GOLDEN / "i_end_to_end.npz")
    rules = replace(
        model.config.subslice,
        n_cells=int(golden["split_num"]),
        position_weight=float(golden["alpha"]),
        leiden_resolution=float(golden["leiden_res"]),
    )
    assert replace(rules, n_cells=1000, position_weight=0.2) == SubSliceConfig.reference()
    own = lay_out_slice(golden["xy"], golden["features"], rules)
    given = SliceLayout(
        coordinates=own.coordinates,
        subslice=own.subslice,
        virtual_cell=golden["cluster_labels"].astype(np.int64),
        virtual=VirtualCells(golden["virtual_nodes"].astype(float), golden["virtual_features"]),
    )
    for layout in (given, own):
        for batch_size in (1, 4):
            out = embed_slice(
                model.se2_transformer,
                layout,
                golden["features"],
                rules,
                device=CPU,
                batch_size=batch_size,
            )
            np.testing.assert_allclose(out, golden["embeddings"], atol=1e-4)


def test_saved_and_loaded_it_is_the_same_model(published, golden_vocabulary, tmp_path):
    model = Stofm.from_reference(published, golden_vocabulary)
    model.save_pretrained(tmp_path / "ours")
    again = Stofm.from_pretrained(tmp_path / "ours")
    assert again.fingerprint == model.fingerprint
    assert again.config == model.config


def test_from_pretrained_points_to_from_reference(published):
    with pytest.raises(FileNotFoundError, match=r"use Stofm\.from_reference"):
        Stofm.from_pretrained(published)


def rewrite(folder, change):
    path = folder / "se2transformer.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("embedding_layer.bias"), r'Missing key.*"input_projection\.bias"'),
        (lambda s: s.update(extra=torch.zeros(2)), r'Unexpected key.*"\.?extra'),
        (
            lambda s: s.update({"embedding_layer.bias": torch.zeros(5)}),
            r"size mismatch for input_projection\.bias",
        ),
        (
            lambda s: s.pop("encoder.layers.1.self_attn.k_proj.bias"),
            r'Missing key.*"layers\.1\.qkv\.bias"',
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, golden_vocabulary, change, message):
    folder = write_published(tmp_path / "published", "safetensors")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        Stofm.from_reference(folder, golden_vocabulary)


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_with_code_is_refused_unexecuted(tmp_path, golden_vocabulary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_published(tmp_path / "published", "pickles")
    with (folder / "se2transformer.pth").open("wb") as file:
        pickle.dump({"weight": _Evil()}, file)
    with pytest.raises(ValueError, match="can't be read as plain tensors"):
        Stofm.from_reference(folder, golden_vocabulary)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "missing", ["config.json", "se2transformer.safetensors", "cell_encoder/cell_proj.safetensors"]
)
def test_a_missing_file_is_named(tmp_path, golden_vocabulary, missing):
    folder = write_published(tmp_path / "published", "safetensors")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=Path(missing).stem):
        Stofm.from_reference(folder, golden_vocabulary)


def test_a_truncated_file_is_refused(tmp_path, golden_vocabulary):
    folder = write_published(tmp_path / "published", "pickles")
    path = folder / "se2transformer.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="it is damaged"):
        Stofm.from_reference(folder, golden_vocabulary)


def test_a_vocabulary_too_large_for_the_encoder_is_refused(tmp_path, vocabulary):
    folder = write_published(tmp_path / "published", "safetensors")
    large = replace(vocabulary, special={"pad": 0, "mask": 1, "cls": 5000})
    with pytest.raises(ValueError, match="5001 tokens, the cell encoder 410"):
        Stofm.from_reference(folder, large)


def test_weights_of_the_pretraining_wrapper_are_read(tmp_path):
    from stofm.nn.reference import rename_se2

    renamed = rename_se2(load_file(GOLDEN / "g_losses.safetensors"))
    plain = rename_se2(load_file(GOLDEN / "f_model_pre_ln.safetensors"))
    assert set(renamed) == set(plain)


def test_reading_published_weights_leaves_torchs_generator_alone(published):
    before = torch.get_rng_state()
    read_reference(published)
    assert torch.equal(torch.get_rng_state(), before)
