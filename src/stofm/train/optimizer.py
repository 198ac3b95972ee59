"""AdamW with warm-up and linear decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from stofm.train.config import OptimizerConfig


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
        raise ValueError("There are no weights to train: all of them are frozen.")
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
