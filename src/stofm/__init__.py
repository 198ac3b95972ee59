"""Foundation-model embeddings of spatial transcriptomics slices."""

from __future__ import annotations

import contextlib
import importlib
import random
from typing import TYPE_CHECKING

from stofm._version import __version__

if TYPE_CHECKING:
    from stofm import datasets, genes, metrics, nn, pl, pp, spatial, tl, train
    from stofm.genes import GeneVocabulary
    from stofm.nn import Stofm
    from stofm.tl import AnnotationHead, DeconvolutionHead, ImputationHead

__all__ = [
    "AnnotationHead",
    "DeconvolutionHead",
    "GeneVocabulary",
    "ImputationHead",
    "Stofm",
    "__version__",
    "datasets",
    "genes",
    "metrics",
    "nn",
    "pl",
    "pp",
    "spatial",
    "tl",
    "train",
]

_LAZY = {
    "genes": "stofm.genes",
    "nn": "stofm.nn",
    "spatial": "stofm.spatial",
    "train": "stofm.train",
    "datasets": "stofm.datasets",
    "pl": "stofm.pl",
    "pp": "stofm.pp",
    "tl": "stofm.tl",
    "metrics": "stofm.metrics",
    "GeneVocabulary": "stofm.genes",
    "Stofm": "stofm.nn",
    "AnnotationHead": "stofm.tl",
    "DeconvolutionHead": "stofm.tl",
    "ImputationHead": "stofm.tl",
}


def __getattr__(name: str) -> object:
    # torch, scanpy and transformers take seconds to import; they wait for the first use.
    if name not in _LAZY:
        msg = f"module 'stofm' has no attribute {name!r}"
        raise AttributeError(msg)
    state = random.getstate()
    try:
        # It draws a number when it is imported, and scikit-learn imports it, within calls of ours.
        with contextlib.suppress(ImportError):
            importlib.import_module("rich.style")
        module = importlib.import_module(_LAZY[name])
    finally:
        random.setstate(state)
    value = module if _LAZY[name] == f"stofm.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
