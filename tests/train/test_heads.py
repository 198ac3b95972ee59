from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from stofm.train.heads import MaskedCellHead, MaskedGeneHead, PairDistanceHead


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
