from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from stofm.heads.tuning import add_low_rank, encoder_weights, merged
from stofm.nn import TokenBatch
from stofm.nn.batch import PairIndex

RANK = 3


@pytest.fixture
def base(model):
    return copy.deepcopy(model)


@pytest.fixture
def low_rank(model, base):
    """Changes that are not 0 any more."""
    found = add_low_rank(model, RANK, 5, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return found


@pytest.fixture
def tokens(rng):
    drawn = torch.from_numpy(rng.integers(2, 69, (6, 9)))
    drawn[:, 0] = 69
    return TokenBatch(tokens=drawn, is_real=torch.ones(6, 9, dtype=torch.bool))


@pytest.fixture
def subslices(rng, dense_batch):
    n, d = 11, 12
    xy = rng.random((n, 2)) * 10
    distances = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    types = np.full((1, n), 3)
    types[0, :2] = [1, 2]
    index = np.concatenate([[-1, -1], np.arange(n - 2)])[None]
    features = rng.standard_normal((1, n, d)).astype(np.float32)
    batch = dense_batch(features, distances[None], types, index)
    assert isinstance(batch.pairs, PairIndex)
    return batch


def test_changes_are_nothing_at_first(model, subslices):
    before = model.se2_transformer(subslices).last_hidden_state
    fingerprint = model.fingerprint
    found = add_low_rank(model, RANK, 5, seed=1)
    after = found.model.se2_transformer(subslices).last_hidden_state
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert merged(found, model).fingerprint == fingerprint


def test_only_changes_are_trained(model):
    found = add_low_rank(model, RANK, 5, seed=1)
    trained = {n for n, w in found.model.named_parameters() if w.requires_grad}
    assert trained
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    changed = {n.split(".lora_")[0] for n in trained}
    assert {
        "cell_encoder.bert.encoder.layer.1.attention.self.value",
        "cell_encoder.bert.encoder.layer.0.attention.output.dense",
        "cell_encoder.projection",
        "se2_transformer.input_projection",
        "se2_transformer.layers.1.qkv",
        "se2_transformer.layers.0.fc2",
    } <= changed
    assert not any("embeddings" in n or "distance_bias" in n for n in changed)


def test_merged_gives_the_numbers_of_unmerged(low_rank, model, tokens, subslices):
    plain = merged(low_rank, model)
    weights = encoder_weights(model)
    encoder = low_rank.model.cell_encoder
    found = torch.func.functional_call(encoder, weights, (tokens,))
    torch.testing.assert_close(plain.cell_encoder(tokens), found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(encoder(tokens), found, atol=1e-3)
    out = low_rank.model.se2_transformer(subslices).last_hidden_state
    expected = plain.se2_transformer(subslices).last_hidden_state
    torch.testing.assert_close(expected, out, rtol=1e-4, atol=1e-5)


def test_merging_leaves_the_base_as_it_is_and_gives_a_plain_model(base, low_rank, model):
    first = merged(low_rank, model)
    own = low_rank.model.state_dict()
    for name, value in base.state_dict().items():
        stem, _, last = name.rpartition(".")
        stored = own.get(name, own.get(f"{stem}.base_layer.{last}"))
        torch.testing.assert_close(stored, value, rtol=0, atol=0)
    assert first.state_dict().keys() == base.state_dict().keys()
    assert first.fingerprint == merged(low_rank, model).fingerprint != base.fingerprint
    assert first.vocabulary is low_rank.model.vocabulary


def test_gradients_reach_the_cell_encoders_changes(low_rank, model, tokens):
    encoder, weights = low_rank.model.cell_encoder, encoder_weights(model)
    torch.func.functional_call(encoder, weights, (tokens,))[:, 0].sum().backward()
    trained = [w for w in encoder.parameters() if w.requires_grad]
    assert all(w.grad is not None and bool((w.grad != 0).any()) for w in trained)


def test_same_seed_same_changes_and_no_global_random_numbers(model):
    state = torch.random.get_rng_state()
    made = [
        add_low_rank(copy.deepcopy(model), RANK, 5, seed=seed).model.state_dict()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "se2_transformer.layers.0.qkv.lora_A.default.weight"
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])
