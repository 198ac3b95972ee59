"""Files with both counts and positions: Stereo-seq's GEM and GEF, h5ad, and Zarr stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.slice_files import read_data
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._messages import naming
from stofm.io.files import open_text
from stofm.io.formats import GENERIC, MICROMETRE, STEREO, UNKNOWN
from stofm.io.joining import Read
from stofm.io.matrices import MASK, make, opened, read_h5ad, text_of
from stofm.io.units import Scale, scale_of_anndata

if TYPE_CHECKING:
    from collections.abc import Iterable

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


_CELLS: Final = {"cellid", "cell", "label"}
_COUNTS: Final = {"MIDCount", "MIDCounts", "UMICount"}


def column_of_cells(file: File) -> str | None:
    """Column of a list of molecules that names the cell of each."""
    return next((name for name in file.columns if name.lower() in _CELLS), None)


def read_gem(file: File, bin_size: int | None) -> tuple[AnnData, dict[str, str]]:
    """Group molecules by squares of `bin_size` dots, or by cells if it is None."""
    from pyarrow import csv

    count = next(name for name in file.columns if name in _COUNTS)
    keys = [name for name in ("geneID", "gene", "geneName") if name in file.columns]
    kinds = dict.fromkeys(("x", "y", count), "integer") | dict.fromkeys(keys, "category")
    label = None if bin_size is not None else column_of_cells(file)
    with open_text(file.path) as lines:
        said = dict(_said(lines))
    with opened(file, file.columns, kinds, [*kinds, *([label] if label else [])]) as found:
        table = csv.read_csv(found[0], **found[1]).to_pandas()
    codes = table[keys[0]].cat.codes.to_numpy()
    names, columns = table[keys[0]].cat.categories.to_numpy(dtype=object), {}
    if len(keys) > 1:
        # Ids are unique, names may not be.
        rows = np.empty(len(names), dtype=np.int64)
        rows[codes[::-1]] = np.arange(len(codes))[::-1]
        columns["gene_ids"] = names
        names = table[keys[1]].iloc[rows].to_numpy(dtype=object)
    offset = np.array([float(said.get(f"Offset{axis}", 0)) for axis in "XY"])
    xy = table[["x", "y"]].to_numpy()
    cells = None if label is None else table[label].to_numpy()
    adata = _put_together(
        xy, codes, table[count].to_numpy(), names, bin_size, cells, offset, columns
    )
    return adata, said


def _said(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        if not line.startswith("#"):
            return
        name, _, value = line[1:].strip().partition("=")
        yield name, value


def _put_together(
    xy: NDArray[Any],
    codes: NDArray[Any],
    counts: NDArray[Any],
    names: Any,
    bin_size: int | None,
    cells: NDArray[Any] | None,
    offset: NDArray[Any],
    columns: dict[str, Any],
) -> AnnData:
    """Sum molecules at `xy` (n, 2), of genes `codes` (n,), by squares or cells (0: none)."""
    import pandas as pd

    if cells is not None:
        kept = cells != 0
        xy, codes, counts = xy[kept], codes[kept], counts[kept]
        rows, labels = pd.factorize(cells[kept], sort=True)
        n_molecules = np.bincount(rows, minlength=len(labels))
        places = np.column_stack([np.bincount(rows, xy[:, k]) / n_molecules for k in (0, 1)])
        ids = pd.Index(labels).astype(str)
    else:
        assert bin_size is not None
        squares = xy // bin_size
        height = int(squares[:, 1].max(initial=0)) + 1
        rows, labels = pd.factorize(squares[:, 0] * height + squares[:, 1], sort=True)
        places = np.column_stack(np.divmod(labels, height)) * bin_size
        ids = _named(places)
    shape = (len(labels), len(names))
    matrix = sparse.csr_matrix((counts.astype(np.float32), (rows, codes)), shape)
    obs = pd.DataFrame(places + offset, columns=["x", "y"], index=ids)
    return make(matrix, None, names, obs, **columns)


def _named(places: NDArray[Any]) -> Any:
    import pandas as pd

    x, y = (pd.Series(places[:, k]).astype(str) for k in (0, 1))
    return pd.Index((x + "_" + y).to_numpy(dtype=object))


def read_gef(file: File, bin_size: int | None) -> tuple[AnnData, dict[str, str]]:
    """Read cells or squares of `bin_size` dots, made from the smallest if missing."""
    import h5py

    with h5py.File(file.path, "r") as opened_file:
        if bin_size is None:
            return _read_cell_bins(opened_file["cellBin"], opened_file.attrs)
        bins = opened_file["geneExp"]
        stored = bins[f"bin{bin_size}" if f"bin{bin_size}" in bins else "bin1"]
        said = _attributes(opened_file.attrs) | _attributes(stored["expression"].attrs)
        found = stored["expression"][:]
        genes = stored["gene"][:]
    codes = np.repeat(np.arange(len(genes)), genes["count"])
    xy = np.column_stack([found["x"], found["y"]])
    names, columns = _gene_names(genes)
    offset = np.array([float(said.get(f"offset{axis}", 0)) for axis in "XY"])
    adata = _put_together(xy, codes, found["count"], names, bin_size, None, offset, columns)
    return adata, said


def _read_cell_bins(group: Any, attributes: Any) -> tuple[AnnData, dict[str, str]]:
    import pandas as pd

    cells, entries, genes = (group[name][:] for name in ("cell", "cellExp", "gene"))
    said = _attributes(attributes)
    indptr = np.append(cells["offset"].astype(np.int64), len(entries))
    matrix = sparse.csr_matrix(
        (entries["count"], entries["geneID"].astype(np.int64), indptr),
        shape=(len(cells), len(genes)),
    )
    offset = [float(said.get(f"offset{axis}", 0)) for axis in "XY"]
    places = np.column_stack([cells["x"], cells["y"]]) + offset
    obs = pd.DataFrame(places, columns=["x", "y"], index=pd.Index(cells["id"]).astype(str))
    obs["area"] = cells["area"]
    names, columns = _gene_names(genes)
    return make(matrix, None, names, obs, **columns), said


def _gene_names(genes: NDArray[Any]) -> tuple[Any, dict[str, Any]]:
    fields = genes.dtype.names or ()
    texts = {name: np.char.decode(genes[name]).astype(object) for name in fields if name in _NAMES}
    ids = {"gene_ids": texts["geneID"]} if {"geneID", "geneName"} <= set(texts) else {}
    return texts.get("geneName", next(iter(texts.values()))), ids


_NAMES: Final = ("geneName", "geneID", "gene")


def _attributes(attributes: Any) -> dict[str, str]:
    return {name: text_of(value) for name, value in attributes.items()}
