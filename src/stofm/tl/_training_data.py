"""From sources to the prepared slices that training reads, and to a vocabulary."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.features import gene_names
from stofm._edge.gene_mapping import candidate_names, find_columns
from stofm._edge.places import read_places
from stofm._edge.tokens import compute_tokens, token_blocks, token_params, warn_of_empty_cells
from stofm._logging import progress
from stofm._messages import warn
from stofm.genes import GeneVocabulary, RankedTokens, embedded_vocabulary
from stofm.genes.fitting import CountSlice
from stofm.spatial import normalize_coordinates
from stofm.tl._slice_sources import orthologs_digest, read_ortholog_tables
from stofm.train.arrays import is_there, write_folder
from stofm.train.corpus import Corpus, preparation_key, reuse_slice, write_slice
from stofm.train.corpus import open_slice as open_prepared
from stofm.train.state import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from stofm._edge.places import Places
    from stofm.nn import Stofm
    from stofm.tl._slice_sources import SliceSource
    from stofm.train.corpus import TokenizedSlice

#: Part of each key: a change of how slices are prepared makes new ones.
_PREPARATION = 2


def prepare_slices(
    sources: Sequence[SliceSource], model: Stofm, folder: Path, *, show_progress_bar: bool
) -> list[str]:
    """Tokenise slices and write them to disk, unless that is done already.

    A file is read again only if it, its options (with what is in a table of orthologs) or the
    model's vocabulary has changed. The tokens of a file that holds one slice are written as they
    come; those of a file of several slices are in memory together.

    Parameters
    ----------
    sources
        Read one after another, in blocks of cells.
    model
        Gives vocabulary, number of tokens and whether values are read.
    folder
        Where the prepared slices are.
    show_progress_bar
        Show a bar.

    Returns
    -------
    Keys under which :func:`open_corpus` finds the slices.

    Raises
    ------
    ValueError, KeyError
        Counts, genes or coordinates of a slice are not usable; the message names it.
    """
    orthologs = read_ortholog_tables(sources)
    shown = progress(
        sources,
        total=len(sources),
        description="prepare slices",
        unit="file",
        show=show_progress_bar,
    )
    return [key for source in shown for key in _prepare(source, model, folder, orthologs)]


def open_corpus(folder: Path, keys: Sequence[str]) -> Corpus:
    """Open prepared slices, without those that have no cells.

    Raises
    ------
    FileNotFoundError
        A slice was prepared, but is not there.
    ValueError
        A slice is there twice.
    """
    slices: list[TokenizedSlice] = []
    for key in keys:
        one = open_prepared(folder, key)
        if one is None:
            msg = (
                f"The prepared slice {folder / key} is not there. The first process wrote it: the "
                "work folder must be visible to every process; pass work_dir (--work) on a file "
                "system that all machines share."
            )
            raise FileNotFoundError(msg)
        slices.append(one)
    if empty := [one.name for one in slices if not one.n_cells]:
        warn(f"{len(empty)} of {len(slices)} slices have no cells and are left out: {empty[:8]}.")
    slices = [one for one in slices if one.n_cells]
    _refuse_repeated(slices)
    return Corpus(tuple(slices))


def _refuse_repeated(slices: Sequence[TokenizedSlice]) -> None:
    first: dict[str, int] = {}
    for number, one in enumerate(slices):
        other = first.setdefault(one.digest, number)
        if other != number:
            msg = (
                f"Slice {one.name!r} (number {number + 1} of {len(slices)}) is the same as slice "
                f"{slices[other].name!r} (number {other + 1}), in all tokens and places, and would "
                "count twice; leave one of them out."
            )
            raise ValueError(msg)


def _prepare(
    source: SliceSource, model: Stofm, folder: Path, orthologs: Mapping[str, Mapping[str, str]]
) -> list[str]:
    settings = _settings(source, model, orthologs_digest(source, orthologs))
    if not isinstance(source.data, Path):
        return _write(source, model, folder, None, settings)
    key = preparation_key(source.data, settings)
    index = folder / f"{key}.json"
    names = _read_index(index)
    if names and all(reuse_slice(folder, name) is not None for name in names):
        return names
    names = _write(source, model, folder, key, settings)
    write_json(index, names)
    return names


def _read_index(index: Path) -> list[str]:
    """Names of the slices of a file; none if that is not known."""
    try:
        names: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else []


def _settings(source: SliceSource, model: Stofm, orthologs: str | None) -> dict[str, Any]:
    """All that a source's tokens depend on besides its content."""
    options = {k: v for k, v in asdict(source.options).items() if k != "files"}
    return {
        "preparation": _PREPARATION,
        **_described_vocabulary(model.vocabulary),
        "tokens": token_params(model, layer=source.options.layer),
        "options": options | {"orthologs": orthologs},
    }


def _described_vocabulary(vocabulary: GeneVocabulary) -> dict[str, str]:
    # Names decide which columns are found; the fingerprint leaves them out.
    names = json.dumps([vocabulary.symbols.tolist(), dict(vocabulary.aliases)])
    return {
        "vocabulary": vocabulary.fingerprint,
        "names": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
    }


def _write(
    source: SliceSource, model: Stofm, folder: Path, key: str | None, settings: dict[str, Any]
) -> list[str]:
    """Tokenise a source and write its slices; keys from the content if there is none."""
    options = source.options
    with source.naming(), source.open() as adata:
        places = read_places(
            adata, spatial_key=options.spatial_key, library_key=options.library_key
        )
        columns = find_columns(
            adata,
            model.vocabulary,
            species=options.species,
            gene_key=options.gene_key,
            orthologs=options.orthologs,
        )
        params = token_params(model, layer=options.layer)
        tokens: RankedTokens | Iterator[RankedTokens]
        if key is not None and len(places.slices.rows) == 1:
            tokens = token_blocks(adata, columns, params, show_progress_bar=False)
        else:
            tokens = compute_tokens(adata, columns, params, show_progress_bar=False).ranked
            content = {"tokens": tokens.digest, "places": _digest(places), "name": source.name}
            key = key or preparation_key(None, settings | content)
        return _write_slices(source, folder, key, places, tokens)


def _write_slices(
    source: SliceSource,
    folder: Path,
    key: str,
    places: Places,
    tokens: RankedTokens | Iterator[RankedTokens],
) -> list[str]:
    """Write the slices of a source; blocks of tokens are those of its only slice."""
    excluded = source.options.exclude
    if unknown := sorted({*excluded} - {*places.slices.names}):
        msg = (
            f"exclude = {unknown} names no slice of {source.name}, which has "
            f"{list(places.slices.names)[:8]} by library_key={source.options.library_key!r}."
        )
        raise ValueError(msg)
    names = []
    for number, (name, rows) in enumerate(
        zip(places.slices.names, places.slices.rows, strict=True)
    ):
        if name in excluded:
            continue
        names.append(f"{key}-{number}")
        written = write_slice(
            folder,
            names[-1],
            name=f"{source.name}/{name}" if name else source.name,
            ranked=_take(tokens, rows) if isinstance(tokens, RankedTokens) else tokens,
            coordinates=normalize_coordinates(places.coordinates[rows]),
            technology=source.options.technology,
        )
        if not isinstance(tokens, RankedTokens):
            warn_of_empty_cells(written.ranked)
    return names


def _digest(places: Places) -> str:
    hashed = hashlib.blake2b(places.coordinates.data, digest_size=8)
    for name, rows in zip(places.slices.names, places.slices.rows, strict=True):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(rows).data)
    return hashed.hexdigest()


def _take(ranked: RankedTokens, rows: NDArray[np.int64]) -> RankedTokens:
    """Tokens of some cells, ascending."""
    if len(rows) == ranked.n_cells:
        return ranked
    lengths = np.diff(ranked.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entries = np.arange(offsets[-1]) + np.repeat(ranked.offsets[rows] - offsets[:-1], lengths)
    values = None if ranked.values is None else ranked.values[entries]
    return RankedTokens(tokens=ranked.tokens[entries], offsets=offsets, values=values)


def fit_vocabulary(sources: Sequence[SliceSource], folder: Path) -> Path:
    """Fit a vocabulary on slices, unless that is done already; returns its table.

    Names that are no human Ensembl ids are looked up in the embedded vocabulary.
    """
    reference = embedded_vocabulary()
    orthologs = read_ortholog_tables(sources)
    settings = {
        "reference": _described_vocabulary(reference),
        "sources": [_described(one, orthologs_digest(one, orthologs)) for one in sources],
    }
    place = folder / f"vocabulary-{preparation_key(None, settings)}"
    table = place / "vocabulary.tsv"
    if all(isinstance(source.data, Path) for source in sources):
        if is_there(place):
            return table
    elif place.is_dir():
        # Of other data: what is in memory has no name.
        shutil.rmtree(place)
    vocabulary = GeneVocabulary.fit(
        _counted(sources),
        orthologs={mouse: human for pairs in orthologs.values() for mouse, human in pairs.items()},
        reference=reference,
        method="histogram",
    )
    write_folder(place, lambda part: vocabulary.save(part / table.name))
    return table


def _described(source: SliceSource, orthologs: str | None) -> str:
    options = source.options
    settings = {"layer": options.layer, "gene_key": options.gene_key, "orthologs": orthologs}
    return preparation_key(source.data if isinstance(source.data, Path) else None, settings)


def _counted(sources: Sequence[SliceSource]) -> Iterator[CountSlice]:
    """The slices one after another, with raw counts and the names that `gene_key` asks for."""
    for source in sources:
        with source.open() as adata:
            ids, symbols = _names(source, adata)
            yield CountSlice(_blocks(source, adata), ids, symbols)


def _names(source: SliceSource, adata: AnnData) -> tuple[list[str], list[str]]:
    gene_key = source.options.gene_key
    if gene_key is None:
        return gene_names(adata)
    with source.naming():
        return candidate_names(adata, gene_key)[gene_key], [""] * adata.n_vars


def _blocks(source: SliceSource, adata: AnnData) -> Iterator[sparse.csr_matrix]:
    with source.naming():
        yield from read_counts(adata, layer=source.options.layer)
