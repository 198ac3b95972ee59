"""Files in a folder with their kinds, by content and not by name."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Folders of a run are nested no deeper.
_DEPTH: Final = 6
_TABLES: Final = (".csv", ".tsv", ".txt", ".gem")
_HDF5: Final = (".h5", ".hdf5", ".h5ad", ".gef")
#: Names of the column of names, in a table of counts whose other columns may be numbers.
_INDEX: Final = ("", "gene", "genes", "name")
_ZARR: Final = ("zarr.json", ".zgroup", ".zattrs")
#: Columns that a table of molecules has, in one spelling or another.
_GEM: Final = ({"geneID", "gene", "geneName"}, {"MIDCount", "MIDCounts", "UMICount"}, {"x"}, {"y"})
#: Names of the files and folders of a run, after the name of a sample.
_ROLES: Final = re.compile(
    r"(?:^|[._-]|(?=raw_expression))(outs|spatial|binned_outputs|square_\d+um|segmented_outputs|images"
    r"|transcripts_and_boundaries_csv|cell_feature_matrix|(?:filtered|raw|sample)?_?(?:filtered_|raw_)?"
    r"(?:feature|gene|probe)s?_(?:bc|cell|barcode)_matri|tissue_positions|scalefactors|cells\.|matrix|barcodes"
    r"|features|genes|cell_by_gene|cell_metadata|exprMat|metadata_file|fov_positions|tx_file"
    r"|MatchedBead|MoleculesPer|bead_?locations|BeadLocations|digital_expression|CellxGene"
    r"|CellCoordinates|cellcentroids|counts|raw_expression|cell_locations|locations|coordinates"
    r"|expr\.|expr_|expression|locs|cell_loc|experiment|gene_panel|cell_segmentations"
    r"|barcode_mappings|tissue_(?:low|hi)res|tissue\.|cellbin|raw\.ge|gem|gef).*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class File:
    """A file and its content.

    `name` is its path below the requested folder. A table has `columns` (empty if it has
    no header), the cells of its `first` row, what separates them, and lines before the data.
    """

    path: Path
    name: str
    kind: str
    columns: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    separator: str = ","
    n_skipped: int = 0

    @property
    def sample(self) -> str:
        """Name of the sample, from the names of folders and files; ``""`` if there is none."""
        *folders, name = Path(self.name).parts
        if self.kind in ("h5ad", "zarr"):
            return Path(self.name).with_suffix("").as_posix()
        own = _ROLES.sub("", name)
        parts = [*(_ROLES.sub("", one) for one in folders), "" if own == name else own]
        return "/".join(filter(None, parts))

    @property
    def is_filtered(self) -> bool:
        """Whether the name of a matrix says that it has observations on tissue only."""
        return any("filtered" in part for part in Path(self.name).parts[-2:])


def find_files(root: Path) -> list[File]:
    """All files in a folder and its sub-folders that may be read; or a single file."""
    if root.is_file() or _is_store(root):
        return [_look_at(root, root.name)]
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        inside = here.relative_to(root)
        stores = [name for name in folders if _is_store(here / name)]
        is_deep = len(inside.parts) >= _DEPTH
        folders[:] = sorted(
            name for name in folders if not (is_deep or name in stores or name.startswith("."))
        )
        shown = (name for name in sorted([*stores, *names]) if not name.startswith("."))
        found += [_look_at(here / name, (inside / name).as_posix()) for name in shown]
    return found


def files_beside(path: Path) -> list[Path]:
    """A file and the files of its sample in its folder, which are read with it."""
    found = (one for one in path.parent.rglob("*") if one.is_file())
    named = [File(one, one.relative_to(path.parent).as_posix(), "") for one in found]
    sample = File(path, path.name, "").sample
    return sorted(one.path for one in named if one.sample == sample)


def distance(file: File, other: File) -> tuple[bool, int]:
    """Distance of files: whether the sample differs, and the words that their paths share."""
    # In a flat copy of a run, folders are the first words of names.
    pairs = zip(*(re.split(r"[/._-]+", one.name) for one in (file, other)), strict=False)
    n_shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return other.sample != file.sample, -n_shared


def nearest(file: File, files: Sequence[File], pattern: str) -> File | None:
    """The file of this name, of the same sample if there is one, that lies nearest."""
    named = [one for one in files if re.search(pattern, one.name)]
    return min(named, key=lambda other: (*distance(file, other), other.name), default=None)


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed, by its content."""
    with path.open("rb") as opened:
        return opened.read(2) == b"\x1f\x8b"


def open_text(path: Path) -> IO[str]:
    """Open a plain or compressed text file, with or without a byte-order mark."""
    if is_gzip(path):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def extension(path: Path) -> str:
    """Last part of a name in lower case; the one before ``.gz`` if it ends in that."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_store(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in _ZARR)


def _look_at(path: Path, name: str) -> File:
    """Kind of a file; one that can't be read may not be needed."""
    try:
        return File(path, name, "zarr") if path.is_dir() else _look_into(path, name)
    except (OSError, EOFError, ValueError, zlib.error):
        return File(path, name, "damaged")


def _look_into(path: Path, name: str) -> File:
    kind = extension(path)
    if kind in _HDF5:
        return File(path, name, _kind_of_hdf5(path))
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return File(path, name, "table", tuple(map(str, pq.read_schema(path).names)))
    if kind in _TABLES:
        return _look_at_table(path, name)
    return File(path, name, kind.removeprefix("."))


def _kind_of_hdf5(path: Path) -> str:
    import h5py

    with h5py.File(path, "r") as file:
        if "matrix" in file and "shape" in file["matrix"]:
            features = file["matrix"].get("features", {})
            return "probes" if "gene_id" in features or "filtered_probes" in features else "10x"
        if {"obs", "var"} <= set(file):
            return "h5ad"
        return next((kind for kind in ("geneExp", "cellBin") if kind in file), "other")


def _look_at_table(path: Path, name: str) -> File:
    with open_text(path) as opened:
        lines = _lines(opened)
        n_skipped, header = next(lines, (0, ""))
        _, row = next(lines, (0, ""))
    separator = next((one for one in "\t,; " if one in header), ",")
    columns, first = (
        tuple(next(csv.reader([line], delimiter=separator), ())) for line in (header, row)
    )
    if len(columns) == len(first) - 1:
        columns = ("", *columns)  # as R writes it, without a name for the rows
    elif len(columns) > 1 and columns[0].lower() not in _INDEX and all(map(is_number, columns[1:])):
        columns, first = (), columns
        n_skipped -= 1
    file = File(path, name, "table", columns, first, separator, n_skipped)
    is_gem = all(names & set(columns) for names in _GEM)
    return File(**{**vars(file), "kind": "gem"}) if is_gem else file


def _lines(opened: Any) -> Iterator[tuple[int, str]]:
    """Lines that are not comments, with the number of lines up to them."""
    for number, line in enumerate(opened, start=1):
        if line.strip() and not line.startswith("#"):
            yield number, line.rstrip("\r\n")


def is_number(text: str) -> bool:
    """Whether a cell of a table is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
