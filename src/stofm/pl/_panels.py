"""What a panel shows: the cells of one slice, and the part of the plane they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import cKDTree

from stofm._anndata import read_record
from stofm._coordinates import read_coordinates
from stofm._keys import Obs, Obsm, Uns
from stofm._slices import described_column
from stofm.pl._style import NO_VALUE_LABEL, category_names, nearest_names

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

#: Slices share a scale if their cells lie about equally far apart (else their units differ), and
#: if none would become tiny.
_MAX_SPACING_RATIO: Final = 1.25
_MAX_SIZE_RATIO: Final = 5.0
_NEIGHBOR: Final = 3
_SAMPLE: Final = 5000


@dataclass(frozen=True)
class Panel:
    """The cells of one slice.

    Attributes
    ----------
    name
        Value of the library key, or "" if the slices are not separated.
    rows
        (n_cells,) rows of the AnnData.
    places
        (n_cells, 2) coordinates of those rows.
    spacing
        Typical distance between neighbouring cells; 0 for a cell alone.
    low, high
        (2,) corners of the part of the plane that is shown.
    """

    name: str
    rows: NDArray[np.int64]
    places: NDArray[np.float64]
    spacing: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def read_panels(adata: AnnData, spatial_key: str, library_key: str | None) -> list[Panel]:
    """Split the cells into slices.

    Parameters
    ----------
    library_key
        Column of ``obs``; None: the one that the sub-slices were made with, or that the metadata
        names, if any.

    Raises
    ------
    KeyError
        A key is missing.
    ValueError
        There are no cells, or coordinates that are not finite.
    """
    places = read_coordinates(adata, spatial_key)
    members = _members(adata, library_key)
    ranges = np.array([np.ptp(places[rows], axis=0) for _, rows in members])
    spacings = np.array([_spacing(places[rows]) for _, rows in members])
    if _share_scale(ranges.max(axis=1), spacings):
        ranges[:] = ranges.max(axis=0)
    return [
        _panel(name, rows, places[rows], spacing, extent)
        for (name, rows), spacing, extent in zip(members, spacings, ranges, strict=True)
    ]


def _share_scale(sizes: NDArray[np.float64], spacings: NDArray[np.float64]) -> bool:
    return bool(
        spacings.max() <= _MAX_SPACING_RATIO * spacings.min()
        and sizes.max() <= _MAX_SIZE_RATIO * sizes.min()
    )


def layout_codes(adata: AnnData, key: str, library_key: str | None) -> NDArray[np.int64]:
    """Read the sub-slice or virtual cell of each cell: (n_obs,) category codes, -1 for none.

    Raises
    ------
    KeyError
        The slices have not been cut yet; or `library_key` is None, and the record that would say
        it is of other cells.
    """
    if key not in adata.obs:
        raise KeyError(_missing_layout(f"obs['{key}']"))
    if Obsm.COORDINATES not in adata.obsm:
        raise KeyError(_missing_layout(f"obsm['{Obsm.COORDINATES}']"))
    if library_key is None:
        _check_record(adata)
    codes: NDArray[np.int64] = adata.obs[key].astype("category").cat.codes.to_numpy(np.int64)
    return codes


def _check_record(adata: AnnData) -> None:
    """Refuse the record of slices without some of these cells: the largest groups tell."""
    n_made = (read_record(adata, Uns.SUBSLICE) or {}).get("n_cells")
    if n_made is None or Obs.VIRTUAL_CELL not in adata.obs:
        raise KeyError(_missing_layout(f"uns['{Uns.STOFM}']['{Uns.SUBSLICE}']"))
    n_made = np.sort(n_made)[::-1]
    n_cells = adata.obs[Obs.VIRTUAL_CELL].value_counts().to_numpy()
    n_cells = n_cells[n_cells > 0]
    if len(n_cells) > len(n_made) or (n_cells > n_made[: len(n_cells)]).any():
        msg = (
            f"uns['{Uns.STOFM}']['{Uns.SUBSLICE}'] is of other cells: of {n_made.sum()} in "
            f"{len(n_made)} virtual cells, {n_made[0]} in the largest; here are {n_cells.sum()} in "
            f"{len(n_cells)}, {n_cells[0]} in the largest. If slices were joined, pass the column "
            "of obs that names them as library_key, or call st.pp.subslice(adata, library_key=...) "
            "again."
        )
        raise KeyError(msg)


def _missing_layout(what: str) -> str:
    """Return an error message that says how to make sub-slices and virtual cells."""
    return (
        f"{what} is missing: call st.tl.embed(adata) first, or st.pp.subslice(adata) if there are "
        "cell embeddings already."
    )


def _members(adata: AnnData, library_key: str | None) -> list[tuple[str, NDArray[np.int64]]]:
    """Name and rows of each slice."""
    if library_key is None:
        record = read_record(adata, Uns.SUBSLICE) or {}
        recorded = record.get("params", {}).get("library_key")
        library_key = recorded or described_column(adata)
    if library_key is None:
        return [("", np.arange(adata.n_obs))]
    if library_key not in adata.obs:
        near = nearest_names(library_key, adata.obs.columns)
        msg = f"library_key={library_key!r} is not a column of obs.{near}"
        raise KeyError(msg)
    column = category_names(adata.obs[library_key])
    codes = column.cat.codes.to_numpy()
    named = [*enumerate(column.cat.categories), (-1, NO_VALUE_LABEL)]
    members = [(str(name), np.flatnonzero(codes == code)) for code, name in named]
    return [(name, rows) for name, rows in members if len(rows)]


def _panel(
    name: str,
    rows: NDArray[np.int64],
    places: NDArray[np.float64],
    spacing: float,
    extent: NDArray[np.float64],
) -> Panel:
    center = (places.min(axis=0) + places.max(axis=0)) / 2
    # A thin slice keeps a visible width.
    half = np.maximum(extent, 0.1 * extent.max()) / 2
    half = half + 0.01 * half.max() + 0.5 * spacing
    half[half == 0.0] = 0.5
    return Panel(name, rows, places, float(spacing), center - half, center + half)


def _spacing(places: NDArray[np.float64]) -> float:
    """Typical distance between neighbours.

    Of a cell's neighbours the third is taken: on a lattice it is as near as the first, and among
    scattered cells it stands for the mean distance.
    """
    if len(places) == 1:
        return 0.0
    k = min(_NEIGHBOR, len(places) - 1)
    sample = places[:: max(1, len(places) // _SAMPLE)]
    distances = cKDTree(places).query(sample, k=[k + 1])[0]
    return float(np.median(distances))
