"""Pictures: slices, embeddings, what heads predict, sub-slices, and how training went."""

from stofm.pl._annotation import annotation
from stofm.pl._charts import probe, training
from stofm.pl._describe import describe
from stofm.pl._image import image
from stofm.pl._predicted import deconvolution, imputation
from stofm.pl._spatial import spatial, umap
from stofm.pl._subslices import subslices, virtual_cells

__all__ = [
    "annotation",
    "deconvolution",
    "describe",
    "image",
    "imputation",
    "probe",
    "spatial",
    "subslices",
    "training",
    "umap",
    "virtual_cells",
]
