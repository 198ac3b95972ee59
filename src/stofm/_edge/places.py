"""Positions of cells: read, checked, laid out slice by slice, and compared with stored layouts."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._digests import fingerprint
from stofm._edge.tables import mark_outdated, read_record, same_params, write_record
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes.ranking import require_sound
from stofm.spatial import SliceLayout, SubSliceConfig, VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Places

_AXES: Final = {"x": "x", "col": "x", "column": "x", "y": "y", "row": "y", "z": "z"}
#: Also in camel case.
_WORD: Final = r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+"
_MAX_NAMED: Final = 10
#: With at least this share of different positions, shared ones get a single line in the log.
_FEW_PLACES: Final = 0.99
#: Largest share of stray cells at one end of a slice; how far they are beyond the others, in units
#: of their extent; and how much the slice must grow because of them.
_STRAY_SHARE: Final = 0.03
_STRAY_BEYOND: Final = 0.35
_STRAY_GROWTH: Final = 1.2
#: Normalised coordinates span 100; smaller differences than this are rounding.
_SAME_PLACE: Final = 0.01
_SAME_SCALE: Final = 1e-3


def read_coordinates(adata: AnnData, spatial_key: str = Obsm.SPATIAL) -> NDArray[np.float64]:
    """Return x and y of every cell, (n_obs, 2), finite."""
    return read_axes(adata, spatial_key)[0]


def read_axes(
    adata: AnnData, spatial_key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return x and y of every cell, (n_obs, 2), finite, and z, (n_obs,), if there is one."""
    if adata.n_obs == 0:
        raise ValueError("The AnnData has no cells; nothing to do. Was it filtered too hard?")
    if spatial_key not in adata.obsm:
        raise KeyError(_missing(adata, spatial_key))
    values = _numbers(adata, spatial_key)
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        raise ValueError(
            f"obsm[{spatial_key!r}] has the shape {values.shape}; expected ({adata.n_obs}, 2), "
            "x and y of each cell."
        )
    bad = np.flatnonzero(~np.isfinite(values[:, :2]).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {adata.n_obs} cells have NaN or infinite coordinates in "
            f"obsm[{spatial_key!r}], for example {adata.obs_names[bad[:3]].tolist()}. Drop them: "
            f"adata = adata[np.isfinite(np.asarray(adata.obsm[{spatial_key!r}], dtype=float))"
            ".all(axis=1)].copy()"
        )
    return np.ascontiguousarray(values[:, :2]), values[:, 2] if values.shape[1] == 3 else None


def _numbers(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Entries as numbers; from a table with columns named by axes, these columns, x first."""
    import pandas as pd

    stored: Any = adata.obsm[key]
    require_sound(stored, f"adata.obsm[{key!r}]")
    if sparse.issparse(stored):
        stored = stored.toarray()
    stored = stored if isinstance(stored, pd.DataFrame) else np.asarray(stored)
    if stored.ndim != 2:
        return np.empty(stored.shape)
    table = pd.DataFrame(stored)
    axes = [axis_of(name)[0] for name in table.columns]
    if axes.count("x") == axes.count("y") == 1 >= axes.count("z"):
        table = table.iloc[:, [axes.index(axis) for axis in "xyz" if axis in axes]]
    try:
        values: NDArray[np.float64] = table.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        is_bad = table.apply(pd.to_numeric, errors="coerce").isna() & table.notna()
        rows = np.flatnonzero(is_bad.any(axis=1))
        raise ValueError(
            f"obsm[{key!r}] holds values that are not numbers in {len(rows)} of {adata.n_obs} "
            f"cells, for example {adata.obs_names[rows[0]]}: {table.iloc[rows[0]].tolist()}. "
            "Correct these cells or drop them. Where decimals have a comma: "
            f"adata.obsm[{key!r}] = np.char.replace(np.asarray(adata.obsm[{key!r}], dtype=str), "
            "',', '.').astype(float)"
        ) from None
    return values


def axis_of(name: object) -> tuple[str, str]:
    """Axis that a column's name stands for (x, y, z, or none), and the rest of the name."""
    words = re.findall(_WORD, str(name))
    named = [word for word in words if word.lower() in _AXES]
    axis = _AXES[named[0].lower()] if len(named) == 1 else ""
    return axis, " ".join(word for word in words if word not in named)


def _missing(adata: AnnData, key: str) -> str:
    """Say that coordinates are missing, and which entries look like coordinates."""
    found = [
        f"obsm[{name!r}] (pass spatial_key={name!r})"
        for name, value in adata.obsm.items()
        if getattr(value, "ndim", 0) == 2
        and value.shape[1] in (2, 3)
        and (not name.startswith("X_") or "spatial" in name.lower())
    ]
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for name in adata.obs.columns:
        axis, rest = axis_of(name)
        pairs[rest][axis] = name
    found += [
        f"obs[{[pair['x'], pair['y']]}] (adata.obsm[{key!r}] = "
        f"adata.obs[{[pair['x'], pair['y']]}].to_numpy())"
        for pair in pairs.values()
        if {"x", "y"} <= set(pair)
    ]
    advice = (
        f"These look like coordinates: {'; '.join(found)}."
        if found
        else "Nothing in obsm or obs looks like coordinates. Put x and y of each cell into "
        f"adata.obsm[{key!r}], or pass `spatial_key`."
    )
    return f"There is no obsm[{key!r}]. {advice}"


# Warnings


def warn_of_places(adata: AnnData, name: str, rows: NDArray[np.int64], xy: NDArray[Any]) -> None:
    """Warn of slices at one position or on a line, of shared positions, and of stray cells."""
    import pandas as pd

    called = f"Slice {name!r}" if name else "The slice"
    extent = np.ptp(xy, axis=0)
    if len(xy) > 1 and not extent.any():
        warn(
            f"{called}: all {len(xy)} cells lie at one position ({xy[0, 0]:g}, {xy[0, 1]:g}), so "
            "coordinates say nothing about them. Check the coordinates."
        )
        return
    if len(xy) > 2 and not extent.all():
        side = "width" if extent[0] == 0 else "height"
        warn(f"{called} has zero {side}: its cells lie on a line. Check the coordinates.")
    if n_shared := int(pd.DataFrame(xy).duplicated().sum()):
        tell = warn if len(xy) - n_shared < _FEW_PLACES * len(xy) else logger.info
        tell(
            f"{called}: {n_shared} of {len(xy)} cells share their position with another; they count "
            "as neighbours at distance 0. If slices were joined, pass `library_key`; if cells are "
            "there twice, drop them."
        )
    is_stray = stray_cells(xy)
    growth = np.hypot(*extent) / max(np.hypot(*np.ptp(xy[~is_stray], axis=0)), 1e-300)
    if growth >= _STRAY_GROWTH:
        stray = adata.obs_names[rows[is_stray]].tolist()
        few = len(stray) <= _MAX_NAMED
        code = f": adata = adata[~adata.obs_names.isin({stray})].copy()" if few else "."
        warn(
            f"{called}: {len(stray)} of {len(xy)} cells ({listed(stray)}) lie far from the others "
            f"and make the slice {growth:.3g} times as large. Slices are scaled to one size, so "
            "this changes all embeddings. If these cells are debris or misplaced, drop them" + code
        )


def stray_cells(xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each cell is one of a few that lie far from the others, (n,)."""
    if len(xy) < 10:
        return np.zeros(len(xy), dtype=bool)
    n_outer = max(1, int(_STRAY_SHARE * len(xy)))
    low, high = np.sort(xy, axis=0)[[n_outer, -1 - n_outer]]
    beyond = _STRAY_BEYOND * (high - low)
    found: NDArray[np.bool_] = ((xy < low - beyond) | (xy > high + beyond)).any(axis=1)
    return found


def warn_of_depth(xy: NDArray[Any], z: NDArray[Any], spacing: float, key: str) -> None:
    """Log that z is not used; warn if it varies by more than the distance between cells."""
    depth, (width, height) = float(np.ptp(z)), np.ptp(xy, axis=0)
    tell = logger.info if depth <= spacing else warn
    tell(
        f"obsm[{key!r}] has three coordinates: the first two are used. z extends over {depth:.3g}, x "
        f"over {width:.3g} and y over {height:.3g}, and cells above each other are taken as "
        "neighbours. If z is of several sections, make a column of it and pass it as `library_key`; "
        "in a thick volume, embed slabs of it one by one."
    )


def warn_of_spots_off_tissue(adata: AnnData) -> None:
    """Warn of spots that a column such as ``in_tissue`` (0 and 1, or False and True) excludes."""
    for name in adata.obs.columns:
        if "tissue" not in str(name).lower():
            continue
        values = adata.obs[name].dropna().astype(str).str.lower()
        is_off = values.isin(("0", "0.0", "false", "no"))
        if is_off.any() and (is_off | values.isin(("1", "1.0", "true", "yes"))).all():
            warn(
                f"{int(is_off.sum())} of {adata.n_obs} spots are not on tissue by obs[{name!r}], and "
                "are taken like the others, which changes what is found for their neighbours. Drop "
                "them if that column is right."
            )


def listed(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# Layouts


@dataclass(frozen=True)
class Layouts:
    """Layouts of all slices, in order of the slices, and the data that they were made from."""

    layouts: list[SliceLayout]
    places: Places
    params: dict[str, Any]
    digest: str

    @property
    def n_subslices(self) -> int:
        """Number of sub-slices over all slices."""
        return sum(layout.n_subslices for layout in self.layouts)


def lay_out(
    features: NDArray[np.float32],
    places: Places,
    rules: SubSliceConfig,
    *,
    use_rep: str,
    seed: int,
    stored_in: AnnData | None = None,
) -> Layouts:
    """Lay out every slice, or use the layout stored in an AnnData if it fits; writes nothing."""
    params = {
        **asdict(rules),
        "use_rep": use_rep,
        "spatial_key": places.spatial_key,
        "library_key": places.slices.column,
        "seed": seed,
    }
    slices = places.slices
    parts = (part for one in zip(slices.names, slices.rows, strict=True) for part in one)
    digest = fingerprint(features, places.coordinates, *parts)
    record = {} if stored_in is None else read_record(stored_in, Uns.SUBSLICE) or {}
    if stored_in is not None and same_params(record, params) and record.get("input") == digest:
        layouts = _read_layouts(stored_in, record, places)
        if _output_digest(layouts) == record.get("output"):
            return Layouts(layouts, places, params, digest)
    if record:
        logger.info(
            "Cells, embeddings, coordinates or rules differ from those of the stored layout: "
            "slices are cut again."
        )
    # A single slice is not copied.
    whole = [slice(None)] if len(slices.rows) == 1 else slices.rows
    layouts = [
        lay_out_slice(places.coordinates[rows], features[rows], rules, seed=seed) for rows in whole
    ]
    return Layouts(layouts, places, params, digest)


def write_layouts(adata: AnnData, result: Layouts) -> None:
    """Write layouts into the AnnData: see :func:`stofm.pp.subslice`."""
    import pandas as pd

    layouts, slices = result.layouts, result.places.slices
    coordinates = np.empty((adata.n_obs, 2))
    subslices, virtual = (np.empty(adata.n_obs, dtype=np.int64) for _ in range(2))
    n_subslices = n_virtual = 0
    for rows, layout in zip(slices.rows, layouts, strict=True):
        coordinates[rows] = layout.coordinates
        subslices[rows] = layout.subslice + n_subslices
        virtual[rows] = layout.virtual_cell + n_virtual
        n_subslices += layout.n_subslices
        n_virtual += layout.virtual.n_virtual

    outdate_by_places(adata)
    adata.obsm[Obsm.COORDINATES] = coordinates
    adata.obs[Obs.SUBSLICE] = pd.Categorical.from_codes(subslices, [*map(str, range(n_subslices))])
    adata.obs[Obs.VIRTUAL_CELL] = pd.Categorical.from_codes(virtual, [*map(str, range(n_virtual))])
    for key in (Obsm.COORDINATES, Obs.SUBSLICE, Obs.VIRTUAL_CELL):
        write_record(adata, key, result.params, input=result.digest)
    write_record(
        adata,
        Uns.SUBSLICE,
        result.params,
        input=result.digest,
        output=_output_digest(layouts),
        coordinates=np.vstack([y.virtual.coordinates for y in layouts]),
        features=np.vstack([y.virtual.features for y in layouts]),
        slice=np.repeat(slices.names, [y.virtual.n_virtual for y in layouts]).astype(object),
        n_cells=np.bincount(virtual, minlength=n_virtual),
    )
    logger.info(
        "%d sub-slices and %d virtual cells in %d slice(s).", n_subslices, n_virtual, len(layouts)
    )


def _read_layouts(adata: AnnData, record: dict[str, Any], places: Places) -> list[SliceLayout]:
    """Read layouts from :func:`write_layouts`; fewer if a part was changed or removed since."""
    layouts = []
    with contextlib.suppress(KeyError, IndexError, ValueError):
        coordinates = np.asarray(adata.obsm[Obsm.COORDINATES])
        subslices, virtual = (
            adata.obs[key].astype(int).to_numpy() for key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL)
        )
        for rows in places.slices.rows:
            used, own = np.unique(virtual[rows], return_inverse=True)
            means = VirtualCells(record["coordinates"][used], record["features"][used])
            number = subslices[rows] - subslices[rows].min()
            layouts.append(SliceLayout(coordinates[rows], number, own, means))
    return layouts


def _output_digest(layouts: list[SliceLayout]) -> str:
    """Fingerprint of the layouts themselves, so that an edited one is recognised."""
    cut = ((y.coordinates, y.subslice, y.virtual_cell) for y in layouts)
    means = ((y.virtual.coordinates, y.virtual.features) for y in layouts)
    pairs = zip(cut, means, strict=True)
    return fingerprint(*(part for one in pairs for half in one for part in half))


# Whether positions are unchanged


def outdate_by_places(adata: AnnData) -> None:
    """Mark embeddings of coordinates that have changed, before layouts are replaced."""
    if changed_places(adata):
        layout = read_record(adata, Uns.SUBSLICE) or {}
        mark_outdated(adata, "coordinates", lambda it: same_places_read(layout, it))


def same_places_read(layout: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a layout has the positions and slices that an embedding was made with."""
    names = ("spatial_key", "library_key")
    first, second = (one.get("params", {}) for one in (layout, record))
    return all(name in first and first[name] == second.get(name) for name in names)


def changed_places(adata: AnnData) -> bool:
    """Whether the coordinates have changed since slices were cut.

    They may be moved, rotated, mirrored and scaled slice by slice, which changes no distance that a
    model uses. Layouts that were lost when tables were joined can't be compared.
    """
    params = (read_record(adata, Uns.SUBSLICE) or {}).get("params", {})
    spatial_key, library_key = (params.get(name) for name in ("spatial_key", "library_key"))
    is_there = {spatial_key, Obsm.COORDINATES} <= set(adata.obsm)
    if not is_there or (library_key and library_key not in adata.obs):
        return False
    try:
        now = read_coordinates(adata, spatial_key)
    except ValueError:
        return False
    stored = np.asarray(adata.obsm[Obsm.COORDINATES])
    if not library_key:
        return not _are_similar(now, stored)
    groups = adata.obs.reset_index(drop=True).groupby(library_key, observed=True).indices
    return not all(_are_similar(now[rows], stored[rows]) for rows in groups.values())


def _are_similar(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether positions changed other than by moving, rotating, mirroring or scaling."""
    first, second = (places - places.mean(axis=0) for places in (first, second))
    first = first / (np.abs(first).max() or 1.0)
    change, _, rank, _ = np.linalg.lstsq(first, second, rcond=None)
    if np.abs(first @ change - second).max() > _SAME_PLACE:
        return False
    sizes = np.linalg.svd(change, compute_uv=False)
    return bool(rank < 2 or sizes[1] >= (1 - _SAME_SCALE) * sizes[0])
