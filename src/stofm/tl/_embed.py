"""``stofm.tl.embed``: from raw counts and coordinates to spatial cell embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm._config import check_seed
from stofm._edge.embedding import Run, embed_table
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from anndata import AnnData

    from stofm.nn import Stofm
    from stofm.spatial import SubSliceConfig


def embed(
    adata: Any,
    model: Stofm | str | Path = "stofm-mini",
    *,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    cell_rep: str | None = None,
    species: Literal["auto", "human", "mouse"] = "auto",
    gene_key: str | None = None,
    orthologs: Any = None,
    subslice: SubSliceConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    token_budget: int | Literal["auto"] = "auto",
    seed: int = 0,
    key_added: str = Obsm.X,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed every cell in the context of its tissue.

    Runs what is missing or no longer fits of :func:`stofm.pp.tokenize`,
    :func:`stofm.tl.encode_cells` and :func:`stofm.pp.subslice`, then the SE(2) Transformer on
    every sub-slice. All is computed before anything is written: if it is interrupted, `adata` is
    left as it was. `adata.X`, its layers and the order of cells stay as they are. Most calls need
    `library_key`, and perhaps `model` and `layer`; the rest is for special cases.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a
        SpatialData with such a table. Backed AnnData are read in pieces.
    model
        A :class:`stofm.Stofm`, a checkpoint folder, a hub id, or the embedded ``"stofm-mini"``.
    layer
        Layer with raw counts; ``adata.X`` by default.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit.
    library_key
        Column of ``adata.obs`` that names each cell's slice. Nothing crosses slices: a slice
        gets the same embedding alone or together with others.
    cell_rep
        Entry of ``adata.obsm`` to use in place of the cell encoder's embedding, (n_obs, d_cell).
        Genes are not used then.
    species, gene_key, orthologs
        How genes are found: see :func:`stofm.pp.map_genes`.
    subslice
        Sub-slice rules to use in place of the model's own.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    dtype
        ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"`` or ``"bfloat16"``.
    batch_size
        Sub-slices computed at a time. Does not change the result; halved when the device runs
        out of memory.
    token_budget
        Gene tokens computed at a time. Does not change the result; halved likewise.
    seed
        Seed of the clustering that gives the virtual cells.
    key_added
        Entry of ``adata.obsm`` to write; not one of the inputs, nor another key of stofm.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show bars.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_stofm' | key_added]`` : float32 (n_obs, d_embedding)
        Spatial cell embeddings.
    ``adata.obsm['X_stofm_cell']``, ``adata.obsm['stofm_tokens']``, ``adata.obs['stofm_n_tokens']``
        See :func:`stofm.tl.encode_cells` and :func:`stofm.pp.tokenize`; not with `cell_rep`.
        A model that uses values adds ``adata.obsm['stofm_token_values']``.
    ``adata.obsm['stofm_spatial']``, ``adata.obs['stofm_subslice']``, ``adata.obs['stofm_virtual_cell']``
        See :func:`stofm.pp.subslice`.
    ``adata.uns['stofm']``
        A record of each of these: parameters, fingerprints of model and vocabulary, version.

    Raises
    ------
    KeyError
        A layer, an entry or a column is not there.
    ValueError
        Counts, genes, coordinates or slices are not usable; the message says what was found
        and what to do.
    MemoryError
        The work would not fit, or the device has no room for a single sub-slice.
    FloatingPointError
        The device gave NaN.

    See Also
    --------
    stofm.pp.check : what will happen, before it does.
    stofm.tl.domains : regions of the embedding.
    stofm.tl.probe : is it better than principal components?
    stofm.corpus.embed : thousands of slices.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.tl.embed(adata)
    >>> adata.obsm["X_stofm"].shape
    (500, 576)
    """
    table = resolve_table(adata, table_key, copy=copy)
    check_seed(seed)
    run = Run.choose(
        model,
        device,
        dtype,
        batch_size=batch_size,
        token_budget=token_budget,
        show_progress_bar=show_progress_bar,
    )
    write = embed_table(
        table,
        run,
        layer=layer,
        genes={"species": species, "gene_key": gene_key, "orthologs": orthologs},
        cell_rep=cell_rep,
        spatial_key=spatial_key,
        library_key=library_key,
        rules=subslice,
        seed=seed,
        key_added=key_added,
        copy=copy,
    )
    # Nothing is written before this line, and from here on nothing is computed.
    target = table.copy() if copy else table
    write(target)
    return target if copy else None
