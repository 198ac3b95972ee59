"""From what a user passes to shards of ranked counts, and to a vocabulary."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._digests import fingerprint
from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import find_columns, ids_and_symbols, names_by_source, report_columns
from stofm._edge.slices import read_places
from stofm._edge.tokens import warn_of_empty_cells
from stofm._files import local
from stofm._keys import Uns
from stofm._logging import progress
from stofm._messages import warn
from stofm.corpus.reader import Corpus, CorpusSlice, Reading
from stofm.corpus.shards import FORMAT, Shard, ShardWriter, write_shard
from stofm.corpus.storage import digest_json, is_there, write_folder
from stofm.genes import (
    GeneVocabulary,
    RankedTokens,
    embedded_vocabulary,
    rank_genes,
    read_orthologs,
)
from stofm.genes.fitting import CountSlice
from stofm.spatial import normalize_coordinates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.gene_mapping import Columns
    from stofm.corpus.sources import SliceSource
    from stofm.nn import Stofm

    #: Mouse and human genes by the address of their table.
    Orthologs = Mapping[str, Mapping[str, str]]

#: Part of each key: a change of how slices are prepared makes new ones.
_PREPARATION: Final = 3
#: Of a panel with fewer genes than ten times the lowest number, a cell must express a tenth.
_PANEL_SHARE: Final = 0.1


def preparation_key(source: str | Path | None, settings: Mapping[str, Any]) -> str:
    """Name what a slice was prepared from, so that a changed file is prepared again.

    Parameters
    ----------
    source
        A file, or the folder of a store or an instrument; None for data that has no file. A file
        counts as changed if its size or its time of change differs.
    settings
        All else that the result depends on (vocabulary, layer, ...), as JSON can hold it.

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
    return digest_json(FORMAT, _PREPARATION, state, dict(settings))


# Slices to train on


def prepare_slices(
    sources: Sequence[SliceSource], model: Stofm, folder: Path, *, show_progress_bar: bool
) -> list[tuple[Path, int]]:
    """Write slices to shards, unless that is done already; returns shards and numbers in them.

    A file is read again only if it, its options (with what is in a table of orthologs) or the
    model's vocabulary has changed. Slices of a corpus with that vocabulary are taken as they are.
    """
    orthologs, show = read_all_orthologs(sources), show_progress_bar
    shown = progress(
        sources, total=len(sources), description="prepare slices", unit="file", show=show
    )
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
    reads_values = model.config.cell_encoder.reads_values
    how = Reading(model.vocabulary, model.config.max_tokens, reads_values)
    shards = {place: Shard(place) for place, _ in places}
    slices = [CorpusSlice(shards[place], number, how) for place, number in places]
    if empty := [one.name for one in slices if not one.n_cells]:
        warn(f"{len(empty)} of {len(slices)} slices have no cells and are left out: {empty[:8]}.")
    first: dict[str, CorpusSlice] = {}
    for one in slices:
        if one.n_cells and first.setdefault(one.digest, one) is not one:
            raise ValueError(
                f"Slice {one.name!r} is the same as slice {first[one.digest].name!r}, in all counts "
                "and places, and would count twice; leave one of them out."
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
        # What is in memory has no name but its content.
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
    """Name a source and its options, with what is in a table of orthologs, which may change."""
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


# Writing


def write_source(
    source: SliceSource,
    vocabulary: GeneVocabulary,
    folder: Path,
    *,
    min_genes: int = 0,
    known: Mapping[str, NDArray[np.uint64]] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Write the slices of a source to a shard, block of cells by block.

    Left out are cells that express fewer than `min_genes` genes, or a tenth of a small panel, and
    slices that share half of their cells with one of `known`, which are hashes of cells. `entries`
    are added to those of each slice.
    """
    options = source.options

    def fill(writer: ShardWriter) -> list[dict[str, Any]]:
        with source.naming(), source.open() as adata:
            places = read_places(
                adata, spatial_key=options.spatial_key, library_key=options.library_key
            )
            slices = dict(zip(places.slices.names, places.slices.rows, strict=True))
            if unknown := sorted({*options.exclude} - {*slices}):
                raise ValueError(
                    f"exclude = {unknown} names no slice of {source.name}, which has "
                    f"{[*slices][:8]} by library_key={options.library_key!r}."
                )
            columns = find_columns(
                adata,
                vocabulary,
                species=options.species,
                gene_key=options.gene_key,
                orthologs=options.orthologs,
            )
            # In the order of the file; then slice by slice.
            folder = writer.folder / "whole"
            folder.mkdir()
            cells = RankedCells(adata, columns, vocabulary, min_genes)
            with ShardWriter(folder) as in_order:
                cells.write(in_order, options.layer)
        whole = Shard(folder)
        if not min_genes:
            _warn_of_empty_cells(whole)
        about = {**cells.about, **source.about, **(entries or {})}
        found = []
        for name, rows in slices.items():
            if name in options.exclude:
                continue
            own = np.flatnonzero(np.isin(whole["rows"], rows))
            entry = about | {
                "name": f"{source.name}/{name}" if name else source.name,
                "slice": name,
                "cells_left_out": len(rows) - len(own),
                "content": fingerprint(np.sort(whole["hashes"][own])),
            }
            if twin := _find_twin(whole["hashes"][own], known or {}):
                own = own[:0]
                entry |= {"status": "left out", "reason": f"has cells of {twin}, which is held out"}
            elif min_genes and not len(own):
                reason = f"no cell expresses {cells.min_genes} genes"
                entry |= {"status": "left out", "reason": reason}
            xy = places.coordinates[whole["rows"][own]]
            coordinates = normalize_coordinates(xy)
            writer.copy(whole, own, ("totals", "hashes", "rows"))
            writer.add(places=xy, coordinates=coordinates)
            content = (whole["hashes"][own], whole["totals"][own], coordinates)
            checksum = fingerprint(vocabulary.fingerprint, *content)
            found.append(entry | {"cells": len(own), "checksum": checksum})
        shutil.rmtree(folder)
        return found

    write_shard(folder, vocabulary.fingerprint, fill)


class RankedCells:
    """The cells of a table with the counts of known genes, in order of rank."""

    def __init__(
        self, adata: AnnData, columns: Columns, vocabulary: GeneVocabulary, min_genes: int
    ) -> None:
        self._adata, self._columns = adata, columns
        is_known = np.flatnonzero(columns.token_ids >= 0)
        self._genes, first, local = np.unique(
            columns.token_ids[is_known], return_index=True, return_inverse=True
        )
        # Multiplied from the right it sums the columns of each gene.
        entries = (np.ones(len(is_known)), (is_known, local))
        self._sums = sparse.csr_matrix(entries, (adata.n_vars, len(self._genes)))
        self._medians = columns.medians[is_known][first]
        ids = dict(zip(vocabulary.tokens.tolist(), vocabulary.gene_ids.tolist(), strict=True))
        digests = (hashlib.blake2b(ids[t].encode(), digest_size=8) for t in self._genes.tolist())
        self._weights = np.array([int.from_bytes(d.digest(), "little") for d in digests], np.uint64)
        self.min_genes = min(min_genes, math.ceil(_PANEL_SHARE * len(self._genes)))
        recorded = adata.uns.get(Uns.STOFM, {}).get("source", {})
        mapping = columns.mapping
        self.about = {
            "technology": str(recorded.get("technology", "")),
            "unit": str(recorded.get("unit", "unknown")),
            "species": mapping.species if mapping else columns.params.get("species", ""),
            "genes": adata.n_vars,
            "genes_matched": len(self._genes),
            "gene_report": mapping.summary() if mapping else "",
            "min_genes": self.min_genes,
            "token_bits": int(columns.token_ids.max(initial=0)).bit_length(),
        }

    def write(self, writer: ShardWriter, layer: str | None) -> None:
        """Write the cells that express enough genes, in the order of the table."""
        counts, start = np.zeros(self._adata.n_vars), 0
        for block in read_counts(self._adata, layer=layer):
            arrays = self._rank(block)
            is_kept = arrays["lengths"] >= self.min_genes
            is_own = np.repeat(is_kept, arrays["lengths"])
            writer.append(
                **{name: arrays[name][is_own] for name in ("tokens", "counts")},
                **{name: arrays[name][is_kept] for name in ("lengths", "totals", "hashes")},
                rows=start + np.flatnonzero(is_kept),
            )
            counts += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            start += block.shape[0]
        report_columns(self._adata, self._columns, counts)
        kept = counts[self._columns.token_ids >= 0].sum()
        self.about["counts_kept"] = float(kept / max(counts.sum(), 1))
        n_cells = writer.n_cells
        if not n_cells and self.min_genes:
            raise ValueError(
                f"No cell expresses {self.min_genes} of the {len(self._genes)} known genes: lower "
                "min_genes, or leave the file out."
            )
        writer.note("", [{"cells": n_cells}])

    def _rank(self, block: sparse.csr_matrix) -> dict[str, NDArray[Any]]:
        genes = sparse.csr_matrix(block @ self._sums)
        genes.eliminate_zeros()
        genes.sort_indices()
        ranked = rank_genes(genes, self._genes, self._medians, max_tokens=max(1, len(self._genes)))
        # Of each cell, ranked tokens in ascending order are its columns.
        rows = np.repeat(np.arange(ranked.n_cells), ranked.n_tokens)
        order = np.argsort(rows * (int(self._genes[-1]) + 1) + ranked.tokens)
        counts = np.empty(len(rows), np.uint64)
        counts[order] = genes.data
        ends = np.cumsum(genes.data.astype(np.uint64) * self._weights[genes.indices])
        ends = np.concatenate([np.zeros(1, np.uint64), ends])
        return {
            "tokens": ranked.tokens.astype(np.uint32),
            "counts": counts,
            "lengths": ranked.n_tokens,
            "totals": np.asarray(block.sum(axis=1, dtype=np.float64)).ravel(),
            "hashes": ends[genes.indptr[1:]] - ends[genes.indptr[:-1]],
        }


def _warn_of_empty_cells(shard: Shard) -> None:
    # What the tokens are does not matter.
    tokens = np.broadcast_to(np.int32(0), int(shard["offsets"][-1]))
    warn_of_empty_cells(RankedTokens(tokens, shard["offsets"]))


def _find_twin(hashes: NDArray[np.uint64], known: Mapping[str, NDArray[np.uint64]]) -> str:
    """Name of a slice that has half the cells of the smaller of the two; empty if none has."""
    for name, others in known.items():
        # A cell without counts is like any other.
        if 2 * np.isin(hashes, others[others > 0]).sum() > min(len(hashes), len(others)):
            return name
    return ""


# A vocabulary


def fit_vocabulary(sources: Sequence[SliceSource], folder: Path) -> Path:
    """Fit a vocabulary on slices, unless that is done already; returns its table.

    Names that are no human Ensembl ids are looked up in the embedded vocabulary.
    """
    reference, orthologs = embedded_vocabulary(), read_all_orthologs(sources)
    described = [describe(one, orthologs) for one in sources]
    settings = {"reference": describe_vocabulary(reference), "sources": described}
    place = folder / f"vocabulary-{preparation_key(None, settings)}"
    table = place / "vocabulary.tsv"
    if not all(source.has_name for source in sources):
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
