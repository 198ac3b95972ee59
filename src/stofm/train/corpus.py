"""Tokenised slices on disk: what training reads in place of counts."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._files import local
from stofm._messages import warn
from stofm.genes import RankedTokens
from stofm.train.storage import (
    digest_json,
    explained_file_limit,
    is_file_limit,
    open_array,
    write_once,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

#: Raised when a slice written by this version can't be read by an older one, or the reverse.
FORMAT_VERSION = 1

_INFO = "slice.json"
_TOKENS, _VALUES, _OFFSETS = "tokens.npy", "values.npy", "offsets.npy"
_COORDINATES = "coordinates.npy"
_HEADER_BYTES = 128


@dataclass(frozen=True, eq=False)
class TokenizedSlice:
    """Ranked gene tokens and places of the cells of one slice.

    Attributes
    ----------
    name
        Name of the slice, as messages give it.
    ranked
        Ranked tokens of the cells, with values if the model reads them; tokens and values are
        memory-mapped.
    coordinates
        (n_cells, 2) float64, model units (the slice's diagonal is 100).
    technology
        Name of the technology; may be empty.
    digest
        16 hexadecimal digits that change with any token, value or coordinate.
    """

    name: str
    ranked: RankedTokens
    coordinates: NDArray[np.float64]
    technology: str
    digest: str

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.ranked.n_cells


def preparation_key(source: str | Path | None, settings: Mapping[str, Any]) -> str:
    """Name what a slice was prepared from, so that a changed file is prepared again.

    Parameters
    ----------
    source
        A file, or the folder of a Zarr store; None for data that has no file. A file counts as
        changed if its size or its time of change differs.
    settings
        All else that the tokens depend on (vocabulary, layer, ...), as JSON can hold it.

    Returns
    -------
    16 hexadecimal digits.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    """
    state: list[list[Any]] = []
    if source is not None:
        path = local(source)
        if not path.exists():
            msg = f"There is no file or folder {str(path)!r}; check the path."
            raise FileNotFoundError(msg)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        state = [
            [p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files
        ]
        state.append([str(path.resolve())])
    return digest_json(FORMAT_VERSION, state, dict(settings))


def write_slice(
    folder: str | Path,
    key: str,
    *,
    name: str,
    ranked: RankedTokens | Iterable[RankedTokens],
    coordinates: NDArray[np.floating],
    technology: str = "",
) -> TokenizedSlice:
    """Write one slice to disk and open it; a crash leaves nothing half-written.

    Parameters
    ----------
    folder
        Work folder; the slice becomes the folder `key` in it.
    key
        What the slice was prepared from (:func:`preparation_key`).
    name, technology
        See :class:`TokenizedSlice`.
    ranked
        Tokens of all cells, or of blocks of cells in order, which are written as they come.
    coordinates
        (n_cells, 2) finite, model units (:func:`stofm.spatial.normalize_coordinates`).

    Returns
    -------
    The slice, with tokens and values memory-mapped. If there is one of that key it is opened and
    nothing is written.

    Raises
    ------
    ValueError
        Coordinates are not finite or do not fit the cells, or some blocks have values and
        others have none.
    """
    if (found := reuse_slice(folder, key)) is not None:
        return found
    xy = np.ascontiguousarray(coordinates, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        msg = f"Slice {name!r}: coordinates must be finite and (n_cells, 2), found {xy.shape}."
        raise ValueError(msg)
    blocks = [ranked] if isinstance(ranked, RankedTokens) else ranked

    def fill(place: Path) -> None:
        written = _write_tokens(place, blocks, name)
        if written.n_cells != len(xy):
            msg = (
                f"Slice {name!r} has {written.n_cells} cells with tokens and {len(xy)} "
                "coordinates; pass one row of coordinates per cell."
            )
            raise ValueError(msg)
        np.save(place / _COORDINATES, xy)
        info = {
            "format_version": FORMAT_VERSION,
            "n_cells": written.n_cells,
            "n_tokens": len(written.tokens),
            "has_values": written.values is not None,
            "digest": _digest(written, xy),
            "name": name,
            "technology": technology,
        }
        (place / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    write_once(Path(folder) / key, fill)
    opened = open_slice(folder, key)
    assert opened is not None
    return opened


def _write_tokens(place: Path, blocks: Iterable[RankedTokens], name: str) -> RankedTokens:
    """Write tokens, values and offsets block by block, and map them."""
    lengths: list[NDArray[np.int32]] = []
    with_values: set[bool] = set()
    with (place / _TOKENS).open("wb") as tokens, (place / _VALUES).open("wb") as values:
        tokens.write(bytes(_HEADER_BYTES))
        values.write(bytes(_HEADER_BYTES))
        for block in blocks:
            lengths.append(block.n_tokens)
            tokens.write(np.ascontiguousarray(block.tokens, dtype=np.int32).data)
            with_values.add(block.values is not None)
            if block.values is not None:
                values.write(np.ascontiguousarray(block.values, dtype=np.float32).data)
    if len(with_values) > 1:
        msg = f"Slice {name!r}: some blocks have values and others have none; rank all alike."
        raise ValueError(msg)
    has_values = with_values == {True}
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(dtype=np.int64)
    np.save(place / _OFFSETS, offsets)
    _write_header(place / _TOKENS, np.int32, int(offsets[-1]))
    if has_values:
        _write_header(place / _VALUES, np.float32, int(offsets[-1]))
    else:
        (place / _VALUES).unlink()
    return _open_tokens(place, has_values=has_values)


def _write_header(path: Path, dtype: type[np.generic], length: int) -> None:
    """Say at the start of an .npy file what was written behind it."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": (length,)}
    )
    assert len(header.getvalue()) == _HEADER_BYTES
    with path.open("r+b") as file:
        file.write(header.getvalue())


def _open_tokens(place: Path, *, has_values: bool) -> RankedTokens:
    return RankedTokens(
        tokens=open_array(place / _TOKENS),
        offsets=_read(place / _OFFSETS),
        values=open_array(place / _VALUES) if has_values else None,
    )


def _read(path: Path) -> NDArray[Any]:
    """Read an .npy file into memory, read-only as a map is."""
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    array.flags.writeable = False
    return array


def _digest(ranked: RankedTokens, coordinates: NDArray[np.float64]) -> str:
    def hashed(*parts: bytes | memoryview) -> str:
        found = hashlib.blake2b(digest_size=8)
        for part in parts:
            found.update(part)
        return found.hexdigest()

    arrays = [hashed(b"" if a is None else a.data) for a in (ranked.tokens, ranked.values)]
    tokens = hashed(np.ascontiguousarray(ranked.offsets).data, "".join(arrays).encode())
    return hashed(tokens.encode(), np.ascontiguousarray(coordinates).data)


def reuse_slice(folder: str | Path, key: str) -> TokenizedSlice | None:
    """Open a slice that is as :func:`write_slice` wrote it; None if there is none of that key.

    A damaged one is deleted, with a warning. Unlike :func:`open_slice` this reads all of it.
    """
    try:
        found = open_slice(folder, key)
        if found is None or _digest(found.ranked, found.coordinates) == found.digest:
            return found
        damage = f"The prepared slice {Path(folder) / key} is not what was written."
    except ValueError as error:
        damage = str(error)
    warn(f"{damage} It is prepared again.")
    shutil.rmtree(Path(folder) / key)
    return None


def open_slice(folder: str | Path, key: str) -> TokenizedSlice | None:
    """Open a slice that :func:`write_slice` wrote; None if there is none of that key.

    Raises
    ------
    ValueError
        The files are damaged.
    OSError
        Too many files are open.
    """
    place = Path(folder) / key
    if not place.is_dir():
        return None
    try:
        with explained_file_limit():
            return _open(place)
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
        if is_file_limit(error):
            raise
        msg = f"The prepared slice {place} is damaged ({error}); delete that folder and run again."
        raise ValueError(msg) from error


def _open(place: Path) -> TokenizedSlice:
    info = json.loads((place / _INFO).read_text(encoding="utf-8"))
    ranked = _open_tokens(place, has_values=info["has_values"])
    coordinates = _read(place / _COORDINATES)
    n_cells, n_tokens = info["n_cells"], int(ranked.offsets[-1])
    for name, array, dtype, shape in (
        (_TOKENS, ranked.tokens, np.int32, (n_tokens,)),
        (_VALUES, ranked.values, np.float32, (n_tokens,)),
        (_OFFSETS, ranked.offsets, np.int64, (n_cells + 1,)),
        (_COORDINATES, coordinates, np.float64, (n_cells, 2)),
    ):
        if array is not None and (array.dtype != dtype or array.shape != shape):
            found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
            msg = f"{name} is {found}, expected {wanted}"
            raise ValueError(msg)
    rises = ranked.offsets[0] == 0 and (np.diff(ranked.offsets) >= 0).all()
    if not rises or not np.isfinite(coordinates).all():
        msg = f"{_OFFSETS} does not rise from 0, or {_COORDINATES} is not finite"
        raise ValueError(msg)
    return TokenizedSlice(info["name"], ranked, coordinates, info["technology"], info["digest"])


@dataclass(frozen=True, eq=False)
class Corpus:
    """Slices to train on; their cells are numbered through, slice after slice.

    Attributes
    ----------
    slices
        At least one, with values in all of them or in none.

    Raises
    ------
    ValueError
        There is no slice, a slice has no cell, or only some slices have values.
    """

    slices: tuple[TokenizedSlice, ...]

    def __post_init__(self) -> None:
        """Check that the slices fit together."""
        if not self.slices:
            msg = "A corpus needs at least one slice, found none."
            raise ValueError(msg)
        if empty := [s.name for s in self.slices if not s.n_cells]:
            msg = f"{len(empty)} slices have no cells, for example {empty[0]!r}; leave them out."
            raise ValueError(msg)
        without = [s.name for s in self.slices if s.ranked.values is None]
        if without and len(without) < len(self.slices):
            msg = (
                f"{len(without)} of {len(self.slices)} slices have no values, for example "
                f"{without[0]!r}; prepare all slices for the same model."
            )
            raise ValueError(msg)

    @cached_property
    def first_cell(self) -> NDArray[np.int64]:
        """(n_slices + 1,) number of each slice's first cell, and the number of cells."""
        ends = np.cumsum([s.n_cells for s in self.slices])
        return np.concatenate([[0], ends]).astype(np.int64)

    @property
    def n_cells(self) -> int:
        """Number of cells of all slices."""
        return int(self.first_cell[-1])

    @property
    def n_tokens(self) -> int:
        """Number of gene tokens of all cells."""
        return sum(len(s.ranked.tokens) for s in self.slices)

    @property
    def has_values(self) -> bool:
        """Whether tokens come with values."""
        return self.slices[0].ranked.values is not None

    @cached_property
    def cell_lengths(self) -> NDArray[np.int32]:
        """(n_cells,) number of gene tokens of each cell."""
        return np.concatenate([s.ranked.n_tokens for s in self.slices])

    def locate(self, cells: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each cell's slice, and its row there."""
        number = np.searchsorted(self.first_cell, cells, side="right") - 1
        return number, np.asarray(cells, dtype=np.int64) - self.first_cell[number]

    def take(self, cells: NDArray[np.integer]) -> RankedTokens:
        """Copy the tokens of some cells, in the order given, into memory."""
        number, rows = self.locate(cells)
        lengths = self.cell_lengths[cells].astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        tokens = np.empty(offsets[-1], dtype=np.int32)
        values = np.empty(offsets[-1], dtype=np.float32) if self.has_values else None
        owner = np.repeat(number, lengths)
        for k in np.unique(number):
            own, ranked = owner == k, self.slices[k].ranked
            source = within[own] + np.repeat(
                ranked.offsets[rows[number == k]], lengths[number == k]
            )
            tokens[own] = ranked.tokens[source]
            if values is not None and ranked.values is not None:
                values[own] = ranked.values[source]
        return RankedTokens(tokens=tokens, offsets=offsets.astype(np.int64), values=values)

    def describe(self, slices: Sequence[int] | NDArray[np.integer]) -> str:
        """Name some slices, each once, for messages."""
        numbers = np.unique(np.asarray(slices, dtype=np.int64))
        names = [repr(self.slices[k].name) for k in numbers[:8]]
        rest = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        return ", ".join(names) + rest
