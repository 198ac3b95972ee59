"""``stofm.tl.attention``: which cells attend to which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stofm._edge.tables import refuse_foreign, refuse_taken, resolve_table, write_record
from stofm._keys import Obsm, Obsp, Suffix
from stofm._logging import progress
from stofm.heads.request import Request, check_whole_number
from stofm.perturb.masking import attend
from stofm.perturb.reading import Subject

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from stofm.nn import Stofm


def attention(
    adata: Any,
    model: Stofm | str | Path | None = None,
    *,
    top: int = 30,
    n_shifted: int = 0,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obsp.ATTENTION,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> Any:
    """Store how much each cell attends to others in the last layer of the SE(2) Transformer.

    Weights are averaged over heads, and are shares without the slice token: those on a cell's
    senders, on itself and on the virtual cells sum to 1 if `top` is not below the size of a
    sub-slice. Attention says what a model looks at, not what it uses; see
    :func:`stofm.tl.influence` for that.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData
        with such a table.
    model
        A :class:`stofm.Stofm`, a checkpoint folder or a hub id; the embedded ``"stofm-mini"`` by
        default.
    top
        Most senders of a receiver, those with most attention. No cell is its own sender.
    n_shifted
        Cells of different sub-slices can't attend to each other: such pairs have no entry, as have
        those beyond `top`. With further partitions, cut after the plane is turned, a weight is the
        mean over the partitions in which both cells share a sub-slice, and fewer neighbours are
        never together.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsp['stofm_attention' | key_added]`` : float32 CSR (n_obs, n_obs)
        From receiver (row) to sender (column), at most `top` entries a row. An entry that is not
        there is no measured zero.
    ``adata.obs['stofm_attention_virtual']`` : float32
        Share of each receiver's attention on virtual cells.
    ``adata.uns['stofm']['stofm_attention']`` : dict
        Parameters and the model's fingerprint.

    Other Parameters
    ----------------
    key_added
        Entry of ``adata.obsp`` to write.
    library_key, layer, spatial_key, seed, device, table_key, show_progress_bar
        See :func:`stofm.tl.perturb`.
    copy
        Return a changed copy and leave `adata` as it is.

    Raises
    ------
    KeyError
        A layer, an entry or a column is not there.
    ValueError
        Counts, genes, coordinates, slices or an option are not usable.

    See Also
    --------
    stofm.pl.attention : draws the weights.
    stofm.tl.influence : what a model uses, beside what it looks at.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.3.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 100, seed=0)
    >>> st.tl.attention(adata, top=10)
    >>> adata.obsp["stofm_attention"].shape
    (300, 300)
    """
    table = resolve_table(adata, table_key, copy=copy)
    check_whole_number("top", top, least=1)
    check_whole_number("n_shifted", n_shifted, least=0)
    refuse_taken(key_added, Obsp.ATTENTION)
    virtual_key = key_added + Suffix.VIRTUAL
    refuse_foreign(table, key_added, obs=[virtual_key])
    request = Request(
        model, Obsm.X, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    subject = Subject.read(table, request, None)
    tissue = subject.tissue
    to_virtual = np.empty(table.n_obs, dtype=np.float32)
    parts = []
    shown = progress(tissue.slices, "attention", "slice", show=show_progress_bar)
    for number, rows in enumerate(shown):
        found = attend(tissue.whole(number), top=top, n_shifted=n_shifted)
        parts.append(found.weights)
        to_virtual[rows] = found.to_virtual
    place = np.argsort(np.concatenate(tissue.slices))
    weights = sparse.csr_matrix(sparse.block_diag(parts, format="csr")[place][:, place])
    weights.sort_indices()
    target = table.copy() if copy else table
    target.obs[virtual_key] = to_virtual
    target.obsp[key_added] = weights
    names = {"library_key": library_key, "layer": subject.layer, "spatial_key": spatial_key}
    params = {**names, "top": top, "n_shifted": n_shifted, "seed": seed}
    made_by = {"model": tissue.model.name, "model_fingerprint": tissue.model.fingerprint}
    write_record(target, key_added, params, **made_by)
    return target if copy else None
