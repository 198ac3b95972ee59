"""Pretraining: what is hidden, what is recovered, and the loop that learns it (torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy
from stofm.train.config import (
    ContrastiveConfig,
    LossWeights,
    MaskedGeneConfig,
    OptimizerConfig,
    RunConfig,
    SpatialMasking,
    StageConfig,
    TokenMasking,
)
from stofm.train.recipe import DataConfig, FileConfig, ModelSource, Recipe, paper_schedule
from stofm.train.run import TrainResult

if TYPE_CHECKING:
    from stofm.heads.ensemble import blend_weights, fit_linear_head, stack_weights
    from stofm.heads.network import FittedHead, HeadTraining, apply_head, fit_head
    from stofm.heads.targets import Targets, head_loss
    from stofm.heads.tuning_samples import FineTuningConfig

#: Public here, and kept with the heads, which are built on training.
_HEADS = {
    "ensemble": ("blend_weights", "fit_linear_head", "stack_weights"),
    "network": ("FittedHead", "HeadTraining", "apply_head", "fit_head"),
    "targets": ("Targets", "head_loss"),
    "tuning_samples": ("FineTuningConfig",),
}
__getattr__ = lazy(
    "stofm.train", {name: f"stofm.heads.{file}" for file, names in _HEADS.items() for name in names}
)

__all__ = [
    "ContrastiveConfig",
    "DataConfig",
    "FileConfig",
    "FineTuningConfig",
    "FittedHead",
    "HeadTraining",
    "LossWeights",
    "MaskedGeneConfig",
    "ModelSource",
    "OptimizerConfig",
    "Recipe",
    "RunConfig",
    "SpatialMasking",
    "StageConfig",
    "Targets",
    "TokenMasking",
    "TrainResult",
    "apply_head",
    "blend_weights",
    "fit_head",
    "fit_linear_head",
    "head_loss",
    "paper_schedule",
    "stack_weights",
]
