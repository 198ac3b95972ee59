"""Pictures: embeddings, slices, sub-slices and virtual cells."""

from stofm.pl._spatial import spatial
from stofm.pl._subslices import subslices
from stofm.pl._umap import umap
from stofm.pl._virtual_cells import virtual_cells

__all__ = ["spatial", "subslices", "umap", "virtual_cells"]
