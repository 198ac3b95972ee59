"""Ranked gene tokens of a table: made from its counts, written, and read back."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._edge.counts import read_counts
from stofm._edge.gene_mapping import Columns, report_columns, write_columns
from stofm._edge.records import read_record, remove_entry, write_record
from stofm._edge.staleness import changed_counts, outdate_by_counts
from stofm._keys import Obs, Obsm
from stofm._logging import counter
from stofm._messages import warn
from stofm.genes import RankedTokens, rank_genes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData

    from stofm.genes import GeneVocabulary

Duplicates = Literal["sum", "keep"]
_DEFAULT_MAX_TOKENS: Final = 2048


def compute_tokens(
    adata: AnnData, columns: Columns, params: Mapping[str, Any], **options: Any
) -> RankedTokens:
    """Read the counts block by block and rank them; writes nothing. See :func:`token_blocks`."""
    ranked = RankedTokens.concatenate(list(token_blocks(adata, columns, params, **options)))
    warn_of_empty_cells(ranked)
    return ranked


def token_blocks(
    adata: AnnData,
    columns: Columns,
    params: Mapping[str, Any],
    *,
    chunk_size: int | None = None,
    show_progress_bar: bool = True,
) -> Iterator[RankedTokens]:
    """Give the tokens block of cells after block, in order; the mapping is reported at the end."""
    total = np.zeros(adata.n_vars)
    with counter(
        total=adata.n_obs, description="tokenize", unit="cell", show=show_progress_bar
    ) as advance:
        for block in read_counts(adata, layer=params["layer"] or None, chunk_size=chunk_size):
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
    """Return what tokens depend on besides counts and columns, as it stands in records.

    Number of tokens, need for values and their rule are the model's where they are None. A vocabulary
    alone has the paper's.
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
    # Read here, because loading the model would import torch.
    config = resources.files("stofm").joinpath("weights", "stofm-mini", "config.json")
    return float(json.loads(config.read_text(encoding="utf-8"))["cell_encoder"]["depth_power"])


def warn_of_empty_cells(ranked: RankedTokens) -> None:
    """Warn if some cells have no tokens."""
    if n_empty := int((ranked.n_tokens == 0).sum()):
        warn(
            f"{n_empty} of {ranked.n_cells} cells have no count in any known gene; they have no "
            "tokens, so a model sees nothing but the <cls> token."
        )


def write_tokens(
    adata: AnnData, ranked: RankedTokens, columns: Columns, params: Mapping[str, Any]
) -> None:
    """Write tokens, their number, their values, a new mapping of the columns, and the records.

    Values of former tokens are removed. Embeddings of other counts are marked as such.
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
    """Read stored tokens, as many as the model keeps of a cell, with values if it reads them."""
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
            f"Model {model.name!r} reads the values of tokens, and there is no "
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
        raise ValueError(f"The tokens are of other counts: {found} Run {again} again.")
    return ranked.head(model.config.max_tokens)
