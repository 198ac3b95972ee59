"""Whether what stofm wrote into an AnnData is still of the counts and places that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.coordinates import read_coordinates
from stofm._edge.counts import peek_counts
from stofm._edge.gene_mapping import columns_fingerprint
from stofm._edge.records import read_record
from stofm._edge.tables import read_representation
from stofm._keys import Obsm, Uns, Var
from stofm.genes import RankedTokens, embedded_vocabulary, rank_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary

#: Cells whose tokens are made again.
_N_CELLS: Final = 512
#: Normalised coordinates span 100; by less than this they may differ, which is rounding.
_SAME_PLACE: Final = 0.01
_SAME_SCALE: Final = 1e-3
#: Entry of a record: what changed since.
_OUTDATED: Final = "outdated"


def stale_reason(adata: AnnData, key: str, vocabulary: GeneVocabulary | None = None) -> str:
    """Say why an embedding that stofm wrote to ``obsm[key]`` does not fit the AnnData any more.

    Empty if it fits, or if that can't be told: without records, counts or coordinates. Whole
    cells and genes may be taken away or put in another order. `vocabulary` is that of its model,
    if at hand; the embedded one is always.
    """
    record = read_record(adata, key)
    if record is None or "cell_encoder" not in record:
        return ""
    if what := record.get(_OUTDATED):
        return f"obsm[{key!r}] is older than the {what} that were read last."
    n_cells = int(record.get("n_cells", 0))
    # Where records of several tables were merged, only what they share is left, without digests.
    if {"tokens", "subslice"} & set(record) and 0 < n_cells < adata.n_obs:
        return (
            f"The record of obsm[{key!r}] is of {n_cells} cells, and there are {adata.n_obs}: of "
            "what was joined it tells one part. ad.concat(..., uns_merge='same') keeps what holds "
            "for all."
        )
    tokens = read_record(adata, Obsm.TOKENS) or {}
    is_of_tokens = _reads_tokens(record) and tokens.get("vocabulary") == record.get("vocabulary")
    if is_of_tokens and (found := changed_counts(adata, vocabulary)):
        return f"obsm[{key!r}] was made from other counts: {found}"
    layout = read_record(adata, Uns.SUBSLICE) or {}
    if "subslice" in record and _same_places_read(layout, record) and changed_places(adata):
        return (
            f"obsm[{key!r}] was made with other coordinates than "
            f"obsm[{layout['params']['spatial_key']!r}] holds now."
        )
    return ""


def read_current(adata: AnnData, rep: str) -> NDArray[np.float32]:
    """Read an entry of ``obsm``, and refuse an embedding that does not fit the AnnData any more."""
    values = read_representation(adata, rep)
    if reason := stale_reason(adata, rep):
        raise ValueError(
            f"{reason} Make it again: st.pp.tokenize(adata), st.tl.encode_cells(adata)."
        )
    return values


def _reads_tokens(record: Mapping[str, Any]) -> bool:
    """Whether an embedding is made from tokens, and not from features that the user gave."""
    return bool(record.get("params", {}).get("use_rep", Obsm.X_CELL) == Obsm.X_CELL)


def outdate_by_counts(adata: AnnData, ranked: RankedTokens, vocabulary: str) -> None:
    """Mark embeddings of other tokens than these of the vocabulary, which will replace the stored."""
    record = read_record(adata, Obsm.TOKENS) or {}
    if Obsm.TOKENS not in adata.obsm or record.get("vocabulary") != vocabulary:
        return
    try:
        stored = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
    except ValueError:  # damaged, and replaced now
        return
    n = min(int(one.n_tokens.max(initial=0)) for one in (stored, ranked))
    if not stored.head(n).equals(ranked.without_values().head(n)):
        _mark(adata, "counts", lambda it: _reads_tokens(it) and it.get("vocabulary") == vocabulary)


def outdate_by_places(adata: AnnData) -> None:
    """Mark embeddings with other coordinates than there are now, before layouts are replaced."""
    if changed_places(adata):
        layout = read_record(adata, Uns.SUBSLICE) or {}
        _mark(adata, "coordinates", lambda it: _same_places_read(layout, it))


def _mark(adata: AnnData, what: str, is_meant: Callable[[Mapping[str, Any]], bool]) -> None:
    entries = dict(adata.uns.get(Uns.STOFM, {}))
    for key, record in entries.items():
        if "cell_encoder" in record and key in adata.obsm and is_meant(record):
            entries[key] = {**record, _OUTDATED: what}
    adata.uns[Uns.STOFM] = entries


def is_outdated(record: Mapping[str, Any]) -> bool:
    """Whether a record is marked as one of an embedding that is older than what it is of."""
    return _OUTDATED in record


def changed_counts(adata: AnnData, vocabulary: GeneVocabulary | None = None) -> str:
    """Say how stored tokens contradict the counts that they are of; empty if they don't.

    Tokens of up to 512 cells, evenly spread, are made again and compared. This notices what is done
    to a table as a whole: cells or genes permuted, counts replaced. A change of a few cells goes
    unnoticed. Where genes were taken away, counts are normalised by now, or the vocabulary is not
    at hand, the counts must still have the genes of the tokens that are there, in any order.
    """
    record, made = (read_record(adata, key) or {} for key in (Obsm.TOKENS, Var.TOKEN_ID))
    is_there = Obsm.TOKENS in adata.obsm and Var.TOKEN_ID in adata.var and adata.n_obs > 0
    if not is_there or made.get("vocabulary") != record.get("vocabulary") or "params" not in record:
        return ""
    params, layer = record["params"], str(record["params"]["layer"]) or None
    columns = np.asarray(adata.var[Var.TOKEN_ID].fillna(-1), dtype=np.int64)
    rows = np.unique(np.linspace(0, adata.n_obs - 1, _N_CELLS).astype(np.int64))
    try:
        counts, is_raw = peek_counts(adata, layer, rows)
    except (KeyError, TypeError, ValueError):
        return ""
    if not np.isfinite(counts.data).all() or counts.data.min(initial=0) < 0:
        return ""
    known = (one for one in (vocabulary, embedded_vocabulary()) if one is not None)
    own = next((one for one in known if one.fingerprint == record["vocabulary"]), None)
    is_whole = columns_fingerprint(columns) == record.get("columns")
    stored = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS][rows])
    # Token -1, no gene, reads the last entry.
    medians = np.ones(int(columns.max(initial=0)) + 2)
    if own is not None and is_raw and is_whole:
        is_used = own.tokens < len(medians) - 1
        medians[own.tokens[is_used]] = own.medians[is_used]
        options = {name: params[name] for name in ("max_tokens", "duplicates")}
        now = rank_genes(counts, columns, medians[columns], **options)
        both = (np.split(one.tokens, one.offsets[1:-1]) for one in (stored, now))
        n_other = sum(not np.array_equal(*pair) for pair in zip(*both, strict=True))
    else:
        options = {"max_tokens": max(adata.n_vars, 1), "duplicates": params["duplicates"]}
        now = rank_genes(counts, columns, medians[columns], **options)
        wanted, found = (
            np.repeat(np.arange(len(rows)) << 32, one.n_tokens) + one.tokens
            for one in (stored, now)
        )
        lost = wanted[np.isin(stored.tokens, columns) & ~np.isin(wanted, found)]
        n_other = len(np.unique(lost >> 32))
    if not n_other:
        return ""
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    return (
        f"of {len(rows)} cells that were looked at, {n_other} have other genes, or another order "
        f"of these, than {where} has for them now."
    )


def _same_places_read(layout: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a layout is of the places and slices that an embedding was made with."""
    names = ("spatial_key", "library_key")
    first, second = (one.get("params", {}) for one in (layout, record))
    return all(name in first and first[name] == second.get(name) for name in names)


def changed_places(adata: AnnData) -> bool:
    """Whether the coordinates are no longer those that slices were cut with.

    They may be moved, turned, mirrored and scaled slice by slice, which changes no distance that
    a model reads. Layouts that tables lost with their slices when they were joined can't be
    compared.
    """
    params = (read_record(adata, Uns.SUBSLICE) or {}).get("params", {})
    spatial_key, library_key = (params.get(name) for name in ("spatial_key", "library_key"))
    is_there = {spatial_key, Obsm.COORDINATES} <= set(adata.obsm)
    if not is_there or (library_key and library_key not in adata.obs):
        return False
    try:
        now = read_coordinates(adata, spatial_key)
    except ValueError:
        return False
    stored = np.asarray(adata.obsm[Obsm.COORDINATES])
    if not library_key:
        return not _are_similar(now, stored)
    groups = adata.obs.reset_index(drop=True).groupby(library_key, observed=True).indices
    return not all(_are_similar(now[rows], stored[rows]) for rows in groups.values())


def _are_similar(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether places are others but moved, turned, mirrored or scaled."""
    first, second = (places - places.mean(axis=0) for places in (first, second))
    first = first / (np.abs(first).max() or 1.0)
    change, _, rank, _ = np.linalg.lstsq(first, second, rcond=None)
    if np.abs(first @ change - second).max() > _SAME_PLACE:
        return False
    sizes = np.linalg.svd(change, compute_uv=False)
    return bool(rank < 2 or sizes[1] >= (1 - _SAME_SCALE) * sizes[0])
