from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, TokenBatch, cell_encoder
from stofm.nn.batch import GeneBag
from stofm.nn.conversion import cell_encoder_from_reference

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(GOLDEN / "b_cell_encoder.npz")
    batch = TokenBatch(
        torch.from_numpy(arrays["input_ids"].astype(np.int64)),
        torch.from_numpy(arrays["attention_mask"] == 1),
    )
    return cell_encoder_from_reference(GOLDEN / "b_cell_encoder").eval(), batch, arrays


def test_embeddings_like_the_reference(golden):
    encoder, batch, arrays = golden
    with torch.no_grad():
        np.testing.assert_allclose(encoder(batch), arrays["embeddings"], atol=1e-5)


def test_hidden_states_like_the_reference(golden):
    encoder, batch, arrays = golden
    real = arrays["attention_mask"] == 1
    with torch.no_grad():
        hidden = encoder.hidden_states(batch)
    np.testing.assert_allclose(hidden[real], arrays["last_hidden_state"][real], atol=5e-5)


def test_hidden_states_like_transformers(golden):
    encoder, batch, _ = golden
    with torch.no_grad():
        expected = encoder.bert(
            input_ids=batch.tokens, attention_mask=batch.is_real.long()
        ).last_hidden_state
        ours = encoder.hidden_states(batch)
    torch.testing.assert_close(ours[batch.is_real], expected[batch.is_real], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [2, 3])
def test_shortest_inputs_are_computed_as_the_beginning_of_longer_ones(golden, length):
    encoder, batch, _ = golden
    short = TokenBatch(batch.tokens[:, :length], batch.is_real[:, :length])
    is_real = batch.is_real.clone()
    is_real[:, length:] = False
    with torch.no_grad():
        expected = encoder.hidden_states(replace(batch, is_real=is_real))[:, :length]
        hidden = encoder.hidden_states(short)
    torch.testing.assert_close(hidden[short.is_real], expected[short.is_real])


def test_gelu_like_transformers(golden):
    encoder, batch, _ = golden
    torch.manual_seed(0)
    smooth = CellEncoder(replace(encoder.config, activation="gelu")).eval()
    with torch.no_grad():
        expected = smooth.bert(
            input_ids=batch.tokens, attention_mask=batch.is_real.long()
        ).last_hidden_state
        ours = smooth.hidden_states(batch)
    torch.testing.assert_close(ours[batch.is_real], expected[batch.is_real], atol=2e-6, rtol=1e-5)


def test_gradients_reach_every_weight_that_is_used(golden):
    encoder, batch, _ = golden
    encoder.train()
    torch.manual_seed(0)
    encoder(batch)[:, 0].sum().backward()
    encoder.eval()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    encoder.zero_grad()
    assert without == []


# Values: an option that the paper does not have.


def reading(golden, **options):
    """The golden encoder's weights in one that reads values, whose own weights are random."""
    encoder, _, _ = golden
    torch.manual_seed(0)
    other = CellEncoder(replace(encoder.config, **options)).eval()
    missing = other.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in missing:
            other.get_parameter(name).normal_(std=0.3)
    return other


@pytest.fixture(scope="module")
def batch_with_values(golden):
    _, batch, arrays = golden
    rng = np.random.default_rng(1)
    n_genes = arrays["attention_mask"].sum(axis=1) - 1
    lists = [row[1 : 1 + n] for row, n in zip(arrays["input_ids"], n_genes, strict=True)]
    longest = n_genes.argmax()
    lists[longest] = np.concatenate([lists[longest], [5, 6, 7]])  # beyond the padded length
    tokens = RankedTokens(
        np.concatenate(lists).astype(np.int32),
        np.concatenate([[0], np.cumsum([len(genes) for genes in lists])]),
        rng.gamma(1.0, 3.0, sum(map(len, lists))).astype(np.float32),
    )
    return tokens, TokenBatch.from_ranked(
        tokens,
        np.arange(len(lists)),
        cls_token=int(batch.tokens[0, 0]),
        pad_token=0,
        length=1 + int(n_genes.max()),
    )


def test_value_embeddings_start_at_nothing(golden, batch_with_values):
    encoder, _, _ = golden
    _, batch = batch_with_values
    fresh = CellEncoder(replace(encoder.config, values="log")).eval()
    fresh.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(fresh(batch), encoder(batch))


def test_value_embeddings_like_transformers(golden, batch_with_values):
    encoder = reading(golden, values="log")
    _, batch = batch_with_values
    with torch.no_grad():
        bent = torch.relu(encoder.value_hidden(torch.log1p(batch.values)[..., None]))
        words = encoder.bert.embeddings.word_embeddings(batch.tokens)
        expected = encoder.bert(
            inputs_embeds=words + encoder.value_embedding(bent),
            attention_mask=batch.is_real.long(),
        ).last_hidden_state
        ours = encoder.hidden_states(batch)
        first = encoder.projection(expected[:, 0])
        embedded = encoder(batch)
    torch.testing.assert_close(ours[batch.is_real], expected[batch.is_real], atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(embedded, first / first.norm(dim=1, keepdim=True))


def plain_pooled(encoder, tokens, hidden=()):
    """One gene after another; `hidden` holds pairs of row and rank to leave out."""
    words = encoder.bert.embeddings.word_embeddings.weight.double()
    sums = torch.zeros(tokens.n_cells, words.shape[1], dtype=torch.float64)
    for cell in range(tokens.n_cells):
        for place in range(tokens.offsets[cell], tokens.offsets[cell + 1]):
            if (cell, place - tokens.offsets[cell]) not in hidden:
                sums[cell] += np.log1p(tokens.values[place]) * words[tokens.tokens[place]]
    return (sums @ encoder.pooled_projection.weight.double().T).float()


@pytest.mark.parametrize("hidden", [[], [(2, 0), (2, 2), (5, 1)]])
def test_pooled_sum_is_over_all_genes_that_are_not_hidden(golden, batch_with_values, hidden):
    plain, _, _ = golden
    encoder = reading(golden, pooled=True)
    tokens, batch = batch_with_values
    if hidden:
        is_hidden = torch.zeros_like(batch.is_real)
        for row, rank in hidden:
            is_hidden[row, 1 + rank] = True
        batch = replace(batch, is_hidden=is_hidden)
    with torch.no_grad():
        expected = plain.project(batch, plain.lay_out(torch.float32)) + plain_pooled(
            encoder, tokens, hidden
        )
        found = encoder.project(batch, encoder.lay_out(torch.float32))
        embedded = encoder(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedded, found / found.norm(dim=1, keepdim=True))


def test_pooled_sum_is_computed_in_float32(golden, batch_with_values):
    encoder = reading(golden, pooled=True)
    torch.nn.init.zeros_(encoder.projection.weight)
    _, batch = batch_with_values
    with torch.no_grad():
        single = encoder.project(batch, encoder.lay_out(torch.float32))
        assert torch.equal(encoder.project(batch, encoder.lay_out(torch.bfloat16)), single)
        encoder.projection.bias.zero_()
        single = encoder.project(batch, encoder.lay_out(torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder.project(batch, encoder.lay_out(torch.float32)), single)


def test_center_is_taken_off_before_scaling(golden):
    encoder, batch, _ = golden
    weights = encoder.lay_out(torch.float32)
    with torch.no_grad():
        projected = encoder.project(batch, weights)
        torch.testing.assert_close(encoder(batch), projected / projected.norm(dim=1, keepdim=True))
        mean = projected.mean(dim=0)
        off = projected - mean
        torch.testing.assert_close(
            encoder(batch, mean[None]), off / off.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5
        )
        per_cell = encoder.embed(batch, weights, projected)
    assert not per_cell.any()


def test_gradients_reach_every_weight_of_values(golden, batch_with_values):
    encoder = reading(golden, values="log", pooled=True).train()
    _, batch = batch_with_values
    encoder(batch)[:, 0].sum().backward()
    own = [n for n, _ in encoder.named_parameters() if n.startswith(("value_", "pooled_"))]
    assert len(own) == 5
    assert all(encoder.get_parameter(name).grad.any() for name in own)
    # The pooled sum also trains the embeddings of genes that BERT does not read.
    assert encoder.bert.embeddings.word_embeddings.weight.grad[7].any()


@pytest.mark.parametrize("options", [{"values": "log"}, {"pooled": True}])
def test_without_values_it_says_what_to_run(golden, options):
    encoder = reading(golden, **options)
    with pytest.raises(
        ValueError, match=r"reads expression values.*st\.pp\.tokenize\(adata, model"
    ):
        encoder(golden[1])


# Gene embeddings of a width of their own: an option that the paper does not have.


@pytest.mark.parametrize("d_gene", [20, 7])
def test_bert_reads_a_linear_map_of_wider_or_narrower_gene_embeddings(
    golden, batch_with_values, d_gene
):
    plain, _, _ = golden
    torch.manual_seed(0)
    encoder = CellEncoder(replace(plain.config, d_gene=d_gene, pooled=True)).eval()
    tokens, batch = batch_with_values
    with torch.no_grad():
        genes = encoder.gene_embeddings.weight
        assert genes.shape == (plain.config.n_tokens, d_gene)
        assert not genes[0].any()
        assert genes[1:].std().item() == pytest.approx(0.02, rel=0.1)
        words = genes @ encoder.gene_projection.weight.T
        torch.testing.assert_close(encoder.words(), words)
        some = torch.tensor([9, 3])
        torch.testing.assert_close(encoder.words(some), words[some])
        expected = encoder.bert(
            inputs_embeds=words[batch.tokens], attention_mask=batch.is_real.long()
        ).last_hidden_state
        hidden = encoder.hidden_states(batch)
        found = encoder.project(batch, encoder.lay_out(torch.float32))
    torch.testing.assert_close(hidden[batch.is_real], expected[batch.is_real], atol=2e-6, rtol=1e-5)
    pooled = plain_pooled(encoder, tokens)
    torch.testing.assert_close(
        found, encoder.projection(expected[:, 0]) + pooled, atol=1e-5, rtol=1e-4
    )


def test_gene_projection_is_the_same_with_gradients_and_learns(golden):
    plain, batch, _ = golden
    torch.manual_seed(0)
    encoder = CellEncoder(replace(plain.config, d_gene=20)).eval()
    with torch.no_grad():
        once = encoder(batch)
    learning = encoder(batch)
    torch.testing.assert_close(learning, once, atol=1e-6, rtol=1e-5)
    learning[:, 0].sum().backward()
    assert encoder.gene_projection.weight.grad.any()
    read = batch.tokens[batch.is_real].unique()
    assert encoder.gene_embeddings.weight.grad[read[read > 0]].any(dim=1).all()


def test_gene_embeddings_as_wide_as_bert_are_its_own(golden):
    plain, _, _ = golden
    same = CellEncoder(replace(plain.config, d_gene=plain.config.d_hidden))
    assert set(same.state_dict()) == set(plain.state_dict())
    assert same.words() is same.gene_embeddings.weight


def test_sums_over_genes_without_embedding_bag(rng, monkeypatch):
    lengths = np.array([0, 3, 7, 0, 1])
    tokens = torch.from_numpy(rng.integers(0, 20, lengths.sum()))
    offsets = torch.from_numpy(np.cumsum(lengths) - lengths)
    shares = torch.from_numpy(rng.random(lengths.sum(), dtype=np.float32))
    words = torch.from_numpy(rng.normal(size=(20, 6)).astype(np.float32)).requires_grad_()
    bag = GeneBag(tokens, offsets, shares)
    expected = cell_encoder._weighted_sums(words, bag, shares)
    (by_bag,) = torch.autograd.grad(expected.square().sum(), words)

    def missing(*_, **__):
        raise NotImplementedError

    # torch before 2.10 has none on MPS.
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", missing)
    found = cell_encoder._gathered_sums(words, bag, shares)
    torch.testing.assert_close(found, expected)
    (gathered,) = torch.autograd.grad(found.square().sum(), words)
    torch.testing.assert_close(gathered, by_bag)
    monkeypatch.setattr(cell_encoder, "_gathered_sums", lambda *_: "gathered")
    on_mps = SimpleNamespace(device=torch.device("mps"))
    assert cell_encoder._weighted_sums(on_mps, bag, shares) == "gathered"
