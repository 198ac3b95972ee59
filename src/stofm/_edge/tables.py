"""The table that a user means, and what stands in its columns and entries.

``genes``, ``spatial`` and ``nn`` see arrays only.
"""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.records import write_record
from stofm._keys import Obsm
from stofm._logging import logger
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray


#: What makes a representation.
_STEPS: Final = {Obsm.X: "st.tl.embed", Obsm.X_CELL: "st.tl.encode_cells"}


def resolve_table(data: Any, table_key: str | None = None, *, copy: bool = False) -> AnnData:
    """Return the AnnData to work on: `data` itself, or the named table of a SpatialData.

    A SpatialData's table without ``obsm["spatial"]`` gets the centroids of what it annotates. `copy`
    says whether the caller will copy the table, which a backed one does not allow.
    """
    if hasattr(data, "tables") and not hasattr(data, "obsm"):
        sdata, key = data, table_name(data.tables, table_key)
        data = sdata.tables[key]
        if Obsm.SPATIAL not in data.obsm:
            data = data.copy() if copy else data
            add_centroids(sdata, data, key)
    if not (hasattr(data, "obsm") and hasattr(data, "var_names")):
        raise TypeError(f"Expected an AnnData or a SpatialData, found {type(data).__name__}.")
    adata: AnnData = data
    if adata.isbacked and (copy or adata.is_view):
        raise ValueError(
            "A backed AnnData can't be copied, nor its view written to, without a new file: use "
            "adata.to_memory(), or work on the whole backed AnnData with copy=False."
        )
    return adata


def table_name(tables: Iterable[str], table_key: str | None) -> str:
    """Name of the table that is meant: the only one, if none is named."""
    names = sorted(tables)
    if table_key is None and len(names) == 1:
        return names[0]
    if table_key not in names:
        raise KeyError(f"The SpatialData has the tables {names}; pass one of them as `table_key`.")
    return table_key


def add_centroids(sdata: Any, table: AnnData, key: str) -> None:
    """Set ``obsm["spatial"]`` of the table `key` to the centroids of what it annotates, if anything.

    Each region is read in the coordinate system "global", or in its only one. The record tells which.
    """
    attrs = table.uns.get("spatialdata_attrs")
    if not attrs or table.n_obs == 0:
        return
    from spatialdata import get_centroids
    from spatialdata.transformations import get_transformation

    obs = table.obs.reset_index(drop=True)
    centroids, used = np.empty((table.n_obs, 2)), {}
    for name, rows in obs.groupby(attrs["region_key"], observed=True).indices.items():
        if name not in sdata:
            logger.info(
                "The table annotates %r, which the SpatialData lacks: no centroids are taken.", name
            )
            return
        element, written = sdata[name], f"sdata[{name!r}]"
        systems = sorted(get_transformation(element, get_all=True))
        if "global" not in systems and len(systems) > 1:
            raise ValueError(
                f"{name!r} has the coordinate systems {systems} and none that is 'global'; choose "
                "one: from spatialdata.transformations import get_transformation, "
                f"set_transformation; set_transformation({written}, "
                f"get_transformation({written}, {systems[0]!r}), 'global')"
            )
        used[str(name)] = "global" if "global" in systems else systems[0]
        with warnings.catch_warnings():
            # Ids need not be in order.
            warnings.filterwarnings("ignore", "The index of the dataframe is not monotonic")
            found = get_centroids(element, coordinate_system=used[str(name)]).compute()
        wanted = obs[attrs["instance_key"]].iloc[rows]
        is_lost = ~wanted.isin(found.index).to_numpy()
        if n_lost := int(is_lost.sum()):
            cells = table.obs_names[rows[is_lost]].tolist()
            mine = f"sdata[{key!r}]"
            drop = f"{mine} = {mine}[~{mine}.obs_names.isin({cells})].copy()"
            raise ValueError(
                f"{n_lost} of {len(rows)} instances of {name!r} in the table are not there, for "
                f"example {wanted[is_lost].tolist()[:3]}; its ids are such as "
                f"{found.index[:3].tolist()}. "
                + (f"Drop them: {drop}" if n_lost <= 10 else "Drop them, or correct the ids.")
            )
        centroids[rows] = found.loc[wanted, ["x", "y"]]
    table.obsm[Obsm.SPATIAL] = centroids
    write_record(table, Obsm.SPATIAL, used)
    logger.info(
        "The table has no obsm[%r]: it is set to centroids (region: coordinate system %s).",
        *(Obsm.SPATIAL, used),
    )


def require_cells_and_genes(adata: AnnData) -> None:
    """Refuse an AnnData without rows or columns."""
    if 0 in adata.shape:
        what = "cells" if adata.n_obs == 0 else "genes"
        raise ValueError(
            f"The AnnData has no {what} (shape {adata.shape}). Was it filtered too hard?"
        )


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 has ``X`` among them, as None."""
    return [name for name in adata.layers if name is not None]


def read_representation(adata: AnnData, rep: str) -> NDArray[np.float32]:
    """Read an entry of ``obsm`` as finite float32 (n_obs, d)."""
    if rep not in adata.obsm:
        there = sorted(map(str, adata.obsm))
        near = difflib.get_close_matches(rep, there, n=1)
        hint = f"Run {_STEPS[rep]}(adata) first." if rep in _STEPS else f"Did you mean {near}?"
        msg = (
            f"There is no obsm[{rep!r}]; there are {there}. {hint if rep in _STEPS or near else ''}"
        )
        raise KeyError(msg.rstrip())
    stored: Any = adata.obsm[rep]
    require_sound(stored, f"adata.obsm[{rep!r}]")
    values = np.asarray(stored.toarray() if sparse.issparse(stored) else stored)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "biuf":
        raise ValueError(
            f"obsm[{rep!r}] has the shape {values.shape} and the type {values.dtype}; expected "
            "numbers, (n_obs, d), of at least one cell."
        )
    values = values.astype(np.float32, copy=False)
    if n_bad := int((~np.isfinite(values)).any(axis=1).sum()):
        raise ValueError(
            f"{n_bad} of {adata.n_obs} cells have NaN or infinite values in obsm[{rep!r}]; make it "
            "again or drop these cells."
        )
    return values


def label_text(column: pd.Series) -> NDArray[np.object_]:
    """Labels of a column as text, (n,), empty where there is none.

    pandas turns whole numbers into 0.0, 1.0 where one is missing; they are "0", "1" all the same.
    """
    import pandas as pd

    codes, labels = pd.factorize(column)
    names = np.array([*map(_text, labels), ""], dtype=object)
    found: NDArray[np.object_] = names[codes]
    return found


def _text(label: Any) -> str:
    is_whole = isinstance(label, float | np.floating) and float(label).is_integer()
    return str(int(label)) if is_whole else str(label)
