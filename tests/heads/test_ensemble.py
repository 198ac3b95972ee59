"""Fitting the networks of a head that vote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stofm.heads import ensemble, network
from stofm.heads.ensemble import fit_voters
from stofm.heads.fitting import FirstFit
from stofm.heads.inputs import Inputs
from stofm.heads.network import HeadTraining, apply_head, fit_head
from stofm.heads.targets import Targets
from stofm.spatial import Split

N = 160


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Fit networks in a moment."""
    short = HeadTraining(learning_rate=5e-3, max_epochs=6, patience=2)
    monkeypatch.setattr(
        network, "HeadTraining", lambda **own: HeadTraining(**own) if own else short
    )


@pytest.fixture
def classes(rng):
    """Classes of all cells but the last ten."""
    values = rng.integers(0, 3, N)
    values[-10:] = -1
    return Targets("classes", values, 3)


@pytest.fixture
def splits(rng):
    """Two draws of a fifth of the known cells, and some that are left out."""
    drawn = [rng.permutation(N - 10) for _ in range(2)]
    parts = [[np.sort(part) for part in (one[40:], one[:30], one[30:40])] for one in drawn]
    return [Split("random", *part, slices=(), params={}) for part in parts]


def features_of(targets, rng, strength, width):
    values = targets.values if targets.kind == "classes" else targets.values.argmax(axis=1)
    made = rng.normal(size=(N, width)) + strength * np.eye(4, width)[values]
    return made.astype(np.float32)


def make_inputs(targets, rng, embedding, expression):
    """An embedding and components that tell so much."""
    features = features_of(targets, rng, embedding, 5)
    own = None if expression is None else features_of(targets, rng, expression, 4)
    return Inputs(features, ("X_a",), (5,), {"X_a": {}}, own)


def seeds(seed, n_heads):
    return [seed + 1000 * k for k in range(n_heads)]


def first_of(inputs, targets, split, seed=0):
    one = fit_head(
        inputs.features, targets, fitted=split.fitted, held_out=split.held_out, seed=seed
    )
    return FirstFit(one, inputs)


def fit(inputs, targets, splits, *, n_heads=2, refit=False, seed=0):
    first = first_of(inputs, targets, splits[0], seed)
    return first, fit_voters(first, targets, splits, seeds(seed, n_heads), refit=refit)


def say(voters, inputs, kind="classes"):
    """The networks' votes on all cells."""
    read = {"embedding": inputs.features, "expression": inputs.expression}
    return [
        apply_head(network, read[source], kind)
        for network, source in zip(voters.networks, voters.reads, strict=True)
    ]


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        bool((states[0][name] == states[1][name]).all()) for name in states[0]
    )


def test_embeddings_alone(classes, splits, rng):
    inputs = make_inputs(classes, rng, 2.0, None)
    first, voters = fit(inputs, classes, splits)
    assert voters.reads == ("embedding",) * 2
    assert voters.weights == pytest.approx((0.5, 0.5))
    assert voters.networks[0] is first.fitted.head
    assert sorted(voters.history["network"].unique()) == [0, 1]
    assert len(voters.votes) == len(voters.rows) == 60
    # The second network is of the second split and of its seed.
    second = fit_head(
        inputs.features,
        classes,
        fitted=splits[1].fitted,
        held_out=splits[1].held_out,
        seed=seeds(0, 2)[1],
    )
    assert same(voters.networks[1], second.head)


def test_held_out_cells_are_judged_by_networks_that_have_not_seen_them(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.5, None)
    _, voters = fit(inputs, classes, splits)
    for own, split in zip(voters.held_out, splits, strict=True):
        np.testing.assert_array_equal(np.sort(own), split.held_out)
    np.testing.assert_array_equal(voters.rows, np.concatenate(voters.held_out))
    expected = [
        votes[rows] for votes, rows in zip(say(voters, inputs), voters.held_out, strict=True)
    ]
    np.testing.assert_allclose(voters.votes, np.concatenate(expected), atol=1e-6)


def test_three_kinds(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    _, voters = fit(inputs, classes, splits)
    assert voters.reads == ("embedding",) * 2 + ("expression",) * 4
    assert [len(one.config.widths) for one in voters.networks] == [2, 2, 2, 2, 0, 0]
    weights = np.array(voters.weights)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(weights[::2], weights[1::2], rtol=1e-12)
    assert set(zip(voters.history["network"], voters.history["reads"], strict=True)) == {
        (0, "embedding"),
        (1, "embedding"),
        (2, "expression"),
        (3, "expression"),
    }
    # What is said of held-out cells is the mean of the kinds', each by the split's own network.
    votes = say(voters, inputs)
    expected = [
        sum(2 * weights[k] * votes[k][rows] for k in range(split, 6, 2))
        for split, rows in enumerate(voters.held_out)
    ]
    np.testing.assert_allclose(voters.votes, np.concatenate(expected), atol=1e-6)
    np.testing.assert_allclose(voters.votes.sum(axis=1), 1.0, rtol=1e-5)


def test_a_split_for_all(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    _, voters = fit(inputs, classes, splits[:1], n_heads=3)
    # Linear networks of the same cells would be the same one.
    assert voters.reads == ("embedding",) * 3 + ("expression",) * 4
    assert [len(one.config.widths) for one in voters.networks] == [2] * 6 + [0]
    np.testing.assert_array_equal(np.sort(voters.rows), splits[0].held_out)
    votes = np.stack([own[voters.rows] for own in say(voters, inputs)])
    expected = np.average(votes, axis=0, weights=voters.weights)
    np.testing.assert_allclose(voters.votes, expected, atol=1e-6)


def test_who_knows_more_weighs_more(classes, splits, rng):
    shares = []
    for embedding, expression in ((3.0, 0.0), (0.0, 3.0)):
        inputs = make_inputs(classes, rng, embedding, expression)
        _, voters = fit(inputs, classes, splits)
        of = np.array(voters.reads) == "embedding"
        shares.append(np.array(voters.weights)[of].sum())
    assert shares[0] > 0.75
    assert shares[1] < 0.3


def test_a_kind_that_hardly_weighs_has_no_vote(classes, splits, rng, monkeypatch):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    monkeypatch.setattr(ensemble, "blend_weights", lambda *_: np.array([0.01, 0.985, 0.005]))
    _, voters = fit(inputs, classes, splits)
    # That of the embedding stays, for cells without expression.
    assert voters.reads == ("embedding",) * 2 + ("expression",) * 2
    assert voters.weights == pytest.approx(np.array([0.01, 0.01, 0.985, 0.985]) / 2 / 0.995)
    assert all(one.config.widths for one in voters.networks)


def test_refit(classes, splits, rng, monkeypatch):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    _, before = fit(inputs, classes, splits)
    known, asked = np.arange(N - 10), []

    def spy(features, targets, **options):
        asked.append(options)
        return fit_head(features, targets, **options)

    first = first_of(inputs, classes, splits[0])
    monkeypatch.setattr(ensemble, "fit_head", spy)
    after = fit_voters(first, classes, splits, seeds(0, 2), refit=True)
    # Weights, and what they are found by, are those of before.
    np.testing.assert_array_equal(after.votes, before.votes)
    again = [one for one in asked if "n_epochs" in one]
    assert len(again) == 4
    assert [one["seed"] for one in again] == seeds(0, 2) * 2
    assert again[0]["n_epochs"] == first.fitted.best_epoch
    for one in again:
        np.testing.assert_array_equal(one["fitted"], known)
        assert len(one["held_out"]) == 0
    # One linear head stands for all splits, with all their weight.
    assert after.reads == ("embedding",) * 2 + ("expression",) * 3
    assert after.weights[-1] == pytest.approx(sum(before.weights[-2:]))
    assert sum(after.weights) == pytest.approx(1.0)
    assert not any(
        same(one, other) for one, other in zip(before.networks, after.networks, strict=False)
    )


def test_a_tuned_network_is_not_fitted_again(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    first = first_of(inputs, classes, splits[0])
    frozen = fit_voters(first, classes, splits[:1], seeds(0, 2), refit=True)
    tuned = replace(first, model=object())
    voters = fit_voters(tuned, classes, splits[:1], seeds(0, 2), refit=True)
    assert voters.networks[0] is first.fitted.head
    assert not same(frozen.networks[0], first.fitted.head)
    assert voters.reads == frozen.reads
    assert all(map(same, voters.networks[1:], frozen.networks[1:]))


def test_strength_is_that_of_the_best_held_out_likelihood(classes, splits, rng, monkeypatch):
    inputs = make_inputs(classes, rng, 1.0, 1.5)
    made = []

    def spy(*args, **options):
        made.append((options["strength"], _fit_linear(*args, **options)))
        return made[-1][1]

    _fit_linear = ensemble.fit_linear_head
    monkeypatch.setattr(ensemble, "fit_linear_head", spy)
    _, voters = fit(inputs, classes, splits)
    losses = {}
    for k, (strength, head) in enumerate(made):
        rows = voters.held_out[k // 4]
        found = apply_head(head, inputs.expression[rows], "classes")
        own = found[np.arange(30), classes.values[rows]]
        losses[strength] = losses.get(strength, 0.0) - np.log(own).sum()
    best = min(losses, key=losses.get)
    kept = [head for strength, head in made if strength == best]
    assert [one for one in voters.networks if not one.config.widths] == kept


def test_proportions(splits, rng):
    values = rng.dirichlet(np.full(3, 0.3), N).astype(np.float32)
    values[-10:] = np.nan
    targets = Targets("proportions", values, 3)
    shares = np.nan_to_num(values, nan=1 / 3) @ rng.normal(size=(3, 4)) * 4
    expression = (shares + 0.3 * rng.normal(size=(N, 4))).astype(np.float32)
    features = rng.normal(size=(N, 5)).astype(np.float32)
    inputs = Inputs(features, ("X_a",), (5,), {"X_a": {}}, expression)
    _, voters = fit(inputs, targets, splits, refit=True)
    known = values[voters.rows]
    assert np.corrcoef(voters.votes.ravel(), known.ravel())[0, 1] > 0.8
    assert np.array(voters.weights)[np.array(voters.reads) == "expression"].sum() > 0.7


@pytest.mark.parametrize("refit", [False, True])
def test_order_of_rows(classes, splits, rng, refit):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    order = rng.permutation(N)
    place = np.argsort(order)
    moved = Targets("classes", classes.values[order], 3)
    parts = [
        replace(one, fitted=np.sort(place[one.fitted]), held_out=np.sort(place[one.held_out]))
        for one in splits
    ]
    _, first = fit(inputs, classes, splits, refit=refit)
    _, again = fit(inputs.take(order), moved, parts, refit=refit)
    np.testing.assert_array_equal(order[again.rows], first.rows)
    np.testing.assert_array_equal(again.votes, first.votes)
    assert again.weights == first.weights
    assert all(same(*pair) for pair in zip(first.networks, again.networks, strict=True))
