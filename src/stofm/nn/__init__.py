"""The model: configuration, networks, checkpoints and batched inference (torch)."""

from stofm.nn.attention import GaussianDistanceBias
from stofm.nn.batch import GeneBag, SubSliceBatch, TokenBatch
from stofm.nn.cell_encoder import CellEncoder
from stofm.nn.config import CellEncoderConfig, SE2TransformerConfig, StofmConfig
from stofm.nn.device import choose_device, choose_dtype
from stofm.nn.inference import embed_slice, encode_cells
from stofm.nn.model import Stofm, UntrainedModelWarning
from stofm.nn.prediction_head import HeadConfig, PredictionHead
from stofm.nn.se2_transformer import SE2Output, SE2Transformer
from stofm.spatial import SubSliceConfig

__all__ = [
    "CellEncoder",
    "CellEncoderConfig",
    "GaussianDistanceBias",
    "GeneBag",
    "HeadConfig",
    "PredictionHead",
    "SE2Output",
    "SE2Transformer",
    "SE2TransformerConfig",
    "Stofm",
    "StofmConfig",
    "SubSliceBatch",
    "SubSliceConfig",
    "TokenBatch",
    "UntrainedModelWarning",
    "choose_device",
    "choose_dtype",
    "embed_slice",
    "encode_cells",
]
