from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from stofm._categories import label_text

NUMBERS = pd.Series([1.0, np.nan, 0.0, 1.0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "Int64", "category", object])
def test_whole_numbers_are_the_same_however_they_are_stored(dtype):
    assert label_text(NUMBERS.astype(dtype)).tolist() == ["1", "", "0", "1"]


def test_other_labels():
    assert label_text(pd.Series(["b", None, "a"])).tolist() == ["b", "", "a"]
    assert label_text(pd.Series([True, False])).tolist() == ["True", "False"]
    assert label_text(pd.Series([0.5, np.inf])).tolist() == ["0.5", "inf"]
    assert label_text(pd.Series([None, None])).tolist() == ["", ""]
