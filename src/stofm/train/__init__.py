"""Pretraining: what is hidden, what is recovered, and the training loop (torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm.corpus.sources import FileConfig
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
from stofm.train.recipe import DataConfig, ModelSource, Recipe, paper_schedule
from stofm.train.run import TrainResult

__all__ = [
    "ContrastiveConfig",
    "DataConfig",
    "FileConfig",
    "LossWeights",
    "MaskedGeneConfig",
    "ModelSource",
    "OptimizerConfig",
    "Recipe",
    "RunConfig",
    "SpatialMasking",
    "StageConfig",
    "TokenMasking",
    "TrainResult",
    "paper_schedule",
]
