"""From what a user passes to the prepared slices that training reads, and to a vocabulary."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stofm._digests import fingerprint
from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import find_columns, ids_and_symbols, names_by_source
from stofm._edge.slice_files import open_table
from stofm._edge.slices import read_places
from stofm._edge.tables import resolve_table
from stofm._edge.tokens import compute_tokens, token_blocks, token_params, warn_of_empty_cells
from stofm._files import local
from stofm._logging import progress
from stofm._messages import warn
from stofm.genes import GeneVocabulary, embedded_vocabulary, read_orthologs
from stofm.genes.fitting import CountSlice
from stofm.spatial import normalize_coordinates
from stofm.train.corpus import Corpus, open_slice, preparation_key, take_cells, write_slice
from stofm.train.storage import digest_json, is_there, write_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stofm._edge.slices import Places
    from stofm.genes import RankedTokens
    from stofm.nn import Stofm
    from stofm.train.corpus import TokenizedSlice
    from stofm.train.recipe import FileConfig

    #: Mouse and human genes by the address of their table.
    Orthologs = Mapping[str, Mapping[str, str]]

_ENDINGS = (".h5ad", ".zarr")
#: Part of each key: a change of how slices are prepared makes new ones.
_PREPARATION = 3


@dataclass(frozen=True)
class SliceSource:
    """An AnnData or SpatialData, or the path of one, its name in messages, and how it is read."""

    data: Any
    name: str
    options: FileConfig

    @property
    def file(self) -> Path | None:
        """The file or store; None for data in memory."""
        return self.data if isinstance(self.data, Path) else None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Say in messages of errors which source they are about."""
        try:
            yield
        except (KeyError, OSError, ValueError) as error:
            if len(error.args) == 1:
                error.args = (f"{self.name}: {error.args[0]}",)
            raise

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Give the AnnData; a file is closed afterwards."""
        key = self.options.table_key
        adata = open_table(self.file, key) if self.file else resolve_table(self.data, key)
        try:
            yield adata
        finally:
            if self.file and adata.isbacked:
                adata.file.close()


def find_sources(data: Any, options: FileConfig) -> list[SliceSource]:
    """List the sources in what a user passes: data, a path, a folder of files, or a list of these."""
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("There is no data: the list is empty.")
        found = [source for one in data for source in find_sources(one, options)]
        return [one if one.file else replace(one, name=f"data[{k}]") for k, one in enumerate(found)]
    if isinstance(data, str | Path):
        return [SliceSource(path, path.stem, options) for path in _files(local(data))]
    if not hasattr(data, "obsm") and not hasattr(data, "tables"):
        raise TypeError(
            "data must be an AnnData, a path, a folder of .h5ad and .zarr, or a list of these, "
            f"found {type(data).__name__}."
        )
    return [SliceSource(data, "data", options)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is no slice or folder of slices at {path}.")
    if path.is_file() or path.suffix in _ENDINGS:
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS)
    if not found:
        raise FileNotFoundError(f"The folder {path} has no .h5ad file and no .zarr store.")
    return found


def prepare_slices(
    sources: Sequence[SliceSource], model: Stofm, folder: Path, *, show_progress_bar: bool
) -> list[str]:
    """Tokenise slices and write them to disk, unless that is done already.

    A file is read again only if it, its options (with what is in a table of orthologs) or the
    model's vocabulary has changed. The tokens of a file that holds one slice are written as they
    come; those of a file of several slices are in memory together. Returns the keys under which
    :func:`open_corpus` finds the slices.
    """
    orthologs, show = _read_orthologs(sources), show_progress_bar
    shown = progress(
        sources, total=len(sources), description="prepare slices", unit="file", show=show
    )
    return [key for source in shown for key in _prepare(source, model, folder, orthologs)]


def open_corpus(folder: Path, keys: Sequence[str]) -> Corpus:
    """Open prepared slices, without those that have no cells."""
    if keys and not (folder / keys[0]).is_dir():
        raise FileNotFoundError(
            f"The prepared slice {folder / keys[0]} is not there. The first process wrote it: the "
            "work folder must be visible to every process; pass work_dir (--work) on a file "
            "system that all machines share."
        )
    slices = [open_slice(folder, key) for key in keys]
    if empty := [one.name for one in slices if not one.n_cells]:
        warn(f"{len(empty)} of {len(slices)} slices have no cells and are left out: {empty[:8]}.")
    first: dict[str, TokenizedSlice] = {}
    for one in slices:
        if one.n_cells and first.setdefault(one.digest, one) is not one:
            raise ValueError(
                f"Slice {one.name!r} is the same as slice {first[one.digest].name!r}, in all tokens "
                "and places, and would count twice; leave one of them out."
            )
    return Corpus(tuple(first.values()))


def _prepare(source: SliceSource, model: Stofm, folder: Path, orthologs: Orthologs) -> list[str]:
    settings = {
        "preparation": _PREPARATION,
        **_described_vocabulary(model.vocabulary),
        "tokens": token_params(model, layer=source.options.layer),
        "options": _described_options(source, orthologs),
    }
    if source.file is None:
        return _write(source, model, folder, None, settings)
    key = preparation_key(source.file, settings)
    index = folder / f"{key}.json"
    if index.is_file():
        names: list[str] = json.loads(index.read_text(encoding="utf-8"))
        if all(is_there(folder / name) for name in names):
            return names
    names = _write(source, model, folder, key, settings)
    write_json(index, names)
    return names


def _described_options(source: SliceSource, orthologs: Orthologs) -> dict[str, Any]:
    """Options of a source, with what is in a table of orthologs, which may change under its name."""
    options = {name: value for name, value in asdict(source.options).items() if name != "files"}
    if (address := source.options.orthologs) is not None:
        options["orthologs"] = digest_json(orthologs[address])
    return options


def _described_vocabulary(vocabulary: GeneVocabulary) -> dict[str, str]:
    # Names decide which columns are found; the fingerprint leaves them out.
    names = digest_json(vocabulary.symbols.tolist(), dict(vocabulary.aliases))
    return {"vocabulary": vocabulary.fingerprint, "names": names}


def _write(
    source: SliceSource, model: Stofm, folder: Path, key: str | None, settings: dict[str, Any]
) -> list[str]:
    """Tokenise a source and write its slices; keys from the content if there is none."""
    options, library_key = source.options, source.options.library_key
    with source.naming(), source.open() as adata:
        places = read_places(adata, spatial_key=options.spatial_key, library_key=library_key)
        slices = places.slices
        if unknown := sorted({*options.exclude} - {*slices.names}):
            raise ValueError(
                f"exclude = {unknown} names no slice of {source.name}, which has "
                f"{list(slices.names)[:8]} by library_key={library_key!r}."
            )
        columns = find_columns(
            adata,
            model.vocabulary,
            species=options.species,
            gene_key=options.gene_key,
            orthologs=options.orthologs,
        )
        params = token_params(model, layer=options.layer)
        is_streamed = key is not None and len(slices.rows) == 1
        tokens: Iterable[Iterable[RankedTokens]]
        if is_streamed:
            tokens = [token_blocks(adata, columns, params, show_progress_bar=False)]
        else:
            ranked = compute_tokens(adata, columns, params, show_progress_bar=False)
            tokens = ([take_cells(ranked, rows)] for rows in slices.rows)
            content = {"tokens": ranked.digest, "places": _digest(places), "name": source.name}
            key = key or preparation_key(None, settings | content)
        names = []
        parts = zip(slices.names, slices.rows, tokens, strict=True)
        for number, (name, rows, blocks) in enumerate(parts):
            if name in options.exclude:
                continue
            names.append(f"{key}-{number}")
            written = write_slice(
                folder,
                names[-1],
                name=f"{source.name}/{name}" if name else source.name,
                blocks=blocks,
                coordinates=normalize_coordinates(places.coordinates[rows]),
            )
            if is_streamed:
                warn_of_empty_cells(written.ranked)
    return names


def _digest(places: Places) -> str:
    slices = zip(places.slices.names, places.slices.rows, strict=True)
    return fingerprint(places.coordinates, *(part for one in slices for part in one))


def fit_vocabulary(sources: Sequence[SliceSource], folder: Path) -> Path:
    """Fit a vocabulary on slices, unless that is done already; returns its table.

    Names that are no human Ensembl ids are looked up in the embedded vocabulary.
    """
    reference, orthologs = embedded_vocabulary(), _read_orthologs(sources)
    described = [preparation_key(o.file, _described_options(o, orthologs)) for o in sources]
    settings = {"reference": _described_vocabulary(reference), "sources": described}
    place = folder / f"vocabulary-{preparation_key(None, settings)}"
    table = place / "vocabulary.tsv"
    if not all(source.file for source in sources):
        # What is in memory has no name: this is of other data.
        shutil.rmtree(place, ignore_errors=True)
    elif is_there(place):
        return table
    vocabulary = GeneVocabulary.fit(
        _counted(sources),
        orthologs={mouse: human for pairs in orthologs.values() for mouse, human in pairs.items()},
        reference=reference,
        method="histogram",
    )
    write_folder(place, lambda part: vocabulary.save(part / table.name))
    return table


def _counted(sources: Sequence[SliceSource]) -> Iterator[CountSlice]:
    """The slices one after another, with raw counts and the names that `gene_key` asks for."""
    for source in sources:
        gene_key = source.options.gene_key
        with source.open() as adata:
            if gene_key is None:
                ids, symbols = ids_and_symbols(adata)
            else:
                with source.naming():
                    ids = names_by_source(adata, gene_key)[gene_key]
                symbols = [""] * adata.n_vars
            yield CountSlice(_blocks(source, adata), ids, symbols)


def _blocks(source: SliceSource, adata: Any) -> Iterator[Any]:
    with source.naming():
        yield from read_counts(adata, layer=source.options.layer)


def _read_orthologs(sources: Sequence[SliceSource]) -> Orthologs:
    """Read the tables of orthologs that sources name, each once."""
    addresses = (source.options.orthologs for source in sources)
    return {name: read_orthologs(name) for name in dict.fromkeys(addresses) if name is not None}
