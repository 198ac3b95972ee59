from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

import stofm as st
from stofm.metrics import maps
from stofm.metrics.maps import gaussian_windows, similarity_index


def plain_ssim(true, predicted, places, sigma, data_range):
    """The index, place by place."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for row in cdist(places, places):
        weights = np.where(row < 3.5 * sigma, np.exp(-0.5 * (row / sigma) ** 2), 0.0)
        weights /= weights.sum()
        mx, my = weights @ true, weights @ predicted
        vx, vy = weights @ (true - mx) ** 2, weights @ (predicted - my) ** 2
        cov = weights @ ((true - mx) * (predicted - my))
        luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        values.append(luminance * (2 * cov + c2) / (vx + vy + c2))
    return np.mean(values)


@pytest.fixture
def scattered(rng):
    places = rng.random((61, 2)) * [30.0, 20.0]
    true = rng.gamma(1.0, 2.0, (61, 3)) + 100.0
    return places, true, true + rng.normal(size=(61, 3))


def test_by_definition(scattered):
    places, true, predicted = scattered
    expected = [
        plain_ssim(true[:, k], predicted[:, k], places, 2.5, np.ptp(true[:, k])) for k in range(3)
    ]
    found = st.metrics.ssim(true, predicted, places, sigma=2.5)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    ranged = st.metrics.ssim(true[:, 0], predicted[:, 0], places, sigma=2.5, data_range=3.0)
    assert ranged == pytest.approx(plain_ssim(true[:, 0], predicted[:, 0], places, 2.5, 3.0))
    assert type(ranged) is float


def test_default_window(scattered):
    places, true, predicted = scattered
    doubled, more = np.vstack([places, places[:1]]), np.vstack([true, true[:1]])
    apart = cdist(places, places)
    np.fill_diagonal(apart, np.inf)
    sigma = 1.5 * np.median(apart.min(axis=1))
    # A second cell at a place does not make the window narrower.
    found = st.metrics.ssim(more, np.vstack([predicted, predicted[:1]]), doubled)
    expected = st.metrics.ssim(more, np.vstack([predicted, predicted[:1]]), doubled, sigma=sigma)
    pd.testing.assert_series_equal(found, expected)


def test_on_a_grid_like_the_index_of_images(rng):
    side = 17
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    true = gaussian_filter(rng.random((side, side)), 1.0)
    predicted = true + 0.05 * rng.normal(size=(side, side))
    c1, c2 = ((share * np.ptp(true)) ** 2 for share in (0.01, 0.03))

    def blurred(image):
        return gaussian_filter(image, 1.5, truncate=3.5)

    mx, my = blurred(true), blurred(predicted)
    vx, vy = blurred(true**2) - mx**2, blurred(predicted**2) - my**2
    cov = blurred(true * predicted) - mx * my
    image = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))

    places = np.column_stack([x.ravel(), y.ravel()]).astype(float)
    found = similarity_index(
        gaussian_windows(places, None),
        true.reshape(-1, 1),
        predicted.reshape(-1, 1),
        np.array([np.ptp(true)]),
    )
    # Closer to the border the image is mirrored, and a window of places ends.
    inner = (slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(found.reshape(side, side)[inner], image[inner], atol=2e-3)
    assert st.metrics.ssim(true.ravel(), predicted.ravel(), places) == pytest.approx(found.mean())


def test_properties(scattered):
    places, true, predicted = scattered
    np.testing.assert_allclose(st.metrics.ssim(true, true, places), 1.0)
    score = st.metrics.ssim(true, predicted, places)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    np.testing.assert_allclose(
        st.metrics.ssim(true, predicted, 7 * places @ turn + 3), score, rtol=1e-9
    )
    np.testing.assert_allclose(st.metrics.ssim(9 * true, 9 * predicted, places), score)
    assert (score < 1.0).all()
    shifted = st.metrics.ssim(true, true + 50.0, places)
    assert (shifted < 0.95).all()
    assert (st.metrics.ssim(true - 100, 200 - (true - 100), places) < 0.2).all()


def test_place_matters(rng):
    places = np.column_stack([np.arange(60.0), np.zeros(60)])
    true = np.sin(np.arange(60) / 9)
    # The same error, spread over the map or far below its scale of variation.
    smooth, rough = true + 0.3 * np.sin(np.arange(60) / 30), true + 0.3 * (-1.0) ** np.arange(60)
    assert st.metrics.ssim(true, smooth, places) > st.metrics.ssim(true, rough, places) + 0.1
    shuffled = rng.permutation(60)
    assert (
        abs(st.metrics.ssim(true, rough, places) - st.metrics.ssim(true, rough, places[shuffled]))
        > 0.1
    )


def test_chunks_do_not_matter(scattered, monkeypatch):
    places, true, predicted = scattered
    whole = st.metrics.ssim(true, predicted, places)
    monkeypatch.setattr(maps, "_CHUNK", 13)
    pd.testing.assert_series_equal(st.metrics.ssim(true, predicted, places), whole)


def test_constant_map():
    places = np.arange(6.0).reshape(3, 2)
    assert np.isnan(st.metrics.ssim([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], places))
    assert st.metrics.ssim([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], places) < 0.2


def test_bad_input():
    places, values = np.arange(6.0).reshape(3, 2), [1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match=r"each of the 3 rows; found the shape \(2, 2\)"):
        st.metrics.ssim(values, values, places[:2])
    with pytest.raises(ValueError, match="with 1 NaN or infinite values"):
        st.metrics.ssim(values, values, np.where(places == 2, np.nan, places))
    with pytest.raises(ValueError, match="All 3 rows lie at one position"):
        st.metrics.ssim(values, values, np.ones((3, 2)))
    with pytest.raises(ValueError, match="sigma must be positive, found 0"):
        st.metrics.ssim(values, values, places, sigma=0)
    with pytest.raises(ValueError, match=r"data_range must be positive, found -1\.0"):
        st.metrics.ssim(values, values, places, data_range=-1.0)
