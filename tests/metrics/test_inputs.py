from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st
from stofm.metrics import _inputs


def test_missing_truth_is_left_out_and_missing_prediction_is_wrong():
    true = ["a", None, "b", np.nan, "Unknown", "b"]
    found = ["a", "a", None, "b", "a", "b"]
    assert st.metrics.accuracy(true, found, missing=["Unknown"]) == pytest.approx(2 / 3)
    # Without the name it is a class like others.
    assert st.metrics.accuracy(true, found) == pytest.approx(2 / 4)


def test_series_are_paired_by_index():
    true = pd.Series(["a", "b", "b"], index=["x", "y", "z"])
    found = pd.Series(["b", "b", "a"], index=["z", "y", "x"])
    assert st.metrics.accuracy(true, found) == 1.0
    assert st.metrics.accuracy(true, found.to_numpy()) == pytest.approx(1 / 3)


def test_categoricals_are_read():
    true = pd.Series(["a", "b", None], dtype="category")
    assert st.metrics.accuracy(true, pd.Categorical(["a", "a", "b"])) == 0.5


def test_other_index_is_refused():
    true = pd.Series(["a", "b"], index=["x", "y"])
    with pytest.raises(ValueError, match=r"1 rows of y_true are not in y_pred \(\['y'\]\)"):
        st.metrics.accuracy(true, pd.Series(["a", "b"], index=["x", "w"]))
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        st.metrics.accuracy(true, pd.Series(["a", "b"], index=["x", "x"]))


def test_text_and_numbers_are_not_compared():
    with pytest.raises(TypeError, match=r"y_true holds \['1', '2'\], y_pred \[1, 2\]"):
        st.metrics.accuracy(["1", "2"], [1, 2])
    # Clusters have no names to compare.
    assert st.metrics.ari(["a", "a", "b"], [1, 1, 0]) == 1.0


def test_labels_that_are_no_labels():
    with pytest.raises(ValueError, match="2 labels and y_pred 3"):
        st.metrics.accuracy(["a", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="None of 2 cells has a true label"):
        st.metrics.accuracy([None, "?"], ["a", "b"], missing=["?"])
    with pytest.raises(ValueError, match=r"one label per cell; found the shape \(2, 1\)"):
        st.metrics.accuracy(np.array([["a"], ["b"]]), ["a", "b"])
    with pytest.raises(TypeError, match=r"text or numbers; y_pred holds \('a',\)"):
        st.metrics.accuracy(["a"], pd.Series([("a",)]))


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
    with pytest.raises(ValueError, match=r"1 columns of y_true are not in y_pred \(\['b'\]\)"):
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
    monkeypatch.setattr(_inputs, "_BLOCK", 23)
    for per, expected in whole.items():
        pd.testing.assert_series_equal(st.metrics.spearman(true, predicted, per=per), expected)


def test_single_precision_is_computed_in_double():
    true = np.array([1e4, 1e4 + 1], dtype=np.float32)
    assert st.metrics.rmse(true, true + np.float32(0.5)) == 0.5
    assert st.metrics.pearson(true, true) == pytest.approx(1.0, abs=1e-15)
