"""Pretraining: what is hidden, what is recovered, and the loop that learns it (torch)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stofm.train.batches import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.checkpoint import Progress
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
from stofm.train.corpus import Corpus, TokenizedSlice, open_slice, preparation_key, write_slice
from stofm.train.epochs import Draws
from stofm.train.folder import RunFolder
from stofm.train.heads import MaskedCellHead, MaskedGeneHead, PairDistanceHead
from stofm.train.loop import TrainingLoop
from stofm.train.losses import (
    LossPart,
    contrastive_loss,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)
from stofm.train.masking import MaskedSubSlice, drop_genes, mask_tokens
from stofm.train.objectives import CellEncoderObjective, JointObjective, SpatialObjective
from stofm.train.processes import Processes
from stofm.train.protocols import Recorder, Samples, Stage
from stofm.train.recipe import DataConfig, FileConfig, ModelSource, Recipe, paper_schedule
from stofm.train.run import Pretraining, TrainResult
from stofm.train.stages import CellEncoderStage, JointStage, SpatialStage, StageSetup

__all__ = [
    "CellBatch",
    "CellEncoderObjective",
    "CellEncoderStage",
    "ContrastiveConfig",
    "Corpus",
    "DataConfig",
    "Draws",
    "FileConfig",
    "JointBatch",
    "JointObjective",
    "JointStage",
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
    "Pretraining",
    "Processes",
    "Progress",
    "Recipe",
    "Recorder",
    "RunConfig",
    "RunFolder",
    "Samples",
    "SpatialMasking",
    "SpatialObjective",
    "SpatialStage",
    "Stage",
    "StageConfig",
    "StageSetup",
    "TokenMasking",
    "TokenizedSlice",
    "TrainResult",
    "TrainingLoop",
    "contrastive_loss",
    "drop_genes",
    "mask_tokens",
    "masked_cell_loss",
    "masked_gene_loss",
    "open_slice",
    "pair_distance_loss",
    "paper_schedule",
    "preparation_key",
    "write_slice",
]
