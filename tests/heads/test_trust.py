from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax

from stofm.heads.annotation import (
    Rejection,
    Surroundings,
    calibrated_probabilities,
    fit_temperature,
)


@pytest.fixture
def cells(rng):
    """Three classes in eleven columns of very different scale, one of them constant."""
    classes = rng.integers(0, 3, 997)
    values = (rng.normal(size=(3, 11)) * 3)[classes] + rng.normal(size=(997, 11))
    values[:, 4] = 2.0
    return (values * 10.0 ** np.arange(-5, 6)).astype(np.float32), classes


def test_temperature_recovers_how_far_scores_are_overstated(rng):
    scores = rng.normal(size=(4001, 5)) * 2
    drawn = (softmax(scores, axis=1).cumsum(axis=1) > rng.random((4001, 1))).argmax(axis=1)
    for factor in (0.4, 1.0, 3.0):
        assert fit_temperature(scores * factor, drawn) == pytest.approx(factor, rel=0.1)
    assert fit_temperature(scores[:0], drawn[:0]) == 1.0


@pytest.mark.parametrize("n_cells", [1, 33])
def test_few_cells_leave_the_temperature_near_one(rng, n_cells):
    classes = rng.integers(0, 4, n_cells)
    sure = np.eye(4)[classes] * 3
    assert 0.5 < fit_temperature(sure, classes) < 1
    wrong = fit_temperature(np.eye(4)[(classes + 1) % 4] * 9, classes)
    assert 1 < wrong < (2 if n_cells == 1 else 5)


def test_temperature_changes_probabilities_and_not_the_class(rng):
    scores = rng.normal(size=(53, 5)).astype(np.float32)
    found = calibrated_probabilities(scores, 2.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(scores / 2.5, axis=1), rtol=1e-5)
    assert np.array_equal(found.argmax(axis=1), scores.argmax(axis=1))


def test_distance_is_that_of_mahalanobis(cells):
    features, classes = cells
    around = Surroundings.fit(features, classes)
    standard = features.astype(np.float64)
    standard = (standard - standard.mean(axis=0)) / np.where(
        np.ptp(standard, axis=0) > 0, standard.std(axis=0), np.inf
    )
    means = np.stack([standard[classes == k].mean(axis=0) for k in range(3)])
    residuals = standard - means[classes]
    within = residuals.T @ residuals / len(standard)
    within += np.eye(11) * 0.01 * np.trace(within) / 11
    expected = cdist(standard, means, "mahalanobis", VI=np.linalg.inv(within)).min(axis=1)
    np.testing.assert_allclose(around.distances(features), expected, rtol=1e-3)


def test_far_cells_are_far(cells):
    features, classes = cells
    around = Surroundings.fit(features, classes)
    far = features + 20 * features.std(axis=0)
    assert around.distances(far).min() > around.distances(features).max()


def test_embeddings_that_are_all_the_same():
    features = np.ones((6, 4), dtype=np.float32)
    around = Surroundings.fit(features, np.array([0, 1] * 3))
    assert not around.distances(features).any()


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_no_more_known_cells_are_rejected_than_stated(rng, rate):
    confidence = rng.random(1009)
    distances = rng.random(1009) - 0.5 * confidence
    found = Rejection.fit(confidence, distances, rate)
    share = found.rejects(confidence, distances).mean()
    assert found.measured == share
    assert rate - 0.005 < share <= rate
    assert (found.rate, found.n_cells) == (rate, 1009)
    # As many cells lie beyond the one threshold as beyond the other.
    beyond = (confidence < found.least_probability).sum()
    assert beyond == pytest.approx((distances > found.greatest_distance).sum(), abs=1)


def test_both_must_speak_against_a_class(rng):
    confidence, distances = rng.random(500), rng.random(500)
    found = Rejection.fit(confidence, distances, 0.05)
    cells = np.array([[0.0, 9.0], [0.0, 0.0], [1.0, 9.0]])
    assert found.rejects(cells[:, 0], cells[:, 1]).tolist() == [True, False, False]


def test_few_or_equal_cells():
    assert Rejection.fit(np.array([0.5]), np.array([1.0]), 0.02).measured == 0.0
    same = Rejection.fit(np.full(50, 0.9), np.full(50, 2.0), 0.1)
    assert same.measured == 0.0
