"""Slices in files: AnnData in ``.h5ad`` and Zarr stores, and SpatialData stores with their tables.

The kind of a file is found by its content, not its name.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Final

from stofm._edge.tables import add_centroids, table_name
from stofm._files import Kind, local, put_in_place, reading, take_back
from stofm._keys import Obsm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

_METADATA: Final = {".zattrs", ".zgroup", ".zmetadata", "zarr.json"}
_PARTS: Final = {"X", "layers", "obs", "obsm", "obsp", "raw", "uns", "var", "varm", "varp"}
_GROUPS: Final = _METADATA | _PARTS | {"raw.X", "raw.var", "raw.varm"}
_ELEMENTS: Final = _METADATA | {"images", "labels", "points", "shapes", "table", "tables"}
_EXPECTED: Final = "AnnData in an .h5ad file or a Zarr store"


def read_data(path: str | Path, *, backed: bool = False) -> Any:
    """Read an AnnData, or a SpatialData from its store; `backed` leaves ``X`` of AnnData on disk."""
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        has_elements = _has_elements(path)
        if not path.is_dir():
            return anndata.read_h5ad(path, backed="r" if backed else None)
        if backed and not has_elements:
            return _open_zarr(path)
        with _root(path) as root:
            _require_whole(root, path)
        if not has_elements:
            return anndata.read_zarr(path)
        import spatialdata

        return spatialdata.read_zarr(path)


def open_table(path: str | Path, table_key: str | None = None) -> AnnData:
    """Open an AnnData, or a table of a SpatialData store, whose ``X`` stays on disk.

    Nothing else is read from a store, except for shapes and labels if the table has no coordinates.
    """
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        if not _has_elements(path):
            return _open_zarr(path) if path.is_dir() else anndata.read_h5ad(path, backed="r")
        with _root(path) as root:
            names = list(root.get("tables", ()))
    key = table_name(names, table_key)
    with reading(path, _EXPECTED):
        adata = _open_zarr(path / "tables" / key)
        if Obsm.SPATIAL in adata.obsm:
            return adata
        import spatialdata

        elements = spatialdata.read_zarr(path, selection=("labels", "shapes"))
    add_centroids(elements, adata, key)
    return adata


def is_data(path: Path) -> bool:
    """Whether a path is an AnnData or a SpatialData, by its ending or its content."""
    is_named = path.suffix in (".h5ad", ".zarr") or not path.exists()
    return is_named or _holds(path, elements=False) or _holds(path, elements=True)


def is_spatialdata(path: str | Path) -> bool:
    """Whether a file holds a SpatialData, and not an AnnData."""
    path = _found(path)
    with reading(path, _EXPECTED):
        return _has_elements(path)


def _has_elements(path: Path) -> bool:
    """Whether a file holds elements of a SpatialData; an error if it holds no AnnData either."""
    with _root(path) as root:
        names, encoding = set(root), root.attrs.get("encoding-type", "anndata")
    if {"obs", "var"} <= names and encoding == "anndata":
        return False
    if path.is_dir() and names & (_ELEMENTS - _METADATA):
        return True
    raise ValueError(
        f"{path} holds no AnnData: expected obs and var, found {sorted(names)[:8]} ({encoding}). "
        "Read it as what it is, and write the table with counts of genes and coordinates as .h5ad."
    )


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


def _found(path: str | Path) -> Path:
    path = local(path)
    if not take_back(path).exists():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def _open_zarr(path: Path) -> AnnData:
    """Read an AnnData whose matrices stay on disk."""
    from anndata import AnnData
    from anndata.experimental import read_dispatched
    from anndata.io import sparse_dataset

    def read(function: Any, name: str, element: Any, iospec: Any) -> Any:
        kind, part = iospec.encoding_type, name.strip("/").split("/")[0]
        if kind == "anndata":
            parts = {key: read_dispatched(element[key], read) for key in _PARTS & set(element)}
            return AnnData(**parts)
        if kind in ("csr_matrix", "csc_matrix") and part != "uns":
            return sparse_dataset(element)
        return element if kind == "array" and part in ("X", "layers") else function(element)

    with _root(path) as store:
        _require_whole(store, path)
        return read_dispatched(store, read)


def _require_whole(group: Any, path: Path) -> None:
    """Raise an error if parts of sparse matrices are missing, which Zarr would read as zeros."""
    if group.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        for array in (group["data"], group["indices"]):
            n, expected = array.nchunks_initialized, array.nchunks
            if n < expected and min(group.attrs["shape"]) > 1:
                raise ValueError(
                    f"{path} lacks a part: the array {array.path!r} has {n} of {expected} chunks. "
                    "Copy the store again, or write it again from the data."
                )
    for _, inner in group.groups():
        _require_whole(inner, path)


def _holds(path: Path, *, elements: bool) -> bool:
    # Whatever the reader's error is, the file is neither.
    with contextlib.suppress(Exception):
        return _has_elements(path) == elements
    return False


_H5AD: Final = Kind(
    "an AnnData in an .h5ad file", lambda file: file.is_file() and _holds(file, elements=False)
)
_ANNDATA_STORE: Final = Kind(
    "an AnnData in a Zarr store",
    lambda store: store.is_dir() and _holds(store, elements=False),
    lambda name: name.split("/")[0] in _GROUPS,
)
_SPATIALDATA: Final = Kind(
    "a SpatialData store",
    lambda store: _holds(store, elements=True),
    lambda name: name.split("/")[0] in _ELEMENTS,
)


def refuse_output(path: Path, *, has_spatialdata: bool, overwrite: bool) -> None:
    """Raise an error if a slice can't be written to a path, before there is anything to write.

    An ``.h5ad`` file gets the table of a SpatialData. `overwrite` allows replacing a file of the
    same kind.
    """
    if path.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"The output must end in .h5ad or .zarr, found {path.name!r}.")
    kind = _H5AD if path.suffix == ".h5ad" else _SPATIALDATA if has_spatialdata else _ANNDATA_STORE
    kind.refuse_other(path, overwrite=overwrite)


def write_data(data: Any, path: Path) -> None:
    """Write an AnnData to ``.h5ad`` or ``.zarr``, or a SpatialData to ``.zarr``, atomically."""

    def fill(part: Path) -> None:
        if path.suffix == ".h5ad":
            data.write_h5ad(part, compression="gzip")
        elif hasattr(data, "tables"):
            data.write(part)
        else:
            data.write_zarr(part)

    with warnings.catch_warnings():
        # anndata announces a future default format.
        warnings.filterwarnings("ignore", "(Writing )?zarr v[23] ")
        put_in_place(path, fill)
