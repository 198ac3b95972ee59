"""The edge to AnnData: tables out of SpatialData, records in.

The core (``genes``, ``spatial``, ``nn``) sees arrays only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm, Uns
from stofm._spatialdata import add_places
from stofm._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData


def resolve_table(data: Any, table_key: str | None = None, *, copy: bool = False) -> AnnData:
    """Return the AnnData to work on: `data` itself, or the named table of a SpatialData.

    A table without ``obsm["spatial"]`` gets the centroids of what it annotates.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    table_key
        Name of the table; may be left out if there is only one.
    copy
        Whether a copy of the table will be made later on.

    Raises
    ------
    KeyError
        `table_key` is not among the tables, or is needed because there are several.
    TypeError
        `data` is neither an AnnData nor a SpatialData.
    ValueError
        The AnnData is backed, and a view or to be copied, which anndata can't do in place.
    """
    if hasattr(data, "tables") and not hasattr(data, "obsm"):
        tables = data.tables
        names = sorted(tables)
        if table_key is None and len(names) == 1:
            table_key = names[0]
        if table_key not in names:
            msg = f"The SpatialData has the tables {names}; pass one of them as `table_key`."
            raise KeyError(msg)
        sdata, data = data, tables[table_key]
        if Obsm.SPATIAL not in data.obsm:
            data = data.copy() if copy else data
            add_places(sdata, data)
    if not (hasattr(data, "obsm") and hasattr(data, "var_names")):
        msg = f"Expected an AnnData or a SpatialData, found {type(data).__name__}."
        raise TypeError(msg)
    adata: AnnData = data
    if adata.isbacked and (copy or adata.is_view):
        msg = (
            "A backed AnnData can't be copied, nor its view written to, without a new file: use "
            "adata.to_memory(), or work on the whole backed AnnData with copy=False."
        )
        raise ValueError(msg)
    return adata


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 has ``X`` among them, as None."""
    return [name for name in adata.layers if name is not None]


def write_record(adata: AnnData, key: str, params: Mapping[str, Any], **fingerprints: str) -> None:
    """Record in ``uns["stofm"][key]`` how `key` was made.

    None is stored as the empty string, because h5ad and Zarr cannot hold it.
    """
    entries = dict(adata.uns.get(Uns.STOFM, {}))
    entries[key] = {
        "params": {name: _writable(value) for name, value in params.items()},
        "version": __version__,
        **fingerprints,
    }
    adata.uns[Uns.STOFM] = entries


def read_record(adata: AnnData, key: str) -> dict[str, Any] | None:
    """Return the record of `key`, or None if stofm has not written it."""
    record = adata.uns.get(Uns.STOFM, {}).get(key)
    return None if record is None else dict(record)


def same_params(record: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether `record` was made with `params` (also after a round trip through a file)."""
    stored = dict(record.get("params", {}))
    return stored.keys() == params.keys() and all(
        stored[name] == _writable(value) for name, value in params.items()
    )


def _writable(value: Any) -> Any:
    return "" if value is None else value
