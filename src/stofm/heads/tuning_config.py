"""How a model is tuned together with a head, as a frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stofm.train.config import OptimizerConfig

#: What is changed: low-rank changes that are added to the weights at the end, or the weights.
TuningStrategy = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """How a model is tuned together with a head.

    Attributes
    ----------
    learning_rate
        Largest learning rate, of model and head.
    weight_decay
        Of AdamW; for matrices only.
    warmup_steps
        Optimiser steps over which the learning rate rises; then it falls linearly to 0.
    batch_size
        Sub-slices of an optimiser step.
    epochs, min_steps
        Passes over the sub-slices; more of them if these would be fewer than `min_steps` steps.
        Rounded up to a whole number of validations.
    validate_every
        Optimiser steps between validations, or those of an epoch if these are more. All cells are
        embedded anew before each.
    patience
        Validations without a lower loss after which tuning stops.
    sampled_cells
        Cells of a sub-slice that go through the cell encoder in a step, with gradients.
    vary_subslices
        Cut the slices anew in every epoch, at another angle.
    lora_rank, lora_alpha
        ``"lora"``: rank of the changes, and their scale times the rank.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 10
    batch_size: int = 1
    epochs: int = 10
    min_steps: int = 100
    validate_every: int = 10
    patience: int = 5
    sampled_cells: int = 32
    vary_subslices: bool = True
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        """Check each value."""
        counts = ("epochs", "min_steps", "validate_every", "patience", "sampled_cells", "lora_rank")
        for name in counts:
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, found {getattr(self, name)}."
                raise ValueError(msg)
        if not 0 < self.lora_alpha < math.inf:
            msg = f"lora_alpha must be positive and finite, found {self.lora_alpha}."
            raise ValueError(msg)
        _ = self.optimizer

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimiser, batch and schedule."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            batch_size=self.batch_size,
            accumulation=1,
        )
