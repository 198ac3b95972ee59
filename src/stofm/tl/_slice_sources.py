"""Where the slices to train on come from, and how they are read."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stofm._edge.slice_files import open_table
from stofm._edge.tables import resolve_table
from stofm._files import local
from stofm.genes import read_orthologs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData

    from stofm.train.recipe import FileConfig

_ENDINGS = (".h5ad", ".zarr")


@dataclass(frozen=True)
class SliceSource:
    """Where slices come from, and how they are read.

    Attributes
    ----------
    data
        AnnData or SpatialData, or the path of one.
    name
        In messages.
    options
        How it is read.
    """

    data: Any
    name: str
    options: FileConfig

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Say in messages of errors which source they are about."""
        try:
            yield
        except KeyError as error:
            msg = f"{self.name}: {error.args[0] if error.args else error}"
            raise KeyError(msg) from error
        except OSError as error:
            msg = f"{self.name}: {error.strerror or error}"
            raise OSError(error.errno, msg) from error
        except ValueError as error:
            # Not of its own type: some, as UnicodeDecodeError, are made of more than a message.
            msg = f"{self.name}: {error}"
            raise ValueError(msg) from error

    @contextmanager
    def open(self) -> Iterator[AnnData]:
        """Give the AnnData; a file is closed afterwards."""
        is_file = isinstance(self.data, Path)
        key = self.options.table_key
        adata = open_table(self.data, key) if is_file else resolve_table(self.data, key)
        try:
            yield adata
        finally:
            if is_file and adata.isbacked:
                adata.file.close()


def find_sources(data: Any, options: FileConfig) -> list[SliceSource]:
    """List the sources in what a user passes.

    Parameters
    ----------
    data
        An AnnData or SpatialData, the path of one AnnData, a folder of such files, or a list of
        all these.
    options
        How they are read.

    Raises
    ------
    FileNotFoundError
        A path is not there, or a folder has no slices.
    TypeError
        Something is none of these.
    """
    if isinstance(data, list | tuple):
        if not data:
            msg = "There is no data: the list is empty."
            raise ValueError(msg)
        found = [source for one in data for source in find_sources(one, options)]
        return [
            source if isinstance(source.data, Path) else replace(source, name=f"data[{k}]")
            for k, source in enumerate(found)
        ]
    if isinstance(data, str | Path):
        return [SliceSource(path, path.stem, options) for path in _files(local(data))]
    if not hasattr(data, "obsm") and not hasattr(data, "tables"):
        msg = (
            "data must be an AnnData, a path, a folder of .h5ad and .zarr, or a list of these, "
            f"found {type(data).__name__}."
        )
        raise TypeError(msg)
    return [SliceSource(data, "data", options)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        msg = f"There is no slice or folder of slices at {path}."
        raise FileNotFoundError(msg)
    if path.is_file() or path.suffix in _ENDINGS:
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS)
    if not found:
        msg = f"The folder {path} has no .h5ad file and no .zarr store."
        raise FileNotFoundError(msg)
    return found


def read_ortholog_tables(sources: Sequence[SliceSource]) -> dict[str, dict[str, str]]:
    """Read the tables of orthologs that sources name, each once; by their addresses."""
    tables: dict[str, dict[str, str]] = {}
    for address in (source.options.orthologs for source in sources):
        if address is None or str(address) in tables:
            continue
        try:
            tables[str(address)] = read_orthologs(address)
        except ValueError as error:
            msg = f"orthologs = {str(address)!r}: {error}"
            raise ValueError(msg) from error
    return tables


def orthologs_digest(source: SliceSource, orthologs: Mapping[str, Mapping[str, str]]) -> str | None:
    """Hash what is in a source's table of orthologs, which may change under its name."""
    address = source.options.orthologs
    if address is None:
        return None
    pairs = json.dumps(orthologs[str(address)], sort_keys=True)
    return hashlib.blake2b(pairs.encode(), digest_size=8).hexdigest()
