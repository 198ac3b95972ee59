from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from stofm.heads.tuning_samples import FineTuningSamples, KnownCells

from stofm.heads.targets import Targets
from stofm.train.config import SpatialMasking
from stofm.train.samples import Draws, SubSliceSamples, TokenReader
from stofm.train.stages import CellCache, StageSetup

DRAWS = Draws(seed=5, stage=0, batch_size=2)
#: The user's cells: five that are in no slice, then those of the slices, backwards.
N_OTHERS = 5


class Alone:
    rank, count = 0, 1

    def wait(self):
        pass


@pytest.fixture
def rows(corpus):
    last = N_OTHERS + corpus.n_cells - 1
    return [last - np.arange(a, b) for a, b in pairwise(corpus.first_cell)]


@pytest.fixture
def targets(corpus, rng):
    classes = rng.integers(0, 4, N_OTHERS + corpus.n_cells)
    return Targets("classes", classes.astype(np.int64), 4)


@pytest.fixture
def make(model, corpus, rows, targets, tmp_path):
    def build(counts, *, vary=False, with_tokens=True):
        reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
        nothing = SpatialMasking(masked=0.0, moved=0.0)
        sampled = {"reader": reader, "sampled_cells": 4} if with_tokens else {}
        rules = model.config.subslice
        subslices = SubSliceSamples(corpus, rules, DRAWS, nothing, vary, **sampled)
        setup = StageSetup(
            model=model,
            corpus=corpus,
            draws=DRAWS,
            folder=tmp_path / "cells",
            own_folder=tmp_path / "cells",
            processes=Alone(),
            device=torch.device("cpu"),
        )
        subslices.encoded = CellCache(setup, corpus, setup.folder, virtual_cells=True).encode()[1]
        return FineTuningSamples(subslices, KnownCells(targets, rows, counts))

    return build


@pytest.mark.parametrize("vary", [False, True])
def test_each_target_that_counts_comes_once_an_epoch(make, corpus, targets, rng, vary):
    counts = rng.random(len(targets)) < 0.3
    samples = make(counts, vary=vary)
    for epoch in (0, 3):
        loaded = [samples.load(batch, epoch) for batch in samples.epoch(epoch)]
        found = torch.cat([batch.targets for batch in loaded]).numpy()
        assert np.array_equal(np.sort(found), np.sort(targets.values[N_OTHERS:][counts[N_OTHERS:]]))


def test_targets_stand_at_their_cells(make, rows, corpus, targets, rng):
    counts = rng.random(len(targets)) < 0.5
    samples = make(counts)
    for batch in samples.epoch(0):
        loaded = samples.load(batch, 0)
        subslices = loaded.cells.subslices
        n_nodes = subslices.cell_index.shape[1]
        for place, target in zip(loaded.places.tolist(), loaded.targets.tolist(), strict=True):
            b, node = divmod(place, n_nodes)
            number = int(batch[b] >> 32)
            row = rows[number][subslices.cell_index[b, node]]
            assert counts[row]
            assert targets.values[row] == target


def test_subslices_without_a_target_are_left_out(make, rows, targets):
    counts = np.zeros(len(targets), dtype=bool)
    counts[rows[1][:3]] = True
    (batch,) = make(counts).epoch(0)
    assert (batch >> 32).tolist() == [1]


def test_nothing_is_hidden_or_moved(make, targets):
    samples = make(np.ones(len(targets), dtype=bool))
    masked = samples.load(samples.epoch(0)[0], 0).cells
    assert not len(masked.hidden_places)
    assert not len(masked.target_places)
    assert not len(masked.pair_rows)


def test_what_counts_does_not_change_what_the_model_reads(make, targets):
    counts = np.ones(len(targets), dtype=bool)
    some = counts.copy()
    some[::2] = False
    whole, part = make(counts), make(some)
    for batch, other in zip(whole.epoch(0), part.epoch(0), strict=True):
        assert np.array_equal(batch, other)
        first, second = whole.load(batch, 0), part.load(batch, 0)
        assert torch.equal(first.cells.sampled_places, second.cells.sampled_places)
        assert len(first.places) > len(second.places)


def test_without_tokens_no_cell_is_embedded_anew(make, targets):
    samples = make(np.ones(len(targets), dtype=bool), with_tokens=False)
    batch = samples.epoch(0)[0]
    loaded = samples.load(batch, 0)
    assert loaded.cells.sampled == ()
    assert loaded.n_tokens == sum(loaded.cells.subslices.pairs.n_real)
    assert loaded.n_cells == len(loaded.targets)
    assert "slice-" in samples.describe(batch)


def test_moves_to_a_device(make, targets):
    samples = make(np.ones(len(targets), dtype=bool))
    moved = samples.load(samples.epoch(0)[0], 0).to("meta")
    assert moved.places.device.type == moved.targets.device.type == "meta"
    assert moved.cells.subslices.features.device.type == "meta"
