"""Pictures: slices, embeddings, what heads predict, sub-slices, and how training went."""

from stofm.pl._annotation import annotation
from stofm.pl._charts import probe, training
from stofm.pl._describe import describe
from stofm.pl._domains import domains
from stofm.pl._gene_prediction import gene_prediction
from stofm.pl._influence import attention, influence
from stofm.pl._perturbation import perturbation
from stofm.pl._predicted import deconvolution, imputation
from stofm.pl._report import report
from stofm.pl._spatial import image, spatial, umap
from stofm.pl._subslices import subslices, virtual_cells

__all__ = [
    "annotation",
    "attention",
    "deconvolution",
    "describe",
    "domains",
    "gene_prediction",
    "image",
    "imputation",
    "influence",
    "perturbation",
    "probe",
    "report",
    "spatial",
    "subslices",
    "training",
    "umap",
    "virtual_cells",
]
