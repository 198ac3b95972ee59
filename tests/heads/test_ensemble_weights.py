"""How much voters weigh."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stofm.heads.ensemble import blend_weights, stack_weights
from stofm.heads.targets import Targets

PRIOR = 1.0


@pytest.fixture
def classes(rng):
    """Targets of 90 cells, of which the last ten have none, and rows of the others, mixed."""
    values = np.concatenate([rng.integers(0, 4, 80), np.full(10, -1)])
    return Targets("classes", values, 4), rng.permutation(80)


def votes_on(classes, rng, strength):
    """Probabilities that lean to the true class by so much."""
    targets, rows = classes
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


def test_who_knows_beats_who_guesses(classes, rng):
    votes = [votes_on(classes, rng, strength) for strength in (3.0, 0.0)]
    weights = blend_weights(votes, *classes)
    assert weights[0] > 0.9
    np.testing.assert_allclose(blend_weights(votes[::-1], *classes), weights[::-1], atol=1e-9)


def test_weights_sum_to_1_and_none_is_without_a_vote(classes, rng):
    votes = [votes_on(classes, rng, strength) for strength in (9.0, 2.0, 0.0, -9.0)]
    weights = blend_weights(votes, *classes)
    assert weights.shape == (4,)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert weights.min() > 0.0


def test_certain_and_wrong(classes):
    targets, rows = classes
    right = np.eye(4, dtype=np.float32)[targets.values[rows]]
    weights = blend_weights([1 - right, right], targets, rows)
    assert np.isfinite(weights).all()
    # The prior leaves it the share of a cell among 82.
    assert weights[0] == pytest.approx(1 / 82, rel=1e-3)


def test_equal_without_rows_and_for_equal_votes(classes, rng):
    targets, rows = classes
    nothing = [np.empty((0, 4), dtype=np.float32)] * 3
    np.testing.assert_allclose(blend_weights(nothing, targets, rows[:0]), 1 / 3, rtol=1e-12)
    same = [votes_on(classes, rng, 1.0)] * 3
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


def test_one_voter(classes, rng):
    assert blend_weights([votes_on(classes, rng, 1.0)], *classes).tolist() == [1.0]


@pytest.mark.parametrize("class_weights", [None, [0.1, 5.0, 1.0, 1.0]])
def test_classes_against_a_search(classes, rng, class_weights):
    values, rows = classes[0].values, classes[1]
    weighed = None if class_weights is None else np.array(class_weights, dtype=np.float32)
    targets = Targets("classes", values, 4, weighed)
    votes = [votes_on(classes, rng, strength) for strength in (1.2, 1.0, 0.6)]
    # What only the second and the third know of.
    votes[0][values[rows] == 1] = 0.25
    weights = blend_weights(votes, targets, rows)
    best = best_on_a_grid(votes, targets, rows)
    assert 0.1 < best.max() < 0.9
    assert posterior(weights, votes, targets, rows) >= posterior(best, votes, targets, rows) - 1e-4
    np.testing.assert_allclose(weights, best, atol=0.04)


def test_class_weights_turn_to_who_knows_the_heavy_class(classes, rng):
    values, rows = classes[0].values, classes[1]
    votes = [votes_on(classes, rng, 3.0), votes_on(classes, rng, 3.0)]
    votes[0][values[rows] == 2] = votes[1][values[rows] != 2] = 0.25
    heavy = Targets("classes", values, 4, np.array([0.1, 0.1, 9.0, 0.1], dtype=np.float32))
    assert blend_weights(votes, *classes)[0] > 0.6
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


def test_a_row_may_occur_more_than_once(classes, rng):
    targets, rows = classes
    votes = [votes_on(classes, rng, strength) for strength in (1.0, 0.5)]
    twice = blend_weights([np.concatenate([v, v]) for v in votes], targets, np.tile(rows, 2))
    once = blend_weights(votes, targets, rows)
    # Twice the evidence against the same prior.
    assert twice[0] > once[0] > 0.5
