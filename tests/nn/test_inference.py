from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import Stofm, TokenBatch, embed_slice, encode_cells
from stofm.nn.inference import _halving, padded_length, refuse_not_finite
from stofm.spatial import SubSliceConfig, lay_out_slice

CPU = torch.device("cpu")


POOLED = {"pooled": True, "d_gene": 8}
OPTIONS = [{}, {"values": "log"}, POOLED, {"values": "log", **POOLED}]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda chosen: "+".join(chosen) or "off")


def with_options(model, options):
    """A model of other options, with no number at 0."""
    cell_encoder = replace(model.config.cell_encoder, **options)
    other = Stofm(replace(model.config, cell_encoder=cell_encoder), model.vocabulary, seed=5).eval()
    if cell_encoder.values == "log":
        torch.nn.init.normal_(other.cell_encoder.value_embedding.weight, std=0.2)
    if cell_encoder.pooled:
        torch.nn.init.normal_(other.cell_encoder.gene_embeddings.weight)
        torch.nn.init.normal_(other.cell_encoder.gene_offset)
    return other


@pytest.fixture
def tokens(rng):
    lists = [rng.permutation(np.arange(2, 69))[:n] for n in [0, 0, 0, *rng.integers(0, 60, 94)]]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])])
    return RankedTokens(
        np.concatenate(lists).astype(np.int32),
        offsets.astype(np.int64),
        rng.gamma(1.0, 3.0, offsets[-1]).astype(np.float32),
    )


def encode(model, tokens, **options):
    return encode_cells(model.cell_encoder, tokens, model.vocabulary, device=CPU, **options)


def take(tokens, rows):
    lists = [tokens.tokens[tokens.offsets[r] : tokens.offsets[r + 1]] for r in rows]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in lists])])
    values = [tokens.values[tokens.offsets[r] : tokens.offsets[r + 1]] for r in rows]
    return RankedTokens(np.concatenate(lists), offsets.astype(np.int64), np.concatenate(values))


def test_padded_length_grows_in_steps_and_wastes_little():
    n = np.arange(1, 2049)
    padded = padded_length(n)
    assert (padded >= n).all()
    assert (np.diff(padded) >= 0).all()
    assert ((padded - n) / padded)[n >= 64].max() <= 0.12
    assert len(np.unique(padded)) < 60


@options
@pytest.mark.parametrize("budget", [1, 100, 3000])
def test_token_budget_changes_no_bit(model, tokens, budget, options):
    model = with_options(model, options)
    np.testing.assert_array_equal(encode(model, tokens, token_budget=budget), encode(model, tokens))


@options
def test_order_and_company_of_cells_change_no_bit(model, tokens, rng, options):
    model = with_options(model, options)
    left = rng.permutation(97)[:31]
    expected = encode(model, tokens)
    np.testing.assert_array_equal(encode(model, take(tokens, left)), expected[left])
    order = rng.permutation(97)
    np.testing.assert_array_equal(encode(model, take(tokens, order)), expected[order])


def test_cells_alone_with_the_panel_of_all_change_no_bit(model, tokens):
    model = with_options(model, POOLED)
    expected, few = encode(model, tokens), take(tokens, np.arange(5))
    panel = np.unique(tokens.tokens)
    assert len(np.unique(few.tokens)) < len(panel)
    np.testing.assert_array_equal(encode(model, few, panel=panel), expected[:5])
    # Without it they are of a smaller panel.
    assert np.abs(encode(model, few) - expected[:5]).max() > 1e-4


def test_values_change_the_embedding(model, tokens):
    plain = with_options(model, {})
    other = with_options(model, {"values": "log"})
    other.cell_encoder.load_state_dict(plain.cell_encoder.state_dict(), strict=False)
    assert np.abs(encode(other, tokens) - encode(plain, tokens)).max() > 1e-3


def test_values_that_the_model_does_not_read_change_nothing(model, tokens):
    np.testing.assert_array_equal(encode(model, tokens), encode(model, tokens.without_values()))


@options
def test_embeddings_are_those_that_training_computes(model, tokens, options):
    model = with_options(model, options)
    batch = TokenBatch.from_ranked(
        tokens,
        np.arange(40),
        cls_token=model.vocabulary.cls,
        pad_token=model.vocabulary.pad,
        length=41,
    )
    with torch.no_grad():
        expected = model.cell_encoder(batch)
    found = encode(model, tokens)[:40, -expected.shape[1] :]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_model_that_pools_reads_the_medians_of_its_vocabulary(model):
    model = with_options(model, POOLED)
    medians = model.cell_encoder.medians.numpy()
    vocabulary = model.vocabulary
    assert len(np.unique(vocabulary.medians)) > 1
    np.testing.assert_array_equal(medians[vocabulary.tokens], vocabulary.medians.astype(np.float32))
    special = np.setdiff1d(np.arange(len(medians)), vocabulary.tokens)
    np.testing.assert_array_equal(medians[special], 1.0)


def test_pooled_sum_holds_the_genes_that_bert_does_not_read(model):
    limit = model.config.cell_encoder.max_positions
    genes = np.arange(2, 69, dtype=np.int32)
    cut = genes[: limit - 1]
    both = RankedTokens(
        np.concatenate([genes, cut]),
        np.array([0, len(genes), len(genes) + len(cut)]),
        np.full(len(genes) + len(cut), 2.0, dtype=np.float32),
    )
    for options in ({}, {"values": "log"}):
        long, short = encode(with_options(model, options), both)
        np.testing.assert_array_equal(long, short)
    long, short = encode(with_options(model, POOLED), both)
    assert np.abs(long - short).max() > 1e-3


@pytest.mark.parametrize("options", [{"values": "log"}, POOLED])
def test_a_model_that_reads_values_needs_them(model, tokens, options):
    with pytest.raises(ValueError, match="uses expression values, but the tokens have none"):
        encode(with_options(model, options), tokens.without_values())


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

    with pytest.raises(MemoryError, match="lower token_budget or use device='cpu'"):
        _halving(run, np.arange(4), "token_budget")


def test_another_error_is_no_memory_shortage():
    def run(items):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _halving(run, np.arange(4), "token_budget")


def test_what_is_not_finite_is_refused_with_a_remedy():
    values = np.array([[0.0], [np.inf]], dtype=np.float32)
    with pytest.raises(FloatingPointError, match=r"1 of 2 cells is not finite .*dtype='float32'"):
        refuse_not_finite(values, torch.device("cpu"), torch.bfloat16)
