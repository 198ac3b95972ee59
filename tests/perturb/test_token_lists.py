from __future__ import annotations

import numpy as np
import pytest

from stofm.corpus.reader import take_cells
from stofm.genes import RankedTokens
from stofm.perturb.tissue import cells_of, delete, put_first


def lists(ranked):
    return [one.tolist() for one in np.split(ranked.tokens, ranked.offsets[1:-1])]


def values(ranked):
    return [one.tolist() for one in np.split(ranked.values, ranked.offsets[1:-1])]


@pytest.fixture
def three():
    """Three cells, the second without genes."""
    return RankedTokens(
        np.array([5, 3, 9, 4, 5], dtype=np.int32),
        np.array([0, 3, 3, 5]),
        np.array([7.0, 6.0, 2.0, 8.0, 3.0], dtype=np.float32),
    )


def test_cells_are_taken_in_any_order_and_twice(three):
    found = take_cells(three, np.array([2, 1, 0, 2]))
    assert lists(found) == [[4, 5], [], [5, 3, 9], [4, 5]]
    assert values(found)[0] == [8.0, 3.0]
    assert lists(take_cells(three.without_values(), np.array([0]))) == [[5, 3, 9]]
    assert cells_of(three).tolist() == [0, 0, 0, 2, 2]


def test_deleted_genes_are_gone_and_others_keep_order_and_value(three):
    found = delete(three, np.array([5, 9]))
    assert lists(found) == [[3], [], [4]]
    assert values(found) == [[6.0], [], [8.0]]
    assert delete(three, np.array([77])).equals(three)


def test_a_gene_put_first_leads_with_the_value_of_the_former_first(three):
    found = put_first(three, 5)
    assert lists(found) == [[5, 3, 9], [5], [5, 4]]
    assert values(found) == [[7.0, 6.0, 2.0], [1.0], [8.0, 8.0]]
    assert lists(put_first(three.without_values(), 77)) == [[77, 5, 3, 9], [77], [77, 4, 5]]
