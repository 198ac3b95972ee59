"""Coordinates of cells, checked, for computing and drawing."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._keys import Obsm
from stofm.genes.compressed import require_sound

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

_AXES: Final = {"x": "x", "col": "x", "column": "x", "y": "y", "row": "y", "z": "z"}
#: In camel case too.
_WORD: Final = r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])"
#: Squares of larger distances can overflow.
_LARGEST: Final = 1e100
_SAMPLE: Final = 2000
_MAX_PAIRS: Final = 3
#: Median distance to the nearest neighbour, in units of what points at random in the box have. That of
#: tissue is 0.7 and more; of counts, areas and shares, which crowd together, less.
_EVEN: Final = 0.7


def read_coordinates(adata: AnnData, spatial_key: str = Obsm.SPATIAL) -> NDArray[np.float64]:
    """Return x and y of every cell, (n_obs, 2): finite, and no larger than squares allow."""
    return read_axes(adata, spatial_key)[0]


def read_axes(
    adata: AnnData, spatial_key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return x and y, (n_obs, 2), as :func:`read_coordinates` does, and z, (n_obs,), if there is one."""
    if adata.n_obs == 0:
        msg = "The AnnData has no cells; nothing to do. Was it filtered too hard?"
        raise ValueError(msg)
    if spatial_key not in adata.obsm:
        raise KeyError(_missing(adata, spatial_key))
    stored = adata.obsm[spatial_key]
    require_sound(stored, f"adata.obsm[{spatial_key!r}]")
    values = _numbers(adata, spatial_key, _in_order(stored))
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        msg = (
            f"obsm[{spatial_key!r}] has the shape {values.shape}; expected ({adata.n_obs}, 2), "
            "x and y of each cell."
        )
        raise ValueError(msg)
    if values.shape[1] == 3:
        _refuse_other_first_axis(values, spatial_key)
    bad = np.flatnonzero(~np.isfinite(values[:, :2]).all(axis=1))
    if len(bad):
        is_plain = isinstance(stored, np.ndarray) and stored.dtype.kind == "f"
        array = f"adata.obsm[{spatial_key!r}]"
        array = array if is_plain else f"np.asarray({array}, dtype=float)"
        msg = (
            f"{len(bad)} of {adata.n_obs} cells have NaN or infinite coordinates in "
            f"obsm[{spatial_key!r}], for example {adata.obs_names[bad[:3]].tolist()}. Drop them: "
            f"adata = adata[np.isfinite({array}).all(axis=1)].copy()"
        )
        raise ValueError(msg)
    huge = np.flatnonzero((np.abs(values[:, :2]) > _LARGEST).any(axis=1))
    if len(huge):
        msg = (
            f"{len(huge)} of {adata.n_obs} cells have coordinates beyond {_LARGEST:g} in "
            f"obsm[{spatial_key!r}], for example {adata.obs_names[huge[:3]].tolist()} at "
            f"{values[huge[0], :2].tolist()}: no unit of length has such numbers. Correct or drop them."
        )
        raise ValueError(msg)
    return np.ascontiguousarray(values[:, :2]), values[:, 2] if values.shape[1] == 3 else None


def _in_order(stored: Any) -> Any:
    """The array, or of a table whose columns are named by axes these, x first."""
    if hasattr(stored, "toarray"):
        return stored.toarray()
    if not hasattr(stored, "columns"):
        return stored
    axes = [axis_of(name) for name in stored.columns]
    if axes.count("x") != 1 or axes.count("y") != 1 or axes.count("z") > 1:
        return stored
    return stored.iloc[:, [axes.index(axis) for axis in "xyz" if axis in axes]]


def axis_of(name: object) -> str:
    """Axis that a column's name stands for: x, y or z; empty if none."""
    words = re.findall(_WORD, str(name))
    found = {_AXES[word.lower()] for word in words if word.lower() in _AXES}
    return found.pop() if len(found) == 1 else ""


def _numbers(adata: AnnData, key: str, table: Any) -> NDArray[np.float64]:
    import pandas as pd

    if isinstance(table, np.ma.MaskedArray):
        return np.asarray(np.ma.filled(table.astype(np.float64), np.nan))
    if not isinstance(table, pd.DataFrame):
        array = np.asarray(table)
        if array.dtype.kind in "biuf" or array.ndim != 2:
            return array.astype(np.float64) if array.dtype.kind in "biuf" else array
        table = pd.DataFrame(array)
    text = table.astype(object)
    read = text.apply(_to_numbers)
    is_bad = (read.isna() & text.notna()).to_numpy()
    if is_bad.any():
        raise ValueError(_text_message(adata, key, text, is_bad))
    values: NDArray[np.float64] = read.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _to_numbers(column: pd.Series) -> pd.Series:
    import pandas as pd

    text = column.map(lambda value: value.decode() if isinstance(value, bytes) else value)
    try:
        return text.astype(np.float64)
    except (TypeError, ValueError):
        return pd.to_numeric(text, errors="coerce").astype("Float64")


def _text_message(adata: AnnData, key: str, text: pd.DataFrame, is_bad: NDArray[np.bool_]) -> str:
    rows = np.flatnonzero(is_bad.any(axis=1))
    shown = [
        f"{adata.obs_names[row]}: {', '.join(repr(value) for value in text.iloc[row])}"
        for row in rows[:3]
    ]
    found = (
        f"obsm[{key!r}] holds something else than numbers in {len(rows)} of {adata.n_obs} cells "
        f"({'; '.join(shown)}{'; ...' if len(rows) > 3 else ''})."
    )
    points = text.iloc[rows].astype(str).apply(lambda column: column.str.replace(",", "."))
    if points.apply(_to_numbers).notna().to_numpy().all():
        return (
            f"{found} They have a decimal comma: adata.obsm[{key!r}] = np.char.replace("
            f"np.asarray(adata.obsm[{key!r}], dtype=str), ',', '.').astype(float)"
        )
    names = adata.obs_names[rows[:3]].tolist()
    drop = f"adata = adata[~adata.obs_names.isin({names})].copy()"
    if len(rows) == adata.n_obs:
        return f"{found} Turn them into numbers first: no unit, no sign between thousands."
    return f"{found} Correct or drop them{': ' if len(rows) <= 3 else ', for example '}{drop}"


def _refuse_other_first_axis(values: NDArray[np.float64], key: str) -> None:
    """Refuse three columns whose first is no place in the plane."""
    first = values[:, 0]
    n = [len(np.unique(column)) for column in values.T]
    if len(first) < 3 or n[0] == 0 or min(n[1:]) < 2:
        return
    steps = np.diff(first)
    if n[0] == 1:
        what = f"is {first[0]:g} for all cells"
    elif (steps == steps[0]).all() and steps[0] == 1:
        what = "only numbers the cells"
    elif 20 * n[0] <= min(n[1:]):
        what = f"takes {n[0]} values and the others {n[1]} and {n[2]}, as if z came first"
    else:
        return
    msg = (
        f"obsm[{key!r}] has three columns, and the first {what}; expected x and y first. Put the "
        f"columns in order: adata.obsm[{key!r}] = np.asarray(adata.obsm[{key!r}])[:, [1, 2, 0]], or "
        "[:, 1:] if the first is no z."
    )
    raise ValueError(msg)


def _missing(adata: AnnData, key: str) -> str:
    if key in adata.varm:
        return (
            f"There is no obsm[{key!r}], but varm[{key!r}]: cells are in columns and genes in rows. "
            "Swap them: adata = adata.T"
        )
    found = [*_arrays_like_places(adata, key), *_columns_like_places(adata, key)]
    if not found:
        return (
            f"There is no obsm[{key!r}]. Nothing in obsm or obs looks like coordinates. Put x and y "
            f"of each cell into adata.obsm[{key!r}], or pass `spatial_key`."
        )
    return f"There is no obsm[{key!r}]. These look like coordinates: {'; '.join(found)}."


def _arrays_like_places(adata: AnnData, key: str) -> list[str]:
    """Arrays with two or three numbers of each cell that are no embedding, and how to use them."""
    found = [
        f"obsm[{name!r}] (pass spatial_key={name!r})"
        for name, value in adata.obsm.items()
        if getattr(value, "ndim", 0) == 2
        and value.shape[1] in (2, 3)
        and (not name.startswith("X_") or "spatial" in name.lower())
    ]
    for name, value in adata.uns.items():
        shape: tuple[int, ...] = getattr(value, "shape", ())
        for turned, ending in ((shape, ""), (shape[::-1], ".T")):
            if len(turned) == 2 and turned[0] == adata.n_obs and turned[1] in (2, 3):
                found.append(
                    f"uns[{name!r}] of the shape {shape} (adata.obsm[{key!r}] = "
                    f"np.asarray(adata.uns[{name!r}]){ending})"
                )
                break
    return found


def _columns_like_places(adata: AnnData, key: str) -> list[str]:
    """Pairs of columns of ``obs`` that could be x and y, those named so first, and how to use them."""
    rows = np.unique(np.linspace(0, adata.n_obs - 1, _SAMPLE).astype(int))
    columns, flawed = {}, set()
    for name in adata.obs.columns:
        column = adata.obs[name].iloc[rows].astype(object)
        values = _to_numbers(column).to_numpy(np.float64, np.nan)
        if not np.isfinite(values).all():
            # With decimal commas, or without a number in some cells; only a name tells of these.
            points = column.astype(str).str.replace(",", ".")
            values = _to_numbers(points).to_numpy(np.float64, np.nan)
            flawed.add(name)
        is_number = np.isfinite(values)
        if is_number.mean() > 0.5 and len(np.unique(values[is_number])) >= min(8, len(rows)):
            columns[name] = values
    pairs = list(itertools.combinations(columns, 2))
    named = [pair for pair in pairs if {axis_of(name) for name in pair} == {"x", "y"}]
    named = [pair[:: 1 if axis_of(pair[0]) == "x" else -1] for pair in named if _alike(*pair)]
    whole = [] if named else [pair for pair in pairs if not flawed & set(pair)]
    spread = {(x, y): _spread(columns[x], columns[y]) for x, y in whole}
    least = max(_EVEN, 0.9 * max(spread.values(), default=0.0))
    even = sorted(
        (pair for pair in spread if spread[pair] >= least), key=lambda pair: -spread[pair]
    )
    return [
        f"obs[{list(pair)}] (adata.obsm[{key!r}] = adata.obs[{list(pair)}].to_numpy("
        f"{'' if flawed & set(pair) else 'dtype=float'}))"
        for pair in (named or even)[:_MAX_PAIRS]
    ]


def _alike(first: str, second: str) -> bool:
    """Whether two names are the same but for the axis."""
    one, other = (
        [word for word in re.findall(rf"{_WORD}|\d+", str(name)) if not axis_of(word)]
        for name in (first, second)
    )
    return one == other


def _spread(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Median distance to the nearest neighbour, in units of that of points at random in the box."""
    from scipy.spatial import cKDTree

    xy = np.column_stack([x, y])
    xy = (xy - xy.min(axis=0)) / np.ptp(xy, axis=0)
    nearest = cKDTree(xy).query(xy, k=[2])[0]
    return float(np.median(nearest) * np.sqrt(len(xy) * np.pi / np.log(2.0)))
