from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import CellEncoder, TokenBatch
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


def ranked(lists):
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in lists])])
    return RankedTokens(np.concatenate(lists).astype(np.int32), offsets.astype(np.int64))


def test_batch_puts_cls_in_front_and_cuts_afterwards():
    tokens = ranked([[5, 6, 7], [], [8]])
    batch = TokenBatch.from_ranked(tokens, np.array([2, 0, 1]), cls_token=9, pad_token=0, length=3)
    assert batch.tokens.tolist() == [[9, 8, 0], [9, 5, 6], [9, 0, 0]]
    assert batch.is_real.tolist() == [[True, True, False], [True] * 3, [True, False, False]]


def test_batch_like_the_reference_collator():
    golden = np.load(GOLDEN / "a_tokenizer.npz")
    tokens = RankedTokens(golden["tokens_flat"], golden["tokens_offsets"])
    expected = golden["collated_input_ids"]
    batch = TokenBatch.from_ranked(
        tokens,
        np.arange(len(expected)),
        cls_token=int(golden["special_ids"][2]),
        pad_token=0,
        length=expected.shape[1],
    )
    np.testing.assert_array_equal(batch.tokens, expected)
    np.testing.assert_array_equal(batch.is_real, golden["collated_attention_mask"] == 1)
    length = int(golden["max_len_small"])
    capped = TokenBatch.from_ranked(
        tokens,
        np.arange(len(expected)),
        cls_token=int(golden["special_ids"][2]),
        pad_token=0,
        length=length,
    )
    np.testing.assert_array_equal(capped.tokens[capped.is_real], golden["cls_capped_flat"])
