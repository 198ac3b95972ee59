"""Pretraining: what is hidden, what is recovered, and the loop that learns it (torch)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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
from stofm.train.corpus import Corpus, TokenizedSlice
from stofm.train.losses import (
    LossPart,
    MaskedCellHead,
    MaskedGeneHead,
    PairDistanceHead,
    contrastive_loss,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)
from stofm.train.masked_cells import JointBatch, MaskedSubSlice, MaskedSubSliceBatch
from stofm.train.masked_genes import CellBatch, MaskedGenes, drop_genes, mask_tokens
from stofm.train.objectives import CellEncoderObjective, JointObjective, SpatialObjective
from stofm.train.recipe import DataConfig, FileConfig, ModelSource, Recipe, paper_schedule
from stofm.train.run import TrainResult

if TYPE_CHECKING:
    from stofm.heads.ensemble import blend_weights, fit_linear_head, stack_weights
    from stofm.heads.network import FittedHead, HeadTraining, apply_head, fit_head
    from stofm.heads.targets import Targets, head_loss
    from stofm.heads.tuning_samples import FineTuningConfig

#: Public here, and kept with the heads, which are built on training.
_HEADS = {
    "FineTuningConfig": "tuning_samples",
    "FittedHead": "network",
    "HeadTraining": "network",
    "Targets": "targets",
    "apply_head": "network",
    "blend_weights": "ensemble",
    "fit_head": "network",
    "fit_linear_head": "ensemble",
    "head_loss": "targets",
    "stack_weights": "ensemble",
}


def __getattr__(name: str) -> object:
    if name not in _HEADS:
        msg = f"module 'stofm.train' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"stofm.heads.{_HEADS[name]}"), name)


__all__ = [
    "CellBatch",
    "CellEncoderObjective",
    "ContrastiveConfig",
    "Corpus",
    "DataConfig",
    "FileConfig",
    "FineTuningConfig",
    "FittedHead",
    "HeadTraining",
    "JointBatch",
    "JointObjective",
    "LossPart",
    "LossWeights",
    "MaskedCellHead",
    "MaskedGeneConfig",
    "MaskedGeneHead",
    "MaskedGenes",
    "MaskedSubSlice",
    "MaskedSubSliceBatch",
    "ModelSource",
    "OptimizerConfig",
    "PairDistanceHead",
    "Recipe",
    "RunConfig",
    "SpatialMasking",
    "SpatialObjective",
    "StageConfig",
    "Targets",
    "TokenMasking",
    "TokenizedSlice",
    "TrainResult",
    "apply_head",
    "blend_weights",
    "contrastive_loss",
    "drop_genes",
    "fit_head",
    "fit_linear_head",
    "head_loss",
    "mask_tokens",
    "masked_cell_loss",
    "masked_gene_loss",
    "pair_distance_loss",
    "paper_schedule",
    "stack_weights",
]
