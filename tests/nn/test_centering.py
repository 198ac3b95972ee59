from __future__ import annotations

import numpy as np
import pytest

from stofm.nn import finish_embeddings


@pytest.fixture
def raw(rng):
    values = rng.normal(size=(211, 7)) + np.array([0, 5, 0, 0, 1e4, 0, 1e-6])
    values[:, 5] *= 10.0 ** rng.uniform(-9, 3, 211)
    return values.astype(np.float32)


@pytest.fixture
def slices(rng):
    return np.split(rng.permutation(211), [1, 60, 60, 150])


def test_without_centering_rows_are_scaled_only(raw, slices):
    features, centers = finish_embeddings(raw, slices, "none")
    expected = raw / np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    assert features.dtype == np.float32
    assert centers.shape == (1, 7)
    assert not centers.any()


def test_mean_of_each_slice_is_taken_off(raw, slices):
    features, centers = finish_embeddings(raw, slices, "slice")
    assert centers.shape == (5, 7)
    for center, rows in zip(centers, slices, strict=True):
        if len(rows) > 1:
            mean = raw[rows].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(center, mean, rtol=1e-6, atol=1e-6)
            off = raw[rows] - center
            off /= np.linalg.norm(off.astype(np.float64), axis=1, keepdims=True)
            np.testing.assert_allclose(features[rows], off, atol=1e-6)


def test_no_slices_are_one_slice(raw):
    features, centers = finish_embeddings(raw, None, "slice")
    expected, same = finish_embeddings(raw, [np.arange(211)], "slice")
    np.testing.assert_array_equal(features, expected)
    np.testing.assert_array_equal(centers, same)


def test_order_and_parts_of_rows_change_no_bit(raw, slices, rng, monkeypatch):
    features, centers = finish_embeddings(raw, slices, "slice")
    monkeypatch.setattr("stofm.nn.centering._ROWS_AT_ONCE", 13)
    order = rng.permutation(211)
    place = np.argsort(order)
    again, same = finish_embeddings(
        raw[order], [rng.permutation(place[rows]) for rows in slices], "slice"
    )
    np.testing.assert_array_equal(same, centers)
    np.testing.assert_array_equal(again, features[order])
    # The reason for adding up in integers: float64 sums do depend on the order.
    sums = {raw[rng.permutation(211), 5].astype(np.float64).sum() for _ in range(50)}
    assert len(sums) > 1


def test_slices_do_not_touch_each_other(raw, slices):
    together, _ = finish_embeddings(raw, slices, "slice")
    for rows in slices:
        alone, _ = finish_embeddings(raw[rows], None, "slice")
        np.testing.assert_array_equal(alone, together[rows])


@pytest.mark.parametrize("n_cells", [1, 2, 3, 1000])
def test_cells_that_are_all_the_same_become_0(rng, n_cells):
    row = (rng.normal(size=9) * 10.0 ** np.arange(-6, 3)).astype(np.float32)
    features, centers = finish_embeddings(np.tile(row, (n_cells, 1)), None, "slice")
    np.testing.assert_array_equal(centers[0], row)
    assert not features.any()


def test_nothing_and_columns_of_0(raw):
    features, centers = finish_embeddings(raw[:0], None, "slice")
    assert features.shape == (0, 7)
    assert not centers.any()
    raw[:, 2] = 0
    features, centers = finish_embeddings(raw, None, "slice")
    assert np.isfinite(features).all()
    assert centers[0, 2] == 0


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1], [3]], [[0, 1, 2, 3]]])
def test_slices_must_share_out_the_rows(raw, rows):
    slices = [np.array(part) for part in rows]
    with pytest.raises(ValueError, match="must hold each of 3 rows exactly once, found"):
        finish_embeddings(raw[:3], slices, "slice")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("centering", ["none", "slice"])
def test_not_finite_is_refused(raw, bad, centering):
    raw[[3, 9], 1] = bad
    with pytest.raises(ValueError, match="2 of 211 projections are NaN or infinite"):
        finish_embeddings(raw, None, centering)
