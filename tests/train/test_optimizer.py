from __future__ import annotations

import pytest
import torch
from torch import nn

from stofm.train.config import OptimizerConfig
from stofm.train.optimizer import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 2)
        self.mask = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self):
        return self.linear(self.norm(self.words.weight) + self.mask).square().sum()


def test_only_matrices_decay():
    module = Small()
    decayed, others = make_optimizer(module, OptimizerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert [id(p) for p in decayed["params"]] == [id(module.linear.weight)]
    assert others["weight_decay"] == 0.0
    expected = {module.words.weight, *module.norm.parameters(), module.linear.bias, module.mask}
    assert set(others["params"]) == expected


@pytest.mark.parametrize(
    ("n_steps", "warmup", "expected"),
    [
        (5, 2, [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        (4, 0, [1.0, 0.75, 0.5, 0.25]),
        # A warm-up longer than half of the stage is cut to that.
        (4, 500, [0.5, 1.0, 1.0, 0.5]),
        (1, 500, [1.0]),
    ],
)
def test_learning_rate(n_steps, warmup, expected):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup)
    found = [learning_rate(step, n_steps, config) for step in range(n_steps)]
    assert found == pytest.approx([2.0 * share for share in expected])
    assert learning_rate(n_steps, n_steps, config) == 0.0


def trained(steps):
    torch.manual_seed(0)
    module = Small()
    optimizer = make_optimizer(module, OptimizerConfig(learning_rate=0.1))
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        module().backward()
        optimizer.step()


def test_the_state_goes_through_tensors():
    module, _ = trained(5)
    half, first = trained(2)
    second = make_optimizer(half, OptimizerConfig(learning_rate=0.1))
    tensors = optimizer_tensors(first, half)
    assert sorted(tensors)[:3] == [
        "linear.bias/exp_avg",
        "linear.bias/exp_avg_sq",
        "linear.bias/step",
    ]
    load_optimizer_tensors(second, half, tensors)
    advance(half, second, 3)
    for one, other in zip(module.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other)
    # Copies: training on changes neither.
    assert float(tensors["linear.bias/step"]) == 2.0


def test_a_state_of_other_weights_is_refused():
    module, optimizer = trained(1)
    tensors = optimizer_tensors(optimizer, module)
    with pytest.raises(ValueError, match=r"belongs to other weights: \['more/exp_avg'\]"):
        load_optimizer_tensors(optimizer, module, {**tensors, "more/exp_avg": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"exp_avg of linear.bias has the shape \(7,\)"):
        load_optimizer_tensors(optimizer, module, {**tensors, "linear.bias/exp_avg": torch.ones(7)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, found -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, found nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0 and finite, found inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, found nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, found inf"),
        ({"max_norm": float("nan")}, "max_norm must be positive, or left out"),
    ],
)
def test_values_that_can_not_be_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**entries)
