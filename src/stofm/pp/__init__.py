"""Preprocessing: genes, tokens, sub-slices."""

from stofm.pp._map_genes import map_genes
from stofm.pp._subslice import subslice
from stofm.pp._tokenize import tokenize

__all__ = ["map_genes", "subslice", "tokenize"]
