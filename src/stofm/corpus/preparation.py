"""From a user's data to shards of ranked counts, and to a vocabulary."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import ids_and_symbols, names_by_source
from stofm._files import local
from stofm._logging import progress
from stofm._messages import warn
from stofm.corpus.reader import Corpus, CorpusSlice, Reading
from stofm.corpus.shards import FORMAT, Shard
from stofm.corpus.sources import ENDINGS
from stofm.corpus.storage import digest_json, is_there, write_folder
from stofm.corpus.writing import write_source
from stofm.genes import (
    GeneVocabulary,
    embedded_vocabulary,
    read_orthologs,
)
from stofm.genes.fitting import CountSlice
from stofm.io.files import files_beside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stofm.corpus.sources import SliceSource
    from stofm.nn import Stofm

    #: Mouse and human genes by the address of their table.
    Orthologs = Mapping[str, Mapping[str, str]]

#: Part of each key: a change in preparation changes all keys.
_PREPARATION: Final = 3


def preparation_key(source: str | Path | None, settings: Mapping[str, Any]) -> str:
    """Key of a slice's source, so that a changed file is prepared again.

    Parameters
    ----------
    source
        A file, or the folder of a store or an instrument; None for data that has no file. A file
        counts as changed if its size or modification time differs, or that of a file read with it.
    settings
        Everything else that the result depends on (vocabulary, layer, ...), as JSON can hold it.

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
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
        else:
            files = [path] if path.suffix in ENDINGS else files_beside(path)
        root = path if path.is_dir() else path.parent
        stats = [(p.relative_to(root).as_posix(), p.stat()) for p in files]
        state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        state.append(str(path.resolve()))
    return digest_json(FORMAT, _PREPARATION, state, dict(settings))


def prepare_slices(
    sources: Sequence[SliceSource], model: Stofm, folder: Path, *, show_progress_bar: bool
) -> list[tuple[Path, int]]:
    """Write slices to shards, unless that is done; returns each slice's shard and number in it.

    A file is read again only if it, its options (with what is in a table of orthologs) or the
    model's vocabulary has changed. Slices of a corpus with that vocabulary are taken as they are.
    """
    orthologs = read_all_orthologs(sources)
    shown = progress(sources, "prepare slices", "file", show=show_progress_bar)
    found = [_prepare(one, model.vocabulary, folder, orthologs) for one in shown]
    return [pair for pairs in found for pair in pairs]


def open_corpus(places: Sequence[tuple[Path, int]], model: Stofm) -> Corpus:
    """Open prepared slices as a model reads them, without those that have no cells."""
    if places and not places[0][0].is_dir():
        raise FileNotFoundError(
            f"The prepared slice {places[0][0]} is not there. The first process wrote it: the "
            "work folder must be visible to every process; pass work_dir (--work) on a file "
            "system that all machines share."
        )
    encoder = model.config.cell_encoder
    power = encoder.depth_power if encoder.reads_values else None
    how = Reading(model.vocabulary, model.config.max_tokens, power)
    shards = {place: Shard(place) for place, _ in places}
    slices = [CorpusSlice(shards[place], number, how) for place, number in places]
    if empty := [one.name for one in slices if not one.n_cells]:
        warn(f"{len(empty)} of {len(slices)} slices have no cells and are left out: {empty[:8]}.")
    first: dict[str, CorpusSlice] = {}
    for one in slices:
        if one.n_cells and first.setdefault(one.digest, one) is not one:
            raise ValueError(
                f"Slice {one.name!r} is the same as slice {first[one.digest].name!r}, in all counts "
                "and coordinates, so it would count twice; leave one of them out."
            )
    return Corpus(tuple(first.values()))


def _prepare(
    source: SliceSource, vocabulary: GeneVocabulary, folder: Path, orthologs: Orthologs
) -> list[tuple[Path, int]]:
    if (
        isinstance(source.data, CorpusSlice)
        and source.data.shard.vocabulary == vocabulary.fingerprint
    ):
        return [(source.data.shard.folder, source.data.number)]
    described = [describe(source, orthologs), describe_vocabulary(vocabulary)]
    if source.has_name:
        place = folder / digest_json(described)
        if not is_there(place):
            write_source(source, vocabulary, place)
    else:
        # Data in memory are known by their content only.
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as temporary:
            written = Path(temporary) / "slices"
            write_source(source, vocabulary, written)
            content = [one["checksum"] for one in Shard(written).slices]
            place = folder / digest_json(described, source.name, content)
            if not is_there(place):
                written.rename(place)
    return [(place, number) for number in range(len(Shard(place).slices))]


def describe(source: SliceSource, orthologs: Orthologs) -> str:
    """Key of a source and its options, including the content of a table of orthologs."""
    options = {name: value for name, value in asdict(source.options).items() if name != "files"}
    if (address := source.options.orthologs) is not None:
        options["orthologs"] = digest_json(orthologs[address])
    if isinstance(source.data, CorpusSlice):
        options["slice"] = source.data.digest
    return preparation_key(source.file, options)


def describe_vocabulary(vocabulary: GeneVocabulary) -> dict[str, str]:
    """Fingerprints of a vocabulary and of its names, which decide which columns are found."""
    names = digest_json(vocabulary.symbols.tolist(), dict(vocabulary.aliases))
    return {"vocabulary": vocabulary.fingerprint, "names": names}


def read_all_orthologs(sources: Sequence[SliceSource]) -> Orthologs:
    """Read the tables of orthologs that sources name, each once."""
    addresses = (source.options.orthologs for source in sources)
    return {name: read_orthologs(name) for name in dict.fromkeys(addresses) if name is not None}


def fit_vocabulary(sources: Sequence[SliceSource], folder: Path) -> Path:
    """Fit a vocabulary on slices, unless that is done already; returns its table.

    Names other than human Ensembl ids are looked up in the embedded vocabulary.
    """
    reference, orthologs = embedded_vocabulary(), read_all_orthologs(sources)
    described = [describe(one, orthologs) for one in sources]
    settings = {"reference": describe_vocabulary(reference), "sources": described}
    place = folder / f"vocabulary-{preparation_key(None, settings)}"
    table = place / "vocabulary.tsv"
    if not all(source.has_name for source in sources):
        # Data in memory have no name: this one is from other data.
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
    """The slices one after another, with raw counts and the names in `gene_key`."""
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
