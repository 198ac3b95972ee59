"""Shards: slices on disk as CSR arrays that are mapped into memory; a folder each."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from stofm._files import reading
from stofm.corpus.storage import open_array, write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Entries = list[dict[str, Any]]

#: A change of the content of shards requires new ones.
FORMAT: Final = 3
_INFO: Final = "shard.json"
#: Arrays of a shard: initial types, and columns.
_ARRAYS: Final[dict[str, tuple[Any, tuple[int, ...]]]] = {
    "tokens": (np.uint16, ()),
    "counts": (np.uint16, ()),
    "offsets": (np.int64, ()),
    "totals": (np.float64, ()),
    "hashes": (np.uint64, ()),
    "rows": (np.int64, ()),
    "places": (np.float64, (2,)),
    "coordinates": (np.float64, (2,)),
}
_OF_ENTRIES: Final = ("tokens", "counts")
_OF_CELLS: Final = ("totals", "hashes", "rows", "places", "coordinates")
_HEADER: Final = 128
#: Number of cells that are copied at once.
CELLS_AT_ONCE: Final = 1 << 14
_BYTES_AT_ONCE: Final = 1 << 24


class _ArrayFile:
    """An .npy file that grows; its integers get a wider type once one does not fit."""

    def __init__(self, path: Path, dtype: Any, columns: tuple[int, ...]) -> None:
        self._path, self._columns, self._n = path, columns, 0
        self._begin(np.dtype(dtype))

    def append(self, array: NDArray[Any]) -> None:
        largest = array.max(initial=0) if self.dtype.kind == "u" else 0
        wanted = np.promote_types(self.dtype, np.min_scalar_type(int(largest)))
        if wanted != self.dtype:
            self._widen(wanted)
        self._file.write(np.ascontiguousarray(array, self.dtype).data)
        self._n += len(array)

    def close(self) -> None:
        shape = (self._n, *self._columns)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        with self._file:
            self._file.seek(0)
            np.lib.format.write_array_header_1_0(self._file, header)

    def _begin(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._file = self._path.open("wb")
        self._file.write(bytes(_HEADER))

    def _widen(self, dtype: np.dtype[Any]) -> None:
        self.close()
        narrow = self._path.rename(self._path.with_suffix(".narrow"))
        self._begin(dtype)
        written = open_array(narrow)
        for start in range(0, self._n, _BYTES_AT_ONCE):
            self._file.write(written[start : start + _BYTES_AT_ONCE].astype(dtype).data)
        narrow.unlink()


class ShardWriter:
    """Appends cells to the arrays of a shard, together or array by array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {n: _ArrayFile(folder / f"{n}.npy", *kind) for n, kind in _ARRAYS.items()}
        self._files["offsets"].append(np.zeros(1, np.int64))
        self._n_entries = 0
        #: Number of cells appended.
        self.n_cells = 0

    def append(self, lengths: NDArray[np.integer], **arrays: NDArray[Any]) -> None:
        """Append cells: their numbers of entries, and the entries."""
        offsets = self._n_entries + np.cumsum(lengths, dtype=np.int64)
        self._n_entries = int(offsets[-1]) if len(offsets) else self._n_entries
        self.n_cells += len(offsets)
        self.add(offsets=offsets, **arrays)

    def add(self, **arrays: NDArray[Any]) -> None:
        """Append to single arrays."""
        for name, array in arrays.items():
            self._files[name].append(array)

    def copy(self, shard: Shard, rows: NDArray[np.integer], names: Iterable[str]) -> None:
        """Append cells of another shard: entries, and the arrays of these names."""
        for start in range(0, len(rows), CELLS_AT_ONCE):
            part = rows[start : start + CELLS_AT_ONCE]
            entries, lengths = shard.entries(part)
            of_cells = {name: shard[name][part] for name in names}
            of_entries = {name: shard[name][entries] for name in _OF_ENTRIES}
            self.append(lengths, **of_entries, **of_cells)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def note(self, vocabulary: str, slices: Entries) -> None:
        """Write the metadata of the slices."""
        info = {"format": FORMAT, "vocabulary": vocabulary, "slices": slices}
        (self.folder / _INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def write_shard(folder: Path, vocabulary: str, fill: Callable[[ShardWriter], Entries]) -> None:
    """Let `fill` write a shard, completely or not at all; it returns each slice's metadata."""

    def fill_folder(place: Path) -> None:
        with ShardWriter(place) as writer:
            writer.note(vocabulary, fill(writer))

    write_folder(folder, fill_folder)


def join_shards(folder: Path, parts: list[Path]) -> None:
    """Write a shard with the slices of several, in order."""
    shards = [Shard(part) for part in parts]

    def fill(writer: ShardWriter) -> Entries:
        for shard in shards:
            writer.copy(shard, np.arange(shard.n_cells), _OF_CELLS)
        return [entry for shard in shards for entry in shard.slices]

    write_shard(folder, shards[0].vocabulary, fill)


class Shard:
    """An existing shard. Arrays are mapped into memory on first use.

    ``tokens`` (n_entries,) are genes, ordered by rank in each cell, and ``counts`` theirs;
    ``offsets`` (n_cells + 1,) where the entries of a cell begin; ``totals`` (n_cells,) counts of
    all columns; ``hashes`` (n_cells,) of genes and counts; ``rows`` (n_cells,) in the source;
    ``places`` (n_cells, 2), positions as in the source, ``coordinates`` in model units.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with reading(folder / _INFO, "shard of a corpus"):
            info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
            self.slices: Entries = info["slices"]
            self.vocabulary: str = info["vocabulary"]
        if info["format"] != FORMAT:
            raise ValueError(
                f"{folder} has the format {info['format']}, and this version of stofm reads {FORMAT}: "
                "build the corpus again, or use the version that wrote it."
            )
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array of the shard."""
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            with reading(path, "array of a shard"):
                self._arrays[name] = array = open_array(path)
            n = {"offsets": self.n_cells + 1}.get(name, self.n_cells)
            if name in _OF_ENTRIES:
                n = int(self["offsets"][-1])
            if len(array) != n:
                raise ValueError(
                    f"{path} is damaged: it has {len(array)} entries, expected {n}. Delete "
                    f"{self.folder} and run the build again, which makes its slices again."
                )
        return self._arrays[name]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.first_cell[-1])

    @cached_property
    def first_cell(self) -> NDArray[np.int64]:
        """(n_slices + 1,) row of each slice's first cell, and the number of cells."""
        return np.cumsum([0, *(one["cells"] for one in self.slices)], dtype=np.int64)

    def entries(self, rows: NDArray[np.integer], most: int | None = None) -> tuple[Any, Any]:
        """Indices of the first `most` entries of some cells, in order, and their numbers."""
        starts = self["offsets"][rows]
        lengths = np.minimum(self["offsets"][rows + 1] - starts, most or np.iinfo(np.int64).max)
        ends = np.cumsum(lengths)
        n = int(ends[-1]) if len(ends) else 0
        return np.arange(n) + np.repeat(starts - ends + lengths, lengths), lengths


def find_shards(folder: Path) -> Iterator[Shard]:
    """Shards in a folder, in alphabetical order."""
    # A hidden one is being written, or was left by a killed process.
    for path in sorted(folder.glob(f"[!.]*/{_INFO}")):
        yield Shard(path.parent)
