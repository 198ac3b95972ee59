from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, TokenBatch, cell_encoder
from stofm.nn.batch import GeneBag
from stofm.nn.cell_encoder import orthonormal
from stofm.nn.reference import cell_encoder_from_reference

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
    """The golden encoder's weights in one that reads values, whose own numbers are random."""
    encoder, _, _ = golden
    torch.manual_seed(0)
    if options.get("pooled"):
        options["d_cell"] = encoder.config.d_hidden + encoder.config.d_cell
    other = CellEncoder(replace(encoder.config, **options)).eval()
    missing = other.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    for name in missing:
        other.state_dict()[name].normal_(std=0.3)
    if other.config.pooled:
        other.medians.uniform_(0.5, 4.0)
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


def plain_pooled(encoder, tokens):
    """One gene after another, with weights that are orthonormal on the genes that occur."""
    table = encoder.gene_embeddings.weight.detach().double().numpy()
    medians = encoder.medians.double().numpy()
    panel, half = np.unique(tokens.tokens), table.shape[1] // 2
    for columns in (slice(half), slice(half, None)):
        rows = table[panel, columns]
        gram = rows.T @ rows
        ridge = 1e-3 * np.linalg.norm(gram, ord=2) * np.eye(half)
        table[panel, columns] = rows @ np.linalg.inv(sqrtm(gram + ridge).real)
    sums = np.zeros((tokens.n_cells, table.shape[1]))
    for cell in range(tokens.n_cells):
        own = slice(tokens.offsets[cell], tokens.offsets[cell + 1])
        genes, values = tokens.tokens[own], tokens.values[own].astype(float)
        counts = np.log(1 + values * medians[genes])
        for gene, value, count in zip(genes, values, counts, strict=True):
            sums[cell, :half] += count * table[gene, :half]
            sums[cell, half:] += np.log(1 + value) * table[gene, half:]
        sums[cell] *= 4 / max(np.linalg.norm(counts), 1) ** 0.5
    return torch.from_numpy(sums - encoder.gene_offset.double().numpy()).float()


def embed(encoder, tokens, batch, dtype=torch.float32):
    """Embeddings, on the panel of the tokens, cut into what is pooled and what is learned."""
    panel = torch.from_numpy(np.unique(tokens.tokens)).long()
    bag = GeneBag.from_ranked(tokens, np.arange(tokens.n_cells))
    found = encoder.embed(batch, encoder.lay_out(dtype, panel), bag)
    return found.split([encoder.config.gene_width, encoder.config.d_learned], dim=1)


def test_sums_over_all_genes_stand_in_front(golden, batch_with_values):
    plain, _, _ = golden
    encoder = reading(golden, pooled=True)
    tokens, batch = batch_with_values
    with torch.no_grad():
        pooled, learned = embed(encoder, tokens, batch)
        expected = plain(batch) * 2
        assert torch.equal(encoder(batch), learned)
    torch.testing.assert_close(pooled, plain_pooled(encoder, tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(learned, expected)
    torch.testing.assert_close(learned.norm(dim=1), torch.full((len(learned),), 2.0))


@pytest.mark.parametrize("n_genes", [5, 40])
def test_weights_of_a_panel_keep_lengths_and_angles(rng, n_genes):
    weights = torch.from_numpy(rng.normal(size=(50, 12)).astype(np.float32))
    weights[:, :2] *= 5
    panel = torch.from_numpy(rng.permutation(50)[:n_genes])
    found = orthonormal(weights, panel)
    assert torch.equal(found.any(dim=1).nonzero()[:, 0], panel.sort().values)
    # Up to the ridge all directions are as long.
    sizes = torch.linalg.svdvals(found[panel])
    assert (sizes <= 1.0).all()
    assert (sizes > 0.9).all()
    # No other matrix with such columns, or rows, is nearer.
    u, _, v = torch.linalg.svd(weights[panel], full_matrices=False)
    torch.testing.assert_close(found[panel], u @ v, atol=0.05, rtol=0)
    assert not orthonormal(torch.zeros(9, 4), torch.arange(3)).any()


def test_sums_are_computed_in_float32(golden, batch_with_values):
    encoder = reading(golden, pooled=True)
    tokens, batch = batch_with_values
    with torch.no_grad():
        single = embed(encoder, tokens, batch)
        near = embed(encoder, tokens, batch, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = embed(encoder, tokens, batch)
        low, _ = embed(encoder.to(torch.bfloat16), tokens, batch, torch.bfloat16)
    for pooled, learned in (near, mixed):
        assert torch.equal(pooled, single[0])
        assert 0 < (learned - single[1]).abs().max() < 0.2
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain_pooled(encoder, tokens), atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight_but_what_is_pooled_by(golden, batch_with_values):
    encoder = reading(golden, values="log", pooled=True).train()
    _, batch = batch_with_values
    encoder(batch)[:, -1].sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert without == ["bert.embeddings.word_embeddings.weight"]
    own = [name for name, _ in encoder.named_parameters() if name.startswith("value_")]
    assert len(own) == 4
    assert all(encoder.get_parameter(name).grad.any() for name in own)
    # Not a weight, but saved with them.
    assert "gene_offset" in encoder.state_dict()


@pytest.mark.parametrize("options", [{"values": "log"}, {"pooled": True}])
def test_without_values_it_says_what_to_run(golden, options):
    encoder = reading(golden, **options)
    with pytest.raises(ValueError, match=r"uses expression values.*st\.pp\.tokenize\(adata, model"):
        encoder.embed(golden[1], encoder.lay_out(torch.float32))


# Gene embeddings of a width of their own: an option that the paper does not have.


@pytest.mark.parametrize("d_gene", [20, 6])
def test_bert_reads_a_linear_map_of_wider_or_narrower_gene_embeddings(
    golden, batch_with_values, d_gene
):
    plain, _, _ = golden
    torch.manual_seed(0)
    encoder = CellEncoder(
        replace(plain.config, d_gene=d_gene, d_cell=d_gene + 8, pooled=True)
    ).eval()
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
        pooled, learned = embed(encoder, tokens, batch)
        first = torch.nn.functional.normalize(encoder.projection(expected[:, 0]))
    torch.testing.assert_close(hidden[batch.is_real], expected[batch.is_real], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, plain_pooled(encoder, tokens), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learned, first * 2, atol=1e-5, rtol=1e-4)


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
    words = torch.from_numpy(rng.normal(size=(20, 6)).astype(np.float32))
    bag = GeneBag(tokens, offsets, shares)
    expected = cell_encoder._weighted_sums(words, shares, bag)

    def missing(*_, **__):
        raise NotImplementedError

    # torch before 2.10 has none on MPS.
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", missing)
    torch.testing.assert_close(cell_encoder._gathered_sums(words, shares, bag), expected)
    monkeypatch.setattr(cell_encoder, "_gathered_sums", lambda *_: "gathered")
    on_mps = SimpleNamespace(device=torch.device("mps"))
    assert cell_encoder._weighted_sums(on_mps, shares, bag) == "gathered"
