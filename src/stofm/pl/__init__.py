"""Pictures: embeddings, slices, sub-slices, virtual cells, and how training went."""

from stofm.pl._spatial import spatial
from stofm.pl._subslices import subslices
from stofm.pl._training import training
from stofm.pl._umap import umap
from stofm.pl._virtual_cells import virtual_cells

__all__ = ["spatial", "subslices", "training", "umap", "virtual_cells"]
