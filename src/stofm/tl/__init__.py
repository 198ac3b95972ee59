"""Tools: run and train models on AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.align.aligner import Aligner as Aligner
    from stofm.align.config import AlignOptions as AlignOptions
    from stofm.heads.annotation import AnnotationHead as AnnotationHead
    from stofm.heads.deconvolution import DeconvolutionHead as DeconvolutionHead
    from stofm.heads.imputation import ImputationHead as ImputationHead
    from stofm.heads.request import HeadOptions as HeadOptions
    from stofm.perturb.effect import PerturbationEffect as PerturbationEffect
    from stofm.tl._align import align as align
    from stofm.tl._annotate import annotate as annotate
    from stofm.tl._attention import attention as attention
    from stofm.tl._deconvolve import deconvolve as deconvolve
    from stofm.tl._describe import describe as describe
    from stofm.tl._description import Description as Description
    from stofm.tl._domains import domains as domains
    from stofm.tl._embed import embed as embed
    from stofm.tl._encode_cells import encode_cells as encode_cells
    from stofm.tl._impute import impute as impute
    from stofm.tl._influence import Influence as Influence
    from stofm.tl._influence import influence as influence
    from stofm.tl._ligand_receptor import ligand_receptor as ligand_receptor
    from stofm.tl._novel import novel as novel
    from stofm.tl._perturb import perturb as perturb
    from stofm.tl._pool_genes import pool_genes as pool_genes
    from stofm.tl._predict_genes import predict_genes as predict_genes
    from stofm.tl._probe import ProbeResult as ProbeResult
    from stofm.tl._probe import probe as probe
    from stofm.tl._screen import screen as screen
    from stofm.tl._train import train as train

__getattr__, __dir__, __all__ = lazy(__name__)
