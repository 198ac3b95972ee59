from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stofm.train import RunConfig, TokenMasking, order
from stofm.train.order import Batches, Draws, permuted, shares_of
from stofm.train.samples import CellSamples, TokenReader

DRAWS = Draws(seed=3, stage=1, batch_size=8)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_takes_each_number_once(n):
    found = permuted(np.arange(n), n, 5)
    assert sorted(found) == list(range(n))
    np.testing.assert_array_equal(permuted(np.arange(n)[::-1], n, 5), found[::-1])
    if n > 100:
        assert (found != permuted(np.arange(n), n, 6)).mean() > 0.9
        assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.1
        # Neighbours are sent far apart.
        assert np.abs(np.diff(found)).mean() > n / 4


def test_permutations_of_several_sizes_at_once():
    sizes, keys = np.repeat([7, 300], [7, 300]), np.repeat([11, 12], [7, 300])
    positions = np.concatenate([np.arange(7), np.arange(300)])
    found = permuted(positions, sizes, keys)
    np.testing.assert_array_equal(found[:7], permuted(np.arange(7), 7, 11))
    np.testing.assert_array_equal(found[7:], permuted(np.arange(300), 300, 12))


def test_batches_are_made_window_by_window(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 12)
    asked = []

    def make(window, positions):
        asked.append(window)
        return np.split(positions, range(5, len(positions), 5))

    batches = Batches(23, replace(DRAWS, batch_size=5), make)
    assert len(batches) == 5
    np.testing.assert_array_equal(batches[2], np.arange(10, 15))
    assert asked == [1]
    assert [len(one) for one in batches[3:]] == [5, 3]
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(23))
    with pytest.raises(IndexError):
        batches[5]


@pytest.fixture
def samples(model, write_corpus):
    corpus = write_corpus([61, 113, 40])
    reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
    return CellSamples(reader, DRAWS, TokenMasking(), 0.0)


def test_in_windows_each_cell_occurs_once_too(samples, monkeypatch):
    whole = np.sort(np.concatenate(samples.epoch(0)))
    monkeypatch.setattr(order, "WINDOW", 32)
    epoch = samples.epoch(0)
    np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), whole)
    assert [b.tolist() for b in epoch] == [b.tolist() for b in samples.epoch(0)]
    assert [b.tolist() for b in epoch] != [b.tolist() for b in samples.epoch(1)]
    first = np.concatenate(epoch[:4])
    # A window is drawn from all slices.
    assert len(np.unique(samples.reader.corpus.locate(first)[0])) == 3


@pytest.mark.parametrize("window", [1 << 16, 32])
def test_an_epoch_takes_shares_of_slices_and_other_cells_in_the_next(samples, monkeypatch, window):
    monkeypatch.setattr(order, "WINDOW", window)
    shares = np.array([1.0, 0.25, 0.0])
    mixed = replace(samples, shares=shares)
    corpus, seen, counts = samples.reader.corpus, set(), []
    for number in range(12):
        cells = np.concatenate(mixed.epoch(number))
        assert len(np.unique(cells)) == len(cells)
        counts.append(np.bincount(corpus.locate(cells)[0], minlength=3))
        seen |= set(cells.tolist())
    assert {tuple(one[[0, 2]]) for one in counts} == {(61, 0)}
    assert {one[1] for one in counts} <= {28, 29}
    # In twelve epochs with a quarter each, nearly all have had their turn.
    assert len(seen) > 61 + 0.9 * 113


def test_mixture_weights():
    slices = [
        {"technology": "Visium", "species": "human"},
        {"technology": "Xenium", "species": "human"},
        {"technology": "Xenium", "species": "mouse"},
    ]
    mixture = {"technology": {"Visium": 0.5}, "species": {"mouse": 2}}
    np.testing.assert_allclose(shares_of(slices, mixture), [0.25, 0.5, 1.0])
    assert shares_of(slices, {}) is None
    with pytest.raises(
        ValueError, match=r"'technology'.* names \['Visum'\].* \['Visium', 'Xenium'\]"
    ):
        shares_of(slices, {"technology": {"Visum": 1}})
    with pytest.raises(ValueError, match="All slices have the weight 0"):
        shares_of(slices[:1], {"technology": {"Visium": 0}})
    with pytest.raises(ValueError, match="mixture must give weights of at least 0"):
        RunConfig(mixture={"species": {"mouse": -1}})
