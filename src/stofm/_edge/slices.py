"""Which cells belong to which slice: told by a column or by metadata, or refused."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.coordinates import read_axes
from stofm._edge.overlays import Nearest, boxes_overlap, other_z, refuse_planes
from stofm._edge.tables import value_codes
from stofm._keys import Uns
from stofm._logging import logger
from stofm._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_MAX_SLICES: Final = 1000
#: Cells that a slice has at least on average, for a column to name slices.
_MIN_CELLS: Final = 5
#: What other columns may explain less than the best one and be named beside it.
_ALSO: Final = 0.15
#: Words in the name of a column that names slices.
_SLICE_WORDS: Final = re.compile(
    r"(?<![a-z])(animal|batch|donor|embryo|fov|library|mouse|orig|patient|puck|replicate|sample"
    r"|section|slice|slide|specimen|subject)",
    re.IGNORECASE,
)
#: What separates parts of the names of cells, and what anndata appends to names that occur again.
_SIGNS: Final = "[^0-9A-Za-z]+"
_NUMBERED: Final = r"-(\d+)$"
#: Share of cells whose name another has, from which on slices were joined.
_REPEATED: Final = 0.05
#: Share of cells with a neighbour of another region, from which on regions adjoin.
_ADJOINING: Final = 0.002


@dataclass(frozen=True)
class Slices:
    """Names of slices in alphabetical order, and rows of their cells, ascending.

    `column` of ``obs`` separates them, asked for or named by the metadata. It is None for an
    AnnData of one slice, whose name is the empty string.
    """

    names: list[str]
    rows: list[NDArray[np.int64]]
    column: str | None = None


def read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    """Separate the slices of an AnnData by a column, or by that which the metadata names.

    Without such a column all cells are one slice, unless places in ``obsm[spatial_key]``, which
    need not be there, tell that they are not: then ValueError says which column may name them.
    """
    if library_key is not None or spatial_key not in adata.obsm:
        return separate(adata, library_key or described_column(adata), spatial_key)
    return tell_slices(adata, *read_axes(adata, spatial_key), spatial_key=spatial_key)


def tell_slices(
    adata: AnnData,
    xy: NDArray[np.float64],
    z: NDArray[np.float64] | None,
    *,
    spatial_key: str,
) -> Slices:
    """Separate slices where no column is given; see :func:`read_slices`."""
    column = described_column(adata)
    if column is not None and _are_apart(adata, column, xy):
        slices = separate(adata, column, spatial_key)
        logger.info(
            "The metadata names %d slices in obs[%r]: they are separated, as with library_key=%r.",
            len(slices.rows),
            column,
            column,
        )
        return slices
    slices = Slices(names=[""], rows=[np.arange(adata.n_obs)])
    found = other_z(adata, xy) if z is None else (z, f"obsm[{spatial_key!r}]")
    if found is not None:
        refuse_planes(adata, slices, xy, *found, is_read=z is not None)
    _refuse_overlays(adata, xy)
    return slices


def separate(adata: AnnData, column: str | None, spatial_key: str) -> Slices:
    """Slices by a column; all cells are one where it is None."""
    if column is None:
        return Slices(names=[""], rows=[np.arange(adata.n_obs)])
    if column not in adata.obs:
        near = difflib.get_close_matches(column, [str(n) for n in adata.obs.columns])
        likely = []
        if spatial_key in adata.obsm:
            nearest = Nearest.find(read_axes(adata, spatial_key)[0])
            likely = [name for name, _ in _overlaid(adata, nearest)]
        msg = (
            f"There is no obs[{column!r}] to separate slices by; "
            f"candidates: {list(dict.fromkeys([*likely, *near])) or 'none'}. If all cells are one "
            f"slice, add it: adata.obs[{column!r}] = 'one'."
        )
        raise KeyError(msg)
    values = adata.obs[column]
    if n_missing := int(values.isna().sum()):
        msg = (
            f"{n_missing} cells have no value in obs[{column!r}]; every cell must belong to "
            "a slice. Fill the column or drop the cells."
        )
        raise ValueError(msg)
    names, codes = np.unique(values.astype(str).to_numpy().astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return Slices(names=names.tolist(), rows=rows, column=column)


def described_column(adata: AnnData) -> str | None:
    """Column of ``obs`` that the metadata says tells slices apart; None if nothing says so.

    That is the region column of a SpatialData's table, or the one whose values are the images that
    squidpy and scanpy keep in ``uns["spatial"]``.
    """
    attrs = adata.uns.get("spatialdata_attrs", {})
    key = attrs.get("region_key") if hasattr(attrs, "get") else None
    if key in adata.obs and adata.obs[key].nunique() > 1:
        return str(key)
    images = adata.uns.get("spatial")
    if not isinstance(images, dict) or len(images) < 2:
        return None
    names = {str(name) for name in images}
    for column in adata.obs.columns:
        values = adata.obs[column]
        if 1 < values.nunique() <= len(names) and set(values.dropna().astype(str)) <= names:
            return str(column)
    return None


def _are_apart(adata: AnnData, column: str, xy: NDArray[np.float64]) -> bool:
    """Whether regions are slices: they are not if they adjoin, as fields of view of one slide do."""
    codes, names = value_codes(adata.obs[column])
    if boxes_overlap(xy, codes, len(names)):
        raise ValueError(_overlay_message([column], names))
    nearest = Nearest.find(xy)
    if nearest.mixing(codes[nearest.rows]) < _ADJOINING:
        return True
    logger.info(
        "The %d regions in obs[%r] adjoin, as fields of one slide do: they are taken as one slice. "
        "Pass library_key=%r to separate them.",
        len(names),
        column,
        column,
    )
    return False


def _overlaid(
    adata: AnnData, nearest: Nearest, slices: NDArray[np.integer] | None = None
) -> list[tuple[str, list[str]]]:
    """Columns whose values lie on each other as slices would, and these values."""
    own = None if slices is None else slices[nearest.rows]
    found = []
    for name, codes, names in _groupings(adata.obs, nearest):
        codes = codes if own is None else own * len(names) + codes
        share = nearest.same_share(codes)
        is_named = _SLICE_WORDS.search(name) is not None
        if share == 1.0 and own is None:
            is_joined = nearest.are_joined(codes, is_named=is_named)
            share = 0.5 if is_joined or (is_named and nearest.are_in_one_box(codes)) else 1.0
        found.append((share, name, names))
    best = min((share for share, _, _ in found), default=1.0)
    near = sorted((f for f in found if f[0] < 1.0 and f[0] <= best + _ALSO), key=lambda f: f[0])
    return [(name, names) for _, name, names in near]


def _groupings(
    columns: pd.DataFrame, nearest: Nearest
) -> Iterator[tuple[str, NDArray[np.int64], list[str]]]:
    """Columns that put cells into groups of several, numbered for the rows that are looked at."""
    most = _most_groups(nearest)
    for name in columns.columns:
        column = columns[name]
        if str(name).startswith(Uns.STOFM):
            continue
        if column.iloc[nearest.rows[nearest.cells]].nunique() > most:
            continue
        codes, names = value_codes(column.iloc[nearest.rows])
        if len(names) > 1:
            yield str(name), codes, names


def _most_groups(nearest: Nearest) -> int:
    return min(_MAX_SLICES, len(nearest.cells) // _MIN_CELLS)


def _refuse_overlays(adata: AnnData, xy: NDArray[np.float64]) -> None:
    nearest = Nearest.find(xy)
    found = _overlaid(adata, nearest)
    if found:
        raise ValueError(_overlay_message([name for name, _ in found], found[0][1]))
    _refuse_joined_names(adata, xy, nearest)
    _warn_of_slices_apart(adata, nearest)


def _warn_of_slices_apart(adata: AnnData, nearest: Nearest) -> None:
    """Warn of a column that names parts with gaps between them, which may be slices."""
    apart = [
        (name, names)
        for name, codes, names in _groupings(adata.obs, nearest)
        if _SLICE_WORDS.search(name) and nearest.mixing(codes) == 0.0
    ]
    if apart:
        (name, names), *_ = apart
        warn(
            f"The {len(names)} values of obs[{name!r}] ({listed(names)}) "
            f"lie apart from each other and are taken as parts of "
            f"one slice, whose size is set to a fixed one. If they are slices, pass library_key={name!r}."
        )


def _overlay_message(columns: list[str], values: list[str]) -> str:
    """What to say of slices on each other that the first of some columns names."""
    ways = " or ".join(f"library_key={column!r}" for column in columns)
    return (
        f"obs[{columns[0]!r}] names {len(values)} samples ({listed(values)}) whose "
        f"coordinates overlap: cells of different slices would be taken as neighbours. Pass {ways}. "
        "If they are one slice, pass a column that is the same for all cells."
    )


def listed(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _refuse_joined_names(adata: AnnData, xy: NDArray[np.float64], nearest: Nearest) -> None:
    """Refuse slices on each other that were joined without a column that names them."""
    import pandas as pd

    if not adata.obs_names.is_unique:
        _refuse_repeated_names(adata, xy)
        return
    names = pd.Series(adata.obs_names[nearest.rows])
    for few, code in _parts_of_names(adata, names, nearest):
        codes, values = value_codes(few)
        if nearest.same_share(codes) < 1.0 or nearest.are_joined(codes, is_named=False):
            msg = (
                f"obs_names are of {len(values)} samples ({listed(values)}) "
                f"whose coordinates overlap: cells of "
                "different slices would be taken as neighbours. Make a column of it and pass it: "
                f"adata.obs['sample'] = {code}, library_key='sample'. If they are one slice, pass a "
                "column that is the same for all cells."
            )
            raise ValueError(msg)


def _parts_of_names(
    adata: AnnData, names: pd.Series, nearest: Nearest
) -> Iterator[tuple[pd.Series, str]]:
    """Parts of the names of cells that few values have, and the code that makes a column of them."""
    most = _most_groups(nearest)
    bare = names.str.replace(_NUMBERED, "", regex=True)
    if (bare != names).mean() >= _REPEATED and adata.obs_names.isin(bare[bare != names]).any():
        # Names that occurred several times, and were made unique.
        number = names.str.extract(_NUMBERED, expand=False).fillna("")
        if 1 < number.nunique() <= most:
            yield number, f"adata.obs_names.str.extract(r'{_NUMBERED}', expand=False).fillna('')"
    parts = names.str.split(_SIGNS, regex=True)
    for number in (-1, 0, 1, 2, -2, -3):
        few = parts.str[number]
        if 1 < few.iloc[nearest.cells].nunique() <= most:
            yield few, f"adata.obs_names.str.split(r'{_SIGNS}', regex=True).str[{number}]"


def _refuse_repeated_names(adata: AnnData, xy: NDArray[np.float64]) -> None:
    import pandas as pd

    names = pd.Series(adata.obs_names)
    times = names.groupby(names, sort=False).cumcount().to_numpy()
    n = int(times.max()) + 1
    share = float(np.isin(names, names[times > 0]).mean())
    if share >= _REPEATED and boxes_overlap(xy, times, n):
        msg = (
            f"{share:.0%} of the obs_names are there several times (up to {n}), and their cells "
            "lie on each other: slices that were joined without a column that names them? Join "
            'them with ad.concat(slices, label="sample", index_unique="-"), slices a dict, and '
            "pass library_key='sample'. If they are one slice, make the names unique: "
            "adata.obs_names_make_unique()."
        )
        raise ValueError(msg)


def overlaid_within(
    adata: AnnData, slices: Slices, xy: NDArray[np.float64]
) -> list[tuple[str, list[str]]]:
    """Columns whose values lie on each other within slices which were asked for, and these values."""
    codes = np.empty(adata.n_obs, dtype=np.int64)
    for k, rows in enumerate(slices.rows):
        codes[rows] = k
    return _overlaid(adata, Nearest.find(xy, codes), codes)
