from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stofm.spatial import (
    NodeType,
    SliceLayout,
    SubSliceConfig,
    VirtualCells,
    lay_out_slice,
    normalize_coordinates,
    partition_balanced,
    rows_by_subslice,
)
from stofm.train import samples as samples_module
from stofm.train.config import SpatialMasking, StageConfig, TokenMasking
from stofm.train.order import Draws, Purpose
from stofm.train.samples import (
    CellSamples,
    SubSliceSamples,
    TokenReader,
    cut_slice,
)
from stofm.train.stages import EncodedSlice

DRAWS = Draws(seed=3, stage=1, batch_size=3)
RULES = SubSliceConfig(n_cells=20, n_neighbors=7)


@pytest.fixture
def encode(rng):
    """Made-up embeddings and three virtual cells for each slice of a corpus."""

    def encode(corpus):
        found = []
        for one in corpus.slices:
            n = one.n_cells
            virtual = VirtualCells(
                rng.normal(size=(3, 2)), rng.normal(size=(3, 12)).astype(np.float32)
            )
            layout = SliceLayout(one.coordinates, np.zeros(n, int), np.zeros(n, int), virtual)
            features = rng.normal(size=(n, 12)).astype(np.float16)
            found.append(EncodedSlice(features=features, layout=layout))
        return found

    return encode


@pytest.fixture
def make(corpus, encode):
    encoded = encode(corpus)

    def make(*, draws=DRAWS, vary=True, masking=None, rules=RULES, config=None, **changed):
        stage = StageConfig(
            name="joint", spatial_masking=masking or SpatialMasking(), **(config or {})
        )
        samples = SubSliceSamples(corpus, rules, draws, stage, vary=vary, **changed)
        samples.encoded = encoded
        return samples

    return make


def arrays(masked):
    pairs = masked.subslice.pairs
    return [
        masked.subslice.features,
        masked.subslice.cell_index,
        pairs.rows,
        pairs.columns,
        pairs.distances,
        masked.hidden_nodes,
        masked.target_features,
        masked.pair_rows,
        masked.pair_distances,
    ]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def test_an_epoch_holds_each_cell_once_with_its_own_embedding(make, corpus):
    samples = make(masking=SpatialMasking(masked=0, moved=0))
    seen = [np.zeros(s.n_cells, int) for s in corpus.slices]
    for batch in samples.epoch(1):
        inputs = samples.load(batch, 1).subslices
        for row, number in enumerate(samples.slices_of(batch)):
            is_cell = inputs.cell_index[row] >= 0
            cells = inputs.cell_index[row][is_cell].numpy()
            seen[number][cells] += 1
            expected = samples.encoded[number].features[cells].astype(np.float32)
            np.testing.assert_array_equal(inputs.features[row][is_cell], expected)
            is_virtual = inputs.node_type[row] == NodeType.VIRTUAL
            virtual = samples.encoded[number].layout.virtual
            np.testing.assert_array_equal(inputs.features[row][is_virtual], virtual.features)
    assert all((n == 1).all() for n in seen)


def test_hidden_embeddings_are_the_targets(make):
    samples = make()
    (sample,) = samples.epoch(0)[0][:1]
    (masked,) = samples.masked(np.array([sample]), 0)
    number = samples.slices_of(np.array([sample]))[0]
    cells = masked.subslice.cell_index[masked.target_nodes]
    assert len(cells) >= 1
    expected = samples.encoded[number].features[cells].astype(np.float32)
    np.testing.assert_array_equal(masked.target_features, expected)
    assert (masked.subslice.features[masked.hidden_nodes] == 0).all()
    assert len(masked.pair_distances) > 0


@pytest.mark.parametrize("vary", [True, False])
def test_company_changes_nothing(make, vary):
    samples, others = make(vary=vary), make(vary=vary)
    batch = samples.epoch(2)[0]
    for k, together in enumerate(samples.masked(batch, 2)):
        assert same(together, others.masked(batch[k : k + 1], 2)[0])


def test_draws_follow_seed_stage_and_epoch(make):
    batch = np.sort(np.concatenate(make(vary=False).epoch(0)))[:2]

    def masked(samples, epoch=0):
        return samples.masked(batch, epoch)[0]

    one = masked(make(vary=False))
    assert same(one, masked(make(vary=False)))
    for other in (
        masked(make(vary=False), epoch=1),
        masked(make(vary=False, draws=replace(DRAWS, seed=4))),
        masked(make(vary=False, draws=replace(DRAWS, stage=2))),
    ):
        assert not np.array_equal(one.hidden_nodes, other.hidden_nodes)
        np.testing.assert_array_equal(one.subslice.cell_index, other.subslice.cell_index)
    varied = masked(make(), epoch=1)
    assert not np.array_equal(one.subslice.cell_index, varied.subslice.cell_index)


def test_epochs_are_shuffled_anew_and_of_one_length(make):
    samples = make()
    first, again, next_ = samples.epoch(0), samples.epoch(0), samples.epoch(1)
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in next_]
    assert len(first) == len(next_)


@pytest.mark.parametrize("partition", ["balanced", "reference"])
@pytest.mark.parametrize("vary", [True, False])
def test_only_the_reference_partition_gives_epochs_of_different_length(make, vary, partition):
    samples = make(
        vary=vary,
        rules=replace(RULES, partition=partition, n_cells=12),
        draws=replace(DRAWS, batch_size=1),
    )
    differ = len({len(samples.epoch(number)) for number in range(9)}) > 1
    assert differ == (vary and partition == "reference")


def test_threads_load_the_same(make):
    samples = make()
    batches = samples.epoch(0)
    expected = [samples.load(batch, 0).subslices.features for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: samples.load(batch, 0), batches))
    assert all(
        torch.equal(inputs.subslices.features, features)
        for inputs, features in zip(found, expected, strict=True)
    )


def counted_builds(monkeypatch):
    built = []
    build = samples_module.build_subslice

    def counted(layout, features, cells, config):
        built.append(len(cells))
        return build(layout, features, cells, config)

    monkeypatch.setattr(samples_module, "build_subslice", counted)
    return built


def test_sub_slices_that_stay_are_built_once(make, encode, corpus, monkeypatch):
    built = counted_builds(monkeypatch)
    samples = make(vary=False)
    batch = np.concatenate(samples.epoch(0))
    first = samples.masked(batch, 0)
    assert len(built) == len(batch)
    again = samples.masked(batch, 0)
    samples.masked(batch, 1)
    assert len(built) == len(batch)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))

    samples.encoded = encode(corpus)
    renewed = samples.masked(batch, 0)
    assert len(built) == 2 * len(batch)
    assert not np.array_equal(first[0].target_features, renewed[0].target_features)


def test_kept_sub_slices_are_bounded(make, monkeypatch):
    built = counted_builds(monkeypatch)
    monkeypatch.setattr(samples_module, "_CELLS_KEPT", 1)
    samples = make(vary=False)
    batch = samples.epoch(0)[0]
    samples.masked(batch, 0)
    samples.masked(batch, 0)
    assert len(built) == 2 * len(batch)


def test_numbers_and_names_for_messages(make):
    samples = make(node_multiple=8)
    batch = np.array([0, (1 << 32) + 1, (1 << 32)])
    inputs = samples.load(batch, 0)
    cells = [part.subslice.n_nodes - 4 for part in samples.masked(batch, 0)]
    assert inputs.n_cells == sum(cells)
    assert inputs.n_tokens == sum(cells) + 3 * 4
    assert inputs.subslices.features.shape[1] % 8 == 0
    assert samples.describe(batch) == "'slice-0', 'slice-1'"


@pytest.fixture
def joint(make, corpus, model):
    def joint(*, sampled_cells=5, **changed):
        reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
        return make(reader=reader, config={"sampled_cells": sampled_cells}, **changed)

    return joint


def test_sampled_cells_stand_where_their_embeddings_go(joint, corpus):
    samples = joint()
    batch = np.concatenate(samples.epoch(0))[:5]
    inputs = samples.load(batch, 0)
    n_nodes = inputs.subslices.pairs.n_nodes
    row, node = np.divmod(inputs.sampled_places.numpy(), n_nodes)
    assert np.bincount(row).tolist() == [5] * 5
    assert len(np.unique(inputs.sampled_places)) == len(inputs.sampled_places)
    assert not np.isin(inputs.sampled_places, inputs.hidden_places).any()

    cells = inputs.subslices.cell_index.numpy()[row, node]
    numbers = samples.slices_of(batch)[row]
    read = [
        group.tokens[k][group.is_real[k]].tolist()
        for group in inputs.sampled
        for k in range(len(group.tokens))
    ]
    expected = corpus.take(corpus.first_cell[numbers] + cells)
    for k, tokens in enumerate(read):
        own = expected.tokens[expected.offsets[k] : expected.offsets[k + 1]][:40]
        assert tokens == [69, *own.tolist()]


def test_sampling_follows_the_sample_alone(joint):
    samples = joint()
    batch = samples.epoch(0)[0]
    together = samples.load(batch, 0)
    n_nodes = together.subslices.pairs.n_nodes
    row, node = np.divmod(together.sampled_places.numpy(), n_nodes)
    for k in range(len(batch)):
        alone = samples.load(batch[k : k + 1], 0)
        assert sorted(alone.sampled_places.tolist()) == sorted(node[row == k].tolist())
    other = samples.load(batch, 1)
    assert sorted(other.sampled_places.tolist()) != sorted(together.sampled_places.tolist())


def test_small_sub_slices_give_all_the_cells_that_they_have(joint):
    samples = joint(rules=replace(RULES, n_cells=1), masking=SpatialMasking(masked=1.0, moved=0))
    batch = samples.epoch(0)[0]
    inputs = samples.load(batch, 0)
    assert len(inputs.sampled_places) == len(batch)
    assert sorted(inputs.sampled_places.tolist()) == sorted(inputs.hidden_places.tolist())


def test_joint_numbers(joint):
    samples = joint()
    inputs = samples.load(samples.epoch(0)[0], 0)
    tokens = sum(int(group.is_real.sum()) for group in inputs.sampled)
    assert inputs.n_tokens == sum(inputs.subslices.pairs.n_real) + tokens


CELL_DRAWS = Draws(seed=3, stage=1, batch_size=8)


@pytest.fixture
def make_cells(model):
    def make_cells(corpus, *, draws=CELL_DRAWS, gene_dropout=0.0, **changed):
        config = replace(model.config.cell_encoder, **changed)
        reader = TokenReader(corpus, config, model.vocabulary)
        return CellSamples(reader, draws, TokenMasking(), gene_dropout)

    return make_cells


def described(inputs, row):
    """All that stands in one row of a batch, without padding."""
    tokens = inputs.genes.tokens
    n = int(tokens.is_real[row].sum())
    length = tokens.tokens.shape[1]
    own = inputs.genes.places // length == row
    views = [view.tokens[row][view.is_real[row]].tolist() for view in inputs.views]
    places = (inputs.genes.places[own] % length).tolist()
    return tokens.tokens[row, :n].tolist(), places, inputs.genes.labels[own].tolist(), views


def test_lists_are_those_of_the_cells(make_cells, corpus):
    cells = np.array([150, 0, 115, 2])
    inputs = make_cells(corpus).load(cells, 0)
    for row, cell in enumerate(cells):
        _, places, labels, (first, second) = described(inputs, row)
        expected = corpus.take(cells[row : row + 1]).tokens.tolist()[:40]
        assert first == second == [69, *expected]
        assert labels == [first[place] for place in places]
        assert len(labels) == (0 if cell in (2, 115) else max(1, round(0.15 * len(expected))))


@pytest.mark.parametrize("gene_dropout", [0.0, 0.3])
def test_company_changes_nothing_for_cells(make_cells, corpus, rng, gene_dropout):
    samples = make_cells(corpus, gene_dropout=gene_dropout)
    cells = rng.permutation(corpus.n_cells)[:11]
    together = samples.load(cells, 2)
    for row, cell in enumerate(cells):
        alone = samples.load(np.array([cell]), 2)
        assert described(alone, 0) == described(together, row)


def test_draws_follow_seed_stage_and_epoch_for_cells(make_cells, corpus):
    cells = np.arange(20)

    def masked(samples, epoch=0):
        return samples.load(cells, epoch).genes.tokens.tokens

    one = masked(make_cells(corpus))
    assert torch.equal(one, masked(make_cells(corpus)))
    assert not torch.equal(one, masked(make_cells(corpus), epoch=1))
    assert not torch.equal(one, masked(make_cells(corpus, draws=replace(CELL_DRAWS, seed=4))))
    assert not torch.equal(one, masked(make_cells(corpus, draws=replace(CELL_DRAWS, stage=2))))


def test_epochs_are_shuffled_anew(make_cells, corpus):
    samples = make_cells(corpus)
    first, again, next_ = samples.epoch(0), samples.epoch(0), samples.epoch(1)
    assert sorted(np.concatenate(first)) == list(range(corpus.n_cells))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in next_]
    assert len(first) == len(next_)


def test_threads_load_the_same_for_cells(make_cells, corpus):
    samples = make_cells(corpus, gene_dropout=0.2)
    batches = samples.epoch(0)
    expected = [samples.load(batch, 0).genes.tokens.tokens for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: samples.load(batch, 0), batches))
    assert all(
        torch.equal(inputs.genes.tokens.tokens, tokens)
        for inputs, tokens in zip(found, expected, strict=True)
    )


def test_values_come_along_only_if_they_are_read(make_cells, write_corpus):
    corpus = write_corpus([23], values=True)
    assert make_cells(corpus).load(np.arange(5), 0).views[0].values is None
    view = make_cells(corpus, values="log").load(np.arange(5), 0).views[0]
    assert view.values.shape == view.tokens.shape
    listed = view.values[:, 1:][view.is_real[:, 1:]]  # without <cls>
    read = corpus.take(np.arange(5)).head(view.tokens.shape[1] - 1)
    np.testing.assert_array_equal(listed, read.values)
    with pytest.raises(ValueError, match="uses expression values, but the tokens have none"):
        make_cells(write_corpus([5], names="bare"), pooled=True, d_gene=8)


def test_numbers_and_names_for_messages_for_cells(make_cells, corpus):
    samples = make_cells(corpus)
    inputs = samples.load(np.array([0, 2, 120]), 0)
    assert inputs.n_cells == 3
    lengths = np.minimum(corpus.lengths_of(np.array([0, 2, 120])) + 1, 41)
    assert inputs.n_tokens == lengths.sum()
    assert samples.describe(np.array([0, 2, 120])) == "'slice-0', 'slice-1'"


def test_cells_of_like_length_are_grouped(model, corpus):
    reader = TokenReader(corpus, model.config.cell_encoder, model.vocabulary)
    cells = np.arange(100)
    groups = reader.groups(cells)
    assert sorted(np.concatenate(groups)) == list(range(100))
    for group in groups:
        lengths = corpus.lengths_of(cells[group]) + 1
        assert lengths.max() <= 1.2 * lengths.min()
    assert reader.groups(cells[:0]) == []


def padded(n_tokens, most):
    config = SimpleNamespace(reads_values=False, max_positions=most)
    return TokenReader(None, config, None).padded(n_tokens)


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
    return draws(seed=seed).batches(padded(corpus.lengths_of(np.arange(corpus.n_cells)), 41), 0)


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
    lengths = padded(n_tokens, 1025)
    batches = draws(batch_size=16).batches(lengths, 0)
    filled = sum(lengths[b].max() * len(b) for b in batches)
    assert filled < 1.01 * lengths.sum()
    means = [lengths[b].mean() for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_what_fills_no_batch_is_shared_out_evenly():
    sizes = np.repeat(np.arange(7), [3, 4, 1, 2, 4, 2, 1])
    batches = draws(batch_size=5).batches(sizes, 0)
    assert sorted(len(b) for b in batches) == [4, 4, 4, 5]
    assert draws(batch_size=5).batches(sizes[:0], 0) == []


def test_padded_length_counts_cls_and_ends_at_the_longest_input():
    n_tokens = np.array([0, 7, 8, 100, 2000])
    assert padded(n_tokens, 41).tolist() == [8, 8, 16, 41, 41]


@pytest.fixture
def places(rng):
    return normalize_coordinates(rng.random((113, 2)) * [9.0, 4.0])


def test_fixed_subslices_are_those_of_inference(places, rng):
    rules = SubSliceConfig(n_cells=20)
    layout = lay_out_slice(places, rng.normal(size=(113, 5)), rules)
    expected = [rows.tolist() for rows in rows_by_subslice(layout)]
    assert [rows.tolist() for rows in cut_slice(places, rules)] == expected


def test_slice_is_turned_before_it_is_cut(places):
    rules = SubSliceConfig(n_cells=60)
    found = cut_slice(places, rules, angle=np.pi / 2)
    turned = np.column_stack([-places[:, 1], places[:, 0]])
    expected = partition_balanced(turned, 60)
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
