from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist

from stofm.nn import SE2Transformer, SE2TransformerConfig, SubSliceBatch
from stofm.nn.conversion import se2_from_reference
from stofm.spatial import SubSliceConfig, build_subslice, lay_out_slice, rows_by_subslice

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_model(name):
    config = json.loads((GOLDEN / f"{name}.config.json").read_text())
    return se2_from_reference(config, load_file(GOLDEN / f"{name}.safetensors")).eval()


def golden_batch(arrays):
    return SubSliceBatch.from_dense(
        arrays["token_embeddings"], arrays["attn_bias"], arrays["token_types"], arrays["indices"]
    )


@pytest.fixture(params=["post", "pre"])
def golden(request):
    inputs = np.load(GOLDEN / "f_model_post_ln.npz")
    is_real = inputs["token_types"] != 3
    expected = np.load(GOLDEN / f"f_model_{request.param}_ln.npz")
    return golden_model(f"f_model_{request.param}_ln"), golden_batch(inputs), is_real, expected


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
        pairs = model(batch).pairs
    np.testing.assert_allclose(pairs.dense()[both], expected["pair_rep"][both], atol=1e-4)
    # Queries that are real see 0 at padded keys, as the reference stores it.
    padded_keys = is_real[:, :, None] & ~is_real[:, None, :]
    assert not pairs.dense()[padded_keys].any()
    chosen = np.argwhere(both)[::97]
    at = pairs.at(*torch.from_numpy(chosen.T))
    np.testing.assert_allclose(at, expected["pair_rep"][tuple(chosen.T)], atol=1e-4)


def test_bias_and_attention_like_the_reference(golden):
    model, batch, is_real, expected = golden
    both = is_real[:, :, None] & is_real[:, None, :]
    with torch.no_grad():
        bias = model.attention_bias(batch).permute(0, 2, 3, 1)
        attention = model(batch).pairs.attention()
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


@pytest.mark.parametrize(("d_cell", "d_model"), [(12, 16), (6, 16), (8, 16)])
def test_residual_start_is_a_cell_beside_the_mean_around_it(d_cell, d_model, rng):
    torch.manual_seed(0)
    model = SE2Transformer(
        SE2TransformerConfig(
            d_cell=d_cell, n_layers=2, d_model=d_model, n_heads=4, norm_first=True, start="residual"
        )
    ).eval()
    n_own = min(d_cell, d_model // 2)
    coordinates = rng.uniform(0, 12, (150, 2))
    waves = np.sin(coordinates @ rng.normal(size=(2, d_cell)) / 3)
    features = (waves + 0.3 * rng.normal(size=(150, d_cell))).astype(np.float32)
    rules = SubSliceConfig(n_cells=200, unit="spacing")
    layout = lay_out_slice(coordinates, features, rules)
    subslice = build_subslice(layout, features, np.arange(150), rules)
    with torch.no_grad():
        out = model(SubSliceBatch.from_subslices([subslice])).last_hidden_state[0].numpy()
    is_cell = subslice.cell_index >= 0
    found = out[is_cell]
    np.testing.assert_allclose(found[:, :n_own], features[:, :n_own], atol=1e-5)
    assert not found[:, n_own : d_model // 2].any()
    assert not found[:, d_model // 2 + n_own :].any()
    near = np.exp(-(cdist(*[subslice.coordinates[is_cell]] * 2) ** 2) / (2 * 2**2))
    means = (near @ features / near.sum(axis=1, keepdims=True))[:, :n_own]
    around = found[:, d_model // 2 : d_model // 2 + n_own]
    assert np.corrcoef(around.ravel(), means.ravel())[0, 1] > 0.9


def test_training_moves_all_parts_of_a_residual_start(slice_):
    torch.manual_seed(0)
    config = SE2TransformerConfig(
        d_cell=slice_[1].shape[1],
        n_layers=2,
        d_model=16,
        n_heads=4,
        norm_first=True,
        start="residual",
    )
    model = SE2Transformer(config)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = SubSliceBatch.from_subslices(subslices(*slice_))
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).last_hidden_state.square().mean().backward()
        optimizer.step()
    still = [n for n, v in model.named_parameters() if torch.equal(v, before[n])]
    assert not still


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
