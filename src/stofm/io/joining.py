"""A matrix of counts and a table of cells, joined by ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.places import listed
from stofm._edge.tables import storable_names
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.io.matrices import make, read_10x, read_cells, read_dense, read_mtx
from stofm.io.units import Scale, facts_of, polygon_centroids, scale_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.io.detection import Candidate
    from stofm.io.files import File

#: Ids with these endings belong to no cell.
_NO_CELL: Final = r"(?:^|_)0$"
_TISSUE: Final = "in_tissue"
#: Share of cells without a position that is worth a warning.
_MANY: Final = 0.05


@dataclass(frozen=True)
class Read:
    """Counts with positions ``obsm["spatial"]`` in the file's unit, and metadata."""

    adata: AnnData
    technology: str
    rows: str
    scale: Scale
    how: str
    facts: dict[str, str]
    dropped: dict[str, int] = field(default_factory=dict)


def join(one: Candidate, chosen: File, files: list[File]) -> Read:
    """Match counts and positions by ids."""
    technology = one.technology
    rows = technology.rows if one.bins is None else f"bins of {one.bins} µm"
    rows = "cells" if one.bins == "cells" else rows
    cells, x, y = _cells(one)
    said: dict[str, str] = {}
    if chosen.kind == "10x":
        adata, said = read_10x(chosen)
    elif chosen.kind == "mtx":
        adata = read_mtx(chosen, files)
    else:
        adata = make(*read_dense(chosen, cells.index, technology))
    place = cells.index.get_indexer(adata.obs_names)
    n_obs, is_found = adata.n_obs, place >= 0
    if technology.has_background:
        is_cell = ~adata.obs_names.str.contains(_NO_CELL)
    else:
        is_cell = np.ones(n_obs, dtype=bool)
    if not (is_found & is_cell).any():
        raise ValueError(
            f"No id of {chosen.name} ({listed(adata.obs_names[is_cell].tolist())}) is in "
            f"{one.file.name} ({listed(cells.index.tolist())}): they are of different samples, or "
            "ids were changed. Give both the same ids, or pass `matrix` and `coordinates`."
        )
    matched = cells.iloc[np.where(is_found, place, 0)]
    xy = matched[[x, y]].to_numpy(dtype=np.float64)
    has_place = is_found & np.isfinite(xy).all(axis=1)
    is_off = has_place & ~_on_tissue(matched, chosen)
    kept = has_place & is_cell & ~is_off
    lost = is_cell & ~has_place
    if lost.any():
        tell = warn if lost.mean() > _MANY else logger.info
        tell(
            f"{int(lost.sum())} of {n_obs} {rows} in {chosen.name} have no position in "
            f"{one.file.name} and are left out: {listed(adata.obs_names[lost].tolist())}."
        )
    dropped = {
        "without a position": int(lost.sum()),
        "background": int((~is_cell).sum()),
        "off tissue": int((is_off & is_cell).sum()),
        "positions without counts": len(cells) - len(np.unique(place[is_found])),
    }
    if technology.field and matched.loc[kept, technology.field].nunique() > 1:
        warn(
            f"{one.file.name}: x and y are counted within each {technology.field!r}, so cells of "
            f"different ones lie on each other. Pass library_key={technology.field!r} to what reads "
            "positions, or give coordinates of the whole slide."
        )
    adata = adata if kept.all() else adata[kept].copy()
    adata.obs = _storable(matched.loc[kept].drop(columns=[x, y]).set_axis(adata.obs_names))
    adata.obsm[Obsm.SPATIAL] = xy[kept]
    facts = {"software": said.get("software_version", "")} | facts_of(
        technology, one.file, cells, files
    )
    return Read(
        adata,
        technology.name,
        rows,
        scale_of(technology, one.file, cells, files),
        f"columns {one.names[0] or '(unnamed)'}, {x}, {y}",
        facts | ({"library": said["library_ids"]} if said.get("library_ids") else {}),
        {name: number for name, number in dropped.items() if number},
    )


def _cells(one: Candidate) -> tuple[pd.DataFrame, str, str]:
    """Table of cells by id, and its columns of x and y."""
    import pandas as pd

    if one.file.kind == "geojson":
        ids, places = polygon_centroids(one.file)
        return pd.DataFrame(places, index=ids, columns=["x", "y"]), "x", "y"
    ids_, x, y = one.names
    cells = read_cells(one.file, one.columns, ids_)
    for name in (x, y):
        try:
            cells[name] = pd.to_numeric(cells[name])
        except ValueError as error:
            raise ValueError(
                f"{one.file.name}: column {name!r} holds values that are not numbers ({error}). Decimals "
                "have a point."
            ) from None
    return cells, x, y


def _on_tissue(cells: pd.DataFrame, chosen: File) -> NDArray[np.bool_]:
    """Whether spots are on tissue; a filtered matrix has no others."""
    if _TISSUE not in cells or chosen.is_filtered:
        return np.ones(len(cells), dtype=bool)
    is_on: NDArray[np.bool_] = cells[_TISSUE].to_numpy() != 0
    return is_on


def _storable(obs: pd.DataFrame) -> pd.DataFrame:
    """Columns as files can hold them: text as categories, and none without a name or values."""
    import pandas as pd

    obs = obs.dropna(axis=1, how="all")
    obs = obs[[name for name in obs if str(name).strip() not in ("", "_index")]]
    for name in [name for name in obs if obs[name].dtype.kind not in "biuf"]:
        values = obs[name]
        obs[name] = pd.Categorical(values.astype(str).where(values.notna()))
    return obs.set_axis(storable_names(map(str, obs.columns)), axis=1)
