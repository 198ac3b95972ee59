"""Every AnnData key that stofm reads or writes, grouped by slot.

No other module spells a key: code and tests take them from here, so they cannot disagree.
"""

from __future__ import annotations

from typing import Final


class Uns:
    """Keys of ``adata.uns``."""

    STOFM: Final = "stofm"
    #: Entry of ``uns["stofm"]`` that holds the virtual cells of :func:`stofm.pp.subslice`.
    SUBSLICE: Final = "subslice"
    #: Entry with what :func:`stofm.read` found out about its files.
    SOURCE: Final = "source"


class Var:
    """Columns of ``adata.var``."""

    GENE: Final = "stofm_gene"
    TOKEN_ID: Final = "stofm_token_id"


class Obs:
    """Columns of ``adata.obs``."""

    CONTROLS: Final = "control_counts"
    N_TOKENS: Final = "stofm_n_tokens"
    SUBSLICE: Final = "stofm_subslice"
    VIRTUAL_CELL: Final = "stofm_virtual_cell"
    DOMAIN: Final = "stofm_domain"
    ANNOTATION: Final = "stofm_annotation"
    ANNOTATION_CONFIDENCE: Final = "stofm_annotation_confidence"
    NOVELTY: Final = "stofm_novelty"
    NOVEL: Final = "stofm_novel"


class Obsm:
    """Entries of ``adata.obsm``."""

    SPATIAL: Final = "spatial"
    TOKENS: Final = "stofm_tokens"
    TOKEN_VALUES: Final = "stofm_token_values"
    X_CELL: Final = "X_stofm_cell"
    X: Final = "X_stofm"
    X_GENES: Final = "X_genes"
    #: Start of the names of features of images.
    X_IMAGE: Final = "X_image"
    X_ALIGNED: Final = "X_aligned"
    COORDINATES: Final = "stofm_spatial"
    ANNOTATION_PROBA: Final = "stofm_annotation_proba"
    ANNOTATION_SET: Final = "stofm_annotation_set"
    DECONVOLUTION: Final = "stofm_deconvolution"
    DECONVOLUTION_STD: Final = "stofm_deconvolution_std"
    IMPUTED: Final = "stofm_imputed"
    PREDICTED: Final = "stofm_predicted"


class Obsp:
    """Entries of ``adata.obsp``."""

    ATTENTION: Final = "stofm_attention"


class Suffix:
    """What is appended to a key."""

    #: Colours of a column's categories in ``uns``, as scanpy stores them.
    COLORS: Final = "_colors"
    #: Column of a coarser level, to be formatted with its number.
    LEVEL: Final = "_level{}"
    #: Features of the image of a cell or spot, and of its niche.
    SPOT: Final = "_spot"
    NICHE: Final = "_niche"
    #: Share of attention on virtual cells.
    VIRTUAL: Final = "_virtual"
    #: What an aligner tells of one modality alone.
    IMAGE: Final = "_image"
    GENES: Final = "_genes"


class Label:
    """Categories that stofm writes, and entries of records."""

    #: Of a cell that no class is supported for.
    UNKNOWN: Final = "unknown"
    #: Entry of the record of an annotation: which of the cells the head was fitted to.
    FITTED: Final = "fitted_to"
