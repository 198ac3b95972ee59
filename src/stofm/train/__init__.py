"""Pretraining: what is hidden, what is recovered, and the loop that learns it (torch)."""

from stofm.train.blending import blend_weights, stack_weights
from stofm.train.cell_masking import MaskedSubSlice, SpatialMasking
from stofm.train.cell_samples import Draws
from stofm.train.config import RunConfig, StageConfig, paper_schedule
from stofm.train.corpus import (
    Corpus,
    TokenizedSlice,
    open_slice,
    preparation_key,
    write_slice,
)
from stofm.train.fine_tuning_config import FineTuningConfig
from stofm.train.gene_masking import TokenMasking, drop_genes, mask_tokens
from stofm.train.head_fitting import FittedHead, HeadTraining, apply_head, fit_head
from stofm.train.heads import MaskedCellHead, MaskedGeneHead, PairDistanceHead
from stofm.train.inputs import CellBatch, JointBatch, MaskedGenes, MaskedSubSliceBatch
from stofm.train.linear_head import fit_linear_head
from stofm.train.loop import TrainingLoop
from stofm.train.losses import (
    ContrastiveConfig,
    LossPart,
    LossWeights,
    MaskedGeneConfig,
    contrastive_loss,
    masked_cell_loss,
    masked_gene_loss,
    pair_distance_loss,
)
from stofm.train.objectives import CellEncoderObjective, JointObjective
from stofm.train.optimizer import OptimizerConfig
from stofm.train.pretraining import Pretraining, TrainResult
from stofm.train.processes import Processes
from stofm.train.protocols import Recorder, Samples, Stage
from stofm.train.recipe import DataConfig, FileConfig, ModelSource, Recipe
from stofm.train.run_checkpoint import Progress
from stofm.train.spatial_objective import SpatialObjective
from stofm.train.stage_setup import StageSetup
from stofm.train.stages import CellEncoderStage, JointStage, SpatialStage
from stofm.train.state import RunFolder
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
