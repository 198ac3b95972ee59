"""``stofm.tl.encode_cells``: the gene scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stofm._anndata import read_record, resolve_table, write_record
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.genes import RankedTokens
from stofm.nn import Stofm, choose_device, choose_dtype
from stofm.nn import encode_cells as encode_ranked

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

_CHECKED_ROWS = 8
# Precisions differ by this much between a stored embedding and one computed again.
_SAME = {"float32": 1e-4, "bfloat16": 0.1}


def encode_cells(
    adata: Any,
    model: Stofm | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    token_budget: int | None = None,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed each cell from its ranked genes, without regard to place (gene scale).

    Parameters
    ----------
    adata
        Annotated data with tokens (:func:`stofm.pp.tokenize`), or a SpatialData with such a
        table.
    model
        A model, a checkpoint folder or a hub id; the embedded ``"stofm-mini"`` by default.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    dtype
        ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"`` or ``"bfloat16"``.
    token_budget
        Tokens computed at a time; fitted to the device by default. Does not change the result.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show a bar.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_stofm_cell']`` : float32 (n_obs, d_cell)
        Cell embeddings of unit length.
    ``adata.uns['stofm']['X_stofm_cell']`` : dict
        Parameters and fingerprints of model and vocabulary.

    Raises
    ------
    KeyError
        There are no tokens.
    ValueError
        The tokens belong to another vocabulary.
    MemoryError
        The device has no room for a single cell.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.1.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.pp.tokenize(adata)
    >>> st.tl.encode_cells(adata)
    >>> adata.obsm["X_stofm_cell"].shape
    (500, 128)
    """
    table = resolve_table(adata, table_key)
    model = load_model(model)
    model.warn_if_untrained()
    ranked = read_tokens(table, model)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    features = encode_ranked(
        model.cell_encoder,
        ranked,
        model.vocabulary,
        device=place,
        dtype=precision,
        token_budget=token_budget,
        show_progress_bar=show_progress_bar,
    )
    target = table.copy() if copy else table
    write_cell_embedding(target, CellEmbedding(features, precision), model)
    return target if copy else None


def load_model(model: Any) -> Stofm:
    """Take a model as it is, or load it by name."""
    if model is None or isinstance(model, str | Path):
        return Stofm.from_pretrained("stofm-mini" if model is None else model)
    if not isinstance(model, Stofm):
        msg = f"model must be a Stofm, a folder or a hub id, found {type(model).__name__}."
        raise TypeError(msg)
    return model


def read_tokens(adata: AnnData, model: Stofm) -> RankedTokens:
    """Read the tokens that :func:`stofm.pp.tokenize` wrote, checked against the model.

    Raises
    ------
    KeyError
        There are no tokens.
    ValueError
        The tokens belong to another vocabulary, or were changed.
    """
    if Obsm.TOKENS not in adata.obsm:
        msg = f"There is no obsm[{Obsm.TOKENS!r}]: run st.pp.tokenize(adata, model) first."
        raise KeyError(msg)
    record = read_record(adata, Obsm.TOKENS) or {}
    if record.get("vocabulary") != model.vocabulary.fingerprint:
        msg = (
            f"The tokens were made with the vocabulary {record.get('vocabulary', '(unknown)')}, "
            f"and model {model.name!r} has {model.vocabulary.fingerprint}: run "
            "st.pp.tokenize(adata, model) again."
        )
        raise ValueError(msg)
    return RankedTokens.from_csr(sparse.csr_matrix(adata.obsm[Obsm.TOKENS]))


@dataclass(frozen=True)
class CellEmbedding:
    """Cell embeddings and the precision they were computed in; None if they were not."""

    features: NDArray[np.float32]
    dtype: torch.dtype | None
    is_new: bool = True


def write_cell_embedding(adata: AnnData, result: CellEmbedding, model: Stofm) -> None:
    """Write cell embeddings and their record."""
    adata.obsm[Obsm.X_CELL] = result.features
    write_record(
        adata,
        Obsm.X_CELL,
        {"dtype": str(result.dtype).removeprefix("torch.")},
        model=model.name,
        cell_encoder=model.cell_encoder_fingerprint,
        vocabulary=model.vocabulary.fingerprint,
    )


def stored_cell_embedding(
    adata: AnnData, model: Stofm, ranked: RankedTokens, dtype: torch.dtype
) -> NDArray[np.float32] | None:
    """Return the stored cell embeddings if they still fit the model and the tokens, else None.

    The record must name the same encoder, and a few cells computed again must agree.
    """
    record = read_record(adata, Obsm.X_CELL)
    if record is None or Obsm.X_CELL not in adata.obsm:
        return None
    precision = str(dtype).removeprefix("torch.")
    fits = (
        record.get("cell_encoder") == model.cell_encoder_fingerprint
        and record.get("vocabulary") == model.vocabulary.fingerprint
        and record.get("params", {}).get("dtype") == precision
    )
    stored = np.asarray(adata.obsm[Obsm.X_CELL])
    if not fits or stored.shape != (adata.n_obs, model.config.cell_encoder.d_cell):
        return None
    rows = np.unique(np.linspace(0, adata.n_obs - 1, _CHECKED_ROWS).astype(int))
    again = encode_ranked(
        model.cell_encoder,
        ranked.take(rows),
        model.vocabulary,
        device=next(model.parameters()).device,
        dtype=dtype,
    )
    if not np.allclose(stored[rows], again, atol=_SAME[precision]):
        logger.info("obsm[%r] no longer fits the tokens: made again.", Obsm.X_CELL)
        return None
    return stored.astype(np.float32, copy=False)
