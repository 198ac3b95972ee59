from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stofm.genes import RankedTokens
from stofm.nn import GeneBag, TokenBatch

GOLDEN = Path(__file__).parents[1] / "golden"


def ranked(lists, values=None):
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in lists])])
    return RankedTokens(
        np.concatenate(lists).astype(np.int32),
        offsets.astype(np.int64),
        None if values is None else np.array(values, dtype=np.float32),
    )


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


@pytest.fixture
def with_values():
    return ranked([[5, 6, 7], [], [8], [9, 4]], values=[6.0, 3.0, 1.0, 2.5, 8.0, 7.0])


def test_values_stand_at_their_tokens_and_the_bag_holds_all_genes(with_values):
    cells = np.array([2, 0, 1])
    batch = TokenBatch.from_ranked(with_values, cells, cls_token=9, pad_token=0, length=3)
    bag = GeneBag.from_ranked(with_values, cells)
    assert batch.tokens.tolist() == [[9, 8, 0], [9, 5, 6], [9, 0, 0]]
    assert batch.values.tolist() == [[0, 2.5, 0], [0, 6, 3], [0, 0, 0]]
    assert bag.tokens.tolist() == [8, 5, 6, 7]
    assert bag.offsets.tolist() == [0, 1, 4]
    assert bag.values.tolist() == [2.5, 6, 3, 1]
    assert batch.values.dtype == bag.values.dtype == torch.float32
    assert bag.tokens.dtype == bag.offsets.dtype == torch.int64


def test_tokens_without_values_give_neither(with_values):
    tokens = with_values.without_values()
    batch = TokenBatch.from_ranked(tokens, np.array([0]), cls_token=9, pad_token=0, length=3)
    assert batch.values is None
    with pytest.raises(ValueError, match=r"no values; rank them with rank_genes\(\.\.\., values"):
        GeneBag.from_ranked(tokens, np.array([0]))


def test_all_goes_to_the_device(with_values):
    batch = TokenBatch.from_ranked(
        with_values, np.array([3, 2]), cls_token=9, pad_token=0, length=3
    )
    moved = batch.to("meta")
    found = (moved.tokens, moved.is_real, moved.values)
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert torch.equal(batch.to("cpu").values, batch.values)
