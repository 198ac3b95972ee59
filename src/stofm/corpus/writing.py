"""Writing counts of known genes in order of rank from a table to a shard."""

from __future__ import annotations

import hashlib
import math
import shutil
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._digests import fingerprint
from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import find_columns, report_columns
from stofm._edge.slices import read_places
from stofm._edge.tokens import warn_of_empty_cells
from stofm._keys import Uns
from stofm.corpus.shards import Shard, ShardWriter, write_shard
from stofm.genes import rank_genes
from stofm.spatial import normalize_coordinates

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.gene_mapping import Columns
    from stofm.corpus.sources import SliceSource
    from stofm.genes import GeneVocabulary

#: In a panel with fewer genes than ten times the minimum, a cell must express a tenth of them.
_PANEL_SHARE: Final = 0.1


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
                warn_of_empty_cells(np.diff(whole["offsets"]))
        about = {**cells.about, **source.about, **(entries or {})}
        about["technology"] = options.technology or about["technology"]
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
        report_columns(self._adata, self._columns, counts, is_written=False)
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


def _find_twin(hashes: NDArray[np.uint64], known: Mapping[str, NDArray[np.uint64]]) -> str:
    """Name of a slice that shares half the cells of the smaller of the two; empty if none does."""
    for name, others in known.items():
        # All cells without counts look the same.
        if 2 * np.isin(hashes, others[others > 0]).sum() > min(len(hashes), len(others)):
            return name
    return ""
