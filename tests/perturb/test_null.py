from __future__ import annotations

import numpy as np
import pytest

from stofm.perturb.effect import adjusted, compare, draw_like, like


def test_genes_of_like_detection_and_mean_are_found(rng):
    others = rng.normal(size=(300, 2)) * [1.0, 50.0]
    own = np.array([0.5, 10.0])
    found = like(own, others, 20)
    scaled = (others - own) / others.std(axis=0)
    expected = np.argsort((scaled**2).sum(axis=1))[:20]
    assert set(found) == set(expected)
    assert len(like(own, others[:7], 20)) == 7


def test_drawn_cells_differ_from_each_other_and_are_like_the_edited(rng):
    others = rng.normal(size=(400, 2))
    own = rng.normal(loc=1.0, scale=0.3, size=(60, 2))
    first, second = (draw_like(own, others, np.random.default_rng(seed)) for seed in (0, 1))
    assert len(set(first)) == 60
    assert set(first) != set(second)
    np.testing.assert_array_equal(first, draw_like(own, others, np.random.default_rng(0)))
    gap = np.linalg.norm(others[first].mean(axis=0) - own.mean(axis=0))
    assert gap < 0.4 < np.linalg.norm(others.mean(axis=0) - own.mean(axis=0))


def test_as_many_cells_as_there_are_can_be_drawn(rng):
    own = rng.normal(size=(90, 2))
    assert sorted(draw_like(own, own + 5.0, rng)) == list(range(90))


def test_p_counts_null_effects_as_large_and_never_is_0():
    null = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    found = compare(3.0, null)
    assert found["p"] == (1 + 2) / (1 + 4)
    assert found["n_null"] == 4
    assert found["z"] == pytest.approx((3.0 - 2.5) / np.std([1, 2, 3, 4]))
    assert compare(9.0, null)["p"] == 1 / 5


@pytest.mark.parametrize(("effect", "null"), [(1.0, []), (np.nan, [1.0, 2.0])])
def test_without_an_effect_or_a_null_there_is_no_p(effect, null):
    assert np.isnan(compare(effect, np.array(null))["p"])


def test_p_is_uniform_where_nothing_is_special(rng):
    draws = rng.normal(size=(2000, 40))
    p = np.array([compare(one[0], one[1:])["p"] for one in draws])
    assert np.abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.04


def test_false_discovery_rates_leave_out_what_has_no_p():
    p = np.array([0.01, np.nan, 0.02, 0.9])
    # By hand: p n / rank, made monotone.
    np.testing.assert_allclose(adjusted(p)[[0, 2, 3]], [0.03, 0.03, 0.9])
    assert np.isnan(adjusted(p)[1])
    assert len(adjusted(p[:0])) == 0
