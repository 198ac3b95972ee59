"""How far an annotation can be trusted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax

from stofm.heads.trust import (
    Novelty,
    PredictionSets,
    Rejection,
    Surroundings,
    calibrated_probabilities,
    energy,
    fit_temperature,
)


@pytest.fixture
def known_cells(rng):
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


def test_distance_is_that_from_the_nearest_labelled_cells(known_cells):
    features, classes = known_cells
    around = Surroundings.fit(features[:401], classes[:401])
    standard = features.astype(np.float64)
    deviation = np.where(np.ptp(standard, axis=0) > 0, standard[:401].std(axis=0), np.inf)
    standard = (standard - standard[:401].mean(axis=0)) / deviation
    fitted = standard[:401]
    residuals = (
        fitted
        - np.stack([fitted[classes[:401] == k].mean(axis=0) for k in range(3)])[classes[:401]]
    )
    within = residuals.T @ residuals / 401
    within += np.eye(11) * 0.01 * np.trace(within) / 11
    every = cdist(standard, fitted, "mahalanobis", VI=np.linalg.inv(within))
    expected = np.sort(every, axis=1)[:, :10].mean(axis=1)
    np.testing.assert_allclose(around.distances(features), expected, rtol=1e-3, atol=1e-3)


def test_large_classes_are_thinned_and_small_ones_are_not(rng):
    features = rng.normal(size=(3011, 4)).astype(np.float32)
    classes = np.repeat([0, 1], [3000, 11])
    assert len(Surroundings.fit(features, classes).points) == 200 + 11


def test_far_cells_are_far(known_cells):
    features, classes = known_cells
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
    some = np.array([[0.0, 9.0], [0.0, 0.0], [1.0, 9.0]])
    assert found.rejects(some[:, 0], some[:, 1]).tolist() == [True, False, False]


def test_few_or_equal_cells():
    assert Rejection.fit(np.array([0.5]), np.array([1.0]), 0.02).measured == 0.0
    same = Rejection.fit(np.full(50, 0.9), np.full(50, 2.0), 0.1)
    assert same.measured == 0.0


def test_a_head_that_is_often_wrong_rejects_more(rng):
    confidence, distances = rng.random(2003), rng.random(2003)
    right = confidence > 0.3
    found = Rejection.fit(confidence, distances, 0.05, right)
    assert found.rejects(confidence[right], distances[right]).mean() <= 0.05
    assert found.measured > Rejection.fit(confidence, distances, 0.05).measured > 0.04
    assert found.n_cells == 2003
    # Nothing is known of right ones where there are none.
    none = Rejection.fit(confidence, distances, 0.05, np.zeros(2003, dtype=bool))
    assert none == Rejection.fit(confidence, distances, 0.05)


def test_energy_falls_with_support():
    outputs = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 3.0]])
    np.testing.assert_allclose(energy(outputs), -np.log(np.exp(outputs).sum(axis=1)))


def test_a_twentieth_of_known_cells_is_novel(rng):
    distances, energies = rng.gamma(2.0, size=2001), rng.normal(size=2001)
    found = Novelty.fit(distances, energies)
    novelty = found.of(distances, energies)
    assert (novelty > 1).mean() == pytest.approx(0.05, abs=1e-3)
    # Either part alone may make a cell new, and a low energy does not take it back.
    middle = np.array([np.median(distances), np.median(energies)])
    far, sure = middle + np.array([[9.0, -9.0], [9.0, 0.0]])
    assert found.of(far[:1], far[1:]) == found.of(sure[:1], sure[1:]) > 1
    assert found.of(middle[:1], middle[1:] + 9.0) > 1
    assert found.of(sure[:1], np.array([np.nan])) == found.of(sure[:1], sure[1:])


def test_novelty_of_cells_that_are_all_the_same():
    found = Novelty.fit(np.ones(5), np.ones(5))
    assert np.isfinite(found.of(np.array([1.0, 2.0]), np.ones(2))).all()


def draw(rng, n_cells, sharpness):
    """Probabilities of five classes, and classes that follow them."""
    found = softmax(rng.normal(size=(n_cells, 5)) * sharpness, axis=1)
    return found, (found.cumsum(axis=1) > rng.random((n_cells, 1))).argmax(axis=1)


@pytest.mark.parametrize("coverage", [0.7, 0.9, 0.95])
def test_sets_cover_the_class(rng, coverage):
    one = np.zeros(2003, dtype=np.int64)
    sets = PredictionSets.fit(*draw(rng, 2003, 2.0), one, coverage)
    found, classes = draw(rng, 20011, 2.0)
    inside = sets.of(found)
    covered = inside[np.arange(20011), classes].mean()
    # Sets have the likeliest class even where that is not needed.
    assert coverage - 0.02 < covered < coverage + 0.05
    assert inside.any(axis=1).all()
    assert sets.measured >= coverage - 1e-3
    assert 1 <= sets.mean_size < 5


def test_sets_hold_for_the_hardest_slice(rng):
    easy, hard = draw(rng, 3001, 3.0), draw(rng, 301, 0.3)
    both = [np.concatenate(pair) for pair in zip(easy, hard, strict=True)]
    slices = np.repeat([4, 7], [3001, 301])
    sets = PredictionSets.fit(*both, slices, 0.9)
    assert sets.of(hard[0])[np.arange(301), hard[1]].mean() >= 0.9
    assert PredictionSets.fit(*both, np.zeros(3302), 0.9).least_probability > sets.least_probability


def test_few_cells_leave_all_classes_in_the_sets(rng):
    found, classes = draw(rng, 8, 2.0)
    assert PredictionSets.fit(found, classes, np.zeros(8), 0.9).of(found).all()
