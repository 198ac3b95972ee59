"""``stofm.pp.subslice``: cut slices into sub-slices and find their virtual cells."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stofm._config import check_seed
from stofm._edge.places import lay_out, write_layouts
from stofm._edge.slices import read_places
from stofm._edge.tables import all_or_nothing, resolve_table
from stofm._edge.tokens import read_current
from stofm._keys import Obsm
from stofm.spatial import SubSliceConfig

if TYPE_CHECKING:
    from anndata import AnnData

    from stofm.spatial.subslices import Partition


def subslice(
    adata: Any,
    model_or_config: Any = None,
    *,
    use_rep: str = Obsm.X_CELL,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    n_cells: int | None = None,
    leiden_resolution: float | None = None,
    position_weight: float | None = None,
    partition: Partition | None = None,
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Cut each slice into sub-slices and find its virtual cells (micro and macro scale).

    Coordinates are centred and scaled slice by slice. A sub-slice is a compact group of about a
    thousand neighbouring cells. Virtual cells are the means of Leiden clusters over expression
    and position; every sub-slice of a slice gets all of them.

    Parameters
    ----------
    adata
        Annotated data with cell embeddings and coordinates, or a SpatialData with such a table.
    model_or_config
        A :class:`stofm.Stofm` or a :class:`stofm.spatial.SubSliceConfig` whose rules to use; by
        default those of ``SubSliceConfig()``, which our own models have. `n_cells`,
        `leiden_resolution`, `position_weight` and `partition` replace single ones.
    use_rep
        Entry of ``adata.obsm`` with the cell embeddings, (n_obs, d).
    library_key
        Column of ``adata.obs`` that names each cell's slice. Nothing crosses slices.
    n_cells
        Cells of a sub-slice, 1000 by default: at most, with the balanced partition.
    leiden_resolution
        Resolution of the clustering, 1.0 by default; higher values give more virtual cells.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['stofm_spatial']`` : float64 (n_obs, 2)
        Normalised coordinates: each slice's bounding box has its centre at 0 and a diagonal
        of 100.
    ``adata.obs['stofm_subslice']`` : category
        Sub-slice of each cell, numbered over all slices.
    ``adata.obs['stofm_virtual_cell']`` : category
        Virtual cell (cluster) of each cell, numbered over all slices.
    ``adata.uns['stofm']['subslice']`` : dict
        ``coordinates`` float64 (n_virtual, 2), ``features`` float32 (n_virtual, d), ``slice``
        (n_virtual,) and ``n_cells`` (n_virtual,) of the virtual cells, in order of the
        categories; ``params``.

    Other Parameters
    ----------------
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit. Of three coordinates
        the first two are used.
    position_weight
        Weight of position against expression in the clustering, 0 to 1; 0.2 by default.
    partition
        ``"balanced"`` or ``"reference"``; see :class:`stofm.spatial.SubSliceConfig`.
    seed
        Seed of the clustering.
    table_key
        Table of a SpatialData.
    copy
        Return a changed copy and leave `adata` as it is.

    Raises
    ------
    KeyError
        `use_rep`, `spatial_key` or `library_key` is not there.
    ValueError
        A rule, a coordinate or a feature is not usable.

    See Also
    --------
    stofm.tl.encode_cells : the step before.
    stofm.tl.embed : runs all steps.
    stofm.pl.subslices : draws sub-slices.
    stofm.pl.virtual_cells : draws virtual cells.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.2.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.pp.tokenize(adata)
    >>> st.tl.encode_cells(adata)
    >>> st.pp.subslice(adata, n_cells=200)
    >>> adata.obs["stofm_subslice"].nunique()
    3
    """
    check_seed(seed)
    table = resolve_table(adata, table_key, copy=copy)
    chosen: dict[str, Any] = {
        "n_cells": n_cells,
        "leiden_resolution": leiden_resolution,
        "position_weight": position_weight,
        "partition": partition,
    }
    rules = model_or_config or SubSliceConfig()
    rules = getattr(getattr(rules, "config", None), "subslice", rules)
    if not isinstance(rules, SubSliceConfig):
        raise TypeError(
            "model_or_config must be a Stofm model or a SubSliceConfig, found "
            f"{type(model_or_config).__name__}."
        )
    rules = replace(rules, **{name: one for name, one in chosen.items() if one is not None})
    where = read_places(table, spatial_key=spatial_key, library_key=library_key)
    result = lay_out(read_current(table, use_rep), where, rules, use_rep=use_rep, seed=seed)
    target = table.copy() if copy else table
    with all_or_nothing(target):
        write_layouts(target, result)
    return target if copy else None
