"""What a panel shows: the cells of one slice, and the part of the plane they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.spatial import cKDTree

from stofm._edge.coordinates import read_coordinates
from stofm._edge.records import read_record
from stofm._edge.slices import described_column
from stofm._keys import Obs, Obsm, Uns
from stofm.pl._colors import NO_VALUE_LABEL, category_names, nearest_names

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

    def titled(self, text: str) -> str:
        """`text` after the slice's name, if it has one."""
        return f"{self.name}: {text}" if self.name else text


def read_panels(adata: AnnData, spatial_key: str, library_key: str | None) -> list[Panel]:
    """Split the cells into slices.

    Without a `library_key` they are separated by the column that the sub-slices were made with,
    or that the metadata names, if any.
    """
    coordinates = read_coordinates(adata, spatial_key)
    names, members = _members(adata, library_key)
    parts = [coordinates[rows] for rows in members]
    extents = np.array([np.ptp(places, axis=0) for places in parts])
    sizes, spacings = extents.max(axis=1), np.array([_spacing(places) for places in parts])
    if (
        spacings.max() <= _MAX_SPACING_RATIO * spacings.min()
        and sizes.max() <= _MAX_SIZE_RATIO * sizes.min()
    ):
        extents[:] = extents.max(axis=0)
    panels = []
    for name, rows, places, spacing, extent in zip(
        names, members, parts, spacings.tolist(), extents, strict=True
    ):
        center = (places.min(axis=0) + places.max(axis=0)) / 2
        # A thin slice keeps a visible width.
        half = np.maximum(extent, 0.1 * extent.max()) / 2
        half = half + 0.01 * half.max() + 0.5 * spacing
        half[half == 0.0] = 0.5
        panels.append(Panel(name, rows, places, spacing, center - half, center + half))
    return panels


def _members(adata: AnnData, library_key: str | None) -> tuple[list[str], list[NDArray[np.int64]]]:
    """Name and rows of each slice."""
    if library_key is None:
        record = read_record(adata, Uns.SUBSLICE) or {}
        library_key = record.get("params", {}).get("library_key") or described_column(adata)
    if library_key is None:
        return [""], [np.arange(adata.n_obs)]
    if library_key not in adata.obs:
        near = nearest_names(library_key, adata.obs.columns)
        msg = f"library_key={library_key!r} is not a column of obs.{near}"
        raise KeyError(msg)
    column = category_names(adata.obs[library_key])
    names = np.array([*column.cat.categories, NO_VALUE_LABEL], dtype=object)
    codes = column.cat.codes.to_numpy(dtype=np.int64) % len(names)
    used = np.unique(codes)
    return names[used].tolist(), [np.flatnonzero(codes == code) for code in used]


def _spacing(places: NDArray[np.float64]) -> float:
    """Typical distance between neighbours.

    Of a cell's neighbours the third is taken: on a lattice it is as near as the first, and among
    scattered cells it stands for the mean distance.
    """
    if len(places) == 1:
        return 0.0
    k = min(_NEIGHBOR, len(places) - 1)
    sample = places[:: max(1, len(places) // _SAMPLE)]
    return float(np.median(cKDTree(places).query(sample, k=[k + 1])[0]))


def layout_codes(adata: AnnData, key: str, library_key: str | None) -> NDArray[np.int64]:
    """Read the sub-slice or virtual cell of each cell: (n_obs,) category codes, -1 for none.

    Without a `library_key`, the record that would name it must be of these cells.
    """
    _require(key in adata.obs, f"obs['{key}']")
    _require(Obsm.COORDINATES in adata.obsm, f"obsm['{Obsm.COORDINATES}']")
    if library_key is None:
        _check_record(adata)
    codes: NDArray[np.int64] = adata.obs[key].astype("category").cat.codes.to_numpy(np.int64)
    return codes


def _check_record(adata: AnnData) -> None:
    """Refuse the record of slices without some of these cells: the largest groups tell."""
    n_made: Any = (read_record(adata, Uns.SUBSLICE) or {}).get("n_cells")
    where = f"uns['{Uns.STOFM}']['{Uns.SUBSLICE}']"
    _require(n_made is not None and Obs.VIRTUAL_CELL in adata.obs, where)
    n_made = np.sort(n_made)[::-1]
    n_cells = adata.obs[Obs.VIRTUAL_CELL].value_counts().to_numpy()
    n_cells = n_cells[n_cells > 0]
    if len(n_cells) > len(n_made) or (n_cells > n_made[: len(n_cells)]).any():
        msg = (
            f"{where} is of other cells: of {n_made.sum()} in {len(n_made)} virtual cells, "
            f"{n_made[0]} in the largest; here are {n_cells.sum()} in {len(n_cells)}, {n_cells[0]} "
            "in the largest. If slices were joined, pass the column of obs that names them as "
            "library_key, or call st.pp.subslice(adata, library_key=...) again."
        )
        raise KeyError(msg)


def _require(is_there: bool, what: str) -> None:  # noqa: FBT001
    if not is_there:
        msg = (
            f"{what} is missing: call st.tl.embed(adata) first, or st.pp.subslice(adata) if there "
            "are cell embeddings already."
        )
        raise KeyError(msg)
