from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays
from scipy import sparse, stats
from scipy.spatial import distance
from sklearn.metrics import mean_absolute_error, root_mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity

import stofm as st
from stofm.metrics import values

counts = some.integers(2, 9).flatmap(
    lambda n: some.tuples(*[arrays(float, (n, 3), elements=some.integers(0, 5))] * 2)
)


@settings(deadline=None, max_examples=60)
@given(counts)
def test_like_scipy_and_scikit_learn(pair):
    true, predicted = pair
    for name in ("pearson", "spearman"):
        scores = getattr(st.metrics, name)(true, predicted)
        for k in range(3):
            x, y = true[:, k], predicted[:, k]
            if np.ptp(x) == 0:
                assert np.isnan(scores[k])
            elif np.ptp(y) == 0:
                assert scores[k] == 0.0
            else:
                expected = getattr(stats, f"{name}r")(x, y).statistic
                assert scores[k] == pytest.approx(expected, abs=1e-12)
    per_column = {"multioutput": "raw_values"}
    np.testing.assert_allclose(
        st.metrics.rmse(true, predicted), root_mean_squared_error(true, predicted, **per_column)
    )
    np.testing.assert_allclose(
        st.metrics.mae(true, predicted), mean_absolute_error(true, predicted, **per_column)
    )
    similarity = np.diag(cosine_similarity(true.T, predicted.T))
    expected = np.where(true.any(axis=0), similarity, np.nan)
    np.testing.assert_allclose(st.metrics.cosine(true, predicted), expected)


def _scipys_divergence(true, predicted, axis):
    # Between equal distributions SciPy may take the root of a rounding error below 0.
    with np.errstate(invalid="ignore"):
        found = distance.jensenshannon(true, predicted, axis=axis, base=2.0)
    return np.nan_to_num(found, nan=0.0) ** 2


@settings(deadline=None, max_examples=60)
@given(counts)
@example((np.zeros((2, 6)), np.ones((2, 6))))
def test_jensen_shannon_like_scipy(pair):
    true, predicted = pair[0] + 1e-9, pair[1] + 1e-9
    for per, axis in (("row", 1), ("column", 0)):
        found = st.metrics.jensen_shannon(true, predicted, per=per)
        np.testing.assert_allclose(found, _scipys_divergence(true, predicted, axis), atol=1e-12)


def test_vectors_give_numbers():
    true, predicted = [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]
    for name in ("pearson", "spearman", "rmse", "mae", "cosine", "jensen_shannon"):
        assert type(getattr(st.metrics, name)(true, predicted)) is float
    assert st.metrics.rmse(true, predicted) == pytest.approx(np.sqrt(1 / 3))
    assert st.metrics.mae(true, predicted) == pytest.approx(1 / 3)
    assert st.metrics.cosine(true, predicted) == pytest.approx(23 / np.sqrt(21 * 26))
    assert st.metrics.spearman(true, predicted) == pytest.approx(1.0)
    # Deviations -4, -1, 5 and -5, 1, 4 in thirds.
    assert st.metrics.pearson(true, predicted) == pytest.approx(39 / 42)


def test_rows_are_columns_of_the_transpose(rng):
    true, predicted = rng.random((5, 7)), rng.random((5, 7))
    for name in ("pearson", "spearman", "rmse", "mae", "cosine", "jensen_shannon"):
        score = getattr(st.metrics, name)
        pd.testing.assert_series_equal(
            score(true, predicted, per="row"), score(true.T, predicted.T, per="column")
        )


def test_constant_genes_are_counted_as_documented():
    true = np.array([[1.0, 5.0, 0.0], [2.0, 5.0, 1.0], [4.0, 5.0, 3.0]])
    predicted = np.array([[1.0, 1.0, 2.0], [2.0, 3.0, 2.0], [4.0, 2.0, 2.0]])
    for score in (st.metrics.pearson, st.metrics.spearman):
        scores = score(true, predicted)
        np.testing.assert_allclose(scores, [1.0, np.nan, 0.0])
        assert scores.mean() == pytest.approx(0.5)


def test_rounding_is_no_variation():
    true = np.array([1.0, 2.0, 3.0])
    assert st.metrics.pearson(true, np.array([0.3, 0.1 + 0.2, 0.3])) == 0.0
    assert np.isnan(st.metrics.pearson(np.array([0.3, 0.1 + 0.2, 0.3]), true))


def test_correlation_of_very_small_and_large_values():
    true = np.array([1.0, 2.0, 4.0, 3.0])
    for scale in (1e-200, 1e200):
        assert st.metrics.pearson(true, scale * true) == pytest.approx(1.0)
        assert st.metrics.cosine(true, scale * true) == pytest.approx(1.0)


def test_nothing_measured_and_nothing_predicted():
    nothing, something = np.zeros(3), np.array([0.2, 0.3, 0.5])
    assert np.isnan(st.metrics.cosine(nothing, something))
    assert st.metrics.cosine(something, nothing) == 0.0
    assert np.isnan(st.metrics.jensen_shannon(nothing, something))
    assert st.metrics.jensen_shannon(something, nothing) == 1.0


def test_jensen_shannon_takes_shares_of_the_sum():
    true, predicted = np.array([[2.0, 6.0]]), np.array([[1.0, 1.0]])
    p, q, middle = np.array([0.25, 0.75]), np.array([0.5, 0.5]), np.array([0.375, 0.625])
    expected = (p @ np.log2(p / middle) + q @ np.log2(q / middle)) / 2
    assert st.metrics.jensen_shannon(true, predicted)[0] == pytest.approx(expected)


def test_jensen_shannon_of_what_is_no_distribution():
    with pytest.raises(ValueError, match=r"never negative; found -0\.5"):
        st.metrics.jensen_shannon([0.5, 0.5], [1.5, -0.5])


def test_one_value_can_not_be_correlated():
    with pytest.raises(ValueError, match="at least 2 values for each column; found 1"):
        st.metrics.pearson(np.ones((1, 4)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="at least 2 values for each row; found 1"):
        st.metrics.spearman(np.ones((4, 1)), np.ones((4, 1)), per="row")


def test_frames_are_paired_by_names(rng):
    true = pd.DataFrame(rng.random((7, 3)), columns=list("abc"), index=[f"c{k}" for k in range(7)])
    shuffled = true.iloc[::-1][["c", "a", "b"]]
    scores = st.metrics.rmse(true, shuffled)
    assert scores.index.tolist() == ["a", "b", "c"]
    assert scores.tolist() == [0.0, 0.0, 0.0]
    assert st.metrics.rmse(true, shuffled.to_numpy()).min() > 0
    by_cell = st.metrics.mae(true, shuffled, per="row")
    assert by_cell.index.tolist() == true.index.tolist()


def test_other_columns_are_refused(rng):
    true = pd.DataFrame(rng.random((4, 2)), columns=["a", "b"])
    with pytest.raises(ValueError, match=r"columns .* \['b', 'c'\] are in one of them only"):
        st.metrics.pearson(true, true.rename(columns={"b": "c"}))


def test_a_frame_and_an_array_keep_the_names(rng):
    predicted = pd.DataFrame(rng.random((4, 2)), columns=["a", "b"])
    assert st.metrics.pearson(predicted.to_numpy(), predicted).index.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("true", "predicted", "error", "message"),
    [
        ([1.0, 2.0], [1.0], ValueError, r"y_true has the shape \(2,\) and y_pred \(1,\)"),
        (np.ones((0, 2)), np.ones((0, 2)), ValueError, "at least one value"),
        ([1.0, np.nan], [1.0, 2.0], ValueError, "1 of 2 values of y_true are NaN or infinite"),
        ([1.0, 2.0], [np.inf, 2.0], ValueError, "1 of 2 values of y_pred are NaN or infinite"),
        (["a", "b"], [1.0, 2.0], TypeError, "y_true must hold numbers; found the type <U1"),
        (sparse.csr_matrix(np.eye(2)), np.eye(2), TypeError, r"sparse; pass the columns .*toarray"),
    ],
)
def test_values_that_are_no_values(true, predicted, error, message):
    with pytest.raises(error, match=message):
        st.metrics.rmse(true, predicted)


def test_unknown_per():
    with pytest.raises(ValueError, match="per must be 'column' or 'row', found 'gene'"):
        st.metrics.rmse(np.ones((2, 2)), np.ones((2, 2)), per="gene")


def test_blocks_do_not_matter(rng, monkeypatch):
    true, predicted = rng.random((11, 7)), rng.random((11, 7))
    whole = {per: st.metrics.spearman(true, predicted, per=per) for per in ("column", "row")}
    monkeypatch.setattr(values, "_BLOCK", 23)
    for per, expected in whole.items():
        pd.testing.assert_series_equal(st.metrics.spearman(true, predicted, per=per), expected)


def test_single_precision_is_computed_in_double():
    true = np.array([1e4, 1e4 + 1], dtype=np.float32)
    assert st.metrics.rmse(true, true + np.float32(0.5)) == 0.5
    assert st.metrics.pearson(true, true) == pytest.approx(1.0, abs=1e-15)
