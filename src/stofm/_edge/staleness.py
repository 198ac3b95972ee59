"""Whether what stofm wrote into an AnnData is still of the counts and places that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._edge.coordinates import read_coordinates
from stofm._edge.counts import peek_counts
from stofm._edge.features import VAR_NAMES, names_of_genes
from stofm._edge.gene_mapping import columns_fingerprint, compute_gene_mapping, names_fingerprint
from stofm._edge.records import read_record
from stofm._edge.tables import read_representation
from stofm._keys import Obsm, Uns, Var
from stofm.genes import RankedTokens, embedded_vocabulary, map_gene_ids, rank_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.genes import GeneVocabulary

#: Cells whose tokens are made again.
_N_CELLS: Final = 512
#: Where columns are taken away, or names that genes were found by, genes that several columns had
#: are others: so large a share of a cell's tokens may be, and more than this of the cells must.
_FEW: Final = 0.1
_MOST: Final = 0.5
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
        msg = f"{reason} Make it again: st.pp.tokenize(adata), st.tl.encode_cells(adata)."
        raise ValueError(msg)
    return values


def _reads_tokens(record: Mapping[str, Any]) -> bool:
    """Whether an embedding is made from tokens, and not from features that the user gave."""
    return bool(record.get("params", {}).get("use_rep", Obsm.X_CELL) == Obsm.X_CELL)


def outdate_by_counts(adata: AnnData) -> None:
    """Mark embeddings of other counts than there are now, before their tokens are replaced."""
    if changed_counts(adata):
        vocabulary = (read_record(adata, Obsm.TOKENS) or {}).get("vocabulary")
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


# Counts


def changed_counts(adata: AnnData, vocabulary: GeneVocabulary | None = None) -> str:
    """Say how stored tokens contradict the counts that they are of; empty if they don't.

    Tokens of up to 512 cells, evenly spread, are made again and compared, but for genes that are
    no longer there. This notices what is done to a table as a whole: cells or genes permuted,
    counts replaced. A change of a few cells goes unnoticed. Counts that can't be ranked again
    (normalised by now, or the vocabulary is not at hand) must still have the genes of the tokens.
    Columns that lost their tokens when tables were joined are mapped again, and columns renamed
    to other genes are other counts.
    """
    record, made = (read_record(adata, key) or {} for key in (Obsm.TOKENS, Var.TOKEN_ID))
    is_there = Obsm.TOKENS in adata.obsm and adata.n_obs > 0
    is_told = {"layer", "max_tokens", "duplicates"} <= set(record.get("params", {}))
    if not (is_there and is_told) or made.get("vocabulary") != record.get("vocabulary"):
        return ""
    known = (vocabulary, embedded_vocabulary())
    own = next((v for v in known if v and v.fingerprint == record.get("vocabulary")), None)
    columns = _stored_columns(adata)
    if own and columns is None:
        columns = _map_again(adata, made, own)
    elif own and columns is not None and (found := _renamed(adata, made, own, columns)):
        return found
    if columns is None:
        return ""
    is_whole = columns_fingerprint(columns) == record.get("columns")
    return _other_tokens(adata, record["params"], columns, own, is_whole=is_whole)


def _stored_columns(adata: AnnData) -> NDArray[np.int64] | None:
    """(n_vars,) token of each column, -1 for none; None where joining tables dropped them."""
    import pandas as pd

    if Var.TOKEN_ID not in adata.var:
        return None
    # Where tables were joined, columns can lack their token.
    tokens = pd.to_numeric(adata.var[Var.TOKEN_ID], errors="coerce").fillna(-1)
    stored: NDArray[np.int64] = tokens.to_numpy(dtype=np.int64)
    return stored


def _name_sources(adata: AnnData, made: Mapping[str, Any]) -> list[str]:
    """Where the names are that a mapping was made from; empty unless all are still there."""
    params = made.get("params", {})
    sources = [params[name] for name in ("source", "fallback") if params.get(name)]
    return sources if all(one == VAR_NAMES or one in adata.var for one in sources) else []


def _renamed(
    adata: AnnData, made: Mapping[str, Any], vocabulary: GeneVocabulary, stored: NDArray[np.int64]
) -> str:
    """Say how many columns have names of other genes than those that their tokens are of."""
    is_told = bool(_name_sources(adata, made))
    if not is_told or names_fingerprint(adata, made["params"]) == made.get("names"):
        return ""
    now = _map_again(adata, made, vocabulary)
    if now is None or not (n := np.count_nonzero((now >= 0) & (stored >= 0) & (now != stored))):
        return ""
    return f"{n} of {adata.n_vars} columns have names of other genes than those that their tokens are of."


def _map_again(
    adata: AnnData, made: Mapping[str, Any], vocabulary: GeneVocabulary
) -> NDArray[np.int64] | None:
    """Token of each column by its names, or by what is left of these; None if they say little."""
    species = made.get("params", {}).get("species", "auto")
    try:
        if sources := _name_sources(adata, made):
            names, *others = (names_of_genes(adata, one) for one in sources)
            fallback = others[0] if others else None
            mapping = map_gene_ids(names, vocabulary, species=species, fallback_ids=fallback)
        else:
            mapping = compute_gene_mapping(adata, vocabulary, species=species).mapping
    except ValueError:
        return None
    return mapping.token_id.astype(np.int64)


def _other_tokens(
    adata: AnnData,
    params: Mapping[str, Any],
    columns: NDArray[np.int64],
    vocabulary: GeneVocabulary | None,
    *,
    is_whole: bool,
) -> str:
    """Say how many cells have other tokens now; if columns are not those of the tokens, if most do."""
    layer = str(params["layer"]) or None
    rows = np.unique(np.linspace(0, adata.n_obs - 1, _N_CELLS).astype(np.int64))
    try:
        counts, is_raw = peek_counts(adata, layer, rows)
    except (KeyError, TypeError, ValueError):
        return ""
    if not np.isfinite(counts.data).all() or counts.data.min(initial=0) < 0:
        return ""
    stored = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS][rows])
    is_there = np.isin(stored.tokens, columns)
    ends = np.concatenate([[0], np.cumsum(is_there)])
    kept = RankedTokens(stored.tokens[is_there], ends[stored.offsets])
    order = vocabulary if is_raw and is_whole else None
    now = _ranked(counts, columns, order, params["duplicates"])
    # Which tokens the counts do not give; without a vocabulary their order does not matter.
    own, found = (_keys(one, ordered=order is not None) for one in (kept, now))
    cells = np.repeat(np.arange(now.n_cells), kept.n_tokens)
    n_lost = np.bincount(cells[~np.isin(own, found)], minlength=now.n_cells)
    differ = n_lost > (0 if is_whole else _FEW) * kept.n_tokens
    if order is not None:
        is_cut = stored.n_tokens >= params["max_tokens"]
        differ |= ~is_cut & (now.n_tokens != kept.n_tokens)
    if differ.sum() <= (0 if is_whole else _MOST * len(rows)):
        return ""
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    return (
        f"of {len(rows)} cells that were looked at, {int(differ.sum())} have other genes, or "
        f"another order of these, than {where} has for them now."
    )


def _ranked(
    counts: sparse.csr_matrix,
    columns: NDArray[np.int64],
    vocabulary: GeneVocabulary | None,
    duplicates: Any,
) -> RankedTokens:
    """All tokens of some cells, in the order that a vocabulary gives them."""
    medians = np.ones(int(columns.max(initial=0)) + 2)
    if vocabulary is not None:
        is_used = vocabulary.tokens < len(medians) - 1
        medians[vocabulary.tokens[is_used]] = vocabulary.medians[is_used]
    return rank_genes(
        counts,
        columns,
        # Token -1, no gene, reads the last entry.
        medians[columns],
        max_tokens=max(counts.shape[1], 1),
        duplicates=duplicates,
    )


def _keys(tokens: RankedTokens, *, ordered: bool) -> NDArray[np.int64]:
    """A number for each token with its cell, and with its place in the order if that counts."""
    cells = np.repeat(np.arange(tokens.n_cells), tokens.n_tokens)
    places = np.arange(len(tokens.tokens)) - tokens.offsets[cells]
    cells = (cells << 20) + places if ordered else cells
    numbers: NDArray[np.int64] = (cells << 24) + tokens.tokens
    return numbers


# Places


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
    record = read_record(adata, Uns.SUBSLICE) or {}
    params = record.get("params", {})
    spatial_key, library_key = (params.get(name) for name in ("spatial_key", "library_key"))
    entries = {spatial_key, Obsm.COORDINATES}
    if "input" not in record or not entries <= set(adata.obsm):
        return False
    if library_key and library_key not in adata.obs:
        return False
    try:
        now = read_coordinates(adata, spatial_key)
    except ValueError:
        return False
    stored = np.asarray(adata.obsm[Obsm.COORDINATES])
    slices = adata.obs[library_key].astype(str).to_numpy() if library_key else np.zeros(len(now))
    order = np.argsort(slices, kind="stable")
    starts = np.flatnonzero(np.append(True, slices[order][1:] != slices[order][:-1]))
    parts = np.split(order, starts[1:])
    return not all(_are_similar(now[rows], stored[rows]) for rows in parts)


def _are_similar(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether places are others but moved, turned, mirrored or scaled."""
    first, second = (places - places.mean(axis=0) for places in (first, second))
    first = first / (np.abs(first).max() or 1.0)
    change, _, rank, _ = np.linalg.lstsq(first, second, rcond=None)
    if np.abs(first @ change - second).max() > _SAME_PLACE:
        return False
    sizes = np.linalg.svd(change, compute_uv=False)
    return bool(rank < 2 or sizes[1] >= (1 - _SAME_SCALE) * sizes[0])
