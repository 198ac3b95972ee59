"""Tools: run and train models on AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.heads.annotation import AnnotationHead
    from stofm.heads.deconvolution import DeconvolutionHead
    from stofm.heads.imputation import ImputationHead
    from stofm.heads.request import HeadOptions
    from stofm.tl._annotate import annotate
    from stofm.tl._deconvolve import deconvolve
    from stofm.tl._describe import describe
    from stofm.tl._description import Description
    from stofm.tl._domains import domains
    from stofm.tl._embed import embed
    from stofm.tl._encode_cells import encode_cells
    from stofm.tl._impute import impute
    from stofm.tl._novel import novel
    from stofm.tl._pool_genes import pool_genes
    from stofm.tl._probe import ProbeResult, probe
    from stofm.tl._train import train

__all__ = [
    "AnnotationHead",
    "DeconvolutionHead",
    "Description",
    "HeadOptions",
    "ImputationHead",
    "ProbeResult",
    "annotate",
    "deconvolve",
    "describe",
    "domains",
    "embed",
    "encode_cells",
    "impute",
    "novel",
    "pool_genes",
    "probe",
    "train",
]

__getattr__ = lazy(
    "stofm.tl",
    {
        "annotate": "stofm.tl._annotate",
        "AnnotationHead": "stofm.heads.annotation",
        "DeconvolutionHead": "stofm.heads.deconvolution",
        "deconvolve": "stofm.tl._deconvolve",
        "describe": "stofm.tl._describe",
        "Description": "stofm.tl._description",
        "domains": "stofm.tl._domains",
        "embed": "stofm.tl._embed",
        "encode_cells": "stofm.tl._encode_cells",
        "HeadOptions": "stofm.heads.request",
        "ImputationHead": "stofm.heads.imputation",
        "impute": "stofm.tl._impute",
        "novel": "stofm.tl._novel",
        "pool_genes": "stofm.tl._pool_genes",
        "probe": "stofm.tl._probe",
        "ProbeResult": "stofm.tl._probe",
        "train": "stofm.tl._train",
    },
)


def __dir__() -> list[str]:
    return __all__
