from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stofm.spatial import SubSliceConfig, normalize_coordinates, partition_balanced
from stofm.train.epochs import (
    Draws,
    Purpose,
    SubSliceSampler,
    batch_length,
    batches_of_like_size,
    cut_slice,
    draw_batches,
)


def draws(*, seed=0, stage=1, batch_size=8):
    return Draws(seed=seed, stage=stage, batch_size=batch_size)


def lists(batches):
    return [batch.tolist() for batch in batches]


def test_generator_depends_on_each_number():
    def drawn(seed, stage, *of):
        return draws(seed=seed, stage=stage).generator(*of).integers(1 << 60)

    keys = [
        (0, 1, 0, Purpose.MASKING, 5),
        (1, 1, 0, Purpose.MASKING, 5),
        (0, 2, 0, Purpose.MASKING, 5),
        (0, 1, 3, Purpose.MASKING, 5),
        (0, 1, 0, Purpose.CELLS, 5),
        (0, 1, 0, Purpose.MASKING, 0),
        (0, 1, 0, Purpose.MASKING, 5 << 32),
        (0, 1, 0, Purpose.ORDER),
        (0, 1, 0, Purpose.ROTATION),
    ]
    found = [drawn(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert found == [drawn(*key) for key in keys]


def epoch_of_cells(corpus, seed=3):
    return draw_batches(draws(seed=seed), batch_length(corpus.cell_lengths, 41), 0)


def test_epoch_takes_each_cell_once(corpus):
    batches = epoch_of_cells(corpus)
    assert sorted(np.concatenate(batches)) == list(range(corpus.n_cells))
    assert max(len(b) for b in batches) == 8
    assert len(batches) == -(-corpus.n_cells // 8)
    assert all(b.dtype == np.int64 for b in batches)


def test_epoch_is_seeded_and_shuffled(corpus):
    epoch = lists(epoch_of_cells(corpus))
    assert epoch == lists(epoch_of_cells(corpus))
    assert epoch != lists(epoch_of_cells(corpus, seed=4))
    order = np.concatenate(epoch)
    # Neither slices nor lengths come one after another.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_little_is_padded(rng):
    n_tokens = rng.integers(1, 500, 5000)
    lengths = batch_length(n_tokens, 1025)
    batches = batches_of_like_size(lengths, batch_size=16, rng=rng)
    padded = sum(lengths[b].max() * len(b) for b in batches)
    assert padded < 1.01 * lengths.sum()
    means = [lengths[b].mean() for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_what_fills_no_batch_is_shared_out_evenly(rng):
    sizes = np.repeat(np.arange(7), [3, 4, 1, 2, 4, 2, 1])
    batches = batches_of_like_size(sizes, batch_size=5, rng=rng)
    assert sorted(len(b) for b in batches) == [4, 4, 4, 5]
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        batches_of_like_size(sizes, batch_size=0, rng=rng)
    assert batches_of_like_size(sizes[:0], batch_size=5, rng=rng) == []


def test_batch_length_counts_cls_and_ends_at_the_longest_input():
    n_tokens = np.array([0, 7, 8, 100, 2000])
    assert batch_length(n_tokens, 41).tolist() == [8, 8, 16, 41, 41]


@pytest.fixture
def slices(rng):
    return [normalize_coordinates(rng.random((n, 2)) * [9.0, 4.0]) for n in (113, 31, 59, 0)]


def sampler(slices, *, vary=True, seed=0, stage=1, batch_size=3, **rules):
    rules = SubSliceConfig(**{"n_cells": 20} | rules)
    drawn = draws(seed=seed, stage=stage, batch_size=batch_size)
    return SubSliceSampler(slices, rules, drawn, vary=vary)


def parts(found, epoch):
    return [found.cells(int(s), epoch).tolist() for s in found.samples(epoch)]


@pytest.mark.parametrize("partition", ["balanced", "reference"])
@pytest.mark.parametrize("vary", [True, False])
def test_subslices_of_an_epoch_hold_each_cell_once(slices, partition, vary):
    found = sampler(slices, vary=vary, partition=partition)
    for epoch in (0, 1):
        samples = found.samples(epoch)
        number, _ = found.locate(samples)
        for k, xy in enumerate(slices):
            cells = [found.cells(int(s), epoch) for s in samples[number == k]]
            rows = np.concatenate([np.empty(0, np.int64), *cells])
            assert sorted(rows) == list(range(len(xy)))
            assert max(map(len, cells), default=0) <= (20 if partition == "balanced" else 39)


def test_subslices_vary_from_epoch_to_epoch_only_if_asked(slices):
    varied, fixed = sampler(slices), sampler(slices, vary=False)
    assert parts(varied, 0) != parts(varied, 1)
    assert parts(varied, 1) == parts(sampler(slices), 1)
    assert parts(varied, 1) != parts(sampler(slices, seed=1), 1)
    assert parts(varied, 1) != parts(sampler(slices, stage=2), 1)
    assert parts(fixed, 0) == parts(fixed, 1)


def test_fixed_subslices_are_those_of_inference(slices, rng):
    from stofm.spatial import lay_out_slice, rows_by_subslice

    rules = SubSliceConfig(n_cells=20)
    layout = lay_out_slice(slices[0], rng.normal(size=(113, 5)), rules)
    expected = [rows.tolist() for rows in rows_by_subslice(layout)]
    assert [rows.tolist() for rows in cut_slice(slices[0], rules)] == expected


def test_slice_is_turned_before_it_is_cut(slices):
    rules = SubSliceConfig(n_cells=60)
    found = cut_slice(slices[0], rules, angle=np.pi / 2)
    turned = np.column_stack([-slices[0][:, 1], slices[0][:, 0]])
    expected = partition_balanced(turned, 60)
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_epoch_of_subslices(slices):
    found = sampler(slices)
    batches = found.epoch(0)
    assert sorted(np.concatenate(batches)) == sorted(found.samples(0))
    assert max(len(b) for b in batches) == 3
    assert lists(batches) != lists(sampler(slices, seed=1).epoch(0))


def test_subslices_of_like_size_are_together(rng):
    slices = [rng.random((n, 2)) for n in [20] * 13 + [400] * 2 + [70] * 7]
    found = sampler(slices, n_cells=100, batch_size=4)
    sizes = [[len(found.cells(int(s), 0)) for s in batch] for batch in found.epoch(0)]
    alike = [max(batch) < 1.5 * min(batch) for batch in sizes]
    assert sum(alike) == 6  # 3 of 20 cells, 2 of 100, 1 of 70; one is mixed
    assert len(alike) == 7


def test_threads_see_the_same_cuts(slices):
    one, many = sampler(slices), sampler(slices)
    wanted = [(int(s), epoch) for epoch in range(5) for s in one.samples(epoch)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda key: many.cells(*key).tolist(), wanted))
    assert found == [one.cells(*key).tolist() for key in wanted]
