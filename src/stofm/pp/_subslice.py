"""``stofm.pp.subslice``: cut slices into sub-slices and find their virtual cells."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._anndata import read_record, resolve_table, same_params, write_record
from stofm._config import check_seed
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm._places import Places, read_places
from stofm._writing import all_or_nothing
from stofm.genes.compressed import require_sound
from stofm.pp._staleness import outdate_by_places, stale_reason
from stofm.spatial import SliceLayout, SubSliceConfig, VirtualCells, lay_out_slice

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.spatial.subslices import Partition
    from stofm.spatial.virtual_cells import Clustering, Mixing

# Rules that take effect only when a sub-slice is embedded, not when slices are cut.
_NOT_LAYOUT = ("n_neighbors", "neighbors_among")


def subslice(
    adata: Any,
    model_or_config: Any = None,
    *,
    use_rep: str = Obsm.X_CELL,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    n_cells: int | None = None,
    leiden_resolution: float | None = None,
    position_weight: float | None = None,
    partition: Partition | None = None,
    mixing: Mixing | None = None,
    n_components: int | None = None,
    clustering: Clustering | None = None,
    max_virtual_cells: int | None = None,
    seed: int = 0,
    table_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Cut each slice into sub-slices and find its virtual cells (micro and macro scale).

    Coordinates are centred and scaled slice by slice. A sub-slice is a compact group of about a
    thousand neighbouring cells. Virtual cells are the means of Leiden clusters over expression
    and place; every sub-slice of a slice gets all of them.

    Parameters
    ----------
    adata
        Annotated data with cell embeddings and coordinates, or a SpatialData with such a table.
    model_or_config
        A :class:`stofm.Stofm` or a :class:`stofm.spatial.SubSliceConfig` whose rules to use; by
        default those of ``SubSliceConfig()``, which our own models have. The options below
        replace single rules.
    use_rep
        Entry of ``adata.obsm`` with the cell embeddings, (n_obs, d).
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit. Of three coordinates
        the first two are used.
    library_key
        Column of ``adata.obs`` that names each cell's slice. Nothing crosses slices.
    n_cells
        Cells of a sub-slice, 1000 by default: at most, with the balanced partition.
    leiden_resolution
        Resolution of the clustering, 1.0 by default; higher values give more virtual cells.
    position_weight
        Weight of place against expression in the clustering, 0 to 1; 0.2 by default.
    partition
        ``"balanced"`` or ``"reference"``; see :class:`stofm.spatial.SubSliceConfig`.
    mixing, n_components, clustering
        How place and expression are put together, with how many principal components, and which
        order of cells Leiden sees; see :class:`stofm.spatial.SubSliceConfig`.
    max_virtual_cells
        Upper limit on virtual cells of a slice, 200 by default.
    seed
        Seed of the clustering.
    table_key
        Table of a SpatialData.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['stofm_spatial']`` : float64 (n_obs, 2)
        Normalised coordinates: each slice's bounding box has its centre at 0 and a diagonal
        of 100.
    ``adata.obs['stofm_subslice']`` : category
        Sub-slice of each cell, numbered over all slices.
    ``adata.obs['stofm_virtual_cell']`` : category
        Virtual cell (cluster) of each cell, numbered over all slices.
    ``adata.uns['stofm']['subslice']`` : dict
        ``coordinates`` float64 (n_virtual, 2), ``features`` float32 (n_virtual, d), ``slice``
        (n_virtual,) and ``n_cells`` (n_virtual,) of the virtual cells, in order of the
        categories; ``params``.

    Raises
    ------
    KeyError
        `use_rep`, `spatial_key` or `library_key` is not there.
    ValueError
        A rule, a coordinate or a feature is not usable.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.2.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.pp.tokenize(adata)
    >>> st.tl.encode_cells(adata)
    >>> st.pp.subslice(adata, n_cells=200)
    >>> adata.obs["stofm_subslice"].nunique()
    3
    """
    check_seed(seed)
    table = resolve_table(adata, table_key, copy=copy)
    chosen: dict[str, Any] = {
        "n_cells": n_cells,
        "leiden_resolution": leiden_resolution,
        "position_weight": position_weight,
        "partition": partition,
        "mixing": mixing,
        "n_components": n_components,
        "clustering": clustering,
        "max_virtual_cells": max_virtual_cells,
    }
    rules = replace(
        _rules_of(model_or_config), **{k: v for k, v in chosen.items() if v is not None}
    )
    where = read_places(table, spatial_key=spatial_key, library_key=library_key)
    result = lay_out(read_features(table, use_rep), where, rules, use_rep=use_rep, seed=seed)
    target = table.copy() if copy else table
    with all_or_nothing(target):
        write_layouts(target, result)
    return target if copy else None


def _rules_of(model_or_config: Any) -> SubSliceConfig:
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


def read_features(adata: AnnData, use_rep: str) -> NDArray[np.float32]:
    """Read cell embeddings from ``obsm[use_rep]``, checked."""
    if use_rep not in adata.obsm:
        hint = (
            "run st.tl.encode_cells(adata) first, or pass use_rep="
            if use_rep == Obsm.X_CELL
            else "there are "
        )
        msg = f"There is no obsm[{use_rep!r}]; {hint}{sorted(map(str, adata.obsm))}."
        raise KeyError(msg)
    stored = adata.obsm[use_rep]
    require_sound(stored, f"adata.obsm[{use_rep!r}]")
    dense = stored.toarray() if hasattr(stored, "toarray") else stored
    values = np.asarray(dense, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] == 0:
        msg = f"obsm[{use_rep!r}] has the shape {values.shape}; expected ({adata.n_obs}, d)."
        raise ValueError(msg)
    if n_bad := int((~np.isfinite(values)).any(axis=1).sum()):
        msg = (
            f"{n_bad} of {adata.n_obs} cells have NaN or infinite values in obsm[{use_rep!r}]; "
            "make it again or drop these cells."
        )
        raise ValueError(msg)
    if reason := stale_reason(adata, use_rep):
        msg = f"{reason} Make it again: st.pp.tokenize(adata), st.tl.encode_cells(adata)."
        raise ValueError(msg)
    return values


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
