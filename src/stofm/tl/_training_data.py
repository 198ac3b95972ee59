"""From AnnData and files to the prepared slices that training reads."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._anndata import resolve_table
from stofm._counts import open_slice
from stofm._logging import progress
from stofm.genes import GeneVocabulary, RankedTokens, embedded_vocabulary
from stofm.pp._subslice import read_places
from stofm.pp._tokenize import compute_tokens, find_columns, token_params
from stofm.spatial import normalize_coordinates
from stofm.train.corpus import Corpus, preparation_key, write_slice
from stofm.train.corpus import open_slice as open_prepared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.nn import Stofm
    from stofm.pp._subslice import Places
    from stofm.train.recipe import FileConfig

_ENDINGS = (".h5ad", ".zarr")
#: Part of each key: a change of how slices are prepared makes new ones.
_PREPARATION = 1


@dataclass(frozen=True)
class SliceSource:
    """Where slices come from, and how they are read.

    Attributes
    ----------
    data
        AnnData or SpatialData, or the path of one AnnData.
    name
        In messages.
    options
        How it is read.
    """

    data: Any
    name: str
    options: FileConfig

    @contextmanager
    def open(self) -> Iterator[AnnData]:
        """Give the AnnData; a file is closed afterwards."""
        is_file = isinstance(self.data, Path)
        adata = open_slice(self.data) if is_file else resolve_table(self.data)
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
        return [SliceSource(path, path.stem, options) for path in _files(Path(data))]
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


def prepare_slices(
    sources: Sequence[SliceSource], model: Stofm, folder: Path, *, show_progress_bar: bool
) -> list[str]:
    """Tokenise slices and write them to disk, unless that is done already.

    A file is read again only if it, its options or the model's vocabulary has changed.

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
    shown = progress(
        sources,
        total=len(sources),
        description="prepare slices",
        unit="file",
        show=show_progress_bar,
    )
    return [key for source in shown for key in _prepare(source, model, folder)]


def open_corpus(folder: Path, keys: Sequence[str]) -> Corpus:
    """Open prepared slices."""
    slices = [open_prepared(folder, key) for key in keys]
    return Corpus(tuple(one for one in slices if one is not None and one.n_cells))


def _prepare(source: SliceSource, model: Stofm, folder: Path) -> list[str]:
    settings = _settings(source, model)
    if not isinstance(source.data, Path):
        return _write(source, model, folder, None, settings)
    key = preparation_key(source.data, settings)
    index = folder / f"{key}.json"
    if index.is_file():
        names: list[str] = json.loads(index.read_text(encoding="utf-8"))
        if all(open_prepared(folder, name) is not None for name in names):
            return names
    names = _write(source, model, folder, key, settings)
    part = index.with_name(f".{index.name}-part")
    part.write_text(json.dumps(names), encoding="utf-8")
    part.replace(index)
    return names


def _settings(source: SliceSource, model: Stofm) -> dict[str, Any]:
    """All that a source's tokens depend on besides its content."""
    vocabulary = model.vocabulary
    # Names decide which columns are found; the fingerprint leaves them out.
    names = json.dumps([vocabulary.symbols.tolist(), dict(vocabulary.aliases)])
    return {
        "preparation": _PREPARATION,
        "vocabulary": vocabulary.fingerprint,
        "names": hashlib.blake2b(names.encode(), digest_size=8).hexdigest(),
        "tokens": token_params(model, layer=source.options.layer),
        "options": {k: v for k, v in asdict(source.options).items() if k != "files"},
    }


def _write(
    source: SliceSource, model: Stofm, folder: Path, key: str | None, settings: dict[str, Any]
) -> list[str]:
    """Tokenise a source and write its slices; keys from the content if there is none."""
    options = source.options
    try:
        with source.open() as adata:
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
            ranked = compute_tokens(adata, columns, params, show_progress_bar=False).ranked
    except (KeyError, ValueError) as error:
        msg = f"{source.name}: {error.args[0] if error.args else error}"
        raise type(error)(msg) from error
    if key is None:
        content = {"tokens": ranked.digest, "places": _digest(places), "name": source.name}
        key = preparation_key(None, settings | content)
    names = []
    for number, (name, rows) in enumerate(
        zip(places.slices.names, places.slices.rows, strict=True)
    ):
        names.append(f"{key}-{number}")
        write_slice(
            folder,
            names[-1],
            name=f"{source.name}/{name}" if name else source.name,
            ranked=_take(ranked, rows),
            coordinates=normalize_coordinates(places.coordinates[rows]),
            technology=options.technology,
        )
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
    described = [_described(source) for source in sources]
    table = folder / f"vocabulary-{preparation_key(None, {'sources': described})}.tsv"
    if table.is_file() and all(isinstance(source.data, Path) for source in sources):
        return table
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = GeneVocabulary.fit(
        _counted(sources), reference=embedded_vocabulary(), method="histogram"
    )
    vocabulary.save(table)
    return table


def _described(source: SliceSource) -> str:
    settings = {"layer": source.options.layer}
    return preparation_key(source.data if isinstance(source.data, Path) else None, settings)


def _counted(sources: Sequence[SliceSource]) -> Iterator[AnnData]:
    """The slices one after another, with raw counts in ``X``."""
    import anndata

    for source in sources:
        with source.open() as adata:
            layer = source.options.layer
            if layer is None:
                yield adata
            else:
                yield anndata.AnnData(adata.layers[layer], obs=adata.obs, var=adata.var)
