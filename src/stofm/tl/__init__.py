"""Tools: run and train models on AnnData."""

from stofm.tl._annotate import annotate
from stofm.tl._annotation_head import AnnotationHead
from stofm.tl._deconvolution_head import DeconvolutionHead
from stofm.tl._deconvolve import deconvolve
from stofm.tl._domains import domains
from stofm.tl._embed import embed
from stofm.tl._encode_cells import encode_cells
from stofm.tl._imputation_head import ImputationHead
from stofm.tl._impute import impute
from stofm.tl._pool_genes import pool_genes
from stofm.tl._probe import ProbeResult, probe
from stofm.tl._train import train

__all__ = [
    "AnnotationHead",
    "DeconvolutionHead",
    "ImputationHead",
    "ProbeResult",
    "annotate",
    "deconvolve",
    "domains",
    "embed",
    "encode_cells",
    "impute",
    "pool_genes",
    "probe",
    "train",
]
