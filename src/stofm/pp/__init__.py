"""Preprocessing: what will happen, genes, tokens, sub-slices."""

from stofm.pp._check import Findings, check
from stofm.pp._map_genes import map_genes
from stofm.pp._subslice import subslice
from stofm.pp._tokenize import tokenize

__all__ = ["Findings", "check", "map_genes", "subslice", "tokenize"]
