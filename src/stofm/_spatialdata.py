"""Places out of a SpatialData, for a table that has none itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._keys import Obsm
from stofm._logging import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray


def add_places(sdata: Any, table: AnnData) -> None:
    """Set ``obsm["spatial"]`` to the centroids of what the table annotates.

    Nothing is done where there are places already, or the table annotates nothing. Centroids are
    those in a coordinate system that all regions have ("global" if it is one), else each region's
    own.
    """
    attrs = table.uns.get("spatialdata_attrs")
    if Obsm.SPATIAL in table.obsm or not attrs or table.n_obs == 0:
        return
    from spatialdata import get_centroids
    from spatialdata.transformations import get_transformation

    regions = table.obs[attrs["region_key"]].astype(str).to_numpy()
    names = [str(name) for name in np.unique(regions) if name in sdata]
    systems = {name: sorted(get_transformation(sdata[name], get_all=True)) for name in names}
    if len(names) < len(np.unique(regions)) or not all(systems.values()):
        return
    shared = set.intersection(*(set(own) for own in systems.values()))
    places = np.full((table.n_obs, 2), np.nan)
    used = {}
    for name, own in systems.items():
        used[name] = _first([system for system in own if system in shared] or own)
        rows = np.flatnonzero(regions == name)
        found = get_centroids(sdata[name], coordinate_system=used[name]).compute()
        wanted = table.obs[attrs["instance_key"]].iloc[rows]
        places[rows] = found[["x", "y"]].reindex(wanted).to_numpy(dtype=np.float64)
    _write(table, places, used)


def _first(systems: list[str]) -> str:
    return "global" if "global" in systems else systems[0]


def _write(table: AnnData, places: NDArray[np.float64], used: dict[str, str]) -> None:
    table.obsm[Obsm.SPATIAL] = places
    logger.info(
        "The table has no obsm[%r]: it is set to the centroids of %s.",
        Obsm.SPATIAL,
        ", ".join(f"{name!r} in the coordinate system {system!r}" for name, system in used.items()),
    )
