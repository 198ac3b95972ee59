"""AdamW with warm-up and linear decay, and its state as plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.optim import Optimizer

    from stofm.train.config import OptimizerConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW for the weights of a module that are to be trained."""
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


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of an optimiser step, counted from 0: a linear rise, then a linear fall."""
    warmup = min(config.warmup_steps, n_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * max(0, n_steps - step) / (n_steps - warmup)


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """State of the optimiser by name of the weight in `module`, on the CPU."""
    return {
        f"{name}/{key}": optimizer.state[weight][key].detach().to("cpu", copy=True)
        for name, weight in module.named_parameters()
        for key in _MOMENTS
        if key in optimizer.state.get(weight, {})
    }


def load_optimizer_tensors(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    left = dict(tensors)
    for name, weight in module.named_parameters():
        found = {key: left.pop(f"{name}/{key}") for key in _MOMENTS if f"{name}/{key}" in left}
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
