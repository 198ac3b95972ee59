"""``stofm.tl.encode_cells``: the gene scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm._edge.embedding import Run, cell_record, encode, write_cells
from stofm._edge.tables import all_or_nothing, resolve_table
from stofm._edge.tokens import read_tokens

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from anndata import AnnData

    from stofm.nn import Stofm


def encode_cells(
    adata: Any,
    model: Stofm | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    token_budget: int | Literal["auto"] = "auto",
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed each cell from its ranked genes, without its position (gene scale).

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
        Tokens computed at a time; fitted to the device by default. Does not change the result;
        halved when the device runs out of memory.
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
        Cell embeddings, of unit length unless the model pools, as stofm-mini does. They depend on
        the cell, and, if the model pools, on which genes occur in the table.
    ``adata.uns['stofm']['X_stofm_cell']`` : dict
        Parameters and fingerprints of model and vocabulary.

    Raises
    ------
    KeyError
        There are no tokens, or no values of tokens for a model that uses them.
    ValueError
        The tokens belong to another vocabulary or to other counts.
    MemoryError
        The device has no room for a single cell.
    FloatingPointError
        The device gave NaN.

    See Also
    --------
    stofm.pp.tokenize : the step before.
    stofm.tl.embed : runs all steps, and adds the context.

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
    (500, 576)
    """
    table = resolve_table(adata, table_key, copy=copy)
    run = Run.choose(
        model, device, dtype, token_budget=token_budget, show_progress_bar=show_progress_bar
    )
    ranked = read_tokens(table, run.model)
    features = encode(ranked, run)
    target = table.copy() if copy else table
    with all_or_nothing(target):
        write_cells(target, features, cell_record(ranked, run))
    return target if copy else None
