"""Where slices come from: data, files, folders, tables of files, and corpora."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from stofm._config import check_choice
from stofm._edge.slice_files import open_table
from stofm._edge.tables import resolve_table
from stofm._files import local, read_table, reading
from stofm._messages import naming
from stofm.corpus.manifest import is_corpus, read_slices
from stofm.corpus.reader import CorpusSlice
from stofm.genes.mapping import Species
from stofm.io import read
from stofm.io.matrices import is_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

ENDINGS: Final = (".h5ad", ".zarr")
#: Columns of a table of files besides those for reading.
ABOUT: Final = ("licence", "tissue", "donor", "unit")


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Options for reading files of slices.

    Attributes
    ----------
    files
        Pattern of names, relative to the data folder; later tables take precedence.
    layer
        Layer with raw counts; None for ``X``.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    library_key
        Column of ``obs`` that names the slices of a file; None for one slice.
    exclude
        Names of slices in that column that are not trained on.
    species, gene_key, orthologs
        As in :func:`stofm.pp.map_genes`.
    technology
        Name of the technology.
    table_key
        Table of a SpatialData; None for the only one.
    """

    files: str = "*"
    layer: str | None = None
    spatial_key: str = "spatial"
    library_key: str | None = None
    exclude: tuple[str, ...] = ()
    species: Species = "auto"
    gene_key: str | None = None
    orthologs: str | None = None
    technology: str = ""
    table_key: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice(self, "species", Species)


@dataclass(frozen=True)
class SliceSource:
    """An AnnData or SpatialData, the path of one, or a slice of a corpus.

    `name` is used in messages, `options` for reading; `about` is its metadata.
    """

    data: Any
    name: str
    options: FileConfig
    about: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The file, store or folder; None for data in memory and slices of a corpus."""
        return self.data if isinstance(self.data, Path) else None

    @property
    def has_name(self) -> bool:
        """Whether a path or checksum identifies the data; data in memory have no name."""
        return isinstance(self.data, Path | CorpusSlice)

    @property
    def origin(self) -> str:
        """Path of the file, and name of the slice in it if it is part of a corpus."""
        if isinstance(self.data, CorpusSlice):
            return f"{self.data.about['source']}:{self.data.about['slice']}"
        return str(self.file or "")

    def naming(self) -> AbstractContextManager[None]:
        """Within this block, messages say which source they are about."""
        return naming(f"{'file' if self.file else 'slice'} {self.name!r}")

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Yield the AnnData; a file is closed afterwards."""
        if isinstance(self.data, CorpusSlice):
            yield self.data.to_anndata()
        elif self.file is None:
            yield resolve_table(self.data, self.options.table_key)
        elif self.file.suffix not in ENDINGS:
            yield read(self.file)
        else:
            adata = open_table(self.file, self.options.table_key)
            try:
                is_fit = self.options.layer is not None or is_plain(adata)
                yield adata if is_fit else read(self.file)
            finally:
                if adata.isbacked:
                    adata.file.close()


def find_sources(data: Any, options: FileConfig) -> list[SliceSource]:
    """List the sources in a user's data: objects, paths, folders of files."""
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("There is no data: the list is empty.")
        found = [source for one in data for source in find_sources(one, options)]
        return [
            one if one.has_name else replace(one, name=f"data[{k}]") for k, one in enumerate(found)
        ]
    if isinstance(data, str | Path):
        path = local(data)
        if is_corpus(path):
            return [SliceSource(one, one.name, FileConfig()) for one in read_slices(path)]
        return find_files(path, options)
    if not hasattr(data, "obsm") and not hasattr(data, "tables"):
        raise TypeError(
            "data must be an AnnData, a path, a folder of .h5ad and .zarr, a corpus, or a list of "
            f"these, found {type(data).__name__}."
        )
    return [SliceSource(data, "data", options)]


def divide_corpus(
    folder: Path, train: Sequence[str], validation: Sequence[str], exclude: Sequence[str]
) -> tuple[list[SliceSource], list[SliceSource]]:
    """Slices of a corpus to train on, and held-out ones, by patterns of the paths of their files."""
    sources = find_sources(folder, FileConfig())

    def named(patterns: Sequence[str]) -> set[int]:
        files = enumerate(PurePath(one.data.about["source"]) for one in sources)
        return {k for k, file in files if any(map(file.match, patterns))}

    if missing := [pattern for pattern in validation if not named([pattern])]:
        raise FileNotFoundError(f"{missing[0]!r} names no file of the corpus {folder}.")
    held_out = named(validation) - named(exclude)
    chosen = named(train) - held_out - named(exclude)
    return [sources[k] for k in sorted(chosen)], [sources[k] for k in sorted(held_out)]


def slice_files(path: Path) -> list[Path]:
    """A file or store, or those in a folder."""
    if not path.exists():
        raise FileNotFoundError(f"There is no slice or folder of slices at {path}.")
    if path.is_file() or path.suffix in ENDINGS:
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix in ENDINGS)


def find_files(files: Any, options: FileConfig) -> list[SliceSource]:
    """List files to build a corpus from: a path, a folder, a table of files, or a list of paths.

    A folder without ``.h5ad`` and ``.zarr`` is an instrument's output.
    """
    if not isinstance(files, str | Path):
        return [source for one in files for source in find_files(one, options)]
    # Workers may be in another folder.
    path = local(files).absolute()
    if path.suffix in (".csv", ".tsv", ".parquet"):
        return _read_manifest(path, options)
    return [SliceSource(file, _name_of(file), options) for file in slice_files(path) or [path]]


def _name_of(file: Path) -> str:
    """Name of a file without its ending, or of a folder; many are called ``SAMPLE/outs``."""
    if file.suffix in ENDINGS:
        return file.stem
    return file.parent.name if file.name == "outs" else file.name


def _read_manifest(path: Path, options: FileConfig) -> list[SliceSource]:
    """Read a table of files: ``source`` (relative to the table), options for reading, metadata."""
    with reading(path, "table of slices"):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = read_table(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str)
    how = {one.name for one in fields(FileConfig)} - {"files", "exclude"}
    if "source" not in table or set(table) - {"source", *how, *ABOUT}:
        raise ValueError(
            f"{path} must have the column 'source' with paths, and may have "
            f"{sorted({*how, *ABOUT})}; found {list(table)}."
        )
    sources = []
    for row in table.to_dict("records"):
        given = {name: str(value) for name, value in row.items() if pd.notna(value) and value != ""}
        file = path.parent / local(given.pop("source"))
        given_how: dict[str, Any] = {name: given[name] for name in how & set(given)}
        chosen = replace(options, **given_how)
        about = {name: given[name] for name in ABOUT if name in given}
        sources.append(SliceSource(file, _name_of(file), chosen, about))
    return sources


def unique_names(names: Sequence[str]) -> list[str]:
    """Names for files; those that occur again are numbered."""
    found: dict[str, None] = {}
    for name in names:
        found[next(one for one in numbered(name) if one not in found)] = None
    return [*found]


def numbered(name: str) -> Iterator[str]:
    """A name for a file, then numbered ones in case it is taken."""
    plain = name.replace("/", "-")
    return itertools.chain([plain], (f"{plain}-{n}" for n in itertools.count(2)))
