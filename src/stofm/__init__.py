"""Foundation-model embeddings of spatial transcriptomics slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy
from stofm._version import __version__

if TYPE_CHECKING:
    from stofm import corpus, datasets, genes, im, metrics, nn, pl, pp, spatial, tl, train
    from stofm._settings import settings
    from stofm.genes import GeneVocabulary
    from stofm.io import read
    from stofm.nn import Stofm
    from stofm.tl import AnnotationHead, DeconvolutionHead, ImputationHead

__all__ = [
    "AnnotationHead",
    "DeconvolutionHead",
    "GeneVocabulary",
    "ImputationHead",
    "Stofm",
    "__version__",
    "corpus",
    "datasets",
    "genes",
    "im",
    "metrics",
    "nn",
    "pl",
    "pp",
    "read",
    "settings",
    "spatial",
    "tl",
    "train",
]

_AREAS = (
    "corpus",
    "datasets",
    "genes",
    "im",
    "metrics",
    "nn",
    "pl",
    "pp",
    "spatial",
    "tl",
    "train",
)

__getattr__ = lazy(
    "stofm",
    {area: f"stofm.{area}" for area in _AREAS}
    | {
        "GeneVocabulary": "stofm.genes",
        "read": "stofm.io",
        "settings": "stofm._settings",
        "Stofm": "stofm.nn",
        "AnnotationHead": "stofm.tl",
        "DeconvolutionHead": "stofm.tl",
        "ImputationHead": "stofm.tl",
    },
)


def __dir__() -> list[str]:
    return __all__
