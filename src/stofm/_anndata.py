"""The edge to AnnData: tables out of SpatialData, slices and coordinates out, records in.

The core (``genes``, ``spatial``, ``nn``) sees arrays only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm import __version__
from stofm._keys import Obsm, Uns
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

_SAMPLE_NOUNS = (
    "animal",
    "batch",
    "dataset",
    "donor",
    "embryo",
    "fov",
    "library",
    "mouse",
    "orig",
    "patient",
    "sample",
    "section",
    "slice",
    "slide",
    "subject",
)
# Joined without punctuation: "orig.ident", "Sample_ID" and "slide name" are found as well.
_SAMPLE_COLUMNS = {
    noun + suffix
    for noun in _SAMPLE_NOUNS
    for suffix in ("", "id", "ident", "label", "name", "number")
}
_MAX_SAMPLES = 1000
_COORDINATE_COLUMNS = (
    ("x", "y"),
    ("x_centroid", "y_centroid"),
    ("center_x", "center_y"),
    ("centroid_x", "centroid_y"),
    ("x_coord", "y_coord"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("array_col", "array_row"),
    ("array_x", "array_y"),
)


def resolve_table(data: Any, table_key: str | None = None, *, copy: bool = False) -> AnnData:
    """Return the AnnData to work on: `data` itself, or the named table of a SpatialData.

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
        data = tables[table_key]
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


def read_coordinates(adata: AnnData, spatial_key: str = Obsm.SPATIAL) -> NDArray[np.float64]:
    """Return the first two coordinates of every cell, checked.

    Raises
    ------
    KeyError
        There is no ``obsm[spatial_key]``.
    ValueError
        There are no cells, the array is not (n_obs, 2) or (n_obs, 3), or a coordinate is NaN or
        infinite.
    """
    if adata.n_obs == 0:
        msg = "The AnnData has no cells; nothing to do. Was it filtered too hard?"
        raise ValueError(msg)
    if spatial_key not in adata.obsm:
        candidates = _like_coordinates(adata)
        hint = (
            f"These look like coordinates: {', '.join(candidates)}"
            if candidates
            else "Nothing in obsm or obs looks like coordinates"
        )
        msg = (
            f"There is no obsm[{spatial_key!r}]. {hint}. Put x and y of each cell into "
            f"adata.obsm[{spatial_key!r}], or pass `spatial_key`."
        )
        raise KeyError(msg)
    stored = adata.obsm[spatial_key]
    require_sound(stored, f"adata.obsm[{spatial_key!r}]")
    dense = stored.toarray() if hasattr(stored, "toarray") else stored
    values = np.asarray(dense, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        msg = (
            f"obsm[{spatial_key!r}] has the shape {values.shape}; expected ({adata.n_obs}, 2), "
            "x and y of each cell."
        )
        raise ValueError(msg)
    if values.shape[1] == 3:
        logger.info("obsm[%r] has three coordinates: the first two are used.", spatial_key)
        values = values[:, :2]
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        msg = (
            f"{len(bad)} of {adata.n_obs} cells have NaN or infinite coordinates in "
            f"obsm[{spatial_key!r}], for example {adata.obs_names[bad[:3]].tolist()}. Drop them: "
            f"adata = adata[np.isfinite(adata.obsm[{spatial_key!r}]).all(axis=1)].copy()"
        )
        raise ValueError(msg)
    return np.ascontiguousarray(values)


def _like_coordinates(adata: AnnData) -> list[str]:
    """Name what could be coordinates: arrays of two or three columns, pairs of columns."""
    arrays = [
        f"obsm[{key!r}]"
        for key, value in adata.obsm.items()
        if getattr(value, "ndim", 0) == 2 and value.shape[1] in (2, 3)
    ]
    lower = {str(name).lower(): str(name) for name in adata.obs.columns}
    pairs = [
        f"obs[[{lower[x]!r}, {lower[y]!r}]]"
        for x, y in _COORDINATE_COLUMNS
        if x in lower and y in lower
    ]
    return arrays + pairs


@dataclass(frozen=True)
class Slices:
    """Which cells belong to which slice.

    Attributes
    ----------
    names
        Values of ``obs[library_key]`` in alphabetical order, or the empty string for the one
        slice of an AnnData without `library_key`.
    rows
        Row numbers of each slice's cells, ascending.
    """

    names: list[str]
    rows: list[NDArray[np.int64]]


def read_slices(
    adata: AnnData, library_key: str | None, coordinates: NDArray[np.float64]
) -> Slices:
    """Separate the slices of an AnnData.

    Raises
    ------
    KeyError
        There is no ``obs[library_key]``.
    ValueError
        A cell has no value there; or no `library_key` is given, a column names samples, and
        their coordinates overlap, so that cells of several slices would be taken as neighbours.
    """
    if library_key is None:
        _refuse_overlapping_samples(adata, coordinates)
        return Slices(names=[""], rows=[np.arange(adata.n_obs)])
    if library_key not in adata.obs:
        likely = [name for name in adata.obs.columns if _names_samples(name)]
        near = difflib.get_close_matches(library_key, [str(n) for n in adata.obs.columns])
        msg = (
            f"There is no obs[{library_key!r}] to separate slices by; "
            f"candidates: {sorted({*likely, *near}) or 'none'}."
        )
        raise KeyError(msg)
    column = adata.obs[library_key]
    if n_missing := int(column.isna().sum()):
        msg = (
            f"{n_missing} cells have no value in obs[{library_key!r}]; every cell must belong to "
            "a slice. Fill the column or drop the cells."
        )
        raise ValueError(msg)
    codes, values = _factorize(column.astype(str).to_numpy())
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return Slices(names=values, rows=rows)


def _factorize(values: NDArray[np.object_]) -> tuple[NDArray[np.int64], list[str]]:
    names, codes = np.unique(values.astype(str), return_inverse=True)
    return codes, names.tolist()


def _names_samples(column: object) -> bool:
    letters = "".join(character for character in str(column).lower() if character.isalnum())
    return letters in _SAMPLE_COLUMNS


def _refuse_overlapping_samples(adata: AnnData, coordinates: NDArray[np.float64]) -> None:
    for column in filter(_names_samples, adata.obs.columns):
        codes, names = _factorize(adata.obs[column].astype(str).to_numpy())
        # With hardly any cells each, or thousands of them, they are no slices.
        if not 1 < len(names) <= min(adata.n_obs // 2, _MAX_SAMPLES):
            continue
        if _boxes_overlap(coordinates, codes, len(names)):
            msg = (
                f"obs[{column!r}] names {len(names)} samples ({', '.join(names[:3])}, ...) whose "
                "coordinates overlap: cells of different slices would be taken as neighbours. "
                f"Pass library_key={column!r}. If they are one slice, pass a column that is the "
                "same for all cells."
            )
            raise ValueError(msg)


def _boxes_overlap(
    coordinates: NDArray[np.float64], codes: NDArray[np.int64], n_groups: int
) -> bool:
    """Whether two groups' bounding boxes share a quarter of the smaller one."""
    low = np.full((n_groups, 2), np.inf)
    high = np.full((n_groups, 2), -np.inf)
    np.minimum.at(low, codes, coordinates)
    np.maximum.at(high, codes, coordinates)
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.maximum(sides, 0.0).prod(axis=-1)
    area = (high - low).prod(axis=1)
    smaller = np.minimum(area[:, None], area[None])
    np.fill_diagonal(shared, 0.0)
    return bool((shared > 0.25 * smaller).any())


def remark_on_places(coordinates: NDArray[np.float64], slices: Slices) -> None:
    """Warn of slices whose coordinates carry little: one place, a line, many duplicates."""
    for name, rows in zip(slices.names, slices.rows, strict=True):
        xy = coordinates[rows]
        called = f"Slice {name!r}" if name else "The slice"
        extent = np.ptp(xy, axis=0)
        if len(xy) > 1 and not extent.any():
            warn(
                f"{called}: all {len(xy)} cells lie at one place ({xy[0, 0]:g}, {xy[0, 1]:g}), so "
                "place says nothing about them. Check the coordinates."
            )
        elif len(xy) > 2 and not extent.all():
            side = "width" if extent[0] == 0 else "height"
            logger.warning("%s has zero %s: its cells lie on a line.", called, side)
        n_places = len(np.unique(xy.view([("x", "f8"), ("y", "f8")])))
        if extent.any() and n_places < len(xy):
            logger.warning(
                "%s: %d of %d cells share their place with another; they count as neighbours at "
                "distance 0.",
                called,
                len(xy) - n_places,
                len(xy),
            )
