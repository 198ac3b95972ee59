"""The members of a head, and what each weighs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from stofm.heads import fitting
from stofm.heads.blocks import Blocks
from stofm.heads.fitting import (
    blend_weights,
    fit_members,
    stack_weights,
)
from stofm.heads.network import Rotation, apply_head, error_products, fit_head, fit_linear
from stofm.heads.targets import Targets
from stofm.nn import HeadConfig, PredictionHead
from stofm.spatial import Split

N = 160
SEEDS = (0, 1000)
PRIOR = 1.0


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


def features_of(values, rng, strength, width):
    made = rng.normal(size=(N, width)) + strength * np.eye(4, width)[values]
    return made.astype(np.float32)


def blocks_of(values, rng, embedding, expression=None, *, around=False):
    """An embedding and components that tell so much, with what is around them if asked for."""
    features = features_of(values, rng, embedding, 5)
    own = None if expression is None else features_of(values, rng, expression, 4)
    return Blocks(
        features,
        ("X_a",),
        (5,),
        {"X_a": {}},
        own,
        features_of(values, rng, embedding, 5) if around else None,
        features_of(values, rng, expression, 4) if around and own is not None else None,
        n_neighbors=5 if around else 0,
    )


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        bool((states[0][name] == states[1][name]).all()) for name in states[0]
    )


def is_linear(members):
    return [not one.config.widths for one in members.networks]


pytestmark = pytest.mark.usefixtures("few_epochs")


def test_embeddings_alone(classes, splits, rng, monkeypatch):
    blocks = blocks_of(classes.values, rng, 2.0)
    fits = []

    def spy(features, targets, **options):
        fits.append((options, fit_head(features, targets, **options)))
        return fits[-1][1]

    monkeypatch.setattr(fitting, "fit_head", spy)
    members = fit_members(blocks, classes, splits, SEEDS)
    assert members.reads == ("embedding",) * 3
    assert is_linear(members) == [False, False, True]
    assert sum(members.weights) == pytest.approx(1.0)
    assert members.weights[0] == members.weights[1]
    assert sorted(members.history["network"].unique()) == [0, 1]
    # Each network is of its split and seed, and stays as it is.
    for (options, fitted), network, split, seed in zip(
        fits, members.networks, splits, SEEDS, strict=False
    ):
        np.testing.assert_array_equal(options["fitted"], split.fitted)
        assert options["seed"] == seed
        assert network is fitted.head
    for own, split in zip(members.held_out, splits, strict=True):
        np.testing.assert_array_equal(np.sort(own), split.held_out)
    # Held-out cells are judged by members that have not seen them.
    linear = [fit_linear(blocks.features, classes, split.fitted) for split in splits]
    share = np.array([2 * members.weights[0], members.weights[2]])
    expected = [
        np.tensordot(
            share, [apply_head(one, blocks.features[rows], "classes") for one in both], axes=1
        )
        for *both, rows in zip(members.networks[:2], linear, members.held_out, strict=True)
    ]
    np.testing.assert_allclose(members.votes, np.concatenate(expected), atol=1e-6)
    # In the end the linear one is fitted to all known cells.
    final = fit_linear(blocks.features, classes, np.arange(N - 10))
    assert same(members.networks[2], final)


def test_all_blocks(classes, splits, rng):
    blocks = blocks_of(classes.values, rng, 1.0, 1.0, around=True)
    members = fit_members(blocks, classes, splits, SEEDS)
    linear = ("embedding", "neighborhood", "expression", "expression neighborhood")
    assert members.reads == ("neighborhood",) * 2 + linear
    assert is_linear(members) == [False] * 2 + [True] * 4
    assert set(members.history["reads"]) == {"neighborhood"}
    np.testing.assert_allclose(members.votes.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(members.rows, np.concatenate(members.held_out))


def test_who_knows_more_weighs_more(classes, splits, rng):
    shares = []
    for embedding, expression in ((3.0, 0.0), (0.0, 3.0)):
        blocks = blocks_of(classes.values, rng, embedding, expression)
        members = fit_members(blocks, classes, splits, SEEDS)
        of = np.array(members.reads) == "embedding"
        shares.append(np.array(members.weights)[of].sum())
    assert shares[0] > 0.75
    assert shares[1] < 0.3


def test_proportions(splits, rng):
    values = rng.dirichlet(np.full(3, 0.3), N).astype(np.float32)
    values[-10:] = np.nan
    targets = Targets("proportions", values, 3)
    shares = np.nan_to_num(values, nan=1 / 3) @ rng.normal(size=(3, 4)) * 4
    expression = (shares + 0.3 * rng.normal(size=(N, 4))).astype(np.float32)
    features = rng.normal(size=(N, 5)).astype(np.float32)
    blocks = Blocks(features, ("X_a",), (5,), {"X_a": {}}, expression)
    members = fit_members(blocks, targets, splits, SEEDS)
    known = values[members.rows]
    assert np.corrcoef(members.votes.ravel(), known.ravel())[0, 1] > 0.8
    assert np.array(members.weights)[np.array(members.reads) == "expression"].sum() > 0.7


def test_values(splits, rng):
    kinds = rng.integers(0, 3, N)
    values = (kinds[:, None] * [1.0, -2.0, 0.5]).astype(np.float32)
    blocks = blocks_of(kinds, rng, 0.0, 4.0, around=True)
    members = fit_members(blocks, Targets("values", values, 3), splits, SEEDS)
    assert members.reads == ("neighborhood",) * 2 + ("expression neighborhood",) * 2
    assert not any(is_linear(members))
    assert sum(members.weights[2:]) > 0.8
    assert members.votes is None


def test_order_of_rows(classes, splits, rng):
    blocks = blocks_of(classes.values, rng, 1.0, 1.0)
    order = rng.permutation(N)
    place = np.argsort(order)
    moved = Targets("classes", classes.values[order], 3)
    parts = [
        replace(one, fitted=np.sort(place[one.fitted]), held_out=np.sort(place[one.held_out]))
        for one in splits
    ]
    turned = replace(blocks, features=blocks.features[order], expression=blocks.expression[order])
    first = fit_members(blocks, classes, splits, SEEDS)
    again = fit_members(turned, moved, parts, SEEDS)
    np.testing.assert_array_equal(order[again.rows], first.rows)
    np.testing.assert_array_equal(again.votes, first.votes)
    assert again.weights == first.weights
    assert all(same(*pair) for pair in zip(first.networks, again.networks, strict=True))


@pytest.fixture
def wide(rng):
    """300 columns of which few matter, in two parts of very different size, some rows unknown."""
    values = rng.normal(size=(N, 6)) @ rng.normal(size=(6, 300)) + 5.0
    values += 0.01 * rng.normal(size=(N, 300))
    values[:, 200:] *= 1000.0
    values[-10:] = np.nan
    return values.astype(np.float32)


def test_wide_blocks_are_rotated(wide, monkeypatch):
    monkeypatch.setattr("stofm.heads.network._MOST_COLUMNS", 20)
    rotation = Rotation(wide, (200, 100), np.arange(N - 10))
    assert (rotation.values.shape, rotation.widths) == ((N, 20), (20,))
    assert np.isnan(rotation.values[-10:]).all()
    # Nothing but noise is lost, and each part has its own scale.
    own = [wide[:150, :200], wide[:150, 200:]]
    total = sum(part.var(axis=0).sum() / part.var(axis=0).mean() for part in own)
    assert rotation.values[:150].var(axis=0).sum() == pytest.approx(total, rel=1e-3)
    torch.manual_seed(1)
    for widths in ((7, 6), ()):
        network = PredictionHead(HeadConfig(d_input=20, d_output=3, widths=widths)).eval()
        network.fit_inputs(torch.from_numpy(rotation.values[:150]))
        undone = rotation.undone(network)
        assert undone.config.d_input == 300
        assert not undone.training
        np.testing.assert_allclose(
            apply_head(undone, wide[:150], "values"),
            apply_head(network, rotation.values[:150], "values"),
            atol=1e-3,
        )


def test_narrow_blocks_are_read_as_they_are(wide):
    narrow = wide[:, :256]
    rotation = Rotation(narrow, (200, 56), np.arange(N - 10))
    assert rotation.values is narrow
    assert rotation.widths == (200, 56)
    network = PredictionHead(HeadConfig(d_input=256, d_output=3, widths=()))
    assert rotation.undone(network) is network


def test_members_on_wide_blocks(classes, splits, rng, wide, monkeypatch):
    monkeypatch.setattr("stofm.heads.network._MOST_COLUMNS", 20)
    features = np.nan_to_num(wide)
    features[:, 200:] = 2 * rng.normal(size=(3, 100))[classes.values]
    features[:, :200] += 2 * rng.normal(size=(3, 200))[classes.values]
    blocks = Blocks(features, ("X_a",), (300,), {"X_a": {}})
    members = fit_members(blocks, classes, splits, SEEDS)
    assert {one.config.d_input for one in members.networks} == {300}
    known = classes.values[:150]
    for network in members.networks:
        found = apply_head(network, features[:150], "classes").argmax(axis=1)
        assert (found == known).mean() > 0.6


@pytest.fixture
def problem(rng):
    """400 cells of three classes that overlap; columns of different size."""
    classes = rng.integers(0, 3, 400)
    features = rng.normal(size=(400, 6)) + 1.2 * np.eye(3, 6)[classes]
    features = features * [3.0, 2.0, 2.0, 1.0, 1.0, 0.5] + 7.0
    return features.astype(np.float32), Targets("classes", classes, 3)


def linear(problem, rows=None):
    return fit_linear(*problem, np.arange(300) if rows is None else rows)


def probabilities(problem, rows=None):
    return apply_head(linear(problem, rows), problem[0], "classes")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 1.0, 4.0)])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_linear_members_are_those_of_scikit_learn(problem, weights, n_classes):
    from sklearn.linear_model import LogisticRegression

    features, targets = problem
    codes = np.minimum(targets.values, n_classes - 1)
    mass = np.array(weights[:n_classes], dtype=np.float32)
    rows = np.arange(300)
    inner = features.astype(float) - features[rows].mean(axis=0, dtype=float)
    inner *= 10 / np.sqrt(inner[rows].var(axis=0).sum())
    model = LogisticRegression(C=0.3, tol=1e-9, max_iter=5000)
    model.fit(inner[rows], codes[rows], sample_weight=mass[codes[rows]].astype(float))
    expected = model.predict_proba(inner)
    found = probabilities((features, Targets("classes", codes, n_classes, mass)))
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_a_softmax_model_is_recovered(rng):
    features = rng.normal(size=(5000, 4)).astype(np.float32)
    true = softmax(features @ rng.normal(size=(4, 3)) + [0.5, 0.0, -1.0], axis=1)
    targets = Targets("proportions", true.astype(np.float32), 3)
    head = linear((features, targets), np.arange(4000))
    found = apply_head(head, features, "proportions")
    np.testing.assert_allclose(found, true, atol=0.02)


def test_only_the_fitted_rows_are_read_in_any_order(problem, rng):
    features, targets = problem
    expected = linear(problem).last.weight
    features[300:], targets.values[300:] = np.nan, -1
    assert torch.equal(linear(problem, rng.permutation(300)).last.weight, expected)


def test_constant_columns(problem):
    features, targets = problem
    head = linear(problem)
    # Columns are scaled as one.
    assert len(head.input_scale.unique()) == 1
    wide = np.column_stack([features, np.full(400, 3.0)]).astype(np.float32)
    np.testing.assert_allclose(probabilities((wide, targets)), probabilities(problem), atol=1e-3)
    shares = np.bincount(targets.values[:300]) / 300
    nothing = np.full((400, 2), 5.0, dtype=np.float32)
    np.testing.assert_allclose(
        probabilities((nothing, targets)), np.tile(shares, (400, 1)), atol=1e-3
    )


def test_a_class_without_cells(problem):
    features, targets = problem
    found = probabilities((features, Targets("classes", targets.values, 4)))
    assert np.isfinite(found).all()
    assert found[:, 3].max() < 1e-6


@pytest.mark.parametrize("kind", ["classes", "proportions"])
def test_a_single_class_with_cells(problem, kind):
    features, _ = problem
    values = np.zeros(400, dtype=np.int64)
    if kind == "proportions":
        values = np.eye(2, dtype=np.float32)[values]
    found = probabilities((features, Targets(kind, values, 2)))
    np.testing.assert_allclose(found[:, 0], 1.0, atol=1e-6)


def test_errors_of_values(rng, monkeypatch):
    monkeypatch.setattr("stofm.heads.network._ROWS_AT_ONCE", 7)
    torch.manual_seed(3)
    config = HeadConfig(d_input=7, d_output=5, widths=(11, 6))
    features = rng.normal(size=(13, 7)).astype(np.float32)
    targets = Targets("values", rng.random((13, 5)).astype(np.float32), 5)
    rows = np.array([1, 4, 5, 9, 11, 12])
    networks = [PredictionHead(config).eval() for _ in range(2)]
    found = error_products([(one, features[rows]) for one in networks], targets, rows)
    errors = [apply_head(one, features[rows], "values") - targets.values[rows] for one in networks]
    wanted = [[np.sum(one * other) for other in errors] for one in errors]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.fixture
def labelled(rng):
    """Targets of 90 cells, of which the last ten have none, and rows of the others, mixed."""
    values = np.concatenate([rng.integers(0, 4, 80), np.full(10, -1)])
    return Targets("classes", values, 4), rng.permutation(80)


def votes_on(labelled, rng, strength):
    """Probabilities that lean to the true class by so much."""
    targets, rows = labelled
    scores = rng.normal(size=(len(rows), 4)) + strength * np.eye(4)[targets.values[rows]]
    odds = np.exp(scores)
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def posterior(weights, votes, targets, rows):
    """Log-likelihood of what is true under the weighted mean, with the prior's cells."""
    values = targets.values[rows]
    mixture = np.tensordot(weights, np.stack(votes).astype(float), axes=1)
    if targets.kind == "classes":
        mass = (
            np.ones(targets.n_outputs)
            if targets.class_weights is None
            else np.array(targets.class_weights, dtype=float)
        )
        fit = (mass[values] * np.log(mixture[np.arange(len(rows)), values])).sum()
    else:
        fit = (values * np.log(mixture)).sum()
    return fit + PRIOR * np.log(weights).sum()


def best_on_a_grid(votes, targets, rows, steps=80):
    """The likeliest of all weights that are multiples of 1 / steps."""
    grid = [
        np.array([a, b, steps - a - b]) / steps
        for a, b in itertools.product(range(1, steps), repeat=2)
        if a + b < steps
    ]
    return max(grid, key=lambda weights: posterior(weights, votes, targets, rows))


def test_who_knows_beats_who_guesses(labelled, rng):
    votes = [votes_on(labelled, rng, strength) for strength in (3.0, 0.0)]
    weights = blend_weights(votes, *labelled)
    assert weights[0] > 0.9
    np.testing.assert_allclose(blend_weights(votes[::-1], *labelled), weights[::-1], atol=1e-9)


def test_weights_sum_to_1_and_none_is_without_a_vote(labelled, rng):
    votes = [votes_on(labelled, rng, strength) for strength in (9.0, 2.0, 0.0, -9.0)]
    weights = blend_weights(votes, *labelled)
    assert weights.shape == (4,)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert weights.min() > 0.0


def test_certain_and_wrong(labelled):
    targets, rows = labelled
    right = np.eye(4, dtype=np.float32)[targets.values[rows]]
    weights = blend_weights([1 - right, right], targets, rows)
    assert np.isfinite(weights).all()
    # The prior leaves it the share of a cell among 82.
    assert weights[0] == pytest.approx(1 / 82, rel=1e-3)


def test_equal_without_rows_and_for_equal_votes(labelled, rng):
    targets, rows = labelled
    nothing = [np.empty((0, 4), dtype=np.float32)] * 3
    np.testing.assert_allclose(blend_weights(nothing, targets, rows[:0]), 1 / 3, rtol=1e-12)
    same = [votes_on(labelled, rng, 1.0)] * 3
    np.testing.assert_allclose(blend_weights(same, targets, rows), 1 / 3, rtol=1e-12)


def products_of(errors):
    return errors @ errors.T


def test_values_are_stacked_with_the_least_error(rng):
    errors = rng.normal(size=(3, 400)) * np.array([[1.0], [1.5], [2.0]])
    weights = stack_weights(products_of(errors))
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    best = (weights @ errors) @ (weights @ errors)
    steps = 60
    for a, b in itertools.product(range(steps + 1), repeat=2):
        other = np.array([a, b, steps - a - b]) / steps
        if other[2] >= 0:
            assert best <= ((other @ errors) ** 2).sum() * (1 + 1e-5)
    # Independent errors: as their variances say.
    np.testing.assert_allclose(weights, np.array([1, 4 / 9, 1 / 4]) / (61 / 36), atol=0.06)
    # The unit does not matter.
    np.testing.assert_allclose(stack_weights(1e-9 * products_of(errors)), weights, atol=1e-9)


def test_who_adds_nothing_has_no_weight(rng):
    good = rng.normal(size=300)
    worse = good + rng.normal(size=300)
    assert stack_weights(products_of(np.stack([worse, good]))).tolist() == [0.0, 1.0]
    equal = stack_weights(products_of(np.stack([good, good, worse])))
    np.testing.assert_allclose(equal, [0.5, 0.5, 0.0], atol=0.02)


def test_nothing_to_stack():
    assert stack_weights(np.zeros((4, 4))).tolist() == [0.25] * 4
    assert stack_weights(np.array([[3.0]])).tolist() == [1.0]


def test_one_voter(labelled, rng):
    assert blend_weights([votes_on(labelled, rng, 1.0)], *labelled).tolist() == [1.0]


@pytest.mark.parametrize("class_weights", [None, [0.1, 5.0, 1.0, 1.0]])
def test_classes_against_a_search(labelled, rng, class_weights):
    values, rows = labelled[0].values, labelled[1]
    weighed = None if class_weights is None else np.array(class_weights, dtype=np.float32)
    targets = Targets("classes", values, 4, weighed)
    votes = [votes_on(labelled, rng, strength) for strength in (1.2, 1.0, 0.6)]
    # What only the second and the third know of.
    votes[0][values[rows] == 1] = 0.25
    weights = blend_weights(votes, targets, rows)
    best = best_on_a_grid(votes, targets, rows)
    assert 0.1 < best.max() < 0.9
    assert posterior(weights, votes, targets, rows) >= posterior(best, votes, targets, rows) - 1e-4
    np.testing.assert_allclose(weights, best, atol=0.04)


def test_class_weights_turn_to_who_knows_the_heavy_class(labelled, rng):
    values, rows = labelled[0].values, labelled[1]
    votes = [votes_on(labelled, rng, 3.0), votes_on(labelled, rng, 3.0)]
    votes[0][values[rows] == 2] = votes[1][values[rows] != 2] = 0.25
    heavy = Targets("classes", values, 4, np.array([0.1, 0.1, 9.0, 0.1], dtype=np.float32))
    assert blend_weights(votes, *labelled)[0] > 0.6
    assert blend_weights(votes, heavy, rows)[0] < 0.2


def test_proportions_against_a_search(rng):
    true = rng.dirichlet(np.ones(4), 60).astype(np.float32)
    targets, rows = Targets("proportions", true, 4), rng.permutation(60)[:45]
    noise = [rng.dirichlet(np.ones(4), 45) for _ in range(3)]
    votes = [
        share * true[rows] + (1 - share) * own
        for share, own in zip((0.75, 0.6, 0.2), noise, strict=True)
    ]
    weights = blend_weights(votes, targets, rows)
    best = best_on_a_grid(votes, targets, rows)
    np.testing.assert_allclose(weights, best, atol=0.04)
    assert posterior(weights, votes, targets, rows) >= posterior(best, votes, targets, rows) - 1e-4
    assert weights[0] > weights[1] > weights[2]


def test_a_row_may_occur_more_than_once(labelled, rng):
    targets, rows = labelled
    votes = [votes_on(labelled, rng, strength) for strength in (1.0, 0.5)]
    twice = blend_weights([np.concatenate([v, v]) for v in votes], targets, np.tile(rows, 2))
    once = blend_weights(votes, targets, rows)
    # Twice the evidence against the same prior.
    assert twice[0] > once[0] > 0.5
