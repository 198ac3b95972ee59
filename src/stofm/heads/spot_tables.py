"""Proportions of spots out of AnnData, and spots made from cells with types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import read_counts
from stofm._edge.records import frame_names
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.compressed import require_sound
from stofm.heads.embeddings import gene_records
from stofm.heads.slices import SliceTables
from stofm.spatial.spots import grid_spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.labels import Labels
    from stofm.heads.options import Request
    from stofm.spatial.spots import SpotGrid

#: By so much the proportions of a spot may miss 1: rounding, not something left out.
_TOLERANCE: Final = 1e-3
#: With fewer cells in most spots, hardly any spot is mixed.
_FEW_CELLS: Final = 2
#: Column of ``obs`` that names the slice of spots made from cells.
SLICE: Final = "slice"


@dataclass(frozen=True, eq=False)
class SpotTable:
    """Spots with proportions.

    Attributes
    ----------
    slices
        The spots.
    types
        Names of the types.
    proportions
        float32 (n_obs, n_types), NaN where they are not known.
    """

    slices: SliceTables
    types: list[str]
    proportions: NDArray[np.float32]


def read_proportions(slices: SliceTables, key: str | Sequence[str]) -> SpotTable:
    """Read known proportions, checked.

    Parameters
    ----------
    slices
        The spots.
    key
        Entry of ``obsm``, or columns of ``obs``.
    """
    frames = slices.each(lambda table: _read_frame(table, key))
    for frame in frames:
        _require_unique([str(name) for name in frame.columns], key)
    types = [str(name) for name in frames[0].columns]
    for k, frame in enumerate(frames[1:], start=2):
        if set(map(str, frame.columns)) != set(types):
            raise ValueError(
                f"{_where(key)} has the types {types} in the first AnnData and "
                f"{[str(name) for name in frame.columns]} in number {k}; they must be the same."
            )
    values = np.concatenate([_numbers(frame, types, key) for frame in frames])
    if len(types) < 2:
        raise ValueError(f"{_where(key)} has {len(types)} types; at least two are needed.")
    known = ~np.isnan(values).any(axis=1)
    _check_proportions(values[known], key)
    values[~known] = np.nan
    values[known] /= values[known].sum(axis=1, keepdims=True)
    if n_unknown := int((~known).sum()):
        logger.info("%d of %d spots have no known proportions (NaN).", n_unknown, len(values))
    return SpotTable(slices, types, values.astype(np.float32))


def _require_unique(types: Sequence[str], key: str | Sequence[str]) -> None:
    if twice := sorted({name for name in types if types.count(name) > 1}):
        raise ValueError(
            f"{_where(key)} has the types {twice} more than once; each must have one column."
        )


def _where(key: str | Sequence[str]) -> str:
    return f"obsm[{key!r}]" if isinstance(key, str) else f"obs[{list(key)!r}]"


def _read_frame(adata: AnnData, key: str | Sequence[str]) -> pd.DataFrame:
    """Proportions with the types' names as columns."""
    import pandas as pd

    if not isinstance(key, str):
        if absent := [name for name in key if name not in adata.obs]:
            raise KeyError(f"There is no obs column {absent}; there are {list(adata.obs)}.")
        return adata.obs[list(key)]
    if key not in adata.obsm:
        raise KeyError(
            f"There is no obsm[{key!r}]; there are {sorted(map(str, adata.obsm))}. For proportions "
            "in columns of obs pass the list of their names."
        )
    values = adata.obsm[key]
    if isinstance(values, pd.DataFrame):
        return values.set_axis(frame_names(adata, key), axis=1)
    require_sound(values, f"adata.obsm[{key!r}]")
    dense = np.asarray(values.toarray() if sparse.issparse(values) else values)
    return pd.DataFrame(dense, index=adata.obs_names, columns=_type_names(adata, key, dense))


def _type_names(adata: AnnData, key: str, values: NDArray[Any]) -> list[str]:
    """Names of an array's columns: those that ``uns`` lists for it, or their numbers."""
    if values.ndim != 2:
        raise ValueError(f"obsm[{key!r}] has the shape {values.shape}; expected (n_obs, n_types).")
    for name in (f"{key}_names", f"{key.removesuffix('s')}_names"):
        names = adata.uns.get(name)
        if names is not None and len(names) == values.shape[1]:
            return [str(one) for one in names]
    return [str(k) for k in range(values.shape[1])]


def _numbers(
    frame: pd.DataFrame, types: Sequence[str], key: str | Sequence[str]
) -> NDArray[np.float64]:
    renamed = frame.set_axis([str(name) for name in frame.columns], axis=1)[list(types)]
    try:
        values: NDArray[np.float64] = renamed.to_numpy(np.float64, na_value=np.nan, copy=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_where(key)} must hold numbers, the share of each type; found {error}."
        ) from error
    return values


def _check_proportions(values: NDArray[np.float64], key: str | Sequence[str]) -> None:
    negative = (values < 0).any(axis=1)
    if negative.any():
        raise ValueError(
            f"{int(negative.sum())} of {len(values)} spots have negative proportions in "
            f"{_where(key)}, down to {values.min():.4g}; expected shares from 0 to 1. "
            "Correct them, or set rows that are not known to NaN."
        )
    sums = values.sum(axis=1)
    off = ~(np.abs(sums - 1) <= _TOLERANCE)
    if off.any():
        raise ValueError(
            f"The proportions of {int(off.sum())} of {len(values)} spots in {_where(key)} do not "
            f"sum to 1: they sum to {sums[off].min():.4g} to {sums[off].max():.4g}. Divide each "
            "row by its sum, and set rows that are not known to NaN."
        )


def grid_into_spots(
    slices: SliceTables,
    labels: Labels,
    request: Request,
    *,
    spot_size: float,
) -> SpotTable:
    """Sum cells with types into square spots, whose proportions are known.

    The spots have their slice in ``obs["slice"]`` and their centre in ``obsm["spatial"]``.
    """
    grid = grid_spots(
        slices.coordinates(request.spatial_key),
        labels.codes,
        slices.rows,
        n_types=len(labels.classes),
        spot_size=spot_size,
    )
    tables, order = [], []
    for k, (table, place) in enumerate(zip(slices.tables, slices.places, strict=True)):
        spots = np.unique(grid.spot[place])
        spots = spots[spots >= 0]
        if len(spots):
            names = [slices.names[number] for number in grid.slices[spots]]
            with slices.naming(k):
                tables.append(_spot_table(table, place.start, grid, spots, names, request.layer))
            order.append(spots)
    _tell_of_sizes(grid, spot_size)
    rows = np.concatenate(order)
    numbers = np.unique(grid.slices[rows])
    spotted = SliceTables(
        tuple(tables),
        [slices.names[k] for k in numbers],
        [np.flatnonzero(grid.slices[rows] == k) for k in numbers],
        (("the spots", "adata"),) * len(tables),
    )
    return SpotTable(spotted, list(labels.classes), grid.proportions[rows].astype(np.float32))


def _tell_of_sizes(grid: SpotGrid, spot_size: float) -> None:
    """Say how many cells a spot has, and warn if most are hardly mixed: the unit may be another."""
    sizes = np.bincount(grid.spot[grid.spot >= 0])
    made = f"{sizes.sum()} cells with types make {len(sizes)} spots"
    if np.median(sizes) >= _FEW_CELLS:
        logger.info("%s, of %.1f cells on average.", made, sizes.mean())
        return
    single = (sizes == 1).mean()
    warn(
        f"{made}, of {sizes.mean():.1f} cells on average; {single:.0%} have a single cell, and hardly "
        f"any are mixed. Is spot_size={spot_size:g} in the unit of the coordinates? A larger "
        "`spot_size` makes larger spots."
    )


def _spot_table(
    table: AnnData,
    start: int,
    grid: SpotGrid,
    spots: NDArray[np.int64],
    names: list[str],
    layer: str | None,
) -> AnnData:
    """The spots of a table, with summed counts; its cells have numbers from `start` on."""
    import anndata
    import pandas as pd

    counts = sparse.csr_matrix((len(grid.centers), table.n_vars), dtype=np.int64)
    for block in read_counts(table, layer=layer):
        counts = sparse.csr_matrix(counts + grid.sum_counts(block, start=start))
        start += block.shape[0]
    return anndata.AnnData(
        counts[spots].astype(np.float32),
        obs=pd.DataFrame({SLICE: names}, index=[f"spot{k}" for k in spots]),
        var=table.var.copy(),
        obsm={Obsm.SPATIAL: grid.centers[spots]},
        uns=gene_records(table),
    )
