"""AdamW with warm-up and linear decay, and its state as plain tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.optim import Optimizer

    from stofm.train.protocols import Stage

_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are changed; the defaults are the paper's.

    Attributes
    ----------
    learning_rate
        Largest learning rate, reached at the end of the warm-up.
    weight_decay
        Of AdamW; for matrices only, neither for biases and norms nor for embeddings.
    beta1, beta2, epsilon
        Of AdamW.
    warmup_steps
        Optimiser steps over which the learning rate rises linearly from 0; at most half of the
        stage. Then it falls linearly to 0 at the stage's last step.
    batch_size
        Samples of a batch (cells, or sub-slices) over all processes.
    accumulation
        Batches of an optimiser step.
    max_norm
        Norm to which larger gradients are scaled down; None for no limit.

    References
    ----------
    SToFM (arXiv 2507.11588), table A.8.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 500
    batch_size: int = 16
    accumulation: int = 4
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Check each value."""
        for name in ("batch_size", "accumulation"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, found {getattr(self, name)}."
                raise ValueError(msg)
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                msg = f"{name} must be positive and finite, found {getattr(self, name)}."
                raise ValueError(msg)

        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                msg = f"{name} must be at least 0 and finite, found {getattr(self, name)}."
                raise ValueError(msg)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                msg = f"{name} must be at least 0 and below 1, found {getattr(self, name)}."
                raise ValueError(msg)
        if self.max_norm is not None and not self.max_norm > 0:
            msg = f"max_norm must be positive, or left out for no limit, found {self.max_norm}."
            raise ValueError(msg)


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of an optimiser step.

    Parameters
    ----------
    step
        From 0.
    n_steps
        Optimiser steps of the stage.
    config
        Gives the largest learning rate and the warm-up.
    """
    warmup = min(config.warmup_steps, n_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * max(0, n_steps - step) / (n_steps - warmup)


def count_steps(
    stage: Stage, config: OptimizerConfig, *, n_epochs: int, max_steps: int | None
) -> int:
    """Optimiser steps of a stage.

    Parameters
    ----------
    stage
        Gives the batches of each epoch.
    config
        Gives the batches of a step; the last step of an epoch may have fewer.
    n_epochs, max_steps
        Epochs, and the most steps if not None.
    """
    total = n_of_epoch = 0
    for epoch in range(n_epochs):
        if epoch == 0 or stage.epochs_differ_in_length:
            n_of_epoch = -(-len(stage.epoch(epoch)) // config.accumulation)
        total += n_of_epoch
        if max_steps is not None and total >= max_steps:
            return max_steps
    return total


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = value


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW for the weights of a module that are to be trained.

    Raises
    ------
    ValueError
        There are none.
    """
    plain = {
        id(weight)
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.LayerNorm)
        for weight in part.parameters(recurse=False)
    }
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not weights:
        msg = "There are no weights to train: all of them are frozen."
        raise ValueError(msg)
    decayed = [w for w in weights if w.ndim > 1 and id(w) not in plain]
    others = [w for w in weights if w.ndim < 2 or id(w) in plain]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """State of the optimiser by name of the weight, on the CPU.

    Parameters
    ----------
    optimizer
        Made for weights of `module`.
    module
        Gives the names.
    """
    return {
        f"{name}/{key}": optimizer.state[weight][key].detach().to("cpu", copy=True)
        for name, weight in module.named_parameters()
        for key in _STATE
        if key in optimizer.state.get(weight, {})
    }


def load_optimizer_tensors(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises
    ------
    ValueError
        A tensor belongs to no weight, or its shape does not fit.
    """
    left = dict(tensors)
    for name, weight in module.named_parameters():
        found = {key: left.pop(f"{name}/{key}") for key in _STATE if f"{name}/{key}" in left}
        for key, value in found.items():
            if value.shape != (() if key == "step" else weight.shape):
                msg = f"The optimiser's {key} of {name} has the shape {tuple(value.shape)}."
                raise ValueError(msg)
            # AdamW counts its steps on the CPU.
            place = torch.device("cpu") if key == "step" else weight.device
            optimizer.state[weight][key] = value.to(place, copy=True)
    if left:
        msg = f"The optimiser's state belongs to other weights: {sorted(left)[:3]} are not there."
        raise ValueError(msg)
