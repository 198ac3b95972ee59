from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import SubSliceBatch, TokenBatch
from stofm.spatial import (
    NodeType,
    PairDistances,
    SubSlice,
    SubSliceConfig,
    build_subslice,
    lay_out_slice,
    pair_distances,
    rows_by_subslice,
)
from stofm.train.config import SpatialMasking, TokenMasking
from stofm.train.masking import CellBatch, Draw, MaskedGenes, MaskedSubSliceBatch, apply, draw

GOLDEN = Path(__file__).parents[1] / "golden"
RULES = SubSliceConfig(n_cells=80, n_neighbors=9)
BATCH_RULES = SubSliceConfig(n_cells=60, n_neighbors=9)
EMPTY = np.empty(0, np.int64)


@pytest.fixture
def subslice(rng):
    xy = rng.random((151, 2)) * [90.0, 40.0]
    features = rng.normal(size=(151, 5)).astype(np.float32)
    layout = lay_out_slice(xy, features, RULES)
    return build_subslice(layout, features, rows_by_subslice(layout)[0], RULES)


def dense(pairs, fill=100.0):
    """All distances, as the published code holds them: 0 for the slice token and the diagonal."""
    matrix = np.full((pairs.n_nodes, pairs.n_nodes), fill, dtype=np.float32)
    matrix[0] = matrix[:, 0] = 0.0
    np.fill_diagonal(matrix, 0.0)
    matrix[pairs.rows, pairs.columns] = matrix[pairs.columns, pairs.rows] = pairs.distances
    return matrix


def test_like_the_reference_with_its_draws():
    golden = np.load(GOLDEN / "h_collator.npz")
    matrix = golden["in_attn_bias"]
    rows, columns = np.nonzero(np.triu((matrix != 0) & (matrix != 100)))
    before = SubSlice(
        coordinates=golden["in_spatial"].astype(np.float64),
        features=golden["in_token_embeddings"],
        node_type=golden["in_token_types"].astype(np.int8),
        cell_index=golden["in_indices"].astype(np.int64),
        pairs=PairDistances(
            rows=rows.astype(np.int32),
            columns=columns.astype(np.int32),
            distances=matrix[rows, columns],
            n_nodes=len(matrix),
        ),
    )
    first_cell = int(np.flatnonzero(golden["in_token_types"] == 0)[0])
    groups = ("masked_nodes", "kept_nodes", "perturbed_nodes", "kept_pair_nodes")
    drawn = Draw(
        *(golden[name].astype(np.int64) - first_cell for name in groups),
        golden["standard_normal_noise"].astype(np.float64),
    )
    masked = apply(before, drawn, SpatialMasking.reference())

    np.testing.assert_array_equal(masked.subslice.features, golden["out_token_embeddings"])
    np.testing.assert_array_equal(masked.subslice.coordinates, golden["out_spatial"])
    np.testing.assert_array_equal(masked.subslice.node_type, golden["out_token_types"])
    np.testing.assert_array_equal(masked.subslice.cell_index, golden["out_indices"])
    after = dense(masked.subslice.pairs)
    np.testing.assert_allclose(after, golden["out_attn_bias"], atol=2e-5)
    # No distance is taken for "not a neighbour", nor the reverse.
    np.testing.assert_array_equal(after == 100, golden["out_attn_bias"] == 100)
    labels = np.full_like(golden["out_labels"], -100)
    labels[masked.target_nodes] = masked.target_features
    np.testing.assert_array_equal(labels, golden["out_labels"])
    pair_labels = np.full_like(golden["out_pair_labels"], -100)
    pair_labels[masked.pair_rows, masked.pair_columns] = masked.pair_distances
    np.testing.assert_allclose(pair_labels, golden["out_pair_labels"], atol=2e-5)
    np.testing.assert_array_equal(pair_labels == -100, golden["out_pair_labels"] == -100)


def test_groups_are_as_large_as_asked_and_disjoint(rng):
    masking = SpatialMasking(masked=0.3, kept=0.1, moved=0.2, kept_pairs=0.1)
    drawn = draw(203, masking, rng)
    groups = (drawn.masked, drawn.kept, drawn.moved, drawn.kept_pairs)
    assert [len(group) for group in groups] == [60, 20, 40, 20]
    together = np.concatenate(groups)
    assert len(np.unique(together)) == len(together)
    assert together.max() < 203
    assert drawn.noise.shape == (40, 2)


def test_independent_draws_overlap(rng):
    masking = SpatialMasking(masked=0.5, moved=0.5, disjoint=False)
    drawn = draw(200, masking, rng)
    assert 30 < len(np.intersect1d(drawn.masked, drawn.moved)) < 70


def test_reference_draws_as_many_as_the_published_code():
    drawn = draw(120, SpatialMasking.reference(), np.random.default_rng(0))
    groups = (drawn.masked, drawn.kept, drawn.moved, drawn.kept_pairs)
    assert [len(group) for group in groups] == [14, 3, 14, 3]


def test_cells_of_tiny_subslices_are_drawn_as_often_as_others():
    drawn = [draw(3, SpatialMasking(), np.random.default_rng(seed)) for seed in range(3000)]
    for group in ("masked", "moved"):
        sizes = np.array([len(getattr(one, group)) for one in drawn])
        assert set(sizes.tolist()) == {0, 1}
        assert sizes.mean() == pytest.approx(0.3, abs=0.03)
    assert not any(np.isin(one.masked, one.moved).any() for one in drawn)
    single = [draw(1, SpatialMasking(), np.random.default_rng(seed)) for seed in range(200)]
    assert max(len(one.masked) + len(one.moved) for one in single) == 1
    assert all(len(one.noise) == len(one.moved) for one in single)


def test_same_generator_same_draw():
    first, second, other = (draw(99, SpatialMasking(), np.random.default_rng(s)) for s in (4, 4, 5))
    np.testing.assert_array_equal(first.masked, second.masked)
    np.testing.assert_array_equal(first.noise, second.noise)
    assert not np.array_equal(first.masked, other.masked)


def test_hidden_features_and_targets(subslice, rng):
    n_virtual = int((subslice.node_type == NodeType.VIRTUAL).sum())
    n_cells = subslice.n_nodes - n_virtual - 1
    drawn = draw(n_cells, SpatialMasking(kept=0.1), rng)
    before = subslice.features.copy()
    masked = apply(subslice, drawn, SpatialMasking(kept=0.1))
    assert set(masked.hidden_nodes.tolist()) == set((drawn.masked + 1 + n_virtual).tolist())
    hidden = masked.subslice.features[masked.hidden_nodes]
    assert hidden.shape == (int(0.1 * n_cells), 5)
    assert not hidden.any()
    others = np.setdiff1d(np.arange(subslice.n_nodes), masked.hidden_nodes)
    np.testing.assert_array_equal(masked.subslice.features[others], before[others])
    np.testing.assert_array_equal(masked.target_features, before[masked.target_nodes])
    np.testing.assert_array_equal(
        masked.target_nodes, np.r_[drawn.masked, drawn.kept] + 1 + n_virtual
    )
    np.testing.assert_array_equal(subslice.features, before)  # the input is not changed
    filled = apply(subslice, drawn, SpatialMasking(mask_value=-3.0))
    assert (filled.subslice.features[filled.hidden_nodes] == -3).all()


def test_moved_cells_have_exact_distances_to_all_nodes(subslice, rng):
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masking = SpatialMasking(noise_spacings=2.0)
    drawn = draw(len(cells), masking, rng)
    masked = apply(subslice, drawn, masking)
    width, height = np.ptp(subslice.coordinates[cells], axis=0)
    places = subslice.coordinates.copy()
    places[cells[drawn.moved]] += 2.0 * np.sqrt(width * height / len(cells)) * drawn.noise
    exact = np.linalg.norm(places[:, None] - places[None], axis=-1)
    before, after = dense(subslice.pairs, np.nan), dense(masked.subslice.pairs, np.nan)
    moved = np.zeros(subslice.n_nodes, dtype=bool)
    moved[cells[drawn.moved]] = True
    touched = moved[:, None] | moved[None]
    touched[0] = touched[:, 0] = False
    np.testing.assert_allclose(after[touched], exact[touched], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(after[~touched], before[~touched])
    codes = masked.subslice.pairs.rows * subslice.n_nodes + masked.subslice.pairs.columns
    assert (np.diff(codes) > 0).all()  # each pair once, in order
    assert (masked.subslice.pairs.rows < masked.subslice.pairs.columns).all()


def test_asked_pairs_are_listed_ones_of_cells_with_their_true_distance(subslice, rng):
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masking = SpatialMasking(kept_pairs=0.05)
    drawn = draw(len(cells), masking, rng)
    masked = apply(subslice, drawn, masking)
    before = dense(subslice.pairs, np.nan)
    is_cell = subslice.node_type == NodeType.CELL
    chosen = np.isin(
        np.arange(subslice.n_nodes), cells[np.concatenate([drawn.moved, drawn.kept_pairs])]
    )
    wanted = (chosen[:, None] | chosen[None]) & is_cell[:, None] & is_cell[None]
    wanted &= np.isfinite(before) & ~np.eye(subslice.n_nodes, dtype=bool)
    asked = np.zeros_like(wanted)
    asked[masked.pair_rows, masked.pair_columns] = True
    np.testing.assert_array_equal(asked, wanted)
    assert len(masked.pair_rows) == wanted.sum()
    np.testing.assert_array_equal(
        masked.pair_distances, before[masked.pair_rows, masked.pair_columns]
    )


def test_nothing_drawn_changes_nothing(subslice):
    nothing = Draw(EMPTY, EMPTY, EMPTY, EMPTY, np.empty((0, 2)))
    masked = apply(subslice, nothing, SpatialMasking())
    np.testing.assert_array_equal(masked.subslice.features, subslice.features)
    np.testing.assert_array_equal(dense(masked.subslice.pairs), dense(subslice.pairs))
    assert len(masked.target_nodes) == len(masked.pair_rows) == 0
    assert masked.target_features.shape == (0, 5)


@pytest.mark.parametrize("direction", [[1.0, 0.0], [0.0, 1.0]])
def test_cells_in_a_row_move_by_spacings_along_it(subslice, direction):
    n = 11
    coordinates = np.vstack([[0.0, 0.0], np.arange(n)[:, None] * 1.87 * np.array(direction)])
    node_type = np.array([NodeType.SLICE, *[NodeType.CELL] * n], dtype=np.int8)
    row = replace(
        subslice,
        coordinates=coordinates,
        features=np.ones((n + 1, 2), np.float32),
        node_type=node_type,
        cell_index=np.arange(-1, n),
        pairs=pair_distances(coordinates, node_type, n_neighbors=5),
    )
    drawn = Draw(EMPTY, EMPTY, np.array([0]), EMPTY, np.array([direction]))
    masked = apply(row, drawn, SpatialMasking(noise_spacings=1.0))
    # One standard deviation is the length of the row over the number of cells.
    assert dense(masked.subslice.pairs)[1, 2] == pytest.approx(1.87 - 1.7)


def test_visible_cells_and_their_surroundings(subslice, rng):
    masking = SpatialMasking(masked=0.3, moved=0.3)
    cells = np.flatnonzero(subslice.node_type == NodeType.CELL)
    masked = apply(subslice, draw(len(cells), masking, rng), masking, n_surrounding=4)
    nodes = masked.visible_nodes
    np.testing.assert_array_equal(nodes, np.setdiff1d(cells, masked.hidden_nodes))
    assert len(nodes) < len(cells)
    # Hidden cells count with what they had, moved ones where they were.
    distances = np.linalg.norm(
        subslice.coordinates[nodes, None] - subslice.coordinates[None, cells], axis=2
    )
    nearest = cells[np.argsort(distances, axis=1)[:, 1:5]]
    assert np.isin(nearest, masked.hidden_nodes).any()
    np.testing.assert_allclose(
        masked.surroundings, subslice.features[nearest].mean(axis=1), rtol=1e-5, atol=1e-6
    )


def test_nothing_is_asked_of_visible_cells_unless_it_is_wanted(subslice, rng):
    masking = SpatialMasking()
    assert not len(apply(subslice, draw(30, masking, rng), masking).visible_nodes)


def test_errors():
    with pytest.raises(ValueError, match="moved must lie between 0 and 1"):
        SpatialMasking(moved=-0.1)
    with pytest.raises(ValueError, match="masked, kept, moved, kept_pairs must add up to at most"):
        SpatialMasking(masked=0.6, moved=0.6)
    with pytest.raises(ValueError, match=r"moved, kept_pairs must add up to at most 1, found 1\.2"):
        SpatialMasking(moved=0.6, kept_pairs=0.6, disjoint=False)
    with pytest.raises(ValueError, match="noise_spacings must be at least 0 and finite"):
        SpatialMasking(noise_spacings=float("nan"))
    for value in ("zero", float("inf")):
        with pytest.raises(ValueError, match="mask_value must be 'learned' or a finite number"):
            SpatialMasking(mask_value=value)


@pytest.fixture
def masked(rng):
    xy = rng.random((113, 2)) * [90.0, 40.0]
    features = rng.normal(size=(113, 5)).astype(np.float32)
    layout = lay_out_slice(xy, features, BATCH_RULES)
    masking = SpatialMasking(kept=0.1)
    parts = []
    for rows in rows_by_subslice(layout):
        subslice = build_subslice(layout, features, rows, BATCH_RULES)
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
        own = slice(visible, visible := visible + len(part.visible_nodes))
        np.testing.assert_array_equal(batch.visible_places[own] - b * n_nodes, part.visible_nodes)
        np.testing.assert_array_equal(batch.surroundings[own], part.surroundings)
    assert (hidden, targets, pairs, visible) == tuple(
        map(len, (batch.hidden_places, batch.target_places, batch.pair_rows, batch.visible_places))
    )
    flat = batch.subslices.features.flatten(0, 1)
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


def test_all_tensors_go_to_the_device(vocabulary, masked):
    ranked = RankedTokens(np.arange(2, 52, dtype=np.int32), np.array([0, 31, 31, 50]))
    special = {"cls_token": vocabulary.cls, "pad_token": vocabulary.pad}
    cells = TokenBatch.from_ranked(ranked, np.arange(3), length=40, **special)
    rngs = [np.random.default_rng(k) for k in range(3)]
    genes = MaskedGenes.build(cells, rngs, masking=TokenMasking(), vocabulary=vocabulary)
    joint = replace(
        MaskedSubSliceBatch.from_masked(masked),
        sampled=(cells,),
        sampled_places=torch.tensor([40, 41, 45]),
    )
    views = CellBatch(genes=genes, views=(cells, cells))
    moved = views.to("cpu")
    assert moved.views[0] is moved.views[1]
    for batch in (joint, views):
        found = list(tensors(batch.to("meta")))
        assert [name for name, tensor in found if tensor.device.type != "meta"] == []
        assert [name for name, _ in found] == [name for name, _ in tensors(batch)]
        assert len(found) > 8
    assert isinstance(joint.to("cpu").subslices, SubSliceBatch)
