"""Tools: run and train models on AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.align.aligner import Aligner
    from stofm.align.config import AlignOptions
    from stofm.heads.annotation import AnnotationHead
    from stofm.heads.deconvolution import DeconvolutionHead
    from stofm.heads.imputation import ImputationHead
    from stofm.heads.request import HeadOptions
    from stofm.perturb.effect import PerturbationEffect
    from stofm.tl._align import align
    from stofm.tl._annotate import annotate
    from stofm.tl._attention import attention
    from stofm.tl._deconvolve import deconvolve
    from stofm.tl._describe import describe
    from stofm.tl._description import Description
    from stofm.tl._domains import domains
    from stofm.tl._embed import embed
    from stofm.tl._encode_cells import encode_cells
    from stofm.tl._impute import impute
    from stofm.tl._influence import Influence, influence
    from stofm.tl._ligand_receptor import ligand_receptor
    from stofm.tl._novel import novel
    from stofm.tl._perturb import perturb
    from stofm.tl._pool_genes import pool_genes
    from stofm.tl._predict_genes import predict_genes
    from stofm.tl._probe import ProbeResult, probe
    from stofm.tl._screen import screen
    from stofm.tl._train import train

__all__ = [
    "AlignOptions",
    "Aligner",
    "AnnotationHead",
    "DeconvolutionHead",
    "Description",
    "HeadOptions",
    "ImputationHead",
    "Influence",
    "PerturbationEffect",
    "ProbeResult",
    "align",
    "annotate",
    "attention",
    "deconvolve",
    "describe",
    "domains",
    "embed",
    "encode_cells",
    "impute",
    "influence",
    "ligand_receptor",
    "novel",
    "perturb",
    "pool_genes",
    "predict_genes",
    "probe",
    "screen",
    "train",
]

__getattr__ = lazy(
    "stofm.tl",
    {
        "align": "stofm.tl._align",
        "Aligner": "stofm.align.aligner",
        "AlignOptions": "stofm.align.config",
        "annotate": "stofm.tl._annotate",
        "AnnotationHead": "stofm.heads.annotation",
        "attention": "stofm.tl._attention",
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
        "Influence": "stofm.tl._influence",
        "influence": "stofm.tl._influence",
        "ligand_receptor": "stofm.tl._ligand_receptor",
        "perturb": "stofm.tl._perturb",
        "PerturbationEffect": "stofm.perturb.effect",
        "novel": "stofm.tl._novel",
        "pool_genes": "stofm.tl._pool_genes",
        "predict_genes": "stofm.tl._predict_genes",
        "probe": "stofm.tl._probe",
        "ProbeResult": "stofm.tl._probe",
        "screen": "stofm.tl._screen",
        "train": "stofm.tl._train",
    },
)


def __dir__() -> list[str]:
    return __all__
