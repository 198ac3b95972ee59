from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, CellEncoderConfig, TokenBatch
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
from stofm.train.masking import Draw, apply, draw, drop_genes, mask_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
RULES = SubSliceConfig(n_cells=80, n_neighbors=9)
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
    nodes = masked.visible.nodes
    np.testing.assert_array_equal(nodes, np.setdiff1d(cells, masked.hidden_nodes))
    assert len(nodes) < len(cells)
    np.testing.assert_array_equal(masked.visible.features, subslice.features[nodes])
    # Hidden cells count with what they had, moved ones where they were.
    distances = np.linalg.norm(
        subslice.coordinates[nodes, None] - subslice.coordinates[None, cells], axis=2
    )
    nearest = cells[np.argsort(distances, axis=1)[:, 1:5]]
    assert np.isin(nearest, masked.hidden_nodes).any()
    np.testing.assert_allclose(
        masked.visible.surroundings, subslice.features[nearest].mean(axis=1), rtol=1e-5, atol=1e-6
    )


def test_nothing_is_asked_of_visible_cells_unless_it_is_wanted(subslice, rng):
    masking = SpatialMasking()
    assert apply(subslice, draw(30, masking, rng), masking).visible is None


def test_errors():
    with pytest.raises(ValueError, match="moved is a share and must lie between 0 and 1"):
        SpatialMasking(moved=-0.1)
    with pytest.raises(ValueError, match="masked, kept, moved, kept_pairs must add up to at most"):
        SpatialMasking(masked=0.6, moved=0.6)
    with pytest.raises(ValueError, match=r"moved, kept_pairs must add up to at most 1, found 1\.2"):
        SpatialMasking(moved=0.6, kept_pairs=0.6, disjoint=False)
    with pytest.raises(ValueError, match="noise_spacings must be finite and not negative"):
        SpatialMasking(noise_spacings=float("nan"))
    for value in ("zero", float("inf")):
        with pytest.raises(ValueError, match="mask_value must be 'learned' or a finite number"):
            SpatialMasking(mask_value=value)


PAD, MASK, CLS = 0, 1, 69
GENES = np.arange(2, 69)


def batch_of(lists, *, length=48, values=False):
    tokens = np.concatenate([np.empty(0, int), *lists]).astype(np.int32)
    ranked = RankedTokens(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum([len(genes) for genes in lists])]),
        values=1 + tokens.astype(np.float32) if values else None,
    )
    return TokenBatch.from_ranked(
        ranked, np.arange(len(lists)), cls_token=CLS, pad_token=PAD, length=length
    )


def rngs(n, seed=0):
    return [np.random.default_rng([seed, k]) for k in range(n)]


@pytest.fixture
def lists(rng):
    """Genes of five cells: 40, 0, 1, 33 and 7."""
    return [rng.permutation(GENES)[:n] for n in (40, 0, 1, 33, 7)]


def mask(batch, masking=None, seed=0):
    return mask_tokens(
        batch,
        masking or TokenMasking(),
        mask_token=MASK,
        gene_tokens=GENES,
        rngs=rngs(len(batch.tokens), seed),
    )


def test_share_of_each_cells_genes_is_masked(lists):
    batch = batch_of(lists)
    masked, is_target = mask(batch)
    assert is_target.sum(dim=1).tolist() == [6, 0, 1, 5, 1]
    assert (masked.tokens[is_target] == MASK).all()
    assert torch.equal(masked.tokens[~is_target], batch.tokens[~is_target])
    assert torch.equal(masked.is_hidden, is_target)
    assert not is_target[:, 0].any()  # <cls>
    assert not (is_target & ~batch.is_real).any()
    assert not (batch.tokens == MASK).any()  # the input is not changed


def test_nothing_and_everything(lists):
    batch = batch_of(lists)
    nothing, is_target = mask(batch, TokenMasking(share=0))
    assert torch.equal(nothing.tokens, batch.tokens)
    assert not is_target.any()
    _, is_target = mask(batch, TokenMasking(share=1))
    assert is_target.sum(dim=1).tolist() == [len(genes) for genes in lists]


def test_bert_shows_some_and_swaps_some(rng):
    batch = batch_of([rng.permutation(GENES)[:47] for _ in range(300)])
    masked, is_target = mask(batch, replace(TokenMasking.bert(), share=0.5))
    n_targets = int(is_target.sum())
    is_mask = masked.tokens == MASK
    is_changed = masked.tokens != batch.tokens
    assert is_mask.sum() / n_targets == pytest.approx(0.8, abs=0.02)
    # One gene in 67 is replaced by itself.
    assert (is_changed & ~is_mask).sum() / n_targets == pytest.approx(0.1, abs=0.02)
    assert (is_changed <= is_target).all()
    assert np.isin(masked.tokens[is_changed & ~is_mask], GENES).all()
    # What stays visible may enter sums over the genes, what does not stays out.
    assert (is_changed <= masked.is_hidden).all()
    assert masked.is_hidden.sum() / n_targets == pytest.approx(0.9, abs=0.02)


def test_every_gene_is_masked_as_often_as_the_others():
    batch = batch_of([GENES[:20]] * 2000, length=24)
    _, is_target = mask(batch)
    assert is_target[:, 1:21].float().mean(dim=0).numpy() == pytest.approx(0.15, abs=0.035)


def test_masks_do_not_depend_on_the_batch(lists):
    together, is_target = mask(batch_of(lists), TokenMasking.bert())
    for cell in (0, 3, 4):
        length = len(lists[cell]) + 1
        alone, is_target_alone = mask_tokens(
            batch_of([lists[cell]], length=length),
            TokenMasking.bert(),
            mask_token=MASK,
            gene_tokens=GENES,
            rngs=[rngs(5)[cell]],
        )
        assert torch.equal(alone.tokens[0], together.tokens[cell, :length])
        assert torch.equal(is_target_alone[0], is_target[cell, :length])


def test_seeds_matter(lists):
    first, second = (mask(batch_of(lists), seed=seed)[1] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_gene_that_stands_twice_is_hidden_twice():
    genes = np.array([5, 9, 5, 11, 9, 13, 15, 17, 19, 21])
    batch = batch_of([genes] * 60, length=11)
    masked, is_target = mask(batch, replace(TokenMasking.bert(), share=0.3))
    for one in (5, 9):
        is_one = batch.tokens == one
        assert torch.equal(is_target[is_one].view(60, 2)[:, 0], is_target[is_one].view(60, 2)[:, 1])
        seen = (masked.tokens == one) & is_one
        assert (seen[is_one].view(60, 2).sum(dim=1) != 1).all()


def test_values_stay_and_the_pooled_sum_loses_what_is_masked(lists):
    batch = batch_of(lists, values=True)
    masked, is_target = mask(batch)
    assert torch.equal(masked.values, batch.values)
    assert torch.equal(masked.bag.values, batch.bag.values)
    assert torch.equal(masked.is_hidden, is_target)


def test_model_with_all_its_inputs_does_not_see_which_gene_is_masked(lists):
    torch.manual_seed(0)
    encoder = CellEncoder(
        CellEncoderConfig(
            n_tokens=70,
            d_cell=14,
            n_layers=1,
            d_hidden=8,
            n_heads=2,
            d_inner=9,
            max_positions=50,
            values="log",
            pooled=True,
        )
    ).eval()
    masked, is_target = mask(batch_of(lists, values=True))
    others = masked.bag.tokens.clone()
    bag = 0
    for row, genes in enumerate(lists):  # other genes in the bag where the list has <mask>
        own = is_target[row, 1 : 1 + len(genes)]
        others[bag : bag + len(genes)][own] = 68
        bag += len(genes)
    assert not torch.equal(others, masked.bag.tokens)
    swapped = replace(masked, bag=replace(masked.bag, tokens=others))
    with torch.no_grad():
        assert torch.equal(encoder(masked), encoder(swapped))
        assert not torch.equal(encoder(replace(masked, is_hidden=None)), encoder(masked))


def test_dropped_genes_leave_the_list_and_the_rest_moves_up(lists):
    batch = batch_of(lists)
    fewer = drop_genes(batch, 0.3, pad_token=PAD, rngs=rngs(5))
    for cell, genes in enumerate(lists):
        n_left = len(genes) - int(0.3 * len(genes))
        left = fewer.tokens[cell, 1 : 1 + n_left].numpy()
        assert fewer.tokens[cell, 0] == CLS
        assert np.array_equal(left, genes[np.isin(genes, left)])  # in the order of rank
        assert not fewer.tokens[cell, 1 + n_left :].any()
        assert fewer.is_real[cell].sum() == 1 + n_left
    assert batch.is_real.sum() == 5 + sum(map(len, lists))  # the input is not changed


def test_dropped_genes_leave_the_bag_too(lists):
    batch = batch_of(lists, values=True, length=20)  # lists are cut, the bag is not
    fewer = drop_genes(batch, 0.5, pad_token=PAD, rngs=rngs(5))
    ends = [*fewer.bag.offsets[1:].tolist(), len(fewer.bag.tokens)]
    for cell, (start, end) in enumerate(zip(fewer.bag.offsets.tolist(), ends, strict=True)):
        assert end - start == len(lists[cell]) - len(lists[cell]) // 2
        bag, listed = fewer.bag.tokens[start:end], fewer.tokens[cell][fewer.is_real[cell]][1:]
        assert np.isin(bag, lists[cell]).all()
        assert torch.equal(bag[: len(listed)], listed)
        assert torch.equal(fewer.values[cell, 1 : 1 + len(listed)], 1.0 + listed)
        assert not fewer.values[cell, 1 + len(listed) :].any()
    assert torch.equal(fewer.bag.values, 1.0 + fewer.bag.tokens)


def test_hidden_genes_stay_hidden_when_others_are_dropped(lists):
    masked, _ = mask(batch_of(lists, values=True))
    fewer = drop_genes(masked, 0.3, pad_token=PAD, rngs=rngs(5))
    assert torch.equal(fewer.is_hidden, fewer.tokens == MASK)


def test_dropping_nothing_changes_nothing(lists):
    batch = batch_of(lists, values=True)
    same = drop_genes(batch, 0.0, pad_token=PAD, rngs=rngs(5))
    for own, other in ((same, batch), (same.bag, batch.bag)):
        assert torch.equal(own.tokens, other.tokens)
        assert torch.equal(own.values, other.values)


def test_drops_do_not_depend_on_the_batch(lists):
    together = drop_genes(batch_of(lists), 0.4, pad_token=PAD, rngs=rngs(5))
    alone = drop_genes(batch_of([lists[3]]), 0.4, pad_token=PAD, rngs=[rngs(5)[3]])
    assert torch.equal(alone.tokens[0], together.tokens[3])


def test_errors_of_gene_masking(lists):
    with pytest.raises(ValueError, match="share is a share and must lie between 0 and 1, found 2"):
        TokenMasking(share=2)
    with pytest.raises(ValueError, match=r"mask_share, random_share must add up to at most 1"):
        TokenMasking(mask_share=0.8, random_share=0.3)
    with pytest.raises(ValueError, match="2 generators for 5 cells; expected one per cell"):
        mask_tokens(
            batch_of(lists), TokenMasking(), mask_token=MASK, gene_tokens=GENES, rngs=rngs(2)
        )
    with pytest.raises(ValueError, match="gene_tokens is empty; pass the vocabulary's tokens"):
        mask_tokens(
            batch_of(lists), TokenMasking.bert(), mask_token=MASK, gene_tokens=[], rngs=rngs(5)
        )
    with pytest.raises(ValueError, match="must be at least 0 and below 1, found 1"):
        drop_genes(batch_of(lists), 1, pad_token=PAD, rngs=rngs(5))
