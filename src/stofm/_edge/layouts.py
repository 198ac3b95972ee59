"""Sub-slices and virtual cells of all slices of a table: made, written, and read back if they fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._digests import fingerprint
from stofm._edge.records import read_record, same_params, write_record
from stofm._edge.staleness import outdate_by_places
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm.spatial import SliceLayout, SubSliceConfig, VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Places

# Rules that take effect only when a sub-slice is embedded, not when slices are cut.
_NOT_LAYOUT = ("n_neighbors", "neighbors_among")


@dataclass(frozen=True)
class Layouts:
    """Layouts of all slices, in order of the slices, with what they were made from."""

    layouts: list[SliceLayout]
    places: Places
    params: dict[str, Any]
    digest: str

    @property
    def n_subslices(self) -> int:
        """Number of sub-slices of all slices together."""
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
    """Lay out every slice, or take the layout stored in an AnnData if it fits; writes nothing."""
    params = {
        **{name: value for name, value in asdict(rules).items() if name not in _NOT_LAYOUT},
        "use_rep": use_rep,
        "spatial_key": places.spatial_key,
        "library_key": places.library_key,
        "seed": seed,
    }
    slices = places.slices
    parts = (part for one in zip(slices.names, slices.rows, strict=True) for part in one)
    digest = fingerprint(features, places.coordinates, *parts)
    record = None if stored_in is None else read_record(stored_in, Uns.SUBSLICE)
    if stored_in is not None and record is not None:
        layouts = None
        if same_params(record, params) and record.get("input") == digest:
            layouts = _read_layouts(stored_in, record, places)
        if layouts is not None:
            return Layouts(layouts, places, params, digest)
        logger.info(
            "Cells, their embeddings, places or the rules are not those of the stored layout: "
            "slices are cut again."
        )
    layouts = [
        lay_out_slice(places.coordinates[rows], features[rows], rules, seed=seed)
        for rows in slices.rows
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


def _read_layouts(
    adata: AnnData, record: dict[str, Any], places: Places
) -> list[SliceLayout] | None:
    """Read what :func:`write_layouts` wrote; None if a part was changed or removed since."""
    layouts = []
    try:
        coordinates = np.asarray(adata.obsm[Obsm.COORDINATES])
        subslices, virtual = (
            adata.obs[key].astype(int).to_numpy() for key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL)
        )
        for rows in places.slices.rows:
            used, own = np.unique(virtual[rows], return_inverse=True)
            layouts.append(
                SliceLayout(
                    coordinates=coordinates[rows],
                    subslice=subslices[rows] - subslices[rows].min(),
                    virtual_cell=own,
                    virtual=VirtualCells(
                        coordinates=record["coordinates"][used], features=record["features"][used]
                    ),
                )
            )
    except (KeyError, IndexError, ValueError):
        return None
    return layouts if _output_digest(layouts) == record.get("output") else None


def _output_digest(layouts: list[SliceLayout]) -> str:
    """Fingerprint of the layouts themselves, so that an edited one is not taken for ours."""
    parts: list[NDArray[Any]] = []
    for one in layouts:
        parts += [one.coordinates, one.subslice, one.virtual_cell]
        parts += [one.virtual.coordinates, one.virtual.features]
    return fingerprint(*parts)
