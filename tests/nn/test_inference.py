from __future__ import annotations

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import embed_slice, encode_cells
from stofm.nn.inference import _halving, describe_bytes, device_memory, host_memory, padded_length
from stofm.spatial import SubSliceConfig, lay_out_slice

CPU = torch.device("cpu")


@pytest.fixture
def tokens(rng):
    lists = [rng.permutation(np.arange(2, 69))[:n] for n in [0, 0, 0, *rng.integers(0, 60, 94)]]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])])
    return RankedTokens(np.concatenate(lists).astype(np.int32), offsets.astype(np.int64))


def encode(model, tokens, **options):
    return encode_cells(model.cell_encoder, tokens, model.vocabulary, device=CPU, **options)


def take(tokens, rows):
    lists = [tokens.tokens[tokens.offsets[r] : tokens.offsets[r + 1]] for r in rows]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])])
    return RankedTokens(np.concatenate(lists), offsets.astype(np.int64))


def test_padded_length_grows_in_steps_and_wastes_little():
    n = np.arange(1, 2049)
    padded = padded_length(n)
    assert (padded >= n).all()
    assert (np.diff(padded) >= 0).all()
    assert ((padded - n) / padded)[n >= 64].max() <= 0.12
    assert len(np.unique(padded)) < 60


@pytest.mark.parametrize("budget", [1, 100, 3000])
def test_token_budget_changes_no_bit(model, tokens, budget):
    np.testing.assert_array_equal(encode(model, tokens, token_budget=budget), encode(model, tokens))


def test_order_and_company_of_cells_change_no_bit(model, tokens, rng):
    expected = encode(model, tokens)
    rows = rng.permutation(97)[:31]
    np.testing.assert_array_equal(encode(model, take(tokens, rows)), expected[rows])


def test_cells_without_genes_are_embedded_from_cls(model, tokens):
    lengths = tokens.n_tokens
    assert (lengths == 0).sum() >= 2
    out = encode(model, tokens)
    empty = out[lengths == 0]
    np.testing.assert_array_equal(empty, np.broadcast_to(empty[0], empty.shape))
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1.0, atol=1e-6)


def test_long_cells_are_cut_like_the_reference(model):
    limit = model.config.cell_encoder.max_positions
    long = np.arange(2, 69, dtype=np.int32)
    both = np.concatenate([long, long[: limit - 1]])
    out = encode(model, RankedTokens(both, np.array([0, len(long), len(both)])))
    np.testing.assert_array_equal(out[0], out[1])


def test_bfloat16_is_near_and_leaves_the_model_in_float32(model, tokens):
    near = encode(model, tokens, dtype=torch.bfloat16)
    assert near.dtype == np.float32
    assert 0 < np.abs(near - encode(model, tokens)).max() < 0.1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def slice_(rng):
    xy = rng.random((157, 2)) * 90
    features = rng.normal(size=(157, 12)).astype(np.float32)
    rules = SubSliceConfig(n_cells=40, n_neighbors=9)
    return lay_out_slice(xy, features, rules), features, rules


@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_batch_size_changes_nothing(model, slice_, batch_size):
    expected = embed_slice(model.se2_transformer, *slice_, device=CPU)
    out = embed_slice(model.se2_transformer, *slice_, device=CPU, batch_size=batch_size)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_transformer_in_bfloat16_leaves_the_model_in_float32(model, slice_):
    expected = embed_slice(model.se2_transformer, *slice_, device=CPU)
    near = embed_slice(model.se2_transformer, *slice_, device=CPU, dtype=torch.bfloat16)
    assert 0 < np.abs(near - expected).max() < 0.3
    assert {p.dtype for p in model.parameters()} == {torch.float32}


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", SHORTAGES)
def test_memory_shortage_halves_batches(error):
    done = []

    def run(items):
        if len(items) > 3:
            raise error
        done.extend(items.tolist())

    _halving(run, np.arange(13), "batch_size")
    assert done == list(range(13))


@pytest.mark.parametrize("error", SHORTAGES)
def test_memory_shortage_with_one_item_says_what_to_lower(error):
    def run(items):
        raise error

    with pytest.raises(MemoryError, match="lower token_budget, or use device='cpu'"):
        _halving(run, np.arange(4), "token_budget")


def test_another_error_is_no_memory_shortage():
    def run(items):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _halving(run, np.arange(4), "token_budget")


def test_estimates_grow_with_the_work(model):
    small = device_memory(model.se2_transformer, 500, 1)
    assert device_memory(model.se2_transformer, 1000, 1) > 2 * small
    assert device_memory(model.se2_transformer, 500, 4) == 4 * small
    assert host_memory(model.se2_transformer, 2000, 40) == 2 * host_memory(
        model.se2_transformer, 1000, 40
    )


@pytest.mark.parametrize(
    ("n", "text"), [(7, "7 bytes"), (2_500, "2 kB"), (3_000_000, "3 MB"), (12e9, "12.0 GB")]
)
def test_bytes_are_described(n, text):
    assert describe_bytes(n) == text
