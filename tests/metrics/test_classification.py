from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.metrics import accuracy_score, f1_score

import stofm as st

labels = some.lists(
    some.tuples(some.sampled_from("abcd"), some.sampled_from("abcde")), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=50)
@given(labels)
def test_like_scikit_learn(pairs):
    true, found = map(list, zip(*pairs, strict=True))
    assert st.metrics.accuracy(true, found) == pytest.approx(accuracy_score(true, found))
    options = {"average": "macro", "zero_division": 0}
    assert st.metrics.macro_f1(true, found, classes="union") == pytest.approx(
        f1_score(true, found, **options)
    )
    assert st.metrics.macro_f1(true, found) == pytest.approx(
        f1_score(true, found, labels=sorted(set(true)), **options)
    )
    assert st.metrics.weighted_f1(true, found) == pytest.approx(
        f1_score(true, found, average="weighted", zero_division=0)
    )


def test_by_hand():
    true, found = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    # a: precision 1, recall 2/3; b: precision 1/2, recall 1.
    f1 = {"a": 4 / 5, "b": 2 / 3}
    assert st.metrics.macro_f1(true, found) == pytest.approx((f1["a"] + f1["b"]) / 2)
    assert st.metrics.weighted_f1(true, found) == pytest.approx((3 * f1["a"] + f1["b"]) / 4)
    assert st.metrics.macro_f1(true, found, classes=["b"]) == pytest.approx(f1["b"])


def test_class_that_occurs_in_predictions_only():
    true, found = ["a", "a", "b"], ["a", "a", "c"]
    assert st.metrics.macro_f1(true, found) == pytest.approx(1 / 2)
    assert st.metrics.macro_f1(true, found, classes="union") == pytest.approx(1 / 3)


def test_no_prediction_is_no_class():
    true, found = ["a", "a", "b", "b"], ["a", None, "b", "unknown"]
    scores = [
        st.metrics.macro_f1(true, found, classes=classes, missing=["unknown"])
        for classes in ("true", "union")
    ]
    # Of both classes precision 1 and recall 1/2.
    np.testing.assert_allclose(scores, 2 / 3)


def test_names_of_classes_do_not_matter():
    true, found = np.array([3, 3, 7, 7, 9]), np.array([3, 7, 7, 7, 3])
    names = {3: "x", 7: "a", 9: "m"}
    renamed = [[names[k] for k in y] for y in (true, found)]
    assert st.metrics.macro_f1(true, found) == st.metrics.macro_f1(*renamed)


def test_unknown_classes_are_refused():
    with pytest.raises(ValueError, match="classes must be 'true', 'union' or a list"):
        st.metrics.macro_f1(["a"], ["a"], classes="all")
    with pytest.raises(ValueError, match=r"classes holds \['z'\]; expected classes that occur"):
        st.metrics.macro_f1(["a"], ["a"], classes=["a", "z"])
    with pytest.raises(ValueError, match="classes holds nothing"):
        st.metrics.macro_f1(["a"], ["a"], classes=[])
