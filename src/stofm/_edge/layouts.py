"""``stofm.pp.subslice``: cut slices into sub-slices and find their virtual cells."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._edge.records import read_record, same_params, write_record
from stofm._edge.staleness import outdate_by_places
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm.spatial import SliceLayout, SubSliceConfig, VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.places import Places


# Rules that take effect only when a sub-slice is embedded, not when slices are cut.
_NOT_LAYOUT = ("n_neighbors", "neighbors_among")


def rules_of(model_or_config: Any) -> SubSliceConfig:
    if model_or_config is None:
        return SubSliceConfig()
    if isinstance(model_or_config, SubSliceConfig):
        return model_or_config
    rules = getattr(getattr(model_or_config, "config", None), "subslice", None)
    if not isinstance(rules, SubSliceConfig):
        msg = (
            "model_or_config must be a Stofm model or a SubSliceConfig, found "
            f"{type(model_or_config).__name__}."
        )
        raise TypeError(msg)
    return rules


@dataclass(frozen=True)
class Layouts:
    """Layouts of all slices, in order of the slices, with what they were made from."""

    layouts: list[SliceLayout]
    places: Places
    params: dict[str, Any]
    digest: str
    is_new: bool = True

    @property
    def n_subslices(self) -> int:
        """Number of sub-slices of all slices together."""
        return sum(layout.n_subslices for layout in self.layouts)

    @property
    def n_virtual(self) -> int:
        """Number of virtual cells of all slices together."""
        return sum(layout.virtual.n_virtual for layout in self.layouts)


def lay_out(
    features: NDArray[np.float32],
    places: Places,
    rules: SubSliceConfig,
    *,
    use_rep: str,
    seed: int,
) -> Layouts:
    """Lay out every slice; writes nothing."""
    layouts = [
        lay_out_slice(places.coordinates[rows], features[rows], rules, seed=seed)
        for rows in places.slices.rows
    ]
    return Layouts(
        layouts, places, _params(rules, places, use_rep, seed), _digest(features, places)
    )


def _params(rules: SubSliceConfig, places: Places, use_rep: str, seed: int) -> dict[str, Any]:
    layout_rules = {k: v for k, v in asdict(rules).items() if k not in _NOT_LAYOUT}
    return {
        **layout_rules,
        "use_rep": use_rep,
        "spatial_key": places.spatial_key,
        "library_key": places.library_key,
        "seed": seed,
    }


def _digest(features: NDArray[np.float32], places: Places) -> str:
    """Hash all that a layout depends on besides its parameters."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.ascontiguousarray(features).data)
    digest.update(places.coordinates.data)
    for name, rows in zip(places.slices.names, places.slices.rows, strict=True):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def write_layouts(adata: AnnData, result: Layouts) -> None:
    """Write layouts into the AnnData: see the Returns section of :func:`subslice`."""
    import pandas as pd

    coordinates = np.empty((adata.n_obs, 2))
    subslices, virtual = (np.empty(adata.n_obs, dtype=np.int64) for _ in range(2))
    n_subslices = n_virtual = 0
    for rows, layout in zip(result.places.slices.rows, result.layouts, strict=True):
        coordinates[rows] = layout.coordinates
        subslices[rows] = layout.subslice + n_subslices
        virtual[rows] = layout.virtual_cell + n_virtual
        n_subslices += layout.n_subslices
        n_virtual += layout.virtual.n_virtual
    names = np.repeat(result.places.slices.names, [y.virtual.n_virtual for y in result.layouts])

    outdate_by_places(adata)
    adata.obsm[Obsm.COORDINATES] = coordinates
    for key, codes, n in (
        (Obs.SUBSLICE, subslices, n_subslices),
        (Obs.VIRTUAL_CELL, virtual, n_virtual),
    ):
        categories = [str(k) for k in range(n)]
        adata.obs[key] = pd.Categorical.from_codes(codes, categories=categories)
    for key in (Obsm.COORDINATES, Obs.SUBSLICE, Obs.VIRTUAL_CELL):
        write_record(adata, key, result.params, input=result.digest)
    output = _output_digest(result.layouts)
    write_record(adata, Uns.SUBSLICE, result.params, input=result.digest, output=output)
    adata.uns[Uns.STOFM][Uns.SUBSLICE] |= {
        "coordinates": np.vstack([y.virtual.coordinates for y in result.layouts]),
        "features": np.vstack([y.virtual.features for y in result.layouts]),
        "slice": names.astype(object),
        "n_cells": np.bincount(virtual, minlength=n_virtual),
    }
    logger.info(
        "%d sub-slices and %d virtual cells in %d slice%s.",
        n_subslices,
        n_virtual,
        len(result.layouts),
        "" if len(result.layouts) == 1 else "s",
    )


def lay_out_or_reuse(
    adata: AnnData,
    features: NDArray[np.float32],
    places: Places,
    rules: SubSliceConfig,
    *,
    use_rep: str,
    seed: int,
) -> Layouts:
    """Take the layout stored in the AnnData if it still fits, else make it; writes nothing."""
    record = read_record(adata, Uns.SUBSLICE)
    if record is not None:
        params, digest = _params(rules, places, use_rep, seed), _digest(features, places)
        if same_params(record, params) and record.get("input") == digest:
            stored = _read_layouts(adata, record, places)
            if stored is not None:
                return Layouts(stored, places, params, digest, is_new=False)
        logger.info(
            "Cells, their embeddings, places or the rules are not those of the stored layout: "
            "slices are cut again."
        )
    return lay_out(features, places, rules, use_rep=use_rep, seed=seed)


def _read_layouts(
    adata: AnnData, record: dict[str, Any], places: Places
) -> list[SliceLayout] | None:
    """Read what :func:`write_layouts` wrote; None if a part was changed or removed since."""
    if not {Obs.SUBSLICE, Obs.VIRTUAL_CELL} <= set(adata.obs) or Obsm.COORDINATES not in adata.obsm:
        return None
    codes = [_numbers(adata.obs[key]) for key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL)]
    features, positions = (np.asarray(record.get(name)) for name in ("features", "coordinates"))
    if any(c is None or c.max(initial=0) >= len(positions) for c in codes[1:]) or codes[0] is None:
        return None
    layouts = [
        _slice_layout(rows, np.asarray(adata.obsm[Obsm.COORDINATES]), codes, positions, features)
        for rows in places.slices.rows
    ]
    return layouts if _output_digest(layouts) == record.get("output") else None


def _numbers(column: Any) -> NDArray[np.int64] | None:
    """Numbers that categories such as "12" stand for; None if one is something else."""
    import pandas as pd

    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=float)
    return numbers.astype(np.int64) if (numbers >= 0).all() else None


def _slice_layout(
    rows: NDArray[np.int64],
    coordinates: NDArray[np.float64],
    codes: Any,
    positions: NDArray[np.float64],
    features: NDArray[np.float32],
) -> SliceLayout:
    subslices, virtual = (c[rows] for c in codes)
    used = np.unique(virtual)
    return SliceLayout(
        coordinates=coordinates[rows],
        subslice=subslices - subslices.min(),
        virtual_cell=np.searchsorted(used, virtual),
        virtual=VirtualCells(coordinates=positions[used], features=features[used]),
    )


def _output_digest(layouts: list[SliceLayout]) -> str:
    """Hash the layouts themselves, so that an edited one is not taken for ours."""
    digest = hashlib.blake2b(digest_size=8)
    for layout in layouts:
        parts = (layout.coordinates, layout.subslice, layout.virtual_cell)
        for part in (*parts, layout.virtual.coordinates, layout.virtual.features):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
