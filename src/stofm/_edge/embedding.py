"""From counts and places of a table to embeddings: steps that fit are taken from it, others run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm._edge.layouts import Layouts, lay_out, write_layouts
from stofm._edge.memory_plan import MemoryPlan
from stofm._edge.slices import read_places
from stofm._edge.records import all_or_nothing, read_record, refuse_taken, write_record
from stofm._edge.staleness import changed_counts, is_outdated, read_current
from stofm._edge.tokens import (
    Tokens,
    read_ranked,
    tokens_or_stored,
    values_are_stored,
    write_tokens,
)
from stofm._keys import Obs, Obsm, Uns, Var
from stofm._logging import counter, logger
from stofm.nn import Stofm, choose_device, choose_dtype, embed_slice
from stofm.nn import encode_cells as encode_ranked
from stofm.nn.device import Nodes, Workload
from stofm.nn.inference import SUBSLICES_AT_ONCE, TOKEN_BUDGET, placed
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.spatial import SubSliceConfig

#: Keys whose entries or records are read, or mean something else.
_OWN_KEYS = (
    *(Obsm.TOKENS, Obsm.TOKEN_VALUES, Obsm.X_CELL, Obsm.COORDINATES, Uns.SUBSLICE),
    *(Var.GENE, Var.TOKEN_ID, Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL),
)


@dataclass(frozen=True)
class Run:
    """A model, where it computes and how much at a time; a batch size of None may be lowered."""

    model: Stofm
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    token_budget: int
    show_progress_bar: bool

    @classmethod
    def choose(
        cls,
        model: Any,
        device: str | torch.device,
        dtype: str | torch.dtype,
        *,
        token_budget: int | Literal["auto"],
        batch_size: int | Literal["auto"] = "auto",
        show_progress_bar: bool,
    ) -> Run:
        """Resolve what users may leave open."""
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget)):
            if value != "auto" and value < 1:
                msg = f"`{name}` must be at least 1, or left out, found {value}."
                raise ValueError(msg)
        model = load_model(model)
        model.warn_if_untrained()
        place = choose_device(device)
        fitting = TOKEN_BUDGET.get(place.type, TOKEN_BUDGET["cpu"])
        return cls(
            model=model,
            device=place,
            dtype=choose_dtype(dtype, place),
            batch_size=None if batch_size == "auto" else batch_size,
            token_budget=fitting if token_budget == "auto" else token_budget,
            show_progress_bar=show_progress_bar,
        )

    @property
    def dtype_name(self) -> str:
        """As it stands in records."""
        return str(self.dtype).removeprefix("torch.")


# Cells without their place


@dataclass(frozen=True)
class CellEmbedding:
    """Cell embeddings, with their record if they are to be written."""

    features: NDArray[np.float32]
    record: dict[str, str] | None


def encode_table(adata: AnnData, run: Run) -> CellEmbedding:
    """Encode the tokens of a table."""
    return _encode(read_tokens(adata, run.model), run)


def _encode(ranked: RankedTokens, run: Run) -> CellEmbedding:
    features = encode_ranked(
        run.model.cell_encoder,
        ranked,
        run.model.vocabulary,
        device=run.device,
        dtype=run.dtype,
        token_budget=run.token_budget,
        show_progress_bar=run.show_progress_bar,
    )
    return CellEmbedding(features, _cell_record(ranked, run))


def read_tokens(adata: AnnData, model: Stofm) -> RankedTokens:
    """Read stored tokens, as many as the model keeps of a cell, with values if it reads them."""
    again = "run st.pp.tokenize(adata, model) again."
    if Obsm.TOKENS not in adata.obsm:
        msg = f"There is no obsm[{Obsm.TOKENS!r}]: run st.pp.tokenize(adata, model) first."
        raise KeyError(msg)
    record = read_record(adata, Obsm.TOKENS) or {}
    if record.get("vocabulary") != model.vocabulary.fingerprint:
        msg = (
            f"The tokens were made with the vocabulary {record.get('vocabulary', '(unknown)')}, "
            f"and model {model.name!r} has {model.vocabulary.fingerprint}: {again}"
        )
        raise ValueError(msg)
    if found := changed_counts(adata, model.vocabulary):
        msg = f"The tokens are of other counts: {found} Run st.pp.tokenize(adata, model) again."
        raise ValueError(msg)
    values = model.config.cell_encoder.reads_values
    if values and not values_are_stored(adata):
        msg = (
            f"Model {model.name!r} reads the values of tokens, and there is no "
            f"obsm[{Obsm.TOKEN_VALUES!r}] that was written with obsm[{Obsm.TOKENS!r}]: {again}"
        )
        raise KeyError(msg)
    ranked = read_ranked(adata, model.vocabulary.n_tokens, values=values)
    return ranked.head(model.config.max_tokens)


def _cell_record(ranked: RankedTokens, run: Run) -> dict[str, str]:
    """All that cell embeddings depend on."""
    return {
        "model": run.model.name,
        "cell_encoder": run.model.cell_encoder_fingerprint,
        "vocabulary": run.model.vocabulary.fingerprint,
        "tokens": ranked.digest,
        "dtype": run.dtype_name,
        "n_cells": str(ranked.n_cells),
    }


def write_cells(adata: AnnData, cells: CellEmbedding) -> None:
    """Write cell embeddings and their record, if they are new."""
    if cells.record is not None:
        adata.obsm[Obsm.X_CELL] = cells.features
        rest = {name: v for name, v in cells.record.items() if v and name != "dtype"}
        write_record(adata, Obsm.X_CELL, {"dtype": cells.record["dtype"]}, **rest)


def _cells_or_stored(adata: AnnData, ranked: RankedTokens, run: Run) -> CellEmbedding:
    """Take the stored cell embeddings if they are of these tokens and this model."""
    record = read_record(adata, Obsm.X_CELL)
    if record is not None and Obsm.X_CELL in adata.obsm and not is_outdated(record):
        dtype = record.get("params", {}).get("dtype")
        # Older records lack the number; a model's name does not change its numbers.
        found = {"n_cells": str(ranked.n_cells), **record, "dtype": dtype}
        expected = _cell_record(ranked, run)
        stored = np.asarray(adata.obsm[Obsm.X_CELL])
        if all(found.get(name) == expected[name] for name in expected if name != "model") and (
            stored.shape == (adata.n_obs, run.model.config.cell_encoder.d_cell)
        ):
            return CellEmbedding(stored.astype(np.float32, copy=False), None)
    return _encode(ranked, run)


def _given_cells(adata: AnnData, cell_rep: str, model: Stofm) -> CellEmbedding:
    """Take features that the user gives in place of the cell encoder's."""
    features = read_current(adata, cell_rep)
    expected = model.config.se2_transformer.d_cell
    if features.shape[1] != expected:
        msg = (
            f"obsm[{cell_rep!r}] has {features.shape[1]} columns; model {model.name!r} "
            f"takes cell features of {expected}."
        )
        raise ValueError(msg)
    return CellEmbedding(features, None)


# Cells in their place


@dataclass(frozen=True)
class Embedding:
    """Spatial embeddings and all that was made on the way, to be written together."""

    values: NDArray[np.float32]
    tokens: Tokens | None
    cells: CellEmbedding
    layouts: Layouts
    params: dict[str, Any]
    fingerprints: dict[str, str]
    started: float


def refuse_own_keys(key_added: str, *read: str | None) -> None:
    """Refuse to write spatial embeddings to a key that is read, or that means something else."""
    refuse_taken(key_added, Obsm.X, *_OWN_KEYS, *read)


def embed_table(
    adata: AnnData,
    run: Run,
    *,
    genes: Mapping[str, Any],
    cell_rep: str | None,
    spatial_key: str,
    library_key: str | None,
    rules: SubSliceConfig | None,
    seed: int,
    copy: bool,
) -> Embedding:
    """Embed the cells of a table; writes nothing.

    `genes` are options of :func:`tokens_or_stored`. `copy` says whether the caller will copy the
    table, which takes memory.
    """
    started = time.perf_counter()
    model, tokens = run.model, None
    rules = rules or model.config.subslice
    places = read_places(adata, spatial_key=spatial_key, library_key=library_key)
    plan = _memory_plan(adata, run, rules, max(map(len, places.slices.rows)), copy=copy)
    with plan.explaining():
        if cell_rep is None:
            tokens = tokens_or_stored(
                adata,
                model,
                **genes,
                on_columns=partial(plan.count_genes, adata, genes["layer"]),
                show_progress_bar=run.show_progress_bar,
            )
            cells = _cells_or_stored(adata, tokens.ranked, run)
        else:
            plan.require()
            cells = _given_cells(adata, cell_rep, model)
        use_rep = cell_rep or Obsm.X_CELL
        layouts = lay_out(
            cells.features, places, rules, use_rep=use_rep, seed=seed, stored_in=adata
        )
        at_once = run.batch_size or SUBSLICES_AT_ONCE.get(run.device.type, 1)
        at_once = plan.fit_batch(layouts.layouts, at_once, is_fixed=run.batch_size is not None)
        values = _embed_slices(layouts, cells.features, rules, run, batch_size=at_once)
    params = {
        **layouts.params,
        "dtype": run.dtype_name,
        "n_neighbors": rules.n_neighbors,
        "neighbors_among": rules.neighbors_among,
    }
    fingerprints = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "cell_encoder": model.cell_encoder_fingerprint,
        "vocabulary": model.vocabulary.fingerprint,
        "subslice": layouts.digest,
        "n_cells": str(adata.n_obs),
    }
    return Embedding(values, tokens, cells, layouts, params, fingerprints, started)


def _memory_plan(
    adata: AnnData, run: Run, rules: SubSliceConfig, largest: int, *, copy: bool
) -> MemoryPlan:
    """Put together what memory depends on, as far as it is known before the work."""
    n_copied = adata.__sizeof__() if copy else 0
    return MemoryPlan(
        config=run.model.config,
        rules=rules,
        work=Workload(
            n_cells=adata.n_obs, largest_slice=largest, genes_per_cell=0, n_copied=n_copied
        ),
        nodes=Nodes.expected(rules, largest),
        device=run.device,
        dtype=run.dtype,
        batch_size=run.batch_size or 1,
        token_budget=run.token_budget,
        is_backed=adata.isbacked,
    )


def _embed_slices(
    layouts: Layouts,
    features: NDArray[np.float32],
    rules: SubSliceConfig,
    run: Run,
    *,
    batch_size: int,
) -> NDArray[np.float32]:
    """Run the SE(2) Transformer slice by slice."""
    transformer = placed(run.model.se2_transformer, run.device, run.dtype)
    embed_one = partial(
        embed_slice,
        transformer,
        config=rules,
        device=run.device,
        dtype=run.dtype,
        batch_size=batch_size,
    )
    with counter(
        total=layouts.n_subslices,
        description="embed sub-slices",
        unit="sub-slice",
        show=run.show_progress_bar,
    ) as advance:
        if len(layouts.layouts) == 1:
            # All rows, in order: nothing is copied.
            return embed_one(layouts.layouts[0], features, on_done=advance)
        values = np.empty((len(features), transformer.config.d_embedding), dtype=np.float32)
        for rows, layout in zip(layouts.places.slices.rows, layouts.layouts, strict=True):
            values[rows] = embed_one(layout, features[rows], on_done=advance)
    return values


def write_embedding(adata: AnnData, result: Embedding, key_added: str) -> None:
    """Write embeddings and what is new of the steps before them, all or nothing."""
    layouts = result.layouts
    with all_or_nothing(adata):
        if result.tokens is not None and result.tokens.is_new:
            write_tokens(adata, result.tokens)
        write_cells(adata, result.cells)
        if layouts.is_new:
            write_layouts(adata, layouts)
        adata.obsm[key_added] = result.values
        write_record(adata, key_added, result.params, **result.fingerprints)
        _log_summary(adata.n_obs, key_added, layouts, time.perf_counter() - result.started)


def _log_summary(n_obs: int, key: str, layouts: Layouts, seconds: float) -> None:
    n_slices = len(layouts.layouts)
    logger.info(
        "%d cells embedded into obsm[%r]: %d slice%s, %d sub-slices, %d virtual cells, %.1f s, "
        "%.0f cells/s.",
        n_obs,
        key,
        n_slices,
        "" if n_slices == 1 else "s",
        layouts.n_subslices,
        layouts.n_virtual,
        seconds,
        n_obs / seconds,
    )
