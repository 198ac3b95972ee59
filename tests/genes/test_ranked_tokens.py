from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stofm.genes import RankedTokens


@pytest.fixture
def ranked(rng: np.random.Generator) -> RankedTokens:
    """13 cells with up to 11 tokens, one without any, with values."""
    lengths = rng.integers(0, 12, 13)
    lengths[4] = 0
    return RankedTokens(
        tokens=rng.integers(2, 30, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        values=rng.gamma(1.0, 2.0, lengths.sum()).astype(np.float32),
    )


def lists(ranked: RankedTokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(ranked.tokens, ranked.offsets[1:-1])]


def take(ranked: RankedTokens, start: int, stop: int) -> RankedTokens:
    places = slice(ranked.offsets[start], ranked.offsets[stop])
    return RankedTokens(
        tokens=ranked.tokens[places],
        offsets=ranked.offsets[start : stop + 1] - ranked.offsets[start],
        values=None if ranked.values is None else ranked.values[places],
    )


def test_matrix_of_tokens_and_back(ranked: RankedTokens) -> None:
    matrix = ranked.to_csr(41)
    assert matrix.shape == (13, 41)
    assert matrix.dtype == np.int32
    for row, cell in zip(matrix.toarray(), lists(ranked), strict=True):
        assert row[: len(cell)].tolist() == cell
        assert not row[len(cell) :].any()
    for back in (RankedTokens.from_csr(matrix), RankedTokens.from_csr(matrix.tocsc())):
        assert lists(back) == lists(ranked)
        assert back.values is None


def test_matrix_of_values_and_back(ranked: RankedTokens) -> None:
    tokens, values = ranked.to_csr(11), ranked.values_to_csr(11)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.indices, tokens.indices)
    np.testing.assert_array_equal(values.indptr, tokens.indptr)
    for matrix in (values, values.tocsc(), sparse.csr_array(values)):
        assert RankedTokens.from_csr(tokens).with_values(matrix).digest == ranked.digest


def test_values_of_other_tokens_are_refused(ranked: RankedTokens) -> None:
    shifted = ranked.values_to_csr(11)[::-1]
    with pytest.raises(ValueError, match="in other places than the tokens"):
        ranked.with_values(shifted)


def test_matrix_must_be_without_gaps() -> None:
    with pytest.raises(ValueError, match="empty places between tokens"):
        RankedTokens.from_csr(sparse.csr_matrix(np.array([[3, 0, 4]])))


@pytest.mark.parametrize(
    ("data", "indices", "message"),
    [
        ([3, 4, 5], [0, 0, 2], "empty places"),
        ([3, 4, 5], [0, 2, 2], "empty places"),
        ([3.0, 4.0, 5.5], [0, 1, 2], "must be positive integers, found the type float64"),
        ([3, -4, 5], [0, 1, 2], "positive integers, found the type int64 and -4"),
    ],
)
def test_tokens_that_stofm_did_not_write(data: list, indices: list, message: str) -> None:
    matrix = sparse.csr_matrix((np.array(data), np.array(indices), [0, 3]), shape=(1, 5))
    with pytest.raises(ValueError, match=message):
        RankedTokens.from_csr(matrix)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_must_be_numbers(ranked: RankedTokens, value: float) -> None:
    values = ranked.values_to_csr(11)
    values.data[7] = value
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        ranked.with_values(values)


def test_arrays_that_do_not_fit_are_refused() -> None:
    tokens = np.arange(3, dtype=np.int32)
    with pytest.raises(ValueError, match="offsets must rise"):
        RankedTokens(tokens, np.array([0, 2]))


@pytest.mark.parametrize("with_values", [True, False])
def test_concatenate_and_compare(ranked: RankedTokens, with_values: bool) -> None:
    whole = ranked if with_values else ranked.without_values()
    parts = [take(whole, *places) for places in ((0, 5), (5, 5), (5, 13))]
    joined = RankedTokens.concatenate(parts)
    assert lists(joined) == lists(whole)
    assert (joined.values is not None) == with_values
    assert joined.digest == whole.digest
    turned = RankedTokens.concatenate(parts[::-1])
    assert turned.digest != whole.digest
    assert RankedTokens.concatenate([]).n_cells == 0


def test_values_count_in_comparisons(ranked: RankedTokens) -> None:
    assert ranked.values is not None
    other = ranked.values.copy()
    other[3] = np.nextafter(other[3], np.float32(99))
    changed = RankedTokens(ranked.tokens, ranked.offsets, other)
    for one in (changed, ranked.without_values()):
        assert one.digest != ranked.digest


def test_head_keeps_the_first_tokens_of_each_cell(ranked: RankedTokens) -> None:
    first = ranked.head(3)
    assert lists(first) == [cell[:3] for cell in lists(ranked)]
    np.testing.assert_array_equal(
        first.values_to_csr(3).toarray(), ranked.values_to_csr(11).toarray()[:, :3]
    )
    assert ranked.head(11) is ranked
    assert ranked.without_values().head(3).values is None
