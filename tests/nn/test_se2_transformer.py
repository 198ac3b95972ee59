from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stofm.nn import SE2Transformer, SE2TransformerConfig, SubSliceBatch
from stofm.nn.reference import se2_from_reference
from stofm.spatial import SubSliceConfig, build_subslice, lay_out_slice, rows_by_subslice

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_model(name):
    config = json.loads((GOLDEN / f"{name}.config.json").read_text())
    return se2_from_reference(config, load_file(GOLDEN / f"{name}.safetensors")).eval()


NAMES = ("token_embeddings", "attn_bias", "token_types", "indices")


@pytest.fixture(params=["post", "pre"])
def golden(request, dense_batch):
    inputs = np.load(GOLDEN / "f_model_post_ln.npz")
    is_real = inputs["token_types"] != 3
    expected = np.load(GOLDEN / f"f_model_{request.param}_ln.npz")
    return (
        golden_model(f"f_model_{request.param}_ln"),
        dense_batch(*map(inputs.get, NAMES)),
        is_real,
        expected,
    )


@pytest.mark.parametrize("grad", [False, True])
def test_hidden_states_like_the_reference(golden, grad):
    model, batch, is_real, expected = golden
    with torch.set_grad_enabled(grad):
        out = model(batch)
    for own, other in zip(out.hidden_states, expected["hidden_states"], strict=True):
        np.testing.assert_allclose(own.detach()[is_real], other[is_real], atol=5e-5)
    np.testing.assert_allclose(
        out.last_hidden_state.detach()[is_real], expected["last_hidden_state"][is_real], atol=5e-5
    )


def test_pair_representation_like_the_reference(golden):
    model, batch, is_real, expected = golden
    both = is_real[:, :, None] & is_real[:, None, :]
    with torch.no_grad():
        at = model(batch).pairs.at(*torch.from_numpy(np.argwhere(both).T))
    np.testing.assert_allclose(at, expected["pair_rep"][both], atol=1e-4)


def test_bias_and_attention_like_the_reference(golden):
    model, batch, is_real, expected = golden
    both = is_real[:, :, None] & is_real[:, None, :]
    with torch.no_grad():
        bias = model.attention_bias(batch).permute(0, 2, 3, 1)
        logits = torch.full(expected["pair_rep"].shape, -torch.inf)
        logits[both] = model(batch).pairs.at(*torch.from_numpy(np.argwhere(both).T))
    attention = logits.softmax(dim=2).mean(dim=-1)
    gaussian = expected["gaussian"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(bias[both], gaussian[both], atol=5e-5)
    np.testing.assert_allclose(attention[both], expected["attention_last"][both], atol=1e-5)


def test_without_pair_bias_like_the_reference(golden):
    model, batch, is_real, expected = golden
    bare = SE2Transformer(replace(model.config, pair_bias=False)).eval()
    bare.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = bare(batch).last_hidden_state
    np.testing.assert_allclose(
        hidden[is_real], expected["last_hidden_state_no_attn_bias"][is_real], atol=5e-5
    )


@pytest.fixture
def slice_(rng):
    xy = rng.random((157, 2)) * 90
    return xy, rng.normal(size=(157, 6)).astype(np.float32)


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = SE2TransformerConfig(
        d_cell=6, d_model=10, n_heads=2, n_layers=3, d_inner=7, n_kernels=5
    )
    return SE2Transformer(config).eval()


RULES = SubSliceConfig(n_cells=60, n_neighbors=9)


def subslices(xy, features):
    layout = lay_out_slice(xy, features, RULES)
    return [build_subslice(layout, features, rows, RULES) for rows in rows_by_subslice(layout)]


def embed(model, *subslices, node_multiple=1):
    batch = SubSliceBatch.from_subslices(subslices, node_multiple=node_multiple)
    with torch.no_grad():
        hidden = model(batch).last_hidden_state.numpy()
    return [hidden[b, : s.n_nodes] for b, s in enumerate(subslices)]


def test_embeddings_pass_features_on_with_their_mean_around(model, slice_):
    reach, n_passed = 2.5, 4
    torch.manual_seed(3)
    passing = SE2Transformer(replace(model.config, n_passed=n_passed, reach=reach)).eval()
    parts = subslices(*slice_)
    with torch.no_grad():
        batch = SubSliceBatch.from_subslices(parts)
        found = passing.embed(batch).numpy()
        hidden = passing(batch).last_hidden_state.numpy()
        assert torch.equal(model.embed(batch), model(batch).last_hidden_state)
    assert found.shape[-1] == passing.config.d_embedding == 2 * n_passed + 10
    told = found[..., 2 * n_passed :]
    for b, one in enumerate(parts):
        is_cell = one.cell_index >= 0
        weights = np.zeros((one.n_nodes, one.n_nodes))
        pairs = one.pairs
        near = np.exp(-(pairs.distances.astype(float) ** 2) / (2 * reach**2))
        weights[pairs.rows, pairs.columns] = weights[pairs.columns, pairs.rows] = near
        weights = weights[np.ix_(is_cell, is_cell)] + np.eye(is_cell.sum())
        own = one.features[is_cell, :n_passed]
        means = weights @ own / weights.sum(axis=1, keepdims=True)
        cells = found[b, : one.n_nodes][is_cell]
        np.testing.assert_array_equal(cells[:, :n_passed], own)
        np.testing.assert_allclose(cells[:, n_passed : 2 * n_passed], means, atol=1e-5)
        lengths = np.linalg.norm(told[b, : one.n_nodes], axis=1)
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
        cosine = (told[b, : one.n_nodes] * hidden[b, : one.n_nodes]).sum(axis=1)
        cosine /= lengths * np.linalg.norm(hidden[b, : one.n_nodes], axis=1)
        np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_a_bias_of_minus_infinity_hides_a_node(model, slice_):
    passing = SE2Transformer(replace(model.config, n_passed=4, reach=2.5)).eval()
    one = subslices(*slice_)[0]
    hidden = one.n_nodes - 2
    features = one.features.copy()
    features[hidden] += 9.0
    batches = [SubSliceBatch.from_subslices([x]) for x in (one, replace(one, features=features))]
    with torch.no_grad():
        bias = passing.attention_bias(batches[0])
        assert torch.equal(passing.embed(batches[0], bias=bias), passing.embed(batches[0]))
        bias[..., hidden] = -torch.inf
        bias[..., hidden, hidden] = 0.0
        first, second = (passing.embed(batch, bias=bias)[0].numpy() for batch in batches)
        seen = passing.embed(batches[1])[0].numpy()
    others = np.arange(one.n_nodes) != hidden
    np.testing.assert_allclose(first[others], second[others], atol=1e-6)
    assert np.abs(first[hidden] - second[hidden]).max() > 1e-2
    assert np.abs(seen[others] - first[others]).max() > 1e-2


def test_feature_scale_multiplies_the_features(model, slice_):
    one = subslices(*slice_)[0]
    (expected,) = embed(model, replace(one, features=3 * one.features))
    model.config = replace(model.config, feature_scale=3.0)
    np.testing.assert_allclose(embed(model, one)[0], expected, atol=1e-5)


def test_turning_shifting_and_mirroring_change_nothing(model, slice_):
    from stofm.spatial import pair_distances

    one = subslices(*slice_)[0]
    turn = np.array([[np.cos(1.1), -np.sin(1.1)], [np.sin(1.1), np.cos(1.1)]])
    (expected,) = embed(model, one)
    for moved in (
        one.coordinates @ turn,
        one.coordinates + np.array([8.0, -3.0]),
        one.coordinates * [-1, 1],
    ):
        pairs = pair_distances(moved, one.node_type, n_neighbors=RULES.n_neighbors)
        (out,) = embed(model, replace(one, coordinates=moved, pairs=pairs))
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_order_of_cells_permutes_the_result(model, slice_, rng):
    from stofm.spatial import pair_distances

    one = subslices(*slice_)[0]
    (expected,) = embed(model, one)
    order = np.concatenate([[0], 1 + rng.permutation(one.n_nodes - 1)])
    coordinates, kinds = one.coordinates[order], one.node_type[order]
    shuffled = replace(
        one,
        coordinates=coordinates,
        features=one.features[order],
        node_type=kinds,
        cell_index=one.cell_index[order],
        pairs=pair_distances(coordinates, kinds, n_neighbors=RULES.n_neighbors),
    )
    (out,) = embed(model, shuffled)
    np.testing.assert_allclose(out, expected[order], atol=1e-5)


def test_padding_and_batch_change_nothing(model, slice_):
    parts = subslices(*slice_)
    alone = [embed(model, part)[0] for part in parts]
    for together in (embed(model, *parts), embed(model, *parts, node_multiple=16)):
        for own, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(own, other, atol=1e-5)


def test_distances_matter(model, slice_):
    xy, features = slice_
    one = subslices(xy, features)[0]
    stretched = replace(one, pairs=replace(one.pairs, distances=one.pairs.distances * 2))
    assert np.abs(embed(model, one)[0] - embed(model, stretched)[0]).max() > 1e-4


def test_dropout_acts_in_training_only(model, slice_):
    batch = SubSliceBatch.from_subslices(subslices(*slice_))
    with torch.no_grad():
        first, second = model(batch), model(batch)
        assert torch.equal(first.last_hidden_state, second.last_hidden_state)
        model.train()
        torch.manual_seed(0)
        assert not torch.allclose(model(batch).last_hidden_state, first.last_hidden_state)
    torch.manual_seed(0)
    model(batch).last_hidden_state.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_like_the_cpu(model, slice_):
    batch = SubSliceBatch.from_subslices(subslices(*slice_), node_multiple=8)
    with torch.no_grad():
        expected = model(batch).last_hidden_state[batch.is_real]
        out = model.cuda()(batch.to("cuda")).last_hidden_state.cpu()[batch.is_real]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
