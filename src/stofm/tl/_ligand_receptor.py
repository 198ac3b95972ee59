"""``stofm.tl.ligand_receptor``: influence between neighbours that express both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._keys import Obsm
from stofm._messages import require_name
from stofm.heads.request import Request, check_whole_number
from stofm.perturb.influence import by_genes, expressed, read_resource
from stofm.perturb.masking import effects_between
from stofm.perturb.reading import Subject

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm


def ligand_receptor(
    adata: Any,
    *,
    resource: pd.DataFrame | str = "consensus",
    groupby: str | None = None,
    gene_symbols: str | None = None,
    model: Stofm | str | Path | None = None,
    head: AnnotationHead | None = None,
    reach: float | None = None,
    n_max: int = 500,
    min_pairs: int = 30,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> pd.DataFrame:
    """Rank ligands and receptors by the influence between neighbours that express both.

    Effects are those of :func:`stofm.tl.influence`: senders are masked one at a time for the cells
    within reach. Of a ligand and a receptor, the pairs of cells count whose sender has counts of
    all the ligand's genes and whose receiver has counts of all the receptor's. Expected is
    what these receivers would show if other senders, of the same type with `groupby`, were beside
    them, see :func:`stofm.tl.influence`; which senders express the ligand is permuted.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData
        with such a table.
    resource
        Table with the columns ``ligand`` and ``receptor``, names of genes, those of a complex
        joined by ``_``; or the name of a resource of LIANA, such as ``"consensus"`` or
        ``"mouseconsensus"``, which needs ``stofm[communication]`` and no network. Pairs with a
        gene that is not measured are left out.
    groupby
        Column of ``adata.obs`` with types, to contrast within each pair of them. None: all cells
        are taken together, and a ligand may stand for the type that expresses it.
    gene_symbols
        Column of ``adata.var`` with the genes' names; ``adata.var_names`` by default.
    model, head, reach
        See :func:`stofm.tl.influence`.
    n_max
        Most senders that are masked (of each type, with `groupby`), drawn at random.
    library_key
        Column of ``adata.obs`` that names each cell's slice; by default the one that was embedded
        with, if any.

    Returns
    -------
    A table with LIANA's columns ``source``, ``target`` (``"all"`` without `groupby`),
    ``ligand_complex`` and ``receptor_complex``, and ``strength``, ``expected``, ``z``, ``FDR`` and
    ``n_pairs`` as in :class:`stofm.tl.Influence`, highest z first; `adata` stays as it is.

    Other Parameters
    ----------------
    min_pairs
        Fewest pairs of cells that express both; other rows are left out.
    layer, spatial_key, seed, device, table_key, show_progress_bar
        See :func:`stofm.tl.influence`.

    Raises
    ------
    ImportError
        A resource of LIANA is named, and LIANA is not installed.
    KeyError
        A layer, an entry or a column is not there.
    ValueError
        The resource is not usable or none of its pairs is measured, no two neighbours express
        both of a pair often enough, or an option is not usable.

    See Also
    --------
    stofm.tl.influence : which types influence which.

    References
    ----------
    Dimitrov et al. 2024, LIANA+ provides an all-in-one framework for cell-cell communication
    inference (Nat Cell Biol 26:1613), for the resources.

    Examples
    --------
    >>> import pandas as pd, stofm as st
    >>> adata = st.datasets.simulate_slice(300, 300, regions="nodular", seed=0)
    >>> resource = pd.DataFrame({"ligand": ["CXCL12"], "receptor": ["ITGA5"]})
    >>> table = st.tl.ligand_receptor(adata, resource=resource, n_max=100, min_pairs=5)
    >>> len(table)
    1
    """
    check_whole_number("n_max", n_max, least=1)
    check_whole_number("min_pairs", min_pairs, least=1)
    request = Request(
        model, Obsm.X, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    subject = Subject.read(adata, request, table_key, head)
    table = subject.adata
    if gene_symbols is not None:
        require_name(gene_symbols, table.var, f"There is no var[{gene_symbols!r}].")
    symbols = table.var_names if gene_symbols is None else table.var[gene_symbols]
    genes = read_resource(resource, symbols.astype(str).tolist())
    kinds, names = np.zeros(table.n_obs, dtype=np.int64), ["all"]
    if groupby is not None:
        kinds, names = subject.types(groupby)
    blocks = (expressed(block, genes.subunits) for block in read_counts(table, layer=subject.layer))
    cells = sparse.csr_array(sparse.vstack(list(blocks), format="csr"))
    pairs, reach = effects_between(subject.tissue, kinds, head, reach=reach, n_max=n_max)
    found = by_genes(pairs, kinds, names, cells, genes, min_pairs=min_pairs)
    if not len(found):
        raise ValueError(
            f"Of the {len(genes.ligands)} ligand-receptor pairs that are measured, none is "
            f"expressed by {min_pairs} pairs of cells within reach={reach:g}; lower `min_pairs`, or "
            "raise `n_max` or `reach`."
        )
    return found
