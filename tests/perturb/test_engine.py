from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stofm.corpus.reader import take_cells
from stofm.nn import Stofm, embed_slice
from stofm.perturb import Detached, Edit, UneditedSlice, engine
from stofm.perturb.tissue import delete
from stofm.spatial import build_subslice

CPU = torch.device("cpu")
N = 131


def in_spacings(model, **sizes):
    """The model with another unit of distances."""
    transformer = replace(model.config.se2_transformer, **sizes)
    rules = replace(model.config.subslice, unit="spacing")
    config = replace(model.config, se2_transformer=transformer, subslice=rules)
    other = Stofm(config, model.vocabulary).eval()
    other.load_state_dict(model.state_dict())
    return other


def passing_on(model):
    """A model that passes features and their mean over neighbours on."""
    return in_spacings(model, n_passed=5)


def deleting(whole, cells, gene=7):
    return Edit(
        cells=cells, tokens=lambda rows: delete(take_cells(whole.ranked, rows), np.array([gene]))
    )


def all_after(whole, edit):
    """Embeddings of the slice after one edit, (n, d); NaN where a cell is gone."""
    after = whole.embeddings.copy()
    after[edit.removed] = np.nan
    for one in whole.embed([edit]):
        np.testing.assert_array_equal(one.before, whole.embeddings[one.rows])
        after[one.rows] = one.after
    return after


@pytest.mark.parametrize("make", [lambda model: model, passing_on], ids=["plain", "passing on"])
def test_unedited_embeddings_are_those_of_embed_slice(model, ranked, coordinates, make):
    whole = UneditedSlice.of(make(model), ranked, coordinates, device=CPU)
    expected = embed_slice(
        whole.model.se2_transformer, whole.layout, whole.features, whole.rules, device=CPU
    )
    np.testing.assert_array_equal(whole.embeddings, expected)


def test_edits_that_change_nothing_give_nothing(whole):
    cells = np.arange(N)
    same = [
        Edit(),
        Edit(cells=cells, tokens=lambda rows: take_cells(whole.ranked, rows)),
        Edit(coordinates=whole.coordinates.copy()),
        Edit(detached=Detached(senders=np.zeros(N, dtype=bool))),
        Edit(detached=Detached(senders=np.ones(N, bool), receivers=np.zeros(N, bool))),
        Edit(detached=Detached(senders=np.ones(N, bool), reach=1e-3)),
    ]
    assert list(whole.embed(same)) == []


@pytest.mark.parametrize("make", [lambda model: model, passing_on], ids=["plain", "passing on"])
def test_deleted_genes_change_their_sub_slices_as_computed_anew(model, ranked, coordinates, make):
    whole = UneditedSlice.of(make(model), ranked, coordinates, device=CPU)
    cells = whole.parts[1][[3, 11, 12]]
    has_gene = [7 in take_cells(ranked, np.array([c])).tokens for c in cells]
    assert any(has_gene)
    assert len(whole.parts) == 3
    features = whole.features.copy()
    features[cells] = whole.encode(delete(take_cells(ranked, cells), np.array([7])))
    expected = embed_slice(
        whole.model.se2_transformer, whole.layout, features, whole.rules, device=CPU
    )
    after = all_after(whole, deleting(whole, cells))
    np.testing.assert_allclose(after, expected, atol=1e-6)
    elsewhere = whole.layout.subslice != 1
    np.testing.assert_array_equal(after[elsewhere], whole.embeddings[elsewhere])
    assert np.abs(after - whole.embeddings).max() > 1e-3


def test_removed_cells_are_no_nodes_and_the_unit_stays(model, ranked, coordinates):
    whole = UneditedSlice.of(in_spacings(model), ranked, coordinates, device=CPU)
    rows = whole.parts[0]
    removed, kept = rows[::3], np.setdiff1d(rows, rows[::3])
    after = all_after(whole, Edit(removed=removed))
    whole_nodes = build_subslice(whole.layout, whole.features, rows, whole.rules)
    nodes = build_subslice(whole.layout, whole.features, kept, whole.rules)
    scale = np.ptp(whole_nodes.coordinates[1:4]) / np.ptp(nodes.coordinates[1:4])
    assert scale != 1.0
    (found,) = whole.embed([Edit(removed=removed)])
    np.testing.assert_array_equal(found.rows, kept)
    assert np.isnan(after[removed]).all()
    assert np.abs(after[kept] - whole.embeddings[kept]).max() > 1e-4


def test_moved_cells_join_the_sub_slice_where_they_are(whole):
    here, there = whole.parts[0], whole.parts[-1]
    coordinates = whole.coordinates.copy()
    coordinates[here[0]] = whole.coordinates[there[0]] + 0.1
    found = list(whole.embed([Edit(coordinates=coordinates)]))
    assert [here[0] in one.rows for one in found] == [False, True]
    np.testing.assert_array_equal(found[1].rows, np.sort([here[0], *there]))
    np.testing.assert_array_equal(found[1].before, whole.embeddings[found[1].rows])


def test_two_cells_that_swap_places_are_as_if_their_genes_were_swapped(whole):
    pair = whole.parts[0][[2, 9]]
    coordinates = whole.coordinates.copy()
    coordinates[pair] = whole.coordinates[pair[::-1]]
    partner = np.arange(N)
    partner[pair] = pair[::-1]
    by_place = all_after(whole, Edit(coordinates=coordinates))
    tokens = Edit(cells=pair, tokens=lambda rows: take_cells(whole.ranked, partner[rows]))
    np.testing.assert_allclose(by_place[partner], all_after(whole, tokens), atol=1e-5)


@pytest.mark.parametrize("make", [lambda model: model, passing_on], ids=["plain", "passing on"])
def test_detached_senders_are_as_good_as_not_there(model, ranked, coordinates, make):
    whole = UneditedSlice.of(make(model), ranked, coordinates, device=CPU)
    rows = whole.parts[0]
    senders = np.zeros(N, dtype=bool)
    senders[rows[:7]] = True
    detached = Edit(detached=Detached(senders=senders))
    # Whatever the senders express then makes no difference to the others.
    both = Edit(
        detached=detached.detached, cells=rows[:7], tokens=lambda r: take_cells(whole.ranked, r * 0)
    )
    first, second = all_after(whole, detached), all_after(whole, both)
    np.testing.assert_allclose(first[rows[7:]], second[rows[7:]], atol=1e-6)
    assert np.abs(first[rows[7:]] - whole.embeddings[rows[7:]]).max() > 1e-4
    assert np.abs(first[rows[:7]] - second[rows[:7]]).max() > 1e-3


def test_detaching_has_receivers_and_a_reach(whole):
    rows = whole.parts[0]
    senders, receivers = np.zeros((2, N), dtype=bool)
    senders[rows[0]] = True
    gaps = np.linalg.norm(whole.coordinates[rows] - whole.coordinates[rows[0]], axis=1)
    near = rows[np.argsort(gaps)[1]]
    receivers[near] = True
    edits = [
        Edit(detached=Detached(senders=senders, receivers=receivers)),
        Edit(
            detached=Detached(senders=senders, receivers=receivers, reach=np.sort(gaps)[1] * 1.01)
        ),
        Edit(detached=Detached(senders=senders, reach=np.sort(gaps)[1] * 1.01)),
        Edit(
            detached=Detached(senders=senders, receivers=receivers, reach=np.sort(gaps)[1] * 0.99)
        ),
    ]
    found = {one.edit: one.after for one in whole.embed(edits)}
    assert sorted(found) == [0, 1, 2]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_turned_and_shifted_slices_give_the_same_shifts(whole):
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    layout = whole.layout
    turned = replace(
        whole,
        coordinates=whole.coordinates @ turn.T + [40.0, -900.0],
        layout=replace(
            layout,
            coordinates=layout.coordinates @ turn.T + [3.0, 5.0],
            virtual=replace(
                layout.virtual, coordinates=layout.virtual.coordinates @ turn.T + [3.0, 5.0]
            ),
        ),
    )
    edits = [deleting(whole, whole.parts[0]), Edit(removed=whole.parts[1][:9])]
    pairs = list(zip(whole.embed(edits), turned.embed(edits), strict=True))
    assert len(pairs) == 2
    for one, other in pairs:
        np.testing.assert_array_equal(one.rows, other.rows)
        shifts = [x.after - x.before for x in (one, other)]
        np.testing.assert_allclose(*shifts, atol=1e-5)


def test_batches_and_other_edits_make_no_difference(whole, monkeypatch):
    cells = np.arange(N)
    edits = [deleting(whole, cells, gene) for gene in (7, 8, 9)]
    edits += [Edit(removed=cells[:5]), deleting(whole, cells[:40], 12)]
    with monkeypatch.context() as several:
        several.setitem(engine.SUBSLICES_AT_ONCE, "cpu", 3)
        together = {(x.edit, x.rows[0]): x.after for x in whole.embed(edits)}
    assert len(together) == 3 * 3 + len(set(whole.layout.subslice[:5])) + len(
        set(whole.layout.subslice[:40])
    )
    for e, edit in enumerate(edits):
        for one in whole.embed([edit]):
            np.testing.assert_allclose(together[e, one.rows[0]], one.after, atol=1e-5)


def test_an_edited_slice_lays_itself_out_anew(whole):
    np.testing.assert_array_equal(whole.after(Edit()).embeddings, whole.embeddings)
    removed = whole.parts[0][:11]
    after = whole.after(Edit(removed=removed))
    kept = np.setdiff1d(np.arange(N), removed)
    anew = UneditedSlice.of(
        whole.model, take_cells(whole.ranked, kept), whole.coordinates[kept], device=CPU
    )
    np.testing.assert_allclose(after.embeddings, anew.embeddings, atol=1e-6)
    genes = whole.after(deleting(whole, np.arange(N)))
    assert genes.n_cells == N
    assert not np.array_equal(genes.layout.virtual.features, whole.layout.virtual.features)


def test_a_model_in_training_is_run_without_dropout_and_left_so(model, ranked, coordinates):
    whole = UneditedSlice.of(model, ranked, coordinates, device=CPU)
    expected = whole.embeddings
    model.train()
    np.testing.assert_array_equal(
        UneditedSlice.of(model, ranked, coordinates, device=CPU).embeddings, expected
    )
    assert model.training
    assert model.se2_transformer.training
