from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from stofm.genes import RankedTokens
from stofm.nn import TokenBatch
from stofm.train.config import ContrastiveConfig, LossWeights, MaskedGeneConfig, TokenMasking
from stofm.train.losses import (
    MaskedCellHead,
    MaskedGeneHead,
    PairDistanceHead,
    contrastive_loss,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)
from stofm.train.masked_genes import MaskedGenes
from stofm.train.objectives import _candidate_genes


class OfAll:
    """What a process gets that gathers, all processes being in this one."""

    def __init__(self, parts, rank):
        self.parts, self.rank = parts, rank

    def __call__(self, rows):
        parts = [*self.parts[: self.rank], rows, *self.parts[self.rank + 1 :]]
        return torch.cat(parts), sum(map(len, self.parts[: self.rank]))


def test_contrastive_loss_by_its_formula():
    torch.manual_seed(0)
    first, second = 3 * torch.randn(5, 4), torch.randn(5, 4)
    part = contrastive_loss(first, second, temperature=0.3)
    total = 0.0
    for i in range(5):
        cosines = [float(first[i] @ b / (first[i].norm() * b.norm())) for b in second]
        terms = [math.exp(cosine / 0.3) for cosine in cosines]
        total -= math.log(terms[i] / sum(terms))
    assert part.total.item() == pytest.approx(total, rel=1e-5)
    assert part.count == 5


def test_contrastive_loss_of_two_processes_is_that_of_one():
    torch.manual_seed(0)
    embeddings = torch.randn(2, 7, 4, requires_grad=True)
    whole = contrastive_loss(*embeddings, temperature=0.1)
    (expected,) = torch.autograd.grad(whole.total, embeddings)
    normal = torch.nn.functional.normalize(embeddings[1], dim=-1)
    bounds = (slice(0, 3), slice(3, 7))
    parts = [
        contrastive_loss(
            *embeddings[:, own],
            temperature=0.1,
            gather=OfAll([normal[b] for b in bounds], rank),
        )
        for rank, own in enumerate(bounds)
    ]
    total = parts[0].total + parts[1].total
    assert [part.count for part in parts] == [3, 4]
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(total, embeddings)[0], expected)


def test_contrastive_loss_is_computed_in_full_precision():
    torch.manual_seed(0)
    first, second = torch.randn(6, 40), torch.randn(6, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = contrastive_loss(first, second, temperature=0.05)
    assert torch.equal(within.total, contrastive_loss(first, second, temperature=0.05).total)


@pytest.fixture
def genes(rng, vocabulary):
    """Nine cells that list the first 20 genes only."""
    tokens = np.concatenate([rng.permutation(vocabulary.tokens[:20])[:n] for n in range(6, 15)])
    offsets = np.concatenate([[0], np.cumsum(np.arange(6, 15))])
    cells = TokenBatch.from_ranked(
        RankedTokens(tokens=tokens, offsets=offsets),
        np.arange(9),
        cls_token=vocabulary.cls,
        pad_token=vocabulary.pad,
        length=16,
    )
    return MaskedGenes.build(
        cells,
        [np.random.default_rng(k) for k in range(9)],
        masking=TokenMasking(share=0.3),
        vocabulary=vocabulary,
    )


@pytest.fixture
def head():
    torch.manual_seed(1)
    head = MaskedGeneHead(n_tokens=70, d_hidden=16, activation="relu", layer_norm_eps=1e-12)
    torch.nn.init.normal_(head.bias)
    return head


@pytest.mark.parametrize("candidates", ["vocabulary", "batch"])
def test_masked_gene_loss_by_its_formula(model, genes, head, candidates):
    encoder = model.cell_encoder
    chosen = _candidate_genes(candidates, genes.measured, None)
    part = masked_gene_loss(encoder, head, genes, candidates=chosen)
    with torch.no_grad():
        hidden = encoder.hidden_states(genes.tokens)
        words = encoder.bert.embeddings.word_embeddings.weight
        scores = head(hidden.view(-1, 16), words)
    among = range(70) if candidates == "vocabulary" else range(2, 22)
    total = 0.0
    for place, label in zip(genes.places.tolist(), genes.labels.tolist(), strict=True):
        terms = {token: math.exp(scores[place, token]) for token in among}
        total -= math.log(terms[label] / sum(terms.values()))
    assert part.total.item() == pytest.approx(total, rel=1e-5)
    assert part.count == len(genes.labels) == sum(round(0.3 * n) for n in range(6, 15))


def test_candidates_are_the_genes_of_all_processes(genes):
    own, other = genes.measured.flip(0), torch.tensor([9, 41, 66])
    assert torch.equal(_candidate_genes("batch", own, None), genes.measured)
    gather = OfAll([own[:, None], other[:, None]], 0)
    union = sorted({*own.tolist(), 9, 41, 66})
    assert _candidate_genes("batch", own, gather).tolist() == union
    assert _candidate_genes("vocabulary", own, gather) is None


def test_nothing_to_recover_gives_zero_and_a_gradient(model, genes, head):
    nothing = replace(genes, places=genes.places[:0], labels=genes.labels[:0])
    parts = [
        masked_gene_loss(model.cell_encoder, head, nothing),
        masked_cell_loss(head.dense(torch.zeros(0, 16)), torch.zeros(0, 16)),
        masked_cell_loss(head.dense(torch.zeros(0, 16)), torch.zeros(0, 16), kind="cosine"),
        pair_distance_loss(head.dense(torch.zeros(0, 16))[:, 0], torch.zeros(0)),
    ]
    for part in parts:
        assert part.count == 0
        assert part.total.item() == 0
        part.total.backward()
    assert not head.dense.weight.grad.any()


def test_masked_cell_losses_by_their_formulas():
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    target = torch.tensor([[0.6, 0.8], [0.0, 2.0]])
    squared = masked_cell_loss(predicted, target)
    assert squared.total.item() == pytest.approx((2.4**2 + 3.2**2) / 2 + (1 + 4) / 2)
    cosine = masked_cell_loss(predicted, target, kind="cosine")
    assert cosine.total.item() == pytest.approx(0 + 1)
    assert squared.count == cosine.count == 2


def test_pair_distance_loss_by_its_formula():
    part = pair_distance_loss(torch.tensor([1.0, 2.5, 7.0]), torch.tensor([1.5, 2.5, 4.0]))
    assert part.total.item() == pytest.approx(0.25 + 9)
    assert part.count == 3


def test_weights_of_the_spatial_losses_add_up_to_one():
    weights = LossWeights(masked_cells=0.8)
    assert weights.pair_distances == pytest.approx(0.2)
    assert LossWeights().masked_cells == LossWeights().pair_distances == 0.5


def test_errors():
    with pytest.raises(ValueError, match="temperature must be positive, found 0"):
        ContrastiveConfig(temperature=0)
    with pytest.raises(ValueError, match="gene_dropout must be at least 0 and below 1, found 1"):
        ContrastiveConfig(gene_dropout=1)
    with pytest.raises(ValueError, match=r"candidates must be one of \['vocabulary', 'batch'\]"):
        MaskedGeneConfig(candidates="panel")
    with pytest.raises(ValueError, match="masked_cells is a share and must lie between 0 and 1"):
        LossWeights(masked_cells=1.5)
    for name in ("contrastive", "visible_cells", "surroundings"):
        with pytest.raises(ValueError, match=f"{name} must not be negative, found -1"):
            LossWeights(**{name: -1})


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gene_scores_like_transformers(activation):
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=31,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=9,
            hidden_act=activation,
            layer_norm_eps=1e-12,
        )
    )
    other = bert.cls.predictions
    head = MaskedGeneHead(n_tokens=31, d_hidden=8, activation=activation, layer_norm_eps=1e-12)
    with torch.no_grad():
        other.transform.LayerNorm.weight.uniform_(0.5, 2)
        other.bias.uniform_(-1, 1)
    head.dense.load_state_dict(other.transform.dense.state_dict())
    head.norm.load_state_dict(other.transform.LayerNorm.state_dict())
    head.bias.data.copy_(other.bias)
    words = bert.bert.embeddings.word_embeddings.weight
    hidden = torch.randn(6, 8)
    scores = head(hidden, words)
    torch.testing.assert_close(scores, other(hidden))
    some = torch.tensor([3, 7, 30])
    torch.testing.assert_close(head(hidden, words[some], some), scores[:, some])


def test_mask_is_as_long_as_an_embedding_or_absent():
    torch.manual_seed(0)
    length = MaskedCellHead(d_model=6, d_cell=400).mask.norm().item()
    assert length == pytest.approx(1, abs=0.2)
    head = MaskedCellHead(d_model=6, d_cell=4, learned_mask=False)
    assert head.mask is None
    assert "mask" not in dict(head.named_parameters())
    assert head(torch.randn(3, 6)).shape == (3, 4)


def test_one_distance_per_pair():
    head = PairDistanceHead(n_heads=4)
    assert head(torch.randn(5, 4)).shape == (5,)
    assert head(torch.randn(0, 4)).shape == (0,)
