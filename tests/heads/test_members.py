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


def fit(inputs, targets, splits, *, n_heads=2, seed=0):
    first = first_of(inputs, targets, splits[0], seed)
    return first, fit_voters(first, targets, splits, seeds(seed, n_heads))


def spied(monkeypatch):
    """What networks with hidden layers are fitted with, in turn, and they themselves."""
    made = []

    def spy(features, targets, **options):
        made.append((options, fit_head(features, targets, **options)))
        return made[-1][1]

    monkeypatch.setattr(ensemble, "fit_head", spy)
    return made


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        bool((states[0][name] == states[1][name]).all()) for name in states[0]
    )


def test_embeddings_alone(classes, splits, rng, monkeypatch):
    inputs, made = make_inputs(classes, rng, 2.0, None), spied(monkeypatch)
    first, voters = fit(inputs, classes, splits)
    assert voters.reads == ("embedding",) * 2
    assert voters.weights == pytest.approx((0.5, 0.5))
    assert sorted(voters.history["network"].unique()) == [0, 1]
    # Held-out cells are judged by the network that has not seen them.
    fits = [first.fitted, made[0][1]]
    expected = [
        apply_head(one.head, inputs.features[rows], "classes")
        for one, rows in zip(fits, voters.held_out, strict=True)
    ]
    np.testing.assert_allclose(voters.votes, np.concatenate(expected), atol=1e-6)
    for own, split in zip(voters.held_out, splits, strict=True):
        np.testing.assert_array_equal(np.sort(own), split.held_out)
    # The second network is of the second split and of its seed.
    np.testing.assert_array_equal(made[0][0]["fitted"], splits[1].fitted)
    assert made[0][0]["seed"] == seeds(0, 2)[1]


def test_three_kinds(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    _, voters = fit(inputs, classes, splits)
    # One linear network stands for all splits.
    assert voters.reads == ("embedding",) * 2 + ("expression",) * 3
    assert [len(one.config.widths) for one in voters.networks] == [2, 2, 2, 2, 0]
    weights = np.array(voters.weights)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(weights[[0, 2]], weights[[1, 3]], rtol=1e-12)
    assert set(zip(voters.history["network"], voters.history["reads"], strict=True)) == {
        (0, "embedding"),
        (1, "embedding"),
        (2, "expression"),
        (3, "expression"),
    }
    np.testing.assert_allclose(voters.votes.sum(axis=1), 1.0, rtol=1e-5)


def test_a_split_for_all(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    _, voters = fit(inputs, classes, splits[:1], n_heads=3)
    assert voters.reads == ("embedding",) * 3 + ("expression",) * 4
    assert [len(one.config.widths) for one in voters.networks] == [2] * 6 + [0]
    np.testing.assert_array_equal(np.sort(voters.rows), splits[0].held_out)


def test_who_knows_more_weighs_more(classes, splits, rng):
    shares = []
    for embedding, expression in ((3.0, 0.0), (0.0, 3.0)):
        inputs = make_inputs(classes, rng, embedding, expression)
        _, voters = fit(inputs, classes, splits)
        of = np.array(voters.reads) == "embedding"
        shares.append(np.array(voters.weights)[of].sum())
    assert shares[0] > 0.75
    assert shares[1] < 0.3


def test_networks_are_fitted_again_to_all_cells(classes, splits, rng, monkeypatch):
    inputs, made = make_inputs(classes, rng, 1.0, 1.0), spied(monkeypatch)
    first, voters = fit(inputs, classes, splits)
    again = [(options, one) for options, one in made if "n_epochs" in options]
    assert [options["seed"] for options, _ in again] == seeds(0, 2) * 2
    assert again[0][0]["n_epochs"] == first.fitted.best_epoch
    for options, _ in again:
        np.testing.assert_array_equal(options["fitted"], np.arange(N - 10))
        assert len(options["held_out"]) == 0
    assert list(voters.networks[:4]) == [one.head for _, one in again]


def test_a_tuned_network_is_not_fitted_again(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    first = first_of(inputs, classes, splits[0])
    frozen = fit_voters(first, classes, splits[:1], seeds(0, 2))
    tuned = replace(first, model=object())
    voters = fit_voters(tuned, classes, splits[:1], seeds(0, 2))
    assert voters.networks[0] is first.fitted.head
    assert not same(frozen.networks[0], first.fitted.head)
    assert voters.reads == frozen.reads
    assert all(map(same, voters.networks[1:], frozen.networks[1:]))


def test_proportions(splits, rng):
    values = rng.dirichlet(np.full(3, 0.3), N).astype(np.float32)
    values[-10:] = np.nan
    targets = Targets("proportions", values, 3)
    shares = np.nan_to_num(values, nan=1 / 3) @ rng.normal(size=(3, 4)) * 4
    expression = (shares + 0.3 * rng.normal(size=(N, 4))).astype(np.float32)
    features = rng.normal(size=(N, 5)).astype(np.float32)
    inputs = Inputs(features, ("X_a",), (5,), {"X_a": {}}, expression)
    _, voters = fit(inputs, targets, splits)
    known = values[voters.rows]
    assert np.corrcoef(voters.votes.ravel(), known.ravel())[0, 1] > 0.8
    assert np.array(voters.weights)[np.array(voters.reads) == "expression"].sum() > 0.7


def test_order_of_rows(classes, splits, rng):
    inputs = make_inputs(classes, rng, 1.0, 1.0)
    order = rng.permutation(N)
    place = np.argsort(order)
    moved = Targets("classes", classes.values[order], 3)
    parts = [
        replace(one, fitted=np.sort(place[one.fitted]), held_out=np.sort(place[one.held_out]))
        for one in splits
    ]
    _, first = fit(inputs, classes, splits)
    _, again = fit(inputs.take(order), moved, parts)
    np.testing.assert_array_equal(order[again.rows], first.rows)
    np.testing.assert_array_equal(again.votes, first.votes)
    assert again.weights == first.weights
    assert all(same(*pair) for pair in zip(first.networks, again.networks, strict=True))
