from __future__ import annotations

import pytest
import torch

from stofm.nn import biased_attention, gather_logits

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
    ours = gather_logits(queries, keys, bias, batch, rows, columns)
    torch.testing.assert_close(ours, full[batch, :, rows, columns])
