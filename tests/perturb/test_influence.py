from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from stofm.perturb import Detached, Edit
from stofm.perturb.influence import baselines, by_distance, by_type, contrast
from stofm.perturb.masking import PairEffects, _apart, pair_effects

NAMES = list("abcdefgh")


def length(before, after):
    return np.linalg.norm(after - before, axis=1)


def test_senders_masked_together_are_as_if_masked_alone(whole) -> None:
    senders, reach = np.arange(0, whole.n_cells, 3), 90.0
    found = pair_effects(whole, senders, reach=reach, change=length)
    distances = cdist(whole.coordinates, whole.coordinates)
    subslice = whole.layout.subslice
    expected = {}
    for sender in senders:
        alone = Edit(detached=Detached(senders=np.arange(whole.n_cells) == sender, reach=reach))
        for one in whole.embed([alone]):
            for row, value in zip(one.rows, length(one.before, one.after), strict=True):
                near = distances[sender, row] <= reach and subslice[sender] == subslice[row]
                if near and row != sender:
                    expected[sender, row] = value
    keys = list(zip(found.senders.tolist(), found.receivers.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert set(keys) == set(expected)
    np.testing.assert_allclose(found.distances, [distances[key] for key in keys])
    # Others that are masked too act through cells in between only.
    np.testing.assert_allclose(found.effects, [expected[key] for key in keys], rtol=0.1, atol=1e-4)
    assert (found.effects > 0).mean() > 0.9


def test_a_slice_without_senders_has_no_pairs(whole) -> None:
    found = pair_effects(whole, np.empty(0, dtype=np.int64), reach=50.0, change=length)
    assert [len(one) for one in found] == [0] * 4


def test_groups_lie_apart(rng) -> None:
    xy = rng.random((203, 2)) * [50.0, 20.0] - 7.0
    groups = _apart(xy, 6.5)
    assert groups.max() < len(xy) - 1
    for number in range(groups.max() + 1):
        assert (pdist(xy[groups == number]) >= 6.5).all()


def test_contrast_is_that_of_all_permutations(rng) -> None:
    n, counts = 7, np.array([2, 0, 1, 3, 2, 1, 4])
    totals, bases = rng.gamma(2.0, size=(n, 1)) * counts[:, None], counts[:, None] * 0.9
    flags = np.array([1, 1, 0, 0, 1, 0, 0], dtype=bool)
    found = contrast(totals, bases, counts[:, None], flags[:, None])
    # Sums over flagged senders in all orders of the flags, among those with receivers.
    own = np.flatnonzero(counts > 0)
    residual = (totals - bases)[own, 0]
    residual = residual - counts[own] * residual.sum() / counts[own].sum()
    sums = [residual[list(order)].sum() for order in itertools.combinations(range(len(own)), 2)]
    observed = residual[flags[own]].sum()
    assert found["z"][0] == pytest.approx((observed - np.mean(sums)) / np.std(sums))
    n_pairs = counts[flags].sum()
    assert found["n_pairs"][0] == n_pairs
    assert found["strength"][0] == pytest.approx(totals[flags].sum() / n_pairs)
    assert found["strength"][0] - found["expected"][0] == pytest.approx(observed / n_pairs)


def test_a_group_without_pairs_has_no_strength() -> None:
    found = contrast(*np.zeros((2, 3, 1)), np.zeros((3, 1), int), np.ones((3, 1), bool))
    assert np.isnan([found["strength"][0], found["expected"][0], found["z"][0]]).all()


def simulated(rng, planted: float) -> tuple[PairEffects, np.ndarray]:
    """Effects that fall with distance and differ between senders and receivers; of a on b they are larger."""
    n, n_pairs = 800, 24_000
    kinds = rng.integers(0, 8, n)
    senders, receivers = rng.integers(0, n, (2, n_pairs))
    distances = rng.uniform(1.0, 10.0, n_pairs)
    effects = np.exp(-distances / 4.0) * (1.0 + kinds[receivers]) * rng.gamma(4.0, 0.25, n_pairs)
    # Some senders change whatever is around them.
    effects *= 1.0 + kinds[senders] / 8 + rng.random(n)[senders]
    effects[(kinds[senders] == 0) & (kinds[receivers] == 1)] *= planted
    return PairEffects(senders, receivers, distances, effects.astype(np.float32)), kinds


def test_a_planted_pair_stands_out_and_nothing_else(rng) -> None:
    pairs, kinds = simulated(rng, 1.5)
    table = by_type(pairs, kinds, NAMES, min_pairs=30)
    first = table.iloc[0]
    assert (first["source"], first["target"]) == ("a", "b")
    assert first["FDR"] < 1e-6
    assert first["strength"] > 1.3 * first["expected"]
    assert table["FDR"].iloc[1:].min() > 0.01
    assert table["length"].to_numpy() == pytest.approx(4.0, rel=0.2)
    assert len(table) == 64
    own = pairs.effects[(kinds[pairs.senders] == 2) & (kinds[pairs.receivers] == 0)]
    row = table[(table["source"] == "c") & (table["target"] == "a")].iloc[0]
    assert row["strength"] == pytest.approx(own.mean())
    assert row["n_pairs"] == len(own)


def test_z_is_standard_normal_without_an_effect(rng) -> None:
    values = [by_type(*simulated(rng, 1.0), NAMES, min_pairs=30)["z"].to_numpy() for _ in range(3)]
    assert np.abs(np.mean(values)) < 0.2
    assert 0.7 < np.std(values) < 1.2


def test_few_pairs_are_left_out(rng) -> None:
    pairs, kinds = simulated(rng, 1.0)
    kinds[np.flatnonzero(kinds == 2)[:2]] = 8
    table = by_type(pairs, kinds, [*NAMES, "i"], min_pairs=100)
    assert {*table["source"], *table["target"]} == set(NAMES)
    assert set(by_distance(pairs, kinds, [*NAMES, "i"], min_pairs=100)["source"]) == set(NAMES)


def test_strength_by_distance(rng) -> None:
    pairs, kinds = simulated(rng, 1.0)
    table = by_distance(pairs, kinds, NAMES, min_pairs=30)
    own = table[(table["source"] == "a") & (table["target"] == "a")]
    assert len(own) == 5
    assert own["strength"].is_monotonic_decreasing
    np.testing.assert_allclose(own["strength"], own["expected"], rtol=0.25)
    assert table["n_pairs"].sum() == len(pairs.effects)
    weighted = (baselines(pairs, kinds)).mean()
    assert weighted == pytest.approx(pairs.effects.mean(), rel=1e-5)
