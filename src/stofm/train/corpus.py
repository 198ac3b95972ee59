"""Tokenised slices on disk: what training reads in place of counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._digests import fingerprint
from stofm._files import local
from stofm.genes import RankedTokens
from stofm.train.storage import digest_json, is_there, open_array, write_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

#: Part of each slice's key: a change of how slices are written makes new ones.
FORMAT_VERSION = 2

_INFO = "slice.json"
_TOKENS, _VALUES = "tokens.int32", "values.float32"
_OFFSETS, _COORDINATES = "offsets.npy", "coordinates.npy"


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
    digest
        16 hexadecimal digits that change with any token, value or coordinate.
    """

    name: str
    ranked: RankedTokens
    coordinates: NDArray[np.float64]
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
    state: list[Any] = []
    if source is not None:
        path = local(source)
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {str(path)!r}; check the path.")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stats = [(p.relative_to(path).as_posix(), p.stat()) for p in files]
        state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        state.append(str(path.resolve()))
    return digest_json(FORMAT_VERSION, state, dict(settings))


def write_slice(
    folder: Path,
    key: str,
    *,
    name: str,
    blocks: Iterable[RankedTokens],
    coordinates: NDArray[np.floating],
) -> TokenizedSlice:
    """Write one slice to disk and open it; a crash leaves nothing half-written.

    Parameters
    ----------
    folder
        Work folder; the slice becomes the folder `key` in it. If that is there, it is opened and
        nothing is written.
    key
        What the slice was prepared from (:func:`preparation_key`).
    name
        As messages give it.
    blocks
        Tokens of the cells in order, which are written block by block as they come.
    coordinates
        (n_cells, 2) finite, model units (:func:`stofm.spatial.normalize_coordinates`).
    """

    def fill(place: Path) -> None:
        lengths, has_values = [np.zeros(1, np.int64)], False
        with (place / _TOKENS).open("wb") as tokens, (place / _VALUES).open("wb") as values:
            for block in blocks:
                lengths.append(block.n_tokens.astype(np.int64))
                block.tokens.astype(np.int32, copy=False).tofile(tokens)
                if block.values is not None:
                    has_values = True
                    block.values.astype(np.float32, copy=False).tofile(values)
        np.save(place / _OFFSETS, np.concatenate(lengths).cumsum())
        xy = np.ascontiguousarray(coordinates, dtype=np.float64)
        np.save(place / _COORDINATES, xy)
        ranked = _open_tokens(place, has_values=has_values)
        info = {"name": name, "has_values": has_values, "digest": _digest(ranked, xy)}
        (place / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    if not is_there(folder / key):
        write_folder(folder / key, fill)
    return open_slice(folder, key)


def open_slice(folder: Path, key: str) -> TokenizedSlice:
    """Open a slice that :func:`write_slice` wrote."""
    place = folder / key
    info = json.loads((place / _INFO).read_text(encoding="utf-8"))
    ranked = _open_tokens(place, has_values=info["has_values"])
    coordinates = _read(place / _COORDINATES)
    return TokenizedSlice(info["name"], ranked, coordinates, info["digest"])


def _open_tokens(place: Path, *, has_values: bool) -> RankedTokens:
    return RankedTokens(
        tokens=open_array(place / _TOKENS, np.int32),
        offsets=_read(place / _OFFSETS),
        values=open_array(place / _VALUES, np.float32) if has_values else None,
    )


def _read(path: Path) -> NDArray[Any]:
    """Read an .npy file into memory, read-only as a map is."""
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    array.flags.writeable = False
    return array


def _digest(ranked: RankedTokens, coordinates: NDArray[np.float64]) -> str:
    values = b"" if ranked.values is None else ranked.values
    tokens = fingerprint(ranked.offsets, fingerprint(ranked.tokens), fingerprint(values))
    return fingerprint(tokens, coordinates)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Slices to train on; their cells are numbered through, slice after slice.

    Attributes
    ----------
    slices
        At least one, all with cells, and with values in all of them or in none.
    """

    slices: tuple[TokenizedSlice, ...]

    def __post_init__(self) -> None:
        """Refuse an empty corpus."""
        if not self.slices:
            raise ValueError("A corpus needs at least one slice with cells, found none.")

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
        order = np.argsort(number, kind="stable")
        parts = [take_cells(self.slices[k].ranked, rows[number == k]) for k in np.unique(number)]
        # Slice after slice; then as asked for.
        return take_cells(RankedTokens.concatenate(parts), np.argsort(order))

    def describe(self, slices: Sequence[int] | NDArray[np.integer]) -> str:
        """Name some slices, each once, for messages."""
        numbers = np.unique(np.asarray(slices, dtype=np.int64))
        names = [repr(self.slices[k].name) for k in numbers[:8]]
        rest = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        return ", ".join(names) + rest


def take_cells(ranked: RankedTokens, rows: NDArray[np.integer]) -> RankedTokens:
    """Copy the tokens of some cells, in the order given."""
    starts, lengths = ranked.offsets[rows], np.diff(ranked.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    values = None if ranked.values is None else ranked.values[entries]
    return RankedTokens(tokens=ranked.tokens[entries], offsets=offsets, values=values)
