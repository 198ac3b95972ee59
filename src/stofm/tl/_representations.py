"""Representations of cells in an AnnData."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stofm._keys import Obsm
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray


def read_representation(adata: AnnData, rep: str) -> NDArray[np.float32]:
    """Read an entry of ``obsm`` as float32 (n_obs, d), checked.

    Raises
    ------
    KeyError
        It is not there.
    ValueError
        It does not hold numbers, some are not finite, or it is a sparse matrix that is damaged.
    """
    if rep not in adata.obsm:
        there = sorted(map(str, adata.obsm))
        near = difflib.get_close_matches(rep, there, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if rep in (Obsm.X, Obsm.X_CELL):
            hint = " Run st.tl.embed(adata) first."
        msg = f"There is no obsm[{rep!r}]; there are {there}.{hint}"
        raise KeyError(msg)
    stored: Any = adata.obsm[rep]
    require_sound(stored, f"adata.obsm[{rep!r}]")
    values = np.asarray(stored.toarray() if sparse.issparse(stored) else stored)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "biuf":
        msg = (
            f"obsm[{rep!r}] has the shape {values.shape} and the type {values.dtype}; expected "
            "numbers, (n_obs, d), of at least one cell."
        )
        raise ValueError(msg)
    values = values.astype(np.float32, copy=False)
    if n_bad := int((~np.isfinite(values)).any(axis=1).sum()):
        msg = (
            f"{n_bad} of {adata.n_obs} cells have NaN or infinite values in obsm[{rep!r}]; make it "
            "again or drop these cells."
        )
        raise ValueError(msg)
    return values
