"""Foundation-model embeddings of spatial transcriptomics slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm import corpus as corpus
    from stofm import datasets as datasets
    from stofm import genes as genes
    from stofm import im as im
    from stofm import metrics as metrics
    from stofm import nn as nn
    from stofm import pl as pl
    from stofm import pp as pp
    from stofm import spatial as spatial
    from stofm import tl as tl
    from stofm import train as train
    from stofm._settings import settings as settings
    from stofm._version import __version__ as __version__
    from stofm.genes import GeneVocabulary as GeneVocabulary
    from stofm.io import read as read
    from stofm.nn import Stofm as Stofm
    from stofm.tl import AnnotationHead as AnnotationHead
    from stofm.tl import DeconvolutionHead as DeconvolutionHead
    from stofm.tl import ImputationHead as ImputationHead

__getattr__, __dir__, __all__ = lazy(__name__)
