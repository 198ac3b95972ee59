"""Pictures: slices, embeddings, what heads predict, sub-slices, and how training went."""

from stofm.pl._annotation import annotation
from stofm.pl._deconvolution import deconvolution
from stofm.pl._imputation import imputation
from stofm.pl._probe import probe
from stofm.pl._spatial import spatial, umap
from stofm.pl._subslices import subslices, virtual_cells
from stofm.pl._training import training

__all__ = [
    "annotation",
    "deconvolution",
    "imputation",
    "probe",
    "spatial",
    "subslices",
    "training",
    "umap",
    "virtual_cells",
]
