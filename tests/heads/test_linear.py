"""Heads without hidden layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from stofm.heads import ensemble as linear
from stofm.heads.ensemble import fit_linear_head
from stofm.heads.network import apply_head
from stofm.heads.targets import Targets
from stofm.nn import PredictionHead


@pytest.fixture
def problem(rng):
    """400 cells of three classes that overlap; columns of different size."""
    classes = rng.integers(0, 3, 400)
    features = rng.normal(size=(400, 6)) + 1.2 * np.eye(3, 6)[classes]
    features = features * [3.0, 2.0, 2.0, 1.0, 1.0, 0.5] + 7.0
    return features.astype(np.float32), Targets("classes", classes, 3)


def fit(problem, **options):
    return fit_linear_head(*problem, **({"fitted": np.arange(300)} | options))


def probabilities(problem, **options):
    return apply_head(fit(problem, **options), problem[0], "classes")


def regression(problem, strength, weights):
    """Probabilities by scikit-learn, of inputs that are scaled alike."""
    from sklearn.linear_model import LogisticRegression

    features, targets = problem
    rows, classes = np.arange(300), targets.values
    inner = features.astype(float) - features[rows].mean(axis=0, dtype=float)
    inner *= 10 / np.sqrt(inner[rows].var(axis=0).sum())
    # Weights of the cells say what their mean is of, and not how much they count in all.
    own = np.asarray(weights, dtype=float)[classes[rows]]
    model = LogisticRegression(C=strength, tol=1e-9, max_iter=5000)
    model.fit(inner[rows], classes[rows], sample_weight=own / own.mean())
    return model.predict_proba(inner)


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_as_scikit_learn(problem, strength):
    expected = regression(problem, strength, np.ones(3))
    np.testing.assert_allclose(probabilities(problem, strength=strength), expected, atol=1e-3)
    assert np.ptp(expected) > 0.2


def test_class_weights_as_in_scikit_learn(problem, monkeypatch):
    # As near to the minimum as it goes: the loss is that of scikit-learn.
    monkeypatch.setattr(linear, "_TOLERANCE", 1e-8)
    monkeypatch.setattr(linear, "_MOST_STEPS", 2000)
    weights = np.array([0.2, 1.0, 4.0], dtype=np.float32)
    targets = Targets("classes", problem[1].values, 3, weights)
    expected = regression(problem, 0.1, weights)
    found = probabilities((problem[0], targets), strength=0.1)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert np.abs(expected - regression(problem, 0.1, np.ones(3))).max() > 0.02


def test_is_a_head_without_hidden_layers(problem):
    head = fit(problem)
    assert isinstance(head, PredictionHead)
    assert head.config.widths == ()
    assert (head.config.d_input, head.config.d_output) == (6, 3)
    assert not head.training
    assert {value.dtype for value in head.state_dict().values()} == {torch.float32}
    # Columns are scaled as one.
    assert len(head.input_scale.unique()) == 1


def test_a_softmax_model_is_recovered(rng):
    features = rng.normal(size=(5000, 4)).astype(np.float32)
    true = softmax(features @ rng.normal(size=(4, 3)) + [0.5, 0.0, -1.0], axis=1)
    targets = Targets("proportions", true.astype(np.float32), 3)
    head = fit_linear_head(features, targets, fitted=np.arange(4000))
    found = apply_head(head, features, "proportions")
    np.testing.assert_allclose(found, true, atol=0.02)


def test_class_weights_lean_to_the_heavy_class(problem):
    features, targets = problem
    heavy = Targets("classes", targets.values, 3, np.array([9.0, 1.0, 1.0], dtype=np.float32))
    plain, leaning = (probabilities((features, one)) for one in (targets, heavy))
    assert leaning[:, 0].mean() > plain[:, 0].mean() + 0.1


def test_only_the_fitted_rows_are_read(problem):
    features, targets = problem
    expected = fit(problem).last.weight
    features[300:], targets.values[300:] = np.nan, -1
    assert torch.equal(fit(problem).last.weight, expected)


def test_many_cells_are_thinned_out(problem, monkeypatch):
    rows = np.random.default_rng(3).permutation(400)
    monkeypatch.setattr(linear, "_MOST_CELLS", 150)
    found = fit(problem, fitted=rows)
    monkeypatch.undo()
    # Every third one in the order that is given: 134 of 400, where each second would be too many.
    expected = fit(problem, fitted=rows[::3])
    assert torch.equal(found.last.weight, expected.last.weight)
    assert not torch.equal(found.last.weight, fit(problem, fitted=rows).last.weight)


def test_as_many_cells_as_may_be_are_all_read(problem, monkeypatch):
    expected = fit(problem).last.weight
    monkeypatch.setattr(linear, "_MOST_CELLS", 300)
    assert torch.equal(fit(problem).last.weight, expected)


def test_the_order_of_rows_hardly_matters(problem, rng):
    turned = probabilities(problem, fitted=rng.permutation(300))
    np.testing.assert_allclose(turned, probabilities(problem), atol=1e-3)


def test_constant_columns(problem):
    features, targets = problem
    wide = np.column_stack([features, np.full(400, 3.0)]).astype(np.float32)
    np.testing.assert_allclose(probabilities((wide, targets)), probabilities(problem), atol=1e-3)
    shares = np.bincount(targets.values[:300]) / 300
    nothing = np.full((400, 2), 5.0, dtype=np.float32)
    np.testing.assert_allclose(
        probabilities((nothing, targets), strength=0.1), np.tile(shares, (400, 1)), atol=1e-3
    )


def test_a_class_without_cells(problem):
    features, targets = problem
    found = probabilities((features, Targets("classes", targets.values, 4)))
    assert np.isfinite(found).all()
    assert found[:, 3].max() < 0.05
