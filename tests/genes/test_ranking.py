from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from stofm.genes import RankedTokens, rank_genes

GOLDEN = Path(__file__).parents[1] / "golden"


def plain_ranks(
    counts: np.ndarray, tokens: np.ndarray, medians: np.ndarray, max_tokens: int
) -> list[list[int]]:
    """One cell after another, one gene after another."""
    cells = []
    for row in counts:
        values: dict[int, float] = {}
        for count, token, median in zip(row, tokens, medians, strict=True):
            if token >= 0 and count > 0:
                values[int(token)] = values.get(int(token), 0.0) + float(count) / median
        cells.append(sorted(values, key=lambda token: (-values[token], token))[:max_tokens])
    return cells


def lists(ranked: RankedTokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(ranked.tokens, ranked.offsets[1:-1])]


def random_case(
    rng: np.random.Generator, n_cells: int = 13, n_vars: int = 29
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = rng.poisson(rng.lognormal(-1, 1.5, n_vars), size=(n_cells, n_vars))
    counts[rng.integers(n_cells)] = 0
    tokens = rng.permutation(n_vars) + 2
    tokens[::7] = -1
    return counts, tokens, rng.lognormal(0, 1, n_vars)


@pytest.mark.parametrize("max_tokens", [3, 2048])
def test_order_is_that_of_a_plain_loop(rng: np.random.Generator, max_tokens: int) -> None:
    counts, tokens, medians = random_case(rng)
    ranked = rank_genes(sparse.csr_matrix(counts), tokens, medians, max_tokens=max_tokens)
    assert lists(ranked) == plain_ranks(counts, tokens, medians, max_tokens)
    assert ranked.tokens.dtype == np.int32
    assert ranked.offsets.dtype == np.int64


def test_many_rows_of_very_different_length(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stofm.genes.ranking._BLOCK_ENTRIES", 97)
    counts = rng.poisson(rng.lognormal(-2, 2, size=(53, 1)), size=(53, 71))
    tokens, medians = rng.permutation(71) + 2, rng.lognormal(0, 1, 71)
    ranked = rank_genes(sparse.csr_matrix(counts), tokens, medians)
    assert lists(ranked) == plain_ranks(counts, tokens, medians, 2048)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_cells=st.integers(1, 7), n_vars=st.integers(1, 11))
def test_columns_of_a_gene_are_summed(seed: int, n_cells: int, n_vars: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, size=(n_cells, n_vars))
    tokens = rng.integers(-1, 5, n_vars)
    tokens[tokens >= 0] += 2
    # Powers of two keep the sum of quotients in the plain loop exact.
    medians = 2.0 ** np.where(tokens >= 0, tokens, 0)
    ranked = rank_genes(sparse.csr_matrix(counts), tokens, medians)
    assert lists(ranked) == plain_ranks(counts, tokens, medians, 2048)


def test_duplicates_can_be_kept() -> None:
    counts = sparse.csr_matrix(np.array([[3, 5, 4, 9]]))
    tokens, medians = np.array([7, 2, 7, -1]), np.array([1.0, 1.0, 1.0, np.nan])
    assert rank_genes(counts, tokens, medians).tokens.tolist() == [7, 2]
    kept = rank_genes(counts, tokens, medians, duplicates="keep")
    assert kept.tokens.tolist() == [2, 7, 7]


def test_ties_are_ordered_by_token() -> None:
    counts = sparse.csr_matrix(np.array([[2, 1, 2, 4, 2]]))
    medians = np.array([2.0, 1.0, 2.0, 4.0, 2.0])
    tokens = np.array([6, 11, 3, 4, 5])
    assert rank_genes(counts, tokens, medians).tokens.tolist() == [3, 4, 5, 6, 11]


def test_order_of_columns_and_rows_does_not_matter(rng: np.random.Generator) -> None:
    counts, tokens, medians = random_case(rng)
    medians[:] = 1.0  # many ties
    columns, rows = rng.permutation(counts.shape[1]), rng.permutation(len(counts))
    straight = rank_genes(sparse.csr_matrix(counts), tokens, medians)
    shuffled = rank_genes(
        sparse.csr_matrix(counts[rows][:, columns]), tokens[columns], medians[columns]
    )
    assert [lists(straight)[row] for row in rows] == lists(shuffled)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float32", "float64"])
def test_types_of_counts_give_the_same(rng: np.random.Generator, dtype: str) -> None:
    counts, tokens, medians = random_case(rng)
    counts = np.minimum(counts, 1 if dtype == "bool" else 100)
    expected = rank_genes(sparse.csr_matrix(counts), tokens, medians)
    ranked = rank_genes(sparse.csr_matrix(counts.astype(dtype)), tokens, medians)
    assert lists(ranked) == lists(expected)


def test_stored_zeros_and_repeated_entries() -> None:
    matrix = sparse.csr_matrix(
        (np.array([1, 0, 2, -0.0, 3]), np.array([2, 1, 2, 0, 0]), np.array([0, 3, 5])),
        shape=(2, 3),
    )
    ranked = rank_genes(matrix, np.array([2, 3, 4]), np.array([1.0, 1.0, 1.0]))
    assert lists(ranked) == [[4], [2]]
    assert matrix.nnz == 5  # the input is as it was


def test_cells_without_defined_counts_are_empty() -> None:
    counts = sparse.csr_matrix(np.array([[1, np.nan], [2, 3], [0, 0], [np.inf, 1]]))
    ranked = rank_genes(counts, np.array([2, 3]), np.array([1.0, 1.0]))
    assert ranked.n_tokens.tolist() == [0, 2, 0, 0]


def test_no_cells_and_no_known_genes() -> None:
    none = rank_genes(sparse.csr_matrix((0, 3)), np.array([2, 3, 4]), np.ones(3))
    assert none.n_cells == 0
    unknown = rank_genes(sparse.csr_matrix(np.ones((2, 3))), np.full(3, -1), np.full(3, np.nan))
    assert unknown.n_tokens.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.array([2, 3])}, "3 columns, but token_ids has shape"),
        ({"medians": np.array([1.0, 0.0, 1.0])}, "must be positive and finite"),
        ({"medians": np.array([1.0, np.nan, 1.0])}, "must be positive and finite"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, found 0"),
        ({"duplicates": "first"}, "duplicates must be 'sum' or 'keep', found 'first'"),
        ({"counts": sparse.csr_matrix(np.array([[1, -1, 0]]))}, "must not be negative"),
    ],
)
def test_unusable_arguments(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "counts": sparse.csr_matrix(np.array([[1, 2, 3]])),
        "token_ids": np.array([2, 3, 4]),
        "medians": np.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        rank_genes(**(arguments | change))  # type: ignore[arg-type]


def plain_values(
    counts: np.ndarray, tokens: np.ndarray, medians: np.ndarray, power: float
) -> list[list[float]]:
    """Values of each cell in descending order, one column after another."""
    cells = []
    for row in counts.astype(float):
        values: dict[int, float] = {}
        for count, token, median in zip(row, tokens, medians, strict=True):
            if token >= 0 and count > 0:
                value = count * (10_000 / row.sum()) ** power / median
                values[int(token)] = values.get(int(token), 0.0) + value
        cells.append(sorted(values.values(), reverse=True))
    return cells


@pytest.mark.parametrize("max_tokens", [3, 2048])
@pytest.mark.parametrize("power", [1.0, 0.75, 0.0])
def test_values_are_those_of_a_plain_loop(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, max_tokens: int, power: float
) -> None:
    monkeypatch.setattr("stofm.genes.ranking._BLOCK_ENTRIES", 97)
    counts, tokens, medians = random_case(rng, n_cells=41)
    matrix = sparse.csr_matrix(counts)
    options = {"max_tokens": max_tokens, "values": True, "depth_power": power}
    ranked = rank_genes(matrix, tokens, medians, **options)
    plain = rank_genes(matrix, tokens, medians, max_tokens=max_tokens)
    assert ranked.without_values().digest == plain.digest
    assert ranked.values is not None
    assert ranked.values.dtype == np.float32
    for cell, expected in enumerate(plain_values(counts, tokens, medians, power)):
        own = ranked.values[ranked.offsets[cell] : ranked.offsets[cell + 1]]
        np.testing.assert_allclose(own, expected[:max_tokens], rtol=1e-7)


def test_values_of_columns_of_one_gene() -> None:
    counts = sparse.csr_matrix(np.array([[3, 5, 4, 8]]))  # 20 in all, 8 of them unknown
    tokens, medians = np.array([7, 2, 7, -1]), np.array([2.0, 1.0, 2.0, np.nan])
    summed = rank_genes(counts, tokens, medians, values=True)
    assert summed.tokens.tolist() == [2, 7]
    assert summed.values is not None
    assert summed.values.tolist() == [2500, 1750]
    kept = rank_genes(counts, tokens, medians, duplicates="keep", values=True)
    assert kept.tokens.tolist() == [2, 7, 7]
    assert kept.values is not None
    assert kept.values.tolist() == [2500, 1000, 750]


def test_order_of_columns_and_rows_does_not_change_a_bit_of_values(
    rng: np.random.Generator,
) -> None:
    counts, tokens, medians = random_case(rng)
    columns, rows = rng.permutation(counts.shape[1]), rng.permutation(len(counts))
    straight = rank_genes(sparse.csr_matrix(counts), tokens, medians, values=True)
    shuffled = rank_genes(
        sparse.csr_matrix(counts[rows][:, columns]), tokens[columns], medians[columns], values=True
    )
    assert straight.values is not None
    assert shuffled.values is not None
    own = np.split(straight.values, straight.offsets[1:-1])
    np.testing.assert_array_equal(np.concatenate([own[row] for row in rows]), shuffled.values)


def test_values_of_nothing() -> None:
    undefined = sparse.csr_matrix(np.array([[1, np.nan], [0, 0]]))
    for counts in (undefined, sparse.csr_matrix((0, 2))):
        ranked = rank_genes(counts, np.array([2, 3]), np.ones(2), values=True)
        assert ranked.values is not None
        assert ranked.values.tolist() == []
        assert ranked.n_cells == counts.shape[0]


# Golden numbers: tests/golden/README.md, file a.


def golden_counts(arrays: np.lib.npyio.NpzFile) -> sparse.csr_matrix:
    names = ("counts_data", "counts_indices", "counts_indptr")
    return sparse.csr_matrix(
        tuple(arrays[name] for name in names), shape=tuple(arrays["counts_shape"])
    )


def values_in_order(
    row: np.ndarray, total: float, arrays: np.lib.npyio.NpzFile, tokens: np.ndarray
) -> np.ndarray:
    """Value of each token of a cell; the k-th of equal tokens gets the k-th largest."""
    quotient = (row / np.float32(total) * np.float32(10_000)).astype(np.float64)
    values: dict[int, list[float]] = {}
    for token, value in zip(arrays["token_id"], quotient / arrays["median"], strict=True):
        values.setdefault(int(token), []).append(float(value))
    ranked = {token: iter(sorted(found, reverse=True)) for token, found in values.items()}
    return np.array([next(ranked[int(token)]) for token in tokens])


def check_cells(
    ranked: RankedTokens,
    rows: np.ndarray,
    arrays: np.lib.npyio.NpzFile,
    tokens: str,
    offsets: str,
) -> None:
    counts = golden_counts(arrays).toarray()
    starts, value_starts = arrays[offsets], arrays["tokens_offsets"]
    for cell, row in enumerate(rows):
        own = ranked.tokens[ranked.offsets[cell] : ranked.offsets[cell + 1]]
        expected = arrays[tokens][starts[cell] : starts[cell + 1]]
        assert sorted(own) == sorted(expected)
        values = arrays["values_flat"][value_starts[cell] : value_starts[cell] + len(own)]
        own_values = values_in_order(counts[row], arrays["n_counts"][row], arrays, own)
        np.testing.assert_allclose(own_values, values, rtol=1e-6)


def test_golden_tokens() -> None:
    arrays = np.load(GOLDEN / "a_tokenizer.npz", allow_pickle=False)
    rows = np.flatnonzero(arrays["filter_pass"])
    assert np.array_equal(rows, arrays["cell_row"])
    ranked = rank_genes(
        golden_counts(arrays)[rows],
        arrays["token_id"],
        arrays["median"],
        max_tokens=2048,
        duplicates="keep",
    )
    check_cells(ranked, rows, arrays, "tokens_flat", "tokens_offsets")
    assert np.array_equal(ranked.n_tokens, arrays["length"])


def test_golden_values() -> None:
    arrays = np.load(GOLDEN / "a_tokenizer.npz", allow_pickle=False)
    ranked = rank_genes(
        golden_counts(arrays)[arrays["cell_row"]],
        arrays["token_id"],
        arrays["median"],
        duplicates="keep",
        values=True,
    )
    assert ranked.values is not None
    # Float32 arithmetic in the reference.
    np.testing.assert_allclose(ranked.values, arrays["values_flat"], rtol=1e-6)


def test_golden_tokens_behind_cls() -> None:
    """With <cls> in front a full cell keeps one gene fewer than the limit."""
    arrays = np.load(GOLDEN / "a_tokenizer.npz", allow_pickle=False)
    limit, cls = int(arrays["max_len_small"]), int(arrays["special_ids"][2])
    counts = golden_counts(arrays)[arrays["cell_row"]]
    ranked = rank_genes(
        counts, arrays["token_id"], arrays["median"], max_tokens=limit - 1, duplicates="keep"
    )
    starts, value_starts = arrays["cls_capped_offsets"], arrays["tokens_offsets"]
    totals = arrays["n_counts"][arrays["cell_row"]]
    for cell, own in enumerate(lists(ranked)):
        expected = arrays["cls_capped_flat"][starts[cell] : starts[cell + 1]]
        assert len(expected) == 1 + len(own)
        assert expected[0] == cls
        values = arrays["values_flat"][value_starts[cell] : value_starts[cell] + len(own)]
        row = counts[cell].toarray().ravel()
        own_values = values_in_order(row, totals[cell], arrays, np.array(own))
        np.testing.assert_allclose(own_values, values, rtol=1e-6)


def test_golden_tokens_of_long_cells(shared: Path) -> None:
    arrays = np.load(shared / "golden" / "a_tokenizer_long.npz", allow_pickle=False)
    rows = np.arange(len(arrays["tokens_offsets"]) - 1)
    ranked = rank_genes(golden_counts(arrays), arrays["token_id"], arrays["median"])
    check_cells(ranked, rows, arrays, "dataset_flat", "dataset_offsets")
    whole = rank_genes(golden_counts(arrays), arrays["token_id"], arrays["median"], max_tokens=2600)
    check_cells(whole, rows, arrays, "tokens_flat", "tokens_offsets")


# Tokens of many cells


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
