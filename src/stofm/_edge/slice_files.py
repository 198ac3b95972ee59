"""Slices in files: AnnData in ``.h5ad`` and Zarr stores, and SpatialData stores with their tables.

What a file is, its content says, not its name.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.tables import resolve_table
from stofm._files import Kind, local, put_in_place, reading, take_back

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

_ZARR: Final = ".zarr"
_ENDINGS: Final = (".h5ad", _ZARR)
_ANNDATA: Final = {"obs", "var"}
_TABLES: Final = {"table", "tables"}
_METADATA: Final = {".zattrs", ".zgroup", ".zmetadata", "zarr.json"}
_GROUPS: Final = (
    _METADATA
    | _ANNDATA
    | {"X", "layers", "obsm", "obsp", "raw", "raw.X", "raw.var", "raw.varm", "uns", "varm", "varp"}
)
_ELEMENTS: Final = _METADATA | _TABLES | {"images", "labels", "points", "shapes"}
#: Of one array in a Zarr store, of either version.
_ARRAY_METADATA: Final = (".zarray", "zarr.json")
_SPARSE: Final = {"csr_matrix", "csc_matrix"}
_EXPECTED: Final = "AnnData in an .h5ad file or a Zarr store"
_10X: Final = (
    "It is a count matrix of 10x Genomics, which has no coordinates. Read the whole folder, for "
    "example with squidpy.read.visium or spatialdata_io, and write that as .h5ad or .zarr."
)
#: In the group of such a file: "matrix", or of old ones the genome.
_10X_PARTS: Final = {"barcodes", "data", "indices", "indptr"}
_MUDATA: Final = (
    "{} holds a MuData, and stofm takes one AnnData of it. Write the modality that has the counts "
    "of genes, for example mdata.mod['rna'].write_h5ad('rna.h5ad')."
)


def read_data(path: str | Path) -> Any:
    """Read an AnnData, or a SpatialData from its store."""
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        if _has_elements(path):
            return _read_spatialdata(path)
        if not path.is_dir():
            return anndata.read_h5ad(path)
        _require_whole(path)
        return anndata.read_zarr(path)


def open_table(path: str | Path, table_key: str | None = None) -> AnnData:
    """Open an AnnData whose ``X`` stays on disk, or read the table of a SpatialData store."""
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        if not _has_elements(path):
            return _open_zarr(path) if path.is_dir() else anndata.read_h5ad(path, backed="r")
        data = _read_spatialdata(path)
    return resolve_table(data, table_key)


def is_spatialdata(path: str | Path) -> bool:
    """Whether a file holds a SpatialData, and not an AnnData."""
    path = _found(path)
    with reading(path, _EXPECTED):
        return _has_elements(path)


def _has_elements(path: Path) -> bool:
    with _root(path) as root:
        names, encoding = set(root), root.attrs.get("encoding-type", "anndata")
        if encoding == "MuData":
            raise ValueError(_MUDATA.format(path))
        if names >= _ANNDATA and encoding == "anndata":
            return False
        if path.is_dir() and names & (_ELEMENTS - _METADATA):
            return True
        hint = _10X if _is_10x(root) else f"Expected obs and var, found {sorted(names)[:8]}."
    msg = f"{path} holds no AnnData. {hint}"
    raise ValueError(msg)


@contextlib.contextmanager
def _root(path: Path) -> Iterator[Any]:
    """Root group of a file."""
    if path.is_dir():
        import zarr

        yield zarr.open_group(path, mode="r")
        return
    import h5py

    with h5py.File(path, "r") as file:
        yield file


def _is_10x(root: Any) -> bool:
    return any(hasattr(group, "keys") and set(group) >= _10X_PARTS for group in root.values())


def _found(path: str | Path) -> Path:
    path = local(path)
    if not take_back(path).exists():
        msg = f"There is no file {path}."
        raise FileNotFoundError(msg)
    return path


def _read_spatialdata(path: Path) -> Any:
    import spatialdata

    _require_whole(path)
    return spatialdata.read_zarr(path)


def _open_zarr(path: Path) -> AnnData:
    import zarr
    from anndata import AnnData
    from anndata.io import read_elem, sparse_dataset

    _require_whole(path)
    store: Any = zarr.open_group(path, mode="r")

    def matrix(element: Any) -> Any:
        return sparse_dataset(element) if isinstance(element, zarr.Group) else element

    return AnnData(
        X=matrix(store["X"]) if "X" in store else None,
        layers={name: matrix(store[f"layers/{name}"]) for name in store.get("layers", {})},
        **{name: read_elem(store[name]) for name in ("obs", "var", "obsm", "uns") if name in store},
    )


def _require_whole(path: Path) -> None:
    """Refuse a store of an AnnData or a SpatialData whose tables lack a part.

    Zarr leaves chunks of zeros out. So those of sparse matrices, places and names have to be there;
    of dense matrices and other columns nobody can tell.
    """
    import zarr

    root: Any = zarr.open_group(path, mode="r")
    tables = [root] if "obs" in root else [*_groups(root, "tables"), *_groups(root, "table")]
    for table in tables:
        for group, is_index in _walk(table):
            for name, array in group.arrays():
                is_full = is_index and name == "values"
                is_full = is_full or _is_never_zero(group, name, array)
                _require_array(path, array, may_lack=not is_full)


def _groups(root: Any, name: str) -> list[Any]:
    return [group for _, group in root[name].groups()] if name in root else []


def _walk(group: Any, *, is_index: bool = False) -> Iterator[tuple[Any, bool]]:
    """A group and all within it, and whether each holds the names of a table's rows."""
    yield group, is_index
    for name, inner in group.groups():
        yield from _walk(inner, is_index=name == group.attrs.get("_index"))


def _require_array(path: Path, array: Any, *, may_lack: bool) -> None:
    if not any((path / array.path / file).is_file() for file in _ARRAY_METADATA):
        lacks = "is not in the folder"
    elif not may_lack and (n_found := array.nchunks_initialized) < array.nchunks:
        lacks = f"has {n_found} of {array.nchunks} chunks"
    else:
        return
    msg = (
        f"{path} lacks a part: the array {array.path!r} {lacks}, and would be read as zeros. Copy "
        "the store again, or write it again from the data."
    )
    raise ValueError(msg)


def _is_never_zero(group: Any, name: str, array: Any) -> bool:
    """Whether no whole chunk of an array can be zeros or empty."""
    if group.attrs.get("encoding-type") in _SPARSE:
        return _is_never_zero_part(group, name, array)
    if name == group.attrs.get("_index") or (name == "categories" and array.shape[0] > 1):
        return True
    if group.path.rpartition("/")[2] != "obsm" or array.ndim != 2:
        return False
    n_columns = array.shape[1]  # a third one, z, may be zeros
    return bool(n_columns == 2 or n_columns == array.chunks[1] == 3)


def _is_never_zero_part(group: Any, name: str, array: Any) -> bool:
    if name == "indptr":  # zeros of empty rows come first
        pointers = array[:]
        return bool((np.diff(pointers) < 0).any() or pointers[-1] != group["indices"].shape[0])
    is_csr = group.attrs["encoding-type"] == "csr_matrix"
    return name == "data" or bool(group.attrs["shape"][int(is_csr)] > 1)


def _holds(path: Path, *, spatialdata: bool) -> bool:
    # Whatever a reader says, it is neither.
    with contextlib.suppress(Exception):
        return _has_elements(path) == spatialdata and (spatialdata or _is_anndata(path))
    return False


def _is_anndata(path: Path) -> bool:
    """Whether all of a file with obs and var is an AnnData's; old ones don't say what they are."""
    with _root(path) as root:
        if "encoding-type" not in root.attrs and not all(
            map(_is_frame, (root["obs"], root["var"]))
        ):
            return False
        return set(root) <= _GROUPS


def _is_frame(element: Any) -> bool:
    return hasattr(element, "dtype") or element.attrs.get("encoding-type") == "dataframe"


_H5AD: Final = Kind(
    "an AnnData in an .h5ad file", lambda file: file.is_file() and _holds(file, spatialdata=False)
)
_ANNDATA_STORE: Final = Kind(
    "an AnnData in a Zarr store",
    lambda store: store.is_dir() and _holds(store, spatialdata=False),
    lambda name: name.split("/")[0] in _GROUPS,
)
_SPATIALDATA: Final = Kind(
    "a SpatialData store",
    lambda store: _holds(store, spatialdata=True),
    lambda name: name.split("/")[0] in _ELEMENTS,
)


def refuse_output(path: Path, *, has_spatialdata: bool, overwrite: bool) -> None:
    """Refuse a place that a slice can't be written to, before there is anything to write.

    Of a SpatialData, an ``.h5ad`` file gets the table. `overwrite` allows to replace a file of the
    kind that is written.
    """
    if path.suffix not in _ENDINGS:
        msg = f"The output must end in .h5ad or .zarr, found {path.name!r}."
        raise ValueError(msg)
    kind = _H5AD if path.suffix != _ZARR else _SPATIALDATA if has_spatialdata else _ANNDATA_STORE
    kind.refuse_other(path, overwrite=overwrite)


def write_data(data: Any, path: Path) -> None:
    """Write an AnnData to ``.h5ad`` or ``.zarr``, or a SpatialData to ``.zarr``, whole or not at all."""

    def fill(part: Path) -> None:
        if path.suffix != _ZARR:
            data.write_h5ad(part, compression="gzip")
        elif hasattr(data, "tables"):
            data.write(part)
        else:
            data.write_zarr(part)

    with warnings.catch_warnings():
        # anndata announces what it will write by default some day.
        warnings.filterwarnings("ignore", "(Writing )?zarr v[23] ")
        put_in_place(path, fill)
