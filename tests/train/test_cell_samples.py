from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from stofm.train.cell_samples import CellSamples, Draws, TokenReader
from stofm.train.gene_masking import TokenMasking

DRAWS = Draws(seed=3, stage=1, batch_size=8)


@pytest.fixture
def make(model):
    def make(corpus, *, draws=DRAWS, gene_dropout=0.0, **changed):
        config = replace(model.config.cell_encoder, **changed)
        reader = TokenReader(corpus, config, model.vocabulary)
        return CellSamples(reader, draws, masking=TokenMasking(), gene_dropout=gene_dropout)

    return make


def described(inputs, row):
    """All that stands in one row of a batch, without padding."""
    tokens = inputs.genes.tokens
    n = int(tokens.is_real[row].sum())
    length = tokens.tokens.shape[1]
    own = inputs.genes.places // length == row
    views = [view.tokens[row][view.is_real[row]].tolist() for view in inputs.views]
    places = (inputs.genes.places[own] % length).tolist()
    return tokens.tokens[row, :n].tolist(), places, inputs.genes.labels[own].tolist(), views


def test_lists_are_those_of_the_cells(make, corpus):
    cells = np.array([150, 0, 115, 2])
    inputs = make(corpus).load(cells, 0)
    for row, cell in enumerate(cells):
        _, places, labels, (first, second) = described(inputs, row)
        expected = corpus.take(cells[row : row + 1]).tokens.tolist()[:40]
        assert first == second == [69, *expected]
        assert labels == [first[place] for place in places]
        assert len(labels) == (0 if cell in (2, 115) else max(1, round(0.15 * len(expected))))


@pytest.mark.parametrize("gene_dropout", [0.0, 0.3])
def test_company_changes_nothing(make, corpus, rng, gene_dropout):
    samples = make(corpus, gene_dropout=gene_dropout)
    cells = rng.permutation(corpus.n_cells)[:11]
    together = samples.load(cells, 2)
    for row, cell in enumerate(cells):
        alone = samples.load(np.array([cell]), 2)
        assert described(alone, 0) == described(together, row)


def test_draws_follow_seed_stage_and_epoch(make, corpus):
    cells = np.arange(20)

    def masked(samples, epoch=0):
        return samples.load(cells, epoch).genes.tokens.tokens

    one = masked(make(corpus))
    assert torch.equal(one, masked(make(corpus)))
    assert not torch.equal(one, masked(make(corpus), epoch=1))
    assert not torch.equal(one, masked(make(corpus, draws=replace(DRAWS, seed=4))))
    assert not torch.equal(one, masked(make(corpus, draws=replace(DRAWS, stage=2))))


def test_epochs_are_shuffled_anew(make, corpus):
    samples = make(corpus)
    first, again, next_ = samples.epoch(0), samples.epoch(0), samples.epoch(1)
    assert sorted(np.concatenate(first)) == list(range(corpus.n_cells))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in next_]
    assert len(first) == len(next_)


def test_threads_load_the_same(make, corpus):
    samples = make(corpus, gene_dropout=0.2)
    batches = samples.epoch(0)
    expected = [samples.load(batch, 0).genes.tokens.tokens for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: samples.load(batch, 0), batches))
    assert all(
        torch.equal(inputs.genes.tokens.tokens, tokens)
        for inputs, tokens in zip(found, expected, strict=True)
    )


def test_values_come_along_only_if_they_are_read(make, write_corpus):
    corpus = write_corpus([23], values=True)
    assert make(corpus).load(np.arange(5), 0).views[0].values is None
    view = make(corpus, values="log").load(np.arange(5), 0).views[0]
    assert view.values.shape == view.tokens.shape
    np.testing.assert_array_equal(view.bag.values, corpus.take(np.arange(5)).values)
    with pytest.raises(ValueError, match="reads expression values, and the tokens have none"):
        make(write_corpus([5], names="bare"), pooled=True, d_gene=8)


def test_numbers_and_names_for_messages(make, corpus):
    samples = make(corpus)
    inputs = samples.load(np.array([0, 2, 120]), 0)
    assert samples.n_cells(inputs) == 3
    lengths = np.minimum(corpus.cell_lengths[[0, 2, 120]] + 1, 41)
    assert samples.n_tokens(inputs) == lengths.sum()
    assert samples.describe(np.array([0, 2, 120])) == "'slice-0', 'slice-1'"


def test_cells_of_like_length_are_grouped(model, corpus):
    reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
    cells = np.arange(100)
    groups = reader.groups(cells)
    assert sorted(np.concatenate(groups)) == list(range(100))
    for group in groups:
        lengths = corpus.cell_lengths[cells[group]] + 1
        assert lengths.max() <= 1.2 * lengths.min()
    assert reader.groups(cells[:0]) == []


@pytest.mark.parametrize("name", ["seed", "stage", "batch_size"])
def test_draws_are_checked(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, found -1"):
        replace(DRAWS, **{name: -1})
