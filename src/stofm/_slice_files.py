"""Slices in files: AnnData in ``.h5ad`` and Zarr stores, and SpatialData stores with their tables.

What a file is, its content says, not its name.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Final

from stofm._anndata import resolve_table
from stofm._files import Kind, local, put_in_place, reading, take_back
from stofm._zarr_stores import require_whole

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


def read_slice(path: str | Path) -> Any:
    """Read an AnnData, or a SpatialData from its store.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    OSError
        It may not be read.
    ValueError
        It is damaged, or holds something else.
    """
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        if _has_elements(path):
            return _read_spatialdata(path)
        if not path.is_dir():
            return anndata.read_h5ad(path)
        require_whole(path)
        return anndata.read_zarr(path)


def open_slice(path: str | Path, table_key: str | None = None) -> AnnData:
    """Open an AnnData whose ``X`` stays on disk, or read the table of a SpatialData store.

    Parameters
    ----------
    path
        ``.h5ad`` file or Zarr store.
    table_key
        Name of a SpatialData's table; may be left out if there is only one.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    OSError
        It may not be read.
    ValueError
        It is damaged, or holds something else.
    KeyError
        There is no such table, or none is named and there are several.
    """
    import anndata

    path = _found(path)
    with reading(path, _EXPECTED):
        if not _has_elements(path):
            return _open_zarr(path) if path.is_dir() else anndata.read_h5ad(path, backed="r")
        data = _read_spatialdata(path)
    return resolve_table(data, table_key)


def is_spatialdata(path: str | Path) -> bool:
    """Whether a file holds a SpatialData, and not an AnnData.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    OSError
        It may not be read.
    ValueError
        It is damaged, or holds neither.
    """
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

    require_whole(path)
    return spatialdata.read_zarr(path)


def _open_zarr(path: Path) -> AnnData:
    import zarr
    from anndata import AnnData
    from anndata.io import read_elem, sparse_dataset

    require_whole(path)
    store: Any = zarr.open_group(path, mode="r")

    def matrix(element: Any) -> Any:
        return sparse_dataset(element) if isinstance(element, zarr.Group) else element

    return AnnData(
        X=matrix(store["X"]) if "X" in store else None,
        layers={name: matrix(store[f"layers/{name}"]) for name in store.get("layers", {})},
        **{name: read_elem(store[name]) for name in ("obs", "var", "obsm", "uns") if name in store},
    )


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

    Parameters
    ----------
    path
        Where to write to.
    has_spatialdata
        Whether a SpatialData is to be written; of it, an ``.h5ad`` file gets the table.
    overwrite
        Replace a file of the kind that is written.

    Raises
    ------
    ValueError
        The name ends in something else than ``.h5ad`` or ``.zarr``.
    FileExistsError
        Something is there, and `overwrite` is false or it is of another kind.
    OSError
        The folder can't be written to.
    """
    if path.suffix not in _ENDINGS:
        msg = f"The output must end in .h5ad or .zarr, found {path.name!r}."
        raise ValueError(msg)
    kind = _H5AD if path.suffix != _ZARR else _SPATIALDATA if has_spatialdata else _ANNDATA_STORE
    kind.refuse_other(path, overwrite=overwrite)


def write_slice(data: Any, path: Path) -> None:
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
