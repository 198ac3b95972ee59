"""Zarr stores that were copied in part: what is missing reads as zeros, and nothing says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_METADATA: Final = (".zarray", "zarr.json")
_SPARSE: Final = {"csr_matrix", "csc_matrix"}


def require_whole(path: Path) -> None:
    """Refuse a store of an AnnData or a SpatialData whose tables lack a part.

    Zarr leaves chunks of zeros out. So those of sparse matrices, places and names have to be there;
    of dense matrices and other columns nobody can tell.

    Raises
    ------
    ValueError
        An array, or a chunk of one that is never all zeros, is not in the folder.
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
    if not any((path / array.path / file).is_file() for file in _METADATA):
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
