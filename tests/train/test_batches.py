from __future__ import annotations

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import SubSliceBatch, TokenBatch
from stofm.spatial import SubSliceConfig, build_subslice, lay_out_slice, rows_by_subslice
from stofm.train.batches import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.config import SpatialMasking, TokenMasking
from stofm.train.masking import apply, draw

RULES = SubSliceConfig(n_cells=60, n_neighbors=9)


@pytest.fixture
def cells(rng, vocabulary):
    tokens = np.concatenate([rng.permutation(vocabulary.tokens[:50])[:n] for n in (31, 0, 19)])
    ranked = RankedTokens(
        tokens=tokens, offsets=np.array([0, 31, 31, 50]), values=tokens.astype(np.float32)
    )
    return TokenBatch.from_ranked(
        ranked, np.arange(3), cls_token=vocabulary.cls, pad_token=vocabulary.pad, length=40
    )


def rngs(seed=0):
    return [np.random.default_rng([seed, k]) for k in range(3)]


def build(cells, vocabulary, **options):
    options = {"masking": TokenMasking(), "gene_dropout": 0.0} | options
    return CellBatch.build(cells, rngs(), vocabulary=vocabulary, **options)


def test_masked_genes_know_what_was_hidden(cells, vocabulary):
    genes = MaskedGenes.build(cells, rngs(), masking=TokenMasking(), vocabulary=vocabulary)
    seen, before = genes.tokens.tokens.flatten(), cells.tokens.flatten()
    assert len(genes.places) == 5 + 0 + 3
    assert (seen[genes.places] == vocabulary.mask).all()
    assert torch.equal(before[genes.places], genes.labels)
    assert torch.equal(seen != before, torch.isin(torch.arange(120), genes.places))
    listed = set(before.tolist()) - {vocabulary.cls, vocabulary.pad}
    assert genes.measured.tolist() == sorted(listed)


def test_views_are_the_cells_themselves_without_gene_dropout(cells, vocabulary):
    batch = build(cells, vocabulary)
    assert batch.n_cells == 3
    assert batch.views[0] is batch.views[1] is cells
    moved = batch.to("cpu")
    assert moved.views[0] is moved.views[1]


def test_views_lose_genes_each_in_its_own_way(cells, vocabulary):
    batch = build(cells, vocabulary, gene_dropout=0.4)
    first, second = batch.views
    for view in (first, second):
        assert view.is_real.sum(dim=1).tolist() == [1 + 31 - 12, 1, 1 + 19 - 7]
    assert not torch.equal(first.tokens, second.tokens)
    # What is hidden does not change with the views.
    assert torch.equal(batch.genes.labels, build(cells, vocabulary).genes.labels)
    assert torch.equal(batch.to("cpu").views[1].tokens, second.tokens)


@pytest.fixture
def masked(rng):
    xy = rng.random((113, 2)) * [90.0, 40.0]
    features = rng.normal(size=(113, 5)).astype(np.float32)
    layout = lay_out_slice(xy, features, RULES)
    masking = SpatialMasking(kept=0.1)
    parts = []
    for rows in rows_by_subslice(layout):
        subslice = build_subslice(layout, features, rows, RULES)
        drawn = draw(len(rows), masking, rng)
        parts.append(apply(subslice, drawn, masking, n_surrounding=3))
    return parts


def test_targets_of_a_batch_are_those_of_its_subslices(masked):
    batch = MaskedSubSliceBatch.from_masked(masked, node_multiple=16)
    n_nodes = batch.subslices.pairs.n_nodes
    assert n_nodes % 16 == 0
    assert len(masked) == 2
    hidden, targets, pairs, visible = 0, 0, 0, 0
    for b, part in enumerate(masked):
        own = slice(hidden, hidden := hidden + len(part.hidden_nodes))
        np.testing.assert_array_equal(batch.hidden_places[own] - b * n_nodes, part.hidden_nodes)
        own = slice(targets, targets := targets + len(part.target_nodes))
        np.testing.assert_array_equal(batch.target_places[own] - b * n_nodes, part.target_nodes)
        np.testing.assert_array_equal(batch.target_features[own], part.target_features)
        own = slice(pairs, pairs := pairs + len(part.pair_rows))
        assert (batch.pair_batch[own] == b).all()
        np.testing.assert_array_equal(batch.pair_rows[own], part.pair_rows)
        np.testing.assert_array_equal(batch.pair_columns[own], part.pair_columns)
        np.testing.assert_array_equal(batch.pair_distances[own], part.pair_distances)
        own = slice(visible, visible := visible + len(part.visible.nodes))
        np.testing.assert_array_equal(batch.visible.places[own] - b * n_nodes, part.visible.nodes)
        np.testing.assert_array_equal(batch.visible.features[own], part.visible.features)
        np.testing.assert_array_equal(batch.visible.surroundings[own], part.visible.surroundings)
    assert (hidden, targets, pairs, visible) == tuple(
        map(len, (batch.hidden_places, batch.target_places, batch.pair_rows, batch.visible.places))
    )
    flat = batch.subslices.features.flatten(0, 1)
    assert torch.equal(flat[batch.visible.places], batch.visible.features)
    assert not flat[batch.hidden_places].any()
    kept = torch.isin(batch.target_places, batch.hidden_places, invert=True)
    assert kept.any()
    assert torch.equal(flat[batch.target_places[kept]], batch.target_features[kept])


def tensors(value):
    """All tensors in a batch, by name."""
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, tuple):
        for k, part in enumerate(value):
            yield from ((f"{k}.{name}", tensor) for name, tensor in tensors(part))
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            found = tensors(getattr(value, field))
            yield from ((f"{field}.{name}", tensor) for name, tensor in found)


def test_all_tensors_go_to_the_device(cells, vocabulary, masked):
    joint = JointBatch(
        masked=MaskedSubSliceBatch.from_masked(masked),
        cells=(cells,),
        places=torch.tensor([40, 41, 45]),
        genes=(MaskedGenes.build(cells, rngs(), masking=TokenMasking(), vocabulary=vocabulary),),
    )
    views = build(cells, vocabulary, gene_dropout=0.2)
    for batch in (joint, views):
        found = list(tensors(batch.to("meta")))
        assert [name for name, tensor in found if tensor.device.type != "meta"] == []
        assert [name for name, _ in found] == [name for name, _ in tensors(batch)]
        assert len(found) > 20
    assert isinstance(joint.to("cpu").masked.subslices, SubSliceBatch)
