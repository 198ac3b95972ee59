"""Files with both counts and positions: Stereo-seq's, h5ad, and Zarr stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from stofm._edge.slice_files import read_data
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._messages import naming
from stofm.io.formats import GENERIC, MICROMETRE, STEREO, UNKNOWN
from stofm.io.joining import Read
from stofm.io.matrices import MASK, read_h5ad
from stofm.io.stereo import read_gef, read_gem
from stofm.io.units import Scale, scale_of_anndata

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.io.detection import BinSize, Candidate
    from stofm.io.files import File

#: Kinds of files that hold everything.
WHOLE: Final = ("h5ad", "zarr", "gem", "geneExp", "cellBin")


def read_whole(one: Candidate, bin_size: BinSize, table_key: str | None, *, images: bool) -> Read:
    """Read a file with counts and positions, by squares or by cells if it has both."""
    kind, file = one.file.kind, one.file
    if kind in ("h5ad", "zarr"):
        return _read_anndata(file, table_key, images=images)
    is_cells = (
        bin_size == "cells" or kind == "cellBin" or (bin_size is None and one.bins == "cells")
    )
    size = None if is_cells else int(bin_size or STEREO.bin_size or 0)
    adata, said = read_gem(file, size) if kind == "gem" else read_gef(file, size)
    adata.obsm[Obsm.SPATIAL] = adata.obs[["x", "y"]].to_numpy(dtype=np.float64)
    adata.obs = adata.obs.drop(columns=["x", "y"])
    scale = Scale()
    if "resolution" in said:
        factor = float(said["resolution"]) / 1000
        scale = Scale(factor, MICROMETRE, f"resolution (nm) in {file.name}")
    rows = "cells" if is_cells else f"bins of {size} dots"
    software = said.get("FileFormat", "")
    if "geftool_ver" in said:
        software = f"geftool {said['geftool_ver']}"
    how = f"its content ({'GEM' if kind == 'gem' else 'GEF'})"
    facts = {"software": software, "library": said.get("sn") or said.get("Stereo-seqChip", "")}
    return Read(adata, STEREO.name, rows, scale, how, facts)


def _read_anndata(file: File, table_key: str | None, *, images: bool) -> Read:
    """An AnnData or a table of a SpatialData, with counts and positions where they belong."""
    if file.kind == "zarr":
        with naming(f"file {file.name!r}"):
            adata, where = resolve_table(read_data(file.path), table_key), "the store"
    else:
        adata, where = read_h5ad(file.path)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obsm[Obsm.SPATIAL] = _places(adata, file)
    assay = adata.obs["assay"].unique().tolist() if "assay" in adata.obs else []
    technology = str(assay[0]) if len(assay) == 1 else UNKNOWN
    dropped = {}
    if MASK in adata.obs:
        technology = "Open-ST"
        is_cell = adata.obs[MASK].to_numpy() != 0
        dropped = {"background": int((~is_cell).sum())} if not is_cell.all() else {}
        adata = adata[is_cell].copy()
    elif {"bin_type", "resolution"} <= set(adata.uns):
        technology = STEREO.name
    facts = {"organism": str(adata.uns.get("organism", ""))}
    if "schema_version" in adata.uns:
        facts["software"] = f"CELLxGENE schema {adata.uns['schema_version']}"
    scale = scale_of_anndata(adata)
    for library in dict(adata.uns.get("spatial", {})).values():
        if not images and hasattr(library, "pop"):
            library.pop("images", None)
    return Read(adata, technology, "observations", scale, f"counts in {where}", facts, dropped)


def _places(adata: AnnData, file: File) -> NDArray[np.float64]:
    for key in (Obsm.SPATIAL, "X_spatial", "spatial3d"):
        if key in adata.obsm:
            found: NDArray[np.float64] = np.asarray(adata.obsm[key], dtype=np.float64)
            return found
    names = GENERIC.columns(["id", *map(str, adata.obs.columns)])
    if names is not None:
        return np.asarray(adata.obs[list(names[1:])], dtype=np.float64)
    raise ValueError(
        f"{file.name} has no positions: expected obsm['spatial'], found {list(adata.obsm)}, and obs "
        f"{list(adata.obs.columns)[:10]}."
    )
