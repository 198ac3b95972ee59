"""Pretraining: what is hidden, what is recovered, and the loop that learns it (torch)."""

from stofm.train.batches import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.blending import blend_weights, stack_weights
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
from stofm.train.fine_tuning_config import FineTuningConfig
from stofm.train.folder import RunFolder
from stofm.train.head_fitting import FittedHead, HeadTraining, apply_head, fit_head
from stofm.train.heads import MaskedCellHead, MaskedGeneHead, PairDistanceHead
from stofm.train.linear_head import fit_linear_head
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
from stofm.train.targets import Targets, head_loss

__all__ = [
    "CellBatch",
    "CellEncoderObjective",
    "CellEncoderStage",
    "ContrastiveConfig",
    "Corpus",
    "DataConfig",
    "Draws",
    "FileConfig",
    "FineTuningConfig",
    "FittedHead",
    "HeadTraining",
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
    "Targets",
    "TokenMasking",
    "TokenizedSlice",
    "TrainResult",
    "TrainingLoop",
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
    "open_slice",
    "pair_distance_loss",
    "paper_schedule",
    "preparation_key",
    "stack_weights",
    "write_slice",
]
