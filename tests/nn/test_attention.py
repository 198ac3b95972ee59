from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stofm.nn import (
    GaussianDistanceBias,
    SE2Transformer,
    SE2TransformerConfig,
)
from stofm.nn.attention import biased_attention
from stofm.nn.se2_transformer import PairState
from stofm.spatial import NO_NEIGHBOR

N_REAL = (11, 7)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 3, 11, 8), (2, 3, 11, 8), (2, 3, 11, 5), (2, 3, 11, 11))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def plain(queries, keys, values, bias):
    logits = queries @ keys.transpose(-1, -2) + bias
    for b, n in enumerate(N_REAL):
        logits[b, :, :, n:] = -torch.inf
    return logits.softmax(-1) @ values


def real_part(x):
    return torch.cat([x[b, :, :n].flatten() for b, n in enumerate(N_REAL)])


@pytest.mark.parametrize("grad", [False, True])
def test_like_the_plain_formula(inputs, grad):
    with torch.set_grad_enabled(grad):
        ours = biased_attention(*inputs, N_REAL)
    torch.testing.assert_close(real_part(ours), real_part(plain(*inputs)))


def test_gradients_like_the_plain_formula(inputs):
    target = torch.linspace(-1, 1, 2 * 3 * 11 * 5, dtype=torch.float64).view(2, 3, 11, 5)
    ours, expected = (
        torch.autograd.grad((real_part(out) * real_part(target)).sum(), inputs)
        for out in (biased_attention(*inputs, N_REAL), plain(*inputs))
    )
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_gradient_without_a_gradient_of_the_bias(inputs):
    *parts, bias = inputs
    out = biased_attention(*parts, bias.detach(), N_REAL)
    out.square().sum().backward()
    assert all(part.grad is not None for part in parts)


def test_dropout_keeps_the_mean_and_its_gradient_matches_its_mask(inputs):
    queries, keys, values, bias = inputs
    with torch.no_grad():
        expected = biased_attention(*inputs, N_REAL)
    torch.manual_seed(0)
    mean = torch.stack([biased_attention(*inputs, N_REAL, dropout=0.3) for _ in range(400)]).mean(0)
    assert (real_part(mean) - real_part(expected)).abs().max() < 0.35

    def run(values):
        torch.manual_seed(1)
        return real_part(biased_attention(queries, keys, values, bias, N_REAL, dropout=0.3)).sum()

    step = torch.zeros_like(values)
    step[0, 1, 2, 3] = 1e-6
    gradient = torch.autograd.grad(run(values), values)[0][0, 1, 2, 3]
    difference = (run(values.detach() + step) - run(values.detach() - step)) / 2e-6
    torch.testing.assert_close(gradient, difference.detach(), rtol=1e-6, atol=1e-6)


def test_gathered_logits_are_those_of_the_matrix(inputs):
    queries, keys, _, bias = inputs
    full = queries @ keys.transpose(-1, -2) + bias
    batch, rows, columns = (
        torch.tensor([0, 1, 1]),
        torch.tensor([10, 2, 6]),
        torch.tensor([3, 2, 0]),
    )
    ours = PairState(bias, queries, keys).at(batch, rows, columns)
    torch.testing.assert_close(ours, full[batch, :, rows, columns])


@pytest.fixture
def module():
    torch.manual_seed(2)
    module = GaussianDistanceBias(n_kernels=7, n_heads=3).double()
    with torch.no_grad():
        module.scale.fill_(0.7)
        module.shift.fill_(-0.2)
    return module


def plain_bias(module, distance):
    x = module.scale * distance + module.shift
    density = []
    for mean, width in zip(module.means, module.widths, strict=True):
        s = width.abs() + 1e-5
        density.append(torch.exp(-0.5 * ((x - mean) / s) ** 2) / (math.sqrt(2 * math.pi) * s))
    return module.output(torch.relu(module.hidden(torch.stack(density))))


def test_near_start_falls_with_distance_in_three_heads_of_four():
    torch.manual_seed(0)
    module = GaussianDistanceBias(n_kernels=64, n_heads=4)
    before = {name: value.clone() for name, value in module.named_parameters()}
    module.favor_near()
    with torch.no_grad():
        bias = module(torch.tensor([0.0, 1.0, 2.0, 40.0, 90.0]))
    expected = torch.tensor([[0.0, -0.5, -2.0, -6.0], [0.0, -0.125, -0.5, -6.0]])
    torch.testing.assert_close(bias[:4, :2].T, expected, atol=0.15, rtol=0)
    assert bias[0, 2] - bias[3, 2] > 4  # the farthest reach too
    torch.testing.assert_close(bias[:, 3], torch.zeros(5), atol=1e-4, rtol=0)
    changed = [n for n, v in module.named_parameters() if not torch.equal(v, before[n])]
    assert changed == ["output.weight", "output.bias"]


def test_models_start_near_if_their_config_says_so():
    config = SE2TransformerConfig(d_cell=8, n_layers=1, d_model=8, n_heads=4, n_kernels=32)
    distances = torch.tensor([0.0, 50.0])
    falls = {}
    for start in ("random", "near"):
        torch.manual_seed(1)
        transformer = SE2Transformer(replace(config, distance_start=start))
        near, far = transformer.distance_bias(distances)[:, 0].tolist()
        falls[start] = near - far
    assert falls["near"] > 5 > abs(falls["random"])


@pytest.mark.parametrize("grad", [False, True])
def test_like_the_formula(module, grad):
    distances = torch.tensor([0.0, 0.3, 2.0, 100.0], dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        ours = module(distances)
    expected = torch.stack([plain_bias(module, d) for d in distances])
    torch.testing.assert_close(ours, expected)


def dense_distances(rng, n_real, n_nodes):
    """Padded matrices: 0 where there is no distance, 100 for no neighbour."""
    matrices = np.zeros((len(n_real), n_nodes, n_nodes), dtype=np.float32)
    node_type = np.full((len(n_real), n_nodes), 3)
    for b, n in enumerate(n_real):
        upper = np.triu(rng.uniform(0.1, 9, (n, n)), k=1)
        upper[rng.random((n, n)) < 0.5] = NO_NEIGHBOR
        upper = np.triu(upper, k=1)
        upper[0] = 0
        matrices[b, :n, :n] = upper + upper.T
        node_type[b, :n] = [1] + [0] * (n - 1)
    return matrices, node_type


def test_bias_and_gradients_like_the_dense_computation(rng, dense_batch):
    matrices, node_type = dense_distances(rng, (11, 7), 13)
    features = np.zeros((2, 13, 4), dtype=np.float32)
    batch = dense_batch(features, matrices, node_type, np.full((2, 13), -1))
    torch.manual_seed(0)
    model = SE2Transformer(
        SE2TransformerConfig(d_cell=4, d_model=6, n_heads=3, n_layers=1, d_inner=5, n_kernels=7)
    )
    ours = model.attention_bias(batch)
    distances = torch.from_numpy(matrices)
    every = model.distance_bias(distances.flatten()).view(2, 13, 13, 3)
    expected = torch.where(distances[..., None] == 0, 0.0, every).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(model.distance_bias.parameters())
    own, dense = (
        torch.autograd.grad((bias * weights).sum(), parameters, retain_graph=True)
        for bias in (ours, expected)
    )
    for a, b in zip(own, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
