"""From counts and positions of a table to embeddings: valid steps are reused, others run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from stofm._arrays import spacious
from stofm._edge.counts import peek_counts
from stofm._edge.gene_mapping import find_columns
from stofm._edge.places import Layouts, lay_out, write_layouts
from stofm._edge.slices import read_places
from stofm._edge.tables import OUTDATED, all_or_nothing, read_record, refuse_taken, write_record
from stofm._edge.tokens import compute_tokens, read_current, token_params, write_tokens
from stofm._keys import Obs, Obsm, Uns, Var
from stofm._logging import counter, logger
from stofm.nn import Stofm, choose_device, choose_dtype, embed_slice, encode_cells
from stofm.nn.device import (
    Nodes,
    Workload,
    describe_bytes,
    encoder_memory,
    free_memory,
    host_memory,
    transformer_memory,
)
from stofm.nn.inference import TOKEN_BUDGET, placed
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.spatial import SubSliceConfig

#: Keys whose entries or records are used, or mean something else.
_OWN_KEYS: Final = (
    *(Obsm.TOKENS, Obsm.TOKEN_VALUES, Obsm.X_CELL, Obsm.COORDINATES, Uns.SUBSLICE),
    *(Var.GENE, Var.TOKEN_ID, Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL),
)
#: Number of cells sampled to find the number of genes per cell.
_SAMPLE: Final = 512
_CPU: Final = torch.device("cpu")
_MEMORY_ADVICE: Final = (
    "What helps: fewer cells at a time (slice by slice), counts left on disk "
    "(anndata.read_h5ad(path, backed='r')), no copy=True, a lower batch_size or token_budget, "
    "smaller sub-slices (subslice=), or device='cpu' where a GPU is too small."
)


@dataclass(frozen=True)
class Run:
    """A model, its device, and batch sizes; None stands for the device's default."""

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
        """Resolve the options that users may leave out."""
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget)):
            if value != "auto" and value < 1:
                raise ValueError(f"`{name}` must be at least 1, or left out, found {value}.")
        model = load_model(model)
        model.warn_if_untrained()
        place = choose_device(device)
        fitting = TOKEN_BUDGET.get(place.type, TOKEN_BUDGET["cpu"])
        return cls(
            model,
            place,
            choose_dtype(dtype, place),
            batch_size=None if batch_size == "auto" else batch_size,
            token_budget=fitting if token_budget == "auto" else token_budget,
            show_progress_bar=show_progress_bar,
        )


# Cells without their position


def encode(ranked: RankedTokens, run: Run) -> NDArray[np.float32]:
    """Embed cells from their tokens, (n_cells, d_cell)."""
    return encode_cells(
        run.model.cell_encoder,
        ranked,
        run.model.vocabulary,
        device=run.device,
        dtype=run.dtype,
        token_budget=run.token_budget,
        show_progress_bar=run.show_progress_bar,
    )


def cell_record(ranked: RankedTokens, run: Run) -> dict[str, Any]:
    """All that cell embeddings depend on."""
    return {
        "params": {"dtype": _name(run.dtype)},
        "model": run.model.name,
        "cell_encoder": run.model.cell_encoder_fingerprint,
        "vocabulary": run.model.vocabulary.fingerprint,
        "tokens": ranked.digest,
        "n_cells": str(ranked.n_cells),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_cells(adata: AnnData, features: NDArray[np.float32], record: Mapping[str, Any]) -> None:
    """Write cell embeddings and their record."""
    adata.obsm[Obsm.X_CELL] = features
    write_record(adata, Obsm.X_CELL, **record)


def _stored_cells(adata: AnnData, record: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """The stored cell embeddings if they have this record; a model's name does not change them."""
    found = read_record(adata, Obsm.X_CELL) or {}
    fits = all(found.get(name) == value for name, value in record.items() if name != "model")
    if not fits or Obsm.X_CELL not in adata.obsm or OUTDATED in found:
        return None
    return np.asarray(adata.obsm[Obsm.X_CELL], dtype=np.float32)


# Cells in their position


def embed_table(
    adata: AnnData,
    run: Run,
    *,
    layer: str | None,
    genes: Mapping[str, Any],
    cell_rep: str | None,
    spatial_key: str,
    library_key: str | None,
    rules: SubSliceConfig | None,
    seed: int,
    key_added: str,
    copy: bool,
) -> Callable[[AnnData], None]:
    """Embed the cells of a table; returns a function that writes the result to it or to its copy.

    `genes` are options of :func:`find_columns`. `copy` says whether the caller will copy the
    table, which takes memory.
    """
    refuse_taken(key_added, Obsm.X, *_OWN_KEYS, spatial_key, cell_rep)
    started = time.perf_counter()
    model = run.model
    rules = rules or model.config.subslice
    places = read_places(adata, spatial_key=spatial_key, library_key=library_key)
    if cell_rep is None:
        columns = find_columns(adata, model.vocabulary, **genes)
        n_genes = _genes_per_cell(adata, layer, columns.token_ids >= 0)
        require_memory(adata, run, rules, places.slices.rows, n_genes, copy=copy)
        params = token_params(model, layer=layer)
        ranked = compute_tokens(adata, columns, params, show_progress_bar=run.show_progress_bar)
        record = cell_record(ranked, run)
        stored = _stored_cells(adata, record)
        features = encode(ranked, run) if stored is None else stored
    else:
        require_memory(adata, run, rules, places.slices.rows, 0.0, copy=copy)
        features = read_current(adata, cell_rep)
        if features.shape[1] != model.config.se2_transformer.d_cell:
            raise ValueError(
                f"obsm[{cell_rep!r}] has {features.shape[1]} columns; model {model.name!r} takes "
                f"cell features of {model.config.se2_transformer.d_cell}."
            )
    use_rep = cell_rep or Obsm.X_CELL
    layouts = lay_out(features, places, rules, use_rep=use_rep, seed=seed, stored_in=adata)
    values = _embed_slices(layouts, features, rules, run)

    def write(target: AnnData) -> None:
        with all_or_nothing(target):
            if cell_rep is None:
                write_tokens(target, ranked, columns, params)
                write_cells(target, features, record)
            write_layouts(target, layouts)
            target.obsm[key_added] = values
            write_record(
                target,
                key_added,
                {**layouts.params, "dtype": _name(run.dtype)},
                model=model.name,
                model_fingerprint=model.fingerprint,
                cell_encoder=model.cell_encoder_fingerprint,
                vocabulary=model.vocabulary.fingerprint,
                subslice=layouts.digest,
                n_cells=str(len(values)),
            )
            seconds = time.perf_counter() - started
            logger.info(
                "%d cells embedded into obsm[%r]: %.1f s, %.0f cells/s.",
                *(len(values), key_added, seconds, len(values) / seconds),
            )

    return write


def _embed_slices(
    layouts: Layouts, features: NDArray[np.float32], rules: SubSliceConfig, run: Run
) -> NDArray[np.float32]:
    """Run the SE(2) Transformer slice by slice."""
    transformer = placed(run.model.se2_transformer, run.device, run.dtype)
    embed_one = partial(
        embed_slice,
        transformer,
        config=rules,
        device=run.device,
        dtype=run.dtype,
        batch_size=run.batch_size,
    )
    show = run.show_progress_bar
    with counter(layouts.n_subslices, "embed sub-slices", "sub-slice", show=show) as advance:
        if len(layouts.layouts) == 1:
            # All rows in order, so nothing is copied.
            return embed_one(layouts.layouts[0], features, on_done=advance)
        values = spacious((len(features), transformer.config.d_embedding))
        for rows, layout in zip(layouts.places.slices.rows, layouts.layouts, strict=True):
            values[rows] = embed_one(layout, features[rows], on_done=advance)
    return values


# Memory


def _genes_per_cell(adata: AnnData, layer: str | None, is_known: NDArray[np.bool_]) -> float:
    """Mean number of known genes of a cell, from a sample spread over the counts."""
    rows = np.unique(np.linspace(0, adata.n_obs - 1, _SAMPLE).astype(np.int64))
    counts, _ = peek_counts(adata, layer, rows)
    return float((is_known[counts.indices] & (counts.data != 0)).sum() / len(rows))


def require_memory(
    adata: AnnData,
    run: Run,
    rules: SubSliceConfig,
    slices: list[NDArray[np.int64]],
    n_genes: float,
    *,
    copy: bool,
) -> tuple[int, int]:
    """Bytes that embedding takes on its device, and bytes that are free there.

    `n_genes` is the number of genes per cell. Raises MemoryError if too few are free.
    """
    config, largest = run.model.config, max(map(len, slices))
    n_genes = min(n_genes, config.max_tokens)
    n_tokens = round(adata.n_obs * (n_genes + 1)) if n_genes else 0
    batches = {
        "encoding": encoder_memory(config.cell_encoder, min(run.token_budget, n_tokens), run.dtype),
        "transforming": transformer_memory(
            config.se2_transformer,
            rules,
            Nodes.expected(rules, largest),
            run.batch_size or 1,
            device=run.device,
            dtype=run.dtype,
        ),
    }
    work = Workload(
        n_cells=adata.n_obs,
        largest_slice=largest,
        genes_per_cell=n_genes,
        n_copied=adata.__sizeof__() if copy else 0,
    )
    # An Apple GPU computes in main memory.
    is_apart = run.device.type not in ("cpu", "mps")
    needed = {_CPU: host_memory(config, rules, work, **({} if is_apart else batches))}
    if is_apart:
        needed[run.device] = max(batches.values())
    for device, n_bytes in needed.items():
        free = free_memory(device)
        if n_bytes > free:
            place = "main memory" if device == _CPU else str(device)
            raise MemoryError(
                f"Embedding {adata.n_obs} cells of {n_genes:.0f} genes takes about "
                f"{describe_bytes(n_bytes)} of {place}, and {describe_bytes(free)} are free. "
                f"{_MEMORY_ADVICE}"
            )
    return n_bytes, free
