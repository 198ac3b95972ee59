"""Ranked gene tokens of a table: made, written, read, and compared with the current counts."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._digests import fingerprint
from stofm._edge.counts import peek_counts, read_counts
from stofm._edge.gene_mapping import Columns, report_columns, write_columns
from stofm._edge.places import changed_places, same_places_read
from stofm._edge.tables import (
    OUTDATED,
    mark_outdated,
    read_record,
    read_representation,
    remove_entry,
    write_record,
)
from stofm._keys import Obs, Obsm, Uns, Var
from stofm._logging import counter
from stofm._messages import warn
from stofm.genes import RankedTokens, embedded_vocabulary, rank_genes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary

Duplicates = Literal["sum", "keep"]
_DEFAULT_MAX_TOKENS: Final = 2048
#: Number of cells whose tokens are made again.
_N_CELLS: Final = 512


def compute_tokens(
    adata: AnnData, columns: Columns, params: Mapping[str, Any], **options: Any
) -> RankedTokens:
    """Read the counts block by block and rank them; writes nothing. See :func:`token_blocks`."""
    ranked = RankedTokens.concatenate(list(token_blocks(adata, columns, params, **options)))
    warn_of_empty_cells(ranked.n_tokens)
    return ranked


def token_blocks(
    adata: AnnData,
    columns: Columns,
    params: Mapping[str, Any],
    *,
    show_progress_bar: bool = True,
) -> Iterator[RankedTokens]:
    """Yield the tokens by blocks of cells, in order; the mapping is reported at the end."""
    total = np.zeros(adata.n_vars)
    with counter(adata.n_obs, "tokenize", "cell", show=show_progress_bar) as advance:
        for block in read_counts(adata, layer=params["layer"] or None):
            yield rank_genes(
                block,
                columns.token_ids,
                columns.medians,
                max_tokens=params["max_tokens"],
                duplicates=params["duplicates"],
                values="depth_power" in params,
                depth_power=params.get("depth_power", 1.0),
            )
            total += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            advance(block.shape[0])
    report_columns(adata, columns, total)


def token_params(
    model_or_vocabulary: GeneVocabulary | Any | None,
    *,
    layer: str | None = None,
    max_tokens: int | None = None,
    duplicates: Duplicates = "sum",
    values: bool | None = None,
) -> dict[str, Any]:
    """Return what tokens depend on besides counts and columns, in the form of records.

    If None, the number of tokens, the need for values and their rule are the model's, or the
    paper's for a vocabulary alone.
    """
    config = getattr(model_or_vocabulary, "config", None)
    if max_tokens is None:
        max_tokens = int(getattr(config, "max_tokens", _DEFAULT_MAX_TOKENS))
    reads_values, depth_power = False, 1.0
    if model_or_vocabulary is None:
        reads_values, depth_power = True, _depth_power_of_embedded_model()
    elif config is not None:
        reads_values = config.cell_encoder.reads_values
        depth_power = config.cell_encoder.depth_power
    params = {"layer": layer or "", "max_tokens": max_tokens, "duplicates": duplicates}
    needs_values = reads_values if values is None else values
    return params | {"depth_power": depth_power} if needs_values else params


@lru_cache(maxsize=1)
def _depth_power_of_embedded_model() -> float:
    # Read here because loading the model would import torch.
    config = resources.files("stofm").joinpath("weights", "stofm-mini", "config.json")
    return float(json.loads(config.read_text(encoding="utf-8"))["cell_encoder"]["depth_power"])


def warn_of_empty_cells(n_tokens: NDArray[np.integer]) -> None:
    """Warn if some cells have no tokens."""
    if n_empty := int((n_tokens == 0).sum()):
        warn(
            f"{n_empty} of {len(n_tokens)} cells have no count in any known gene; they have no "
            "tokens, so a model sees only the <cls> token."
        )


def write_tokens(
    adata: AnnData, ranked: RankedTokens, columns: Columns, params: Mapping[str, Any]
) -> None:
    """Write tokens, their number, their values, a new mapping of the columns, and the records.

    Values of earlier tokens are removed. Embeddings of other counts are marked as outdated.
    """
    made: dict[str, Any] = {Obsm.TOKENS: ranked.to_csr(params["max_tokens"])}
    if "depth_power" in params:
        made[Obsm.TOKEN_VALUES] = ranked.values_to_csr(params["max_tokens"])
    outdate_by_counts(adata, ranked, columns.vocabulary)
    write_columns(adata, columns)
    remove_entry(adata, Obsm.TOKEN_VALUES)
    adata.obs[Obs.N_TOKENS] = ranked.n_tokens
    for key, matrix in made.items():
        adata.obsm[key] = matrix
    for key in (Obs.N_TOKENS, *made):
        write_record(adata, key, params, vocabulary=columns.vocabulary, columns=columns.fingerprint)


def read_tokens(adata: AnnData, model: Any) -> RankedTokens:
    """Read stored tokens, as many per cell as the model keeps, with values if it uses them."""
    again = "st.pp.tokenize(adata, model)"
    if Obsm.TOKENS not in adata.obsm:
        raise KeyError(f"There is no obsm[{Obsm.TOKENS!r}]: run {again} first.")
    record, beside = (read_record(adata, key) or {} for key in (Obsm.TOKENS, Obsm.TOKEN_VALUES))
    if record.get("vocabulary") != model.vocabulary.fingerprint:
        raise ValueError(
            f"The tokens were made with the vocabulary {record.get('vocabulary', '(unknown)')}, "
            f"and model {model.name!r} has {model.vocabulary.fingerprint}. Run {again} again."
        )
    encoder = model.config.cell_encoder
    has_values = Obsm.TOKEN_VALUES in adata.obsm and record == beside
    has_values &= record.get("params", {}).get("depth_power") == encoder.depth_power
    if encoder.reads_values and not has_values:
        raise KeyError(
            f"Model {model.name!r} uses the values of tokens, but there is no "
            f"obsm[{Obsm.TOKEN_VALUES!r}] that was written with obsm[{Obsm.TOKENS!r}] for such a model. "
            f"Run {again} again."
        )
    try:
        ranked = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
        if (largest := int(ranked.tokens.max(initial=0))) >= model.vocabulary.n_tokens:
            raise ValueError(f"The token {largest} is not in the vocabulary.")
        if encoder.reads_values:
            ranked = ranked.with_values(adata.obsm[Obsm.TOKEN_VALUES])
    except ValueError as error:
        raise ValueError(
            f"Tokens in adata.obsm[{Obsm.TOKENS!r}]: {error} Run {again} again."
        ) from error
    if found := changed_counts(adata, model.vocabulary):
        raise ValueError(f"The tokens were made from other counts: {found} Run {again} again.")
    return ranked.head(model.config.max_tokens)


# Whether embeddings and tokens still fit the counts


def stale_reason(adata: AnnData, key: str, vocabulary: GeneVocabulary | None = None) -> str:
    """Say why an embedding that stofm wrote to ``obsm[key]`` no longer fits the AnnData.

    Empty if it fits, or if that is unknown, without records, counts or coordinates. Whole cells and
    genes may be removed or reordered. `vocabulary` is that of its model, if available; the embedded
    one always is.
    """
    record = read_record(adata, key)
    if record is None or "cell_encoder" not in record:
        return ""
    if what := record.get(OUTDATED):
        return f"obsm[{key!r}] is older than the {what} that were read last."
    n_cells = int(record.get("n_cells", 0))
    # If records of several tables were merged, only their shared part is left, without digests.
    if {"tokens", "subslice"} & set(record) and 0 < n_cells < adata.n_obs:
        return (
            f"The record of obsm[{key!r}] is of {n_cells} cells, and there are {adata.n_obs}: of "
            "what was joined it describes one part. ad.concat(..., uns_merge='same') keeps what holds "
            "for all."
        )
    tokens = read_record(adata, Obsm.TOKENS) or {}
    is_of_tokens = _reads_tokens(record) and tokens.get("vocabulary") == record.get("vocabulary")
    if is_of_tokens and (found := changed_counts(adata, vocabulary)):
        return f"obsm[{key!r}] was made from other counts: {found}"
    layout = read_record(adata, Uns.SUBSLICE) or {}
    if "subslice" in record and same_places_read(layout, record) and changed_places(adata):
        return (
            f"obsm[{key!r}] was made with other coordinates than "
            f"obsm[{layout['params']['spatial_key']!r}] holds now."
        )
    return ""


def read_current(adata: AnnData, rep: str) -> NDArray[np.float32]:
    """Read an entry of ``obsm``; raise an error if it is an outdated embedding."""
    values = read_representation(adata, rep)
    if reason := stale_reason(adata, rep):
        raise ValueError(
            f"{reason} Make it again: st.pp.tokenize(adata), st.tl.encode_cells(adata)."
        )
    return values


def _reads_tokens(record: Mapping[str, Any]) -> bool:
    """Whether an embedding was made from tokens, and not from the user's features."""
    return bool(record.get("params", {}).get("use_rep", Obsm.X_CELL) == Obsm.X_CELL)


def outdate_by_counts(adata: AnnData, ranked: RankedTokens, vocabulary: str) -> None:
    """Mark embeddings of other tokens than these, which will replace the stored ones."""
    record = read_record(adata, Obsm.TOKENS) or {}
    if Obsm.TOKENS not in adata.obsm or record.get("vocabulary") != vocabulary:
        return
    try:
        stored = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS])
    except ValueError:  # damaged, and replaced now
        return
    n = min(int(one.n_tokens.max(initial=0)) for one in (stored, ranked))
    if not stored.head(n).equals(ranked.without_values().head(n)):
        mark_outdated(
            adata, "counts", lambda it: _reads_tokens(it) and it.get("vocabulary") == vocabulary
        )


def changed_counts(adata: AnnData, vocabulary: GeneVocabulary | None = None) -> str:
    """Say how stored tokens contradict their counts; empty if they don't.

    Tokens of up to 512 cells, evenly spread, are made again and compared. This detects changes to a
    table as a whole: permuted cells or genes, replaced counts. A change of a few cells goes
    unnoticed. If genes were removed, counts have been normalised, or the vocabulary is not
    available, the counts must still contain the genes of the tokens, in any order.
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
    is_whole = fingerprint(columns.astype("<i4")) == record.get("columns")
    stored = RankedTokens.from_csr(adata.obsm[Obsm.TOKENS][rows])
    # Token -1, not a gene, indexes the last entry.
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
        f"of {len(rows)} cells examined, {n_other} have other genes, or another order "
        f"of these, than {where} has for them now."
    )
