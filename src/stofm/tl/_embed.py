"""``stofm.tl.embed``: from raw counts and coordinates to spatial cell embeddings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stofm._anndata import resolve_table, write_record
from stofm._config import check_seed
from stofm._keys import Obs, Obsm, Uns, Var
from stofm._logging import counter, logger
from stofm._places import read_places
from stofm._writing import all_or_nothing, refuse_taken
from stofm.nn import Stofm, choose_device, choose_dtype, embed_slice
from stofm.nn import encode_cells as encode_ranked
from stofm.nn.device import Nodes, Workload
from stofm.nn.inference import SUBSLICES_AT_ONCE, TOKEN_BUDGET, placed
from stofm.pp._subslice import (
    Layouts,
    lay_out_or_reuse,
    read_features,
    write_layouts,
)
from stofm.pp._token_entries import Tokens, write_tokens
from stofm.pp._tokenize import tokens_or_stored
from stofm.tl._encode_cells import (
    CellEmbedding,
    cell_record,
    checked_budget,
    load_model,
    stored_cell_embedding,
    write_cell_embedding,
)
from stofm.tl._memory import MemoryPlan

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._slices import Slices
    from stofm.genes import RankedTokens
    from stofm.spatial import SubSliceConfig


def embed(
    adata: Any,
    model: Stofm | str | Path = "stofm-mini",
    *,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    cell_rep: str | None = None,
    species: Literal["auto", "human", "mouse"] = "auto",
    gene_key: str | None = None,
    orthologs: Any = None,
    subslice: SubSliceConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int | Literal["auto"] = "auto",
    token_budget: int | Literal["auto"] = "auto",
    seed: int = 0,
    key_added: str = Obsm.X,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed every cell in the context of its tissue.

    Runs what is missing or no longer fits of :func:`stofm.pp.tokenize`,
    :func:`stofm.tl.encode_cells` and :func:`stofm.pp.subslice`, then the SE(2) Transformer on
    every sub-slice. All is computed before anything is written: interrupted, it leaves `adata`
    as it was. `adata.X`, its layers and the order of cells stay as they are.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a
        SpatialData with such a table. Backed AnnData are read in pieces.
    model
        A :class:`stofm.Stofm`, a checkpoint folder, a hub id, or the embedded ``"stofm-mini"``.
    layer
        Layer with raw counts; ``adata.X`` by default.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates, (n_obs, 2), any unit.
    library_key
        Column of ``adata.obs`` that names each cell's slice. Nothing crosses slices: a slice
        gets the same embedding alone or together with others.
    cell_rep
        Entry of ``adata.obsm`` to use in place of the cell encoder's embedding, (n_obs, d_cell).
        Genes are not read then.
    species, gene_key, orthologs
        How genes are found: see :func:`stofm.pp.map_genes`.
    subslice
        Sub-slice rules to use in place of the model's own.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    dtype
        ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"`` or ``"bfloat16"``.
    batch_size
        Sub-slices computed at a time. Does not change the result; halved when the device runs
        out of memory.
    token_budget
        Gene tokens computed at a time. Does not change the result; halved likewise.
    seed
        Seed of the clustering that gives the virtual cells.
    key_added
        Entry of ``adata.obsm`` to write; none that is read, and none of stofm's other keys.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show bars.
    copy
        Return a changed copy and leave `adata` as it is.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_stofm' | key_added]`` : float32 (n_obs, d_embedding)
        Spatial cell embeddings.
    ``adata.obsm['X_stofm_cell']``, ``adata.obsm['stofm_tokens']``, ``adata.obs['stofm_n_tokens']``
        See :func:`stofm.tl.encode_cells` and :func:`stofm.pp.tokenize`; not with `cell_rep`.
        A model that reads values adds ``adata.obsm['stofm_token_values']``.
    ``adata.obsm['stofm_spatial']``, ``adata.obs['stofm_subslice']``, ``adata.obs['stofm_virtual_cell']``
        See :func:`stofm.pp.subslice`.
    ``adata.uns['stofm']``
        A record of each of these: parameters, fingerprints of model and vocabulary, version.

    Raises
    ------
    KeyError
        A layer, an entry or a column is not there.
    ValueError
        Counts, genes, coordinates or slices are not usable; the message says what was found
        and what to do.
    MemoryError
        The work would not fit, or the device has no room for a single sub-slice.
    FloatingPointError
        The device gave NaN.

    References
    ----------
    SToFM (arXiv 2507.11588), section 3.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, seed=0)
    >>> st.tl.embed(adata)
    >>> adata.obsm["X_stofm"].shape
    (500, 128)
    """
    started = time.perf_counter()
    table = resolve_table(adata, table_key, copy=copy)
    _refuse_reserved(key_added, spatial_key, cell_rep)
    check_seed(seed)
    model = load_model(model)
    model.warn_if_untrained()
    rules = subslice or model.config.subslice
    places = read_places(table, spatial_key=spatial_key, library_key=library_key)
    run = _Run.choose(
        model, device, dtype, batch_size, token_budget, show_progress_bar=show_progress_bar
    )
    plan = run.memory(table, rules, places.slices, copy=copy)

    tokens: Tokens | None = None
    with plan.explaining():
        if cell_rep is None:
            tokens = tokens_or_stored(
                table,
                model,
                layer=layer,
                species=species,
                gene_key=gene_key,
                orthologs=orthologs,
                on_columns=partial(plan.count_genes, table, layer),
                show_progress_bar=show_progress_bar,
            )
            cells = run.embed_cells(table, tokens.ranked)
        else:
            plan.require()
            cells = run.take_cells(table, cell_rep)
        use_rep = cell_rep or Obsm.X_CELL
        layouts = lay_out_or_reuse(table, cells.features, places, rules, use_rep=use_rep, seed=seed)
        at_once = plan.fit_batch(layouts, run.batch_size, is_fixed=run.batch_is_fixed)
        embedding = run.embed_slices(layouts, cells.features, rules, batch_size=at_once)
    record = run.record(layouts, rules)

    # Nothing is written before this line, and from here on nothing is computed.
    target = table.copy() if copy else table
    with all_or_nothing(target):
        if tokens is not None and tokens.is_new:
            write_tokens(target, tokens)
        write_cell_embedding(target, cells)
        if layouts.is_new:
            write_layouts(target, layouts)
        target.obsm[key_added] = embedding
        write_record(target, key_added, record.params, **record.fingerprints)
        _log_summary(table.n_obs, key_added, layouts, time.perf_counter() - started)
    return target if copy else None


def _refuse_reserved(key_added: str, spatial_key: str, cell_rep: str | None) -> None:
    """Refuse a key whose entry or record is read, or means something else."""
    own = (
        Obsm.TOKENS,
        Obsm.TOKEN_VALUES,
        Obsm.X_CELL,
        Obsm.COORDINATES,
        Uns.SUBSLICE,
        Var.GENE,
        Var.TOKEN_ID,
    )
    counted = (Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL)
    refuse_taken(key_added, Obsm.X, *own, *counted, spatial_key, cell_rep)


@dataclass(frozen=True)
class _Record:
    """What is recorded of an embedding."""

    params: dict[str, Any]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class _Run:
    """A model and how it is to be run."""

    model: Stofm
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    batch_is_fixed: bool
    token_budget: int
    show_progress_bar: bool

    @classmethod
    def choose(
        cls,
        model: Stofm,
        device: str | torch.device,
        dtype: str | torch.dtype,
        batch_size: int | Literal["auto"],
        token_budget: int | Literal["auto"],
        *,
        show_progress_bar: bool,
    ) -> _Run:
        at_once = checked_budget("batch_size", batch_size)
        budget = checked_budget("token_budget", token_budget)
        place = choose_device(device)
        return cls(
            model=model,
            device=place,
            dtype=choose_dtype(dtype, place),
            batch_size=at_once or SUBSLICES_AT_ONCE.get(place.type, 1),
            batch_is_fixed=at_once is not None,
            token_budget=budget or TOKEN_BUDGET.get(place.type, TOKEN_BUDGET["cpu"]),
            show_progress_bar=show_progress_bar,
        )

    def memory(
        self, adata: AnnData, rules: SubSliceConfig, slices: Slices, *, copy: bool
    ) -> MemoryPlan:
        """Put together what memory depends on, as far as it is known before the work."""
        largest = max(len(rows) for rows in slices.rows)
        n_copied = adata.__sizeof__() if copy else 0
        return MemoryPlan(
            config=self.model.config,
            rules=rules,
            work=Workload(
                n_cells=adata.n_obs, largest_slice=largest, genes_per_cell=0, n_copied=n_copied
            ),
            nodes=Nodes.expected(rules, largest),
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size if self.batch_is_fixed else 1,
            token_budget=self.token_budget,
            is_backed=adata.isbacked,
        )

    def embed_cells(self, adata: AnnData, ranked: RankedTokens) -> CellEmbedding:
        """Take the stored cell embeddings if they fit the tokens, else compute them."""
        record = cell_record(self.model, ranked, self.dtype)
        d_cell = self.model.config.cell_encoder.d_cell
        stored = stored_cell_embedding(adata, record, d_cell)
        if stored is not None:
            return CellEmbedding(stored, None)
        features = encode_ranked(
            self.model.cell_encoder,
            ranked,
            self.model.vocabulary,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget,
            show_progress_bar=self.show_progress_bar,
        )
        return CellEmbedding(features, record)

    def take_cells(self, adata: AnnData, cell_rep: str) -> CellEmbedding:
        """Take the features that the user gives in place of the cell encoder's."""
        features = read_features(adata, cell_rep)
        expected = self.model.config.se2_transformer.d_cell
        if features.shape[1] != expected:
            msg = (
                f"obsm[{cell_rep!r}] has {features.shape[1]} columns; model {self.model.name!r} "
                f"takes cell features of {expected}."
            )
            raise ValueError(msg)
        return CellEmbedding(features, None)

    def embed_slices(
        self,
        layouts: Layouts,
        features: NDArray[np.float32],
        rules: SubSliceConfig,
        *,
        batch_size: int,
    ) -> NDArray[np.float32]:
        """Run the SE(2) Transformer slice by slice."""
        transformer = placed(self.model.se2_transformer, self.device, self.dtype)
        done = counter(
            total=layouts.n_subslices,
            description="embed sub-slices",
            unit="sub-slice",
            show=self.show_progress_bar,
        )
        run = partial(
            embed_slice,
            transformer,
            config=rules,
            device=self.device,
            dtype=self.dtype,
            batch_size=batch_size,
        )
        with done as advance:
            if len(layouts.layouts) == 1:
                # All rows, in order: nothing is copied.
                return run(layouts.layouts[0], features, on_done=advance)
            embedding = np.empty((len(features), transformer.config.d_embedding), dtype=np.float32)
            for rows, layout in zip(layouts.places.slices.rows, layouts.layouts, strict=True):
                embedding[rows] = run(layout, features[rows], on_done=advance)
        return embedding

    def record(self, layouts: Layouts, rules: SubSliceConfig) -> _Record:
        """Return how the embedding was made."""
        return _Record(
            params={
                **layouts.params,
                "dtype": str(self.dtype).removeprefix("torch."),
                "n_neighbors": rules.n_neighbors,
                "neighbors_among": rules.neighbors_among,
            },
            fingerprints={
                "model": self.model.name,
                "model_fingerprint": self.model.fingerprint,
                "cell_encoder": self.model.cell_encoder_fingerprint,
                "vocabulary": self.model.vocabulary.fingerprint,
                "subslice": layouts.digest,
                "n_cells": str(len(layouts.places.coordinates)),
            },
        )


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
