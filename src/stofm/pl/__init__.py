"""Pictures: slices, embeddings, what heads predict, sub-slices, and how training went."""

from stofm.pl._annotation import annotation
from stofm.pl._deconvolution import deconvolution
from stofm.pl._imputation import imputation
from stofm.pl._probe import probe
from stofm.pl._spatial import spatial
from stofm.pl._subslices import subslices
from stofm.pl._training import training
from stofm.pl._umap import umap
from stofm.pl._virtual_cells import virtual_cells

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
