from __future__ import annotations

import pandas as pd
import pytest

from stofm.pl._colors import category_names, default_colors, nearest_names


@pytest.mark.parametrize("n_colors", [0, 1, 20, 21, 57, 120, 230])
def test_colors_are_distinct_as_far_as_scanpy_has_some(n_colors: int) -> None:
    colors = default_colors(n_colors)
    assert len(colors) == n_colors
    assert len(set(colors)) == min(n_colors, 122)


def test_natural_order_of_text_and_own_order_of_categories() -> None:
    text = category_names(pd.Series(["10", "2", None, "b", "1"], dtype=object))
    assert list(text.cat.categories) == ["1", "2", "10", "b"]
    assert list(text.cat.codes) == [2, 1, -1, 3, 0]
    own = category_names(pd.Series(pd.Categorical.from_codes([0, 1], [10, 2])))
    assert list(own.cat.categories) == ["10", "2"]


def test_nearest_names() -> None:
    assert nearest_names("erbb2", ["ERBB2", "KRT8"]) == " Nearest: ['ERBB2']."
    assert nearest_names("zzz", ["a", "b"]) == " There are: ['a', 'b']."
    assert nearest_names("zzz", [f"k{i}" for i in range(30)]).endswith("...")
