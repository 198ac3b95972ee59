from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stofm.nn import encode_cells
from stofm.spatial import lay_out_slice
from stofm.train.stages import CellCache

CPU = torch.device("cpu")


class Together:
    """One of several processes, which the test runs one after another."""

    def __init__(self, rank, count, wait=lambda: None):
        self.rank, self.count, self.wait, self.device = rank, count, wait, CPU


ALONE = Together(0, 1)


def encode(one, key=None):
    """Key and slices; of the cell encoder as it is now by default."""
    key = key or one.key()
    return key, one.encode(key)


def cache(tmp_path, corpus, model, processes=ALONE, *, rules=None, virtual_cells=True):
    model.config = replace(model.config, subslice=rules or model.config.subslice)
    setup = SimpleNamespace(model=model, processes=processes, show_progress_bar=False)
    return CellCache(setup, corpus, tmp_path / "cells", virtual_cells)


def test_features_are_those_of_the_cell_encoder_in_half_precision(tmp_path, corpus, model):
    _, found = encode(cache(tmp_path, corpus, model))
    assert len(found) == 3
    for one, encoded in zip(corpus.slices, found, strict=True):
        expected = encode_cells(model.cell_encoder, one.ranked, model.vocabulary, device=CPU)
        assert encoded.features.dtype == np.float16
        np.testing.assert_array_equal(encoded.features, expected.astype(np.float16))
        np.testing.assert_array_equal(encoded.layout.coordinates, one.coordinates)


def test_virtual_cells_are_those_of_the_rules(tmp_path, corpus, model):
    rules = replace(model.config.subslice, leiden_resolution=2.0)
    _, found = encode(cache(tmp_path, corpus, model, rules=rules))
    one, encoded = corpus.slices[0], found[0]
    expected = lay_out_slice(one.coordinates, encoded.features.astype(np.float32), rules).virtual
    np.testing.assert_array_equal(encoded.layout.virtual.coordinates, expected.coordinates)
    np.testing.assert_array_equal(encoded.layout.virtual.features, expected.features)
    assert encoded.layout.virtual.n_virtual > 1


def test_without_virtual_cells(tmp_path, corpus, model):
    _, found = encode(cache(tmp_path, corpus, model, virtual_cells=False))
    assert [e.layout.virtual.n_virtual for e in found] == [0, 0, 0]
    assert found[0].layout.virtual.features.shape == (0, 12)


def test_second_time_nothing_is_computed(tmp_path, corpus, model, monkeypatch):
    key, found = encode(cache(tmp_path, corpus, model))
    monkeypatch.setattr("stofm.train.stages.encode_cells", None)
    monkeypatch.setattr("stofm.train.stages.lay_out_slice", None)
    again_key, again = encode(cache(tmp_path, corpus, model))
    assert again_key == key
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
    # Other rules of sub-slices need neither.
    rules = replace(model.config.subslice, n_cells=7)
    encode(cache(tmp_path, corpus, model, rules=rules))


def test_other_weights_or_rules_are_computed_anew(tmp_path, corpus, model):
    first, _ = encode(cache(tmp_path, corpus, model))
    with torch.no_grad():
        model.cell_encoder.projection.weight[0, 0] += 1.0
    key, found = encode(cache(tmp_path, corpus, model))
    assert key != first
    expected = encode_cells(
        model.cell_encoder, corpus.slices[0].ranked, model.vocabulary, device=CPU
    )
    np.testing.assert_array_equal(found[0].features, expected.astype(np.float16))
    rules = replace(model.config.subslice, leiden_resolution=9.0)
    _, finer = encode(cache(tmp_path, corpus, model, rules=rules))
    assert finer[0].layout.virtual.n_virtual > found[0].layout.virtual.n_virtual


def test_processes_share_the_slices(tmp_path, corpus, model, monkeypatch):
    encoded = []

    def counted(encoder, ranked, *args, **options):
        encoded.append(ranked.n_cells)
        return encode_cells(encoder, ranked, *args, **options)

    monkeypatch.setattr("stofm.train.stages.encode_cells", counted)

    def second_works():
        encoded.append("wait")
        encode(cache(tmp_path, corpus, model, Together(1, 2)))

    _, found = encode(cache(tmp_path, corpus, model, Together(0, 2, second_works)))
    assert encoded == [113, 59, "wait", 31]
    assert [len(e.features) for e in found] == [113, 31, 59]


def test_interrupted_encoding_goes_on(tmp_path, corpus, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("stofm.train.stages.lay_out_slice", None)
        with pytest.raises(TypeError):
            encode(cache(tmp_path, corpus, model))
    _, found = encode(cache(tmp_path, corpus, model))
    assert [len(e.features) for e in found] == [113, 31, 59]


def test_removed_result_is_missed_with_advice(tmp_path, corpus, model):
    one = cache(tmp_path, corpus, model)
    key, _ = encode(one)
    one.remove(but={key})
    assert len(encode(one, key)[1]) == 3
    one.remove(but={"other"})
    assert list((tmp_path / "cells").iterdir()) == []
    with torch.no_grad():
        model.cell_encoder.projection.weight[0, 0] += 1.0
    with pytest.raises(FileNotFoundError, match=r"'slice-0' .* and resume, and the stage begins"):
        encode(one, key)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def widen(path):
    np.save(path, np.load(path).astype(np.float64))


@pytest.mark.parametrize("harm", [flip, truncate, widen])
@pytest.mark.parametrize("name", ["cells-*/features", "virtual-*/features"])
def test_a_damaged_result_is_made_again(tmp_path, write_corpus, model, name, harm):
    corpus = write_corpus([13, 9])
    one = cache(tmp_path, corpus, model)
    _, made = encode(one)
    # Not the mapped file, which changes.
    expected = [old._replace(features=old.features.copy()) for old in made]
    path = sorted((tmp_path / "cells").glob(f"{name}.npy"))[0]
    harm(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged: its content has changed. It is ma"):
        _, found = encode(one)
    for new, old in zip(found, expected, strict=True):
        np.testing.assert_array_equal(new.features, old.features)
